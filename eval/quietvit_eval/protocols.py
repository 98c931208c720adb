"""Recipes of published and of cheap protocols: configs/eval/*.yaml. Reading one needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from quietvit.config.load import explained_yaml
from quietvit_eval.option_values import nearest, typed_options

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Published:
    """What others report by this protocol."""

    score: str  # which score of the task
    source: str  # e.g. "DINOv2 paper, Table 10"
    figures: Mapping[str, float]  # by model, as printed: shares in %, errors in their units


@dataclass(frozen=True)
class Protocol:
    """A task with all that must be equal before two scores are compared, and the figures it should reach."""

    name: str
    about: str  # first line of the recipe
    task: str
    data: tuple[str, ...]  # the layouts it is for: rows of DATASETS, SEGMENTATION_SETS, DEPTH_SETS or BOX_SETS
    size: int | None = None  # --size; None: the task's own rule
    options: Mapping[str, Any] = field(default_factory=dict)  # the task's, where they are not its defaults
    test_split: str | None = None  # --test-split; None: val
    published: Published | None = None


def protocols() -> dict[str, Traversable]:
    """The recipes that ship with quietvit, by name."""
    folder = resources.files("quietvit.configs").joinpath("eval")
    found = {p.name.removesuffix(".yaml"): p for p in folder.iterdir() if p.name.endswith(".yaml")}
    return dict(sorted(found.items()))


def load_protocol(name: str) -> Protocol:
    """A shipped recipe by name, or one of the user's by its path. Options are looked at by `check_options`.

    Raises ValueError for a recipe that is not there (naming the nearest), that does not parse, or that has unknown,
    missing or ill-typed keys.
    """
    known = protocols()
    if name in known:
        return _protocol(name, known[name].read_text(encoding="utf-8"))
    path = Path(name).expanduser()
    if path.suffix not in SUFFIXES:
        raise ValueError(f"unknown protocol {name!r}; {nearest(name, known)}; or a .yaml file")
    if not path.is_file():
        raise ValueError(f"there is no protocol file {name}")
    try:
        return _protocol(path.stem, path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"protocol {name} is not UTF-8 text: {error}") from error


def check_options(protocol: Protocol) -> Any:
    """All options of the protocol's task, those of the protocol set. Raises ValueError for an unknown task or option
    (naming the nearest), and for values that cannot be."""
    from quietvit_eval.task import find_task, make_options

    options = typed_options(find_task(protocol.task).options, protocol.options, f"task {protocol.task}")
    return make_options(protocol.task, options)


def to_yaml(protocol: Protocol) -> str:
    """The recipe with every option of its task spelled out; `load_protocol` reads it back. Raises ValueError as
    `check_options`."""
    tree: dict[str, Any] = {"task": protocol.task, "data": list(protocol.data)}
    if protocol.size is not None:
        tree["size"] = protocol.size
    if protocol.test_split is not None:
        tree["test_split"] = protocol.test_split
    tree["options"] = asdict(check_options(protocol))
    if protocol.published is not None:
        tree["published"] = asdict(protocol.published)
    return f"# {protocol.about}\n{OmegaConf.to_yaml(OmegaConf.create(json.loads(json.dumps(tree))))}"


def _protocol(name: str, text: str) -> Protocol:
    where = f"protocol {name}"
    values = _read(where, text)
    _check_keys(where, values, {"task", "data", "size", "test_split", "options", "published"}, {"task", "data"})
    about = text.splitlines()[0]
    if not about.startswith("#"):
        raise ValueError(f"{where}: its first line must be a comment (#) that says what it is")
    data = values["data"] if isinstance(values["data"], list) else [values["data"]]
    size = values.get("size")
    options = values.get("options") or {}
    _expect(where, "task", isinstance(values["task"], str), "the name of a task")
    _expect(where, "data", bool(data) and all(isinstance(d, str) for d in data), "the name of a layout, or a list")
    _expect(where, "size", size is None or (type(size) is int and size > 0), "a whole number of pixels")
    test_split = values.get("test_split")
    _expect(where, "test_split", test_split is None or isinstance(test_split, str), "the name of a split")
    _expect(where, "options", isinstance(options, dict), "a mapping of the task's options")
    published = values.get("published")
    return Protocol(
        name,
        about.lstrip("# "),
        values["task"],
        tuple(data),
        size,
        options,
        test_split,
        None if published is None else _published(f"{where}: published", published),
    )


def _published(where: str, values: Any) -> Published:
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a mapping of score, source and figures")
    names = {f.name for f in fields(Published)}
    _check_keys(where, values, names, names)
    figures = values["figures"]
    for name in ("score", "source"):
        _expect(where, name, isinstance(values[name], str), "text")
    numbers = isinstance(figures, dict) and bool(figures) and all(type(v) in (int, float) for v in figures.values())
    _expect(where, "figures", numbers, "a mapping of models to numbers")
    return Published(values["score"], values["source"], {str(k): float(v) for k, v in figures.items()})


def _read(where: str, text: str) -> dict[str, Any]:
    with explained_yaml(where):
        values = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a mapping of task, data, options and published")
    return {str(k): v for k, v in values.items()}


def _check_keys(where: str, values: Mapping[str, Any], known: set[str], needed: set[str]) -> None:
    for name in values:
        if name not in known:
            raise ValueError(f"{where} has an unknown key {name!r}; {nearest(str(name), sorted(known))}")
    if missing := sorted(needed - set(values)):
        raise ValueError(f"{where} lacks {', '.join(missing)}")


def _expect(where: str, name: str, right: bool, what: str) -> None:
    if not right:
        raise ValueError(f"{where}: {name} must be {what}")
