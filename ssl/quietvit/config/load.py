"""recipe.yaml + a.b=c -> RunConfig. An unknown key is answered with the nearest known one. No torch here."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from quietvit.config.schema import RunConfig

T = TypeVar("T")
NO_MAPPING = "recipe {!r} must be a mapping of sections (model, data, train, ...)"


class ConfigError(ValueError):
    """A setting that cannot be; the message names it and says what to write instead."""


def recipes() -> dict[str, Traversable]:
    """The pretraining recipes that ship with quietvit, by name."""
    folder = resources.files("quietvit.configs").joinpath("pretrain")
    found = {p.name.removesuffix(".yaml"): p for p in folder.iterdir() if p.name.endswith(".yaml")}
    return dict(sorted(found.items()))


@contextlib.contextmanager
def explained_yaml(what: str) -> Iterator[None]:
    """Raises ConfigError, which is a ValueError, for what OmegaConf or its YAML parser cannot read."""
    try:
        yield
    except OmegaConfBaseException as error:
        raise ConfigError(f"{what} does not parse: {error}") from error
    except Exception as error:
        if type(error).__module__.startswith("yaml"):
            raise ConfigError(f"{what} is not valid YAML: {error}") from error
        raise


def load_config(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe (a shipped name or the path of a YAML file) and apply `a.b=c` overrides.

    Raises ConfigError for an unknown recipe or key (naming the nearest) and for values of the wrong type.
    """
    for item in overrides:
        if "=" not in item:
            raise ConfigError(f"{item!r} is not a setting: write it as key=value, e.g. train.steps=1000")
    with explained_yaml(f"recipe {recipe!r} or an override"):
        # Keep the user's order: what is written last wins.
        try:
            written = OmegaConf.create(_recipe_text(recipe))
        except AssertionError as error:  # OmegaConf's, of a bare number
            raise ConfigError(NO_MAPPING.format(recipe)) from error
        if not OmegaConf.is_dict(written):
            raise ConfigError(NO_MAPPING.format(recipe))
        values = OmegaConf.to_container(OmegaConf.merge(written, OmegaConf.from_dotlist(list(overrides))), resolve=True)
    assert isinstance(values, dict)
    return from_mapping(RunConfig, _left_open({str(k): v for k, v in values.items()}), "")


# What a run that begins with a model takes from it where the settings say nothing.
OPEN = {
    "model": ("backbone", "size", "patch_size", "num_registers", "layer_scale", "pos_interpolation", "pos_antialias"),
    "data": ("mean", "std"),
}


def _left_open(values: dict[str, Any]) -> dict[str, Any]:
    """Under `init.from` what is not given has no default: it is None, until the model is read."""
    init = values.get("init")
    if not isinstance(init, Mapping) or init.get("from") is None:
        return values
    opened = dict(values)
    for section, names in OPEN.items():
        given = values.get(section, {})
        if isinstance(given, Mapping):
            opened[section] = dict.fromkeys(names) | dict(given)
    return opened


def _recipe_text(recipe: str) -> str:
    known = recipes()
    if recipe in known:
        return known[recipe].read_text(encoding="utf-8")
    path = Path(recipe)
    if path.suffix in {".yaml", ".yml"}:
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ConfigError(f"recipe {recipe!r} is not UTF-8 text: {error}") from error
        raise ConfigError(f"there is no recipe file {recipe!r}")
    raise ConfigError(
        f"unknown recipe {recipe!r}.{_nearest(recipe, known)} Recipes: {', '.join(known)}; or a .yaml file"
    )


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Fill dataclass `cls` from plain values, recursively and strictly. `where` is the dotted prefix for messages."""
    hints = {_setting(k): v for k, v in typing.get_type_hints(cls).items()}
    fields = {_setting(f.name): f.name for f in dataclasses.fields(typing.cast(Any, cls))}
    out: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{where}{key}"
        if key not in hints:
            raise ConfigError(f"unknown setting {name!r}.{_suggest(str(key), where, hints)}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{name!r} is a section, not a value: give {name}.<setting>=...")
            out[fields[key]] = from_mapping(typing.cast(type[Any], hint), value, f"{name}.")
        else:
            out[fields[key]] = _convert(value, hint, name)
    return cls(**out)


def _setting(field: str) -> str:
    """The name of a setting: that of its field, but for a last underscore, which Python's own words need (from_)."""
    return field.removesuffix("_")


def plain(config: Any) -> dict[str, Any]:
    """A config, or a section of it, as nested dictionaries by the names of the settings."""
    values = ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config))
    return {_setting(name): plain(v) if dataclasses.is_dataclass(v) else v for name, v in values}


def _suggest(key: str, where: str, hints: Mapping[str, Any]) -> str:
    here = f" Settings here: {', '.join(sorted(hints))}"
    elsewhere = {path.rsplit(".", 1)[-1]: path for path in flatten(RunConfig())}
    if key in elsewhere:
        return f" Did you mean {elsewhere[key]!r}?{here}"
    return _nearest(key, hints).replace("Did you mean '", f"Did you mean '{where}") + here


def _convert(value: Any, hint: Any, name: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, args, name)
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != len(args):
            raise ConfigError(
                f"{name!r} takes {len(args)} values, e.g. {name}=[{', '.join('x' * len(args))}]; got {value!r}"
            )
        return tuple(_convert(v, a, name) for v, a in zip(value, args, strict=True))
    if origin is dict:
        value = {} if value is None else value  # data.options=null takes a recipe's away; {} would be merged into them
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name!r} takes key: value pairs; got {value!r}")
        return {str(k): _convert(v, args[1], f"{name}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, str):
        # YAML reads 1e-5 as text; people write it all the time.
        try:
            return float(value)
        except ValueError:
            pass
    if hint in (float, str) and isinstance(value, int) and not isinstance(value, bool):
        return hint(value)  # model.size=14 and data.path=2024 are names, which YAML reads as numbers
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise ConfigError(f"{name!r} takes a value of type {hint.__name__}; got {value!r}")


def _convert_union(value: Any, args: tuple[Any, ...], name: str) -> Any:
    if value is None and type(None) in args:
        return None
    options = [a for a in args if a is not type(None)]
    if len(options) == 1:
        return _convert(value, options[0], name)
    for option in options:
        if type(value) is option:
            return value
    for option in options:
        try:
            return _convert(value, option, name)
        except ConfigError:
            continue
    kinds = " or ".join(o.__name__ for o in options)
    raise ConfigError(f"{name!r} takes {kinds}; got {value!r}")


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"model.size": "small", ...}: every setting by its dotted name."""
    out: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            out |= flatten(value, f"{prefix}{_setting(f.name)}.")
        else:
            out[f"{prefix}{_setting(f.name)}"] = value
    return out


def to_yaml(config: RunConfig) -> str:
    """The config as YAML that load_config reads back to an equal RunConfig."""
    return OmegaConf.to_yaml(OmegaConf.create(json.loads(json.dumps(plain(config)))))


def config_hash(config: RunConfig) -> str:
    """First 12 hex digits of the SHA-256 of every setting."""
    text = json.dumps(plain(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# Settings that may differ when a run is resumed: they do not change what is computed.
RESUMABLE = (
    "data.workers",
    "data.ram_cache_mb",
    "data.path",
    "data.max_bad_share",
    "checkpoint.",
    "health.",
    "train.device",
    "init.guard",
)


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Settings that a resumed run may not change, as "key: old -> new" lines."""
    a, b = flatten(old), flatten(new)
    return [f"{k}: {a[k]!r} -> {b[k]!r}" for k in b if a[k] != b[k] and not k.startswith(RESUMABLE)]
