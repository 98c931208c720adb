"""What a run that begins with a model (`init.from`) takes over from it, and what its settings may change. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quietvit.config.load import ConfigError
from quietvit.config.schema import ModelConfig, RunConfig

TOLERANCE = 1e-6  # of mean and std (ours): others write them with six digits
STEM_SETTINGS = {"stem_attention": "stem.attention", "token_dim": "stem.token_dim"}
Triple = tuple[float, float, float]


def adopt(
    config: RunConfig,
    *,
    name: str,
    arguments: Mapping[str, Any],
    mean: Triple,
    std: Triple,
    sizes: Mapping[str, Mapping[str, Any]],
) -> RunConfig:
    """The config with everything that it leaves open set as in the model that the run begins with.

    `name`, `arguments`: those of the model's `make_backbone`, all of them; `mean`, `std`: its input normalisation;
    `sizes`: the named sizes of its kind of backbone. The settings may ask for more registers, another patch side (not
    of a tokens-to-token stem) and another position grid (`model.image_size`); when the patch alone is another, the grid
    is that of the nearest image side. Stochastic depth, attention and the start of new parts are the run's own.

    Raises ConfigError, which names both values, for an architecture or a normalisation that contradicts the model's.
    """
    model, file = config.model, config.init.from_
    if arguments.get("register_neurons"):
        raise ConfigError(
            f"init.from={file}: its registers were added without training. Begin with the model that they were added "
            "to, and ask for registers by model.num_registers"
        )
    _check_same(model, name, arguments, sizes, f"init.from={file}")
    _check_normalisation(config, mean, std)
    patch, registers = arguments["patch_size"], arguments["num_registers"]
    if model.patch_size not in (None, patch) and name == "t2t_vit":
        raise ConfigError(
            f"model.patch_size={model.patch_size}, but the tokens-to-token stem of {file} makes tokens of {patch} "
            "pixels, and such a stem cannot be resized: leave model.patch_size out"
        )
    if model.num_registers is not None and model.num_registers < registers:
        raise ConfigError(
            f"model.num_registers={model.num_registers}, but {file} has {registers} registers, which its blocks rely "
            f"on: leave model.num_registers out, or ask for more than {registers}"
        )
    if model.patch_size is not None and model.patch_size < 1:
        raise ConfigError(f"model.patch_size={model.patch_size}: at least 1 pixel")
    new_patch = model.patch_size or patch
    side = arguments["image_size"]
    if new_patch != patch:
        side = max(1, round(side / new_patch)) * new_patch
    adopted = replace(
        model,
        backbone=name,
        size=next((size for size, says in sizes.items() if not _contradictions(says, arguments)), None),
        embed_dim=arguments["embed_dim"],
        depth=arguments["depth"],
        num_heads=arguments["num_heads"],
        ffn=arguments["ffn"],
        patch_size=new_patch,
        image_size=model.image_size or side,
        num_registers=registers if model.num_registers is None else model.num_registers,
        layer_scale=arguments["layer_scale"],
        pos_interpolation=arguments["pos_interpolation"],
        pos_antialias=arguments["pos_antialias"],
    )
    return replace(config, model=adopted, data=replace(config.data, mean=mean, std=std))


def backbone_arguments(model: ModelConfig, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `make_backbone` for a run that begins with a model of `arguments`, from its adopted settings.

    A supervised head that came with the model is left out.
    """
    own = {
        "patch_size": model.patch_size,
        "image_size": model.image_size,
        "num_registers": model.num_registers,
        "register_std": model.register_std,
        "drop_path": model.drop_path,
        "drop_path_uniform": model.drop_path_uniform,
        "attention": model.attention,
        "init": model.init,
        "num_classes": 0,
    }
    if "recompute" in arguments:
        own["recompute"] = model.stem.recompute
    return {**arguments, **own}


def _check_same(
    model: ModelConfig, name: str, arguments: Mapping[str, Any], sizes: Mapping[str, Mapping[str, Any]], what: str
) -> None:
    if model.backbone not in (None, name):
        raise ConfigError(f"model.backbone={model.backbone}, but {what} is a {name}: leave model.backbone out")
    given = {
        "embed_dim": model.embed_dim,
        "depth": model.depth,
        "num_heads": model.num_heads,
        "ffn": model.ffn,
        "pos_interpolation": model.pos_interpolation,
        "pos_antialias": model.pos_antialias,
        "stem_attention": model.stem.attention,
        "token_dim": model.stem.token_dim,
    }
    wrong: list[tuple[str, Any, Any]] = [
        (f"model.{STEM_SETTINGS.get(key, key)}", value, arguments.get(key))
        for key, value in given.items()
        if value is not None and value != arguments.get(key)
    ]
    if model.layer_scale is not None and bool(model.layer_scale) != bool(arguments["layer_scale"]):
        # Where there is one its values are the model's own, whatever they were at their start.
        wrong.append(("model.layer_scale", model.layer_scale, arguments["layer_scale"]))
    if model.size is not None:
        if model.size not in sizes:
            raise ConfigError(f"model.size={model.size}: a {name} has {', '.join(sizes)}. Or leave it out")
        says = {k: v for k, v in sizes[model.size].items() if given.get(k) is None}
        wrong += [(f"model.size={model.size} has {k}", v, found) for k, v, found in _contradictions(says, arguments)]
    if wrong:
        said = "; ".join(
            f"{key}={value}, " + ("there is none" if found is None else f"there it is {found}")
            for key, value, found in wrong
        )
        raise ConfigError(f"{what} is another model than the settings ask for: {said}. Leave out what the model says")


def _contradictions(says: Mapping[str, Any], arguments: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(k, v, arguments.get(k)) for k, v in says.items() if arguments.get(k) != v]


def _check_normalisation(config: RunConfig, mean: Triple, std: Triple) -> None:
    def differs(given: Triple | None, own: Triple) -> bool:
        return given is not None and max(abs(a - b) for a, b in zip(given, own, strict=True)) > TOLERANCE

    if differs(config.data.mean, mean) or differs(config.data.std, std):
        raise ConfigError(
            f"data.mean={_listed(config.data.mean)} data.std={_listed(config.data.std)} is not what "
            f"{config.init.from_} was trained with: leave both out, or write data.mean={_listed(mean)} "
            f"data.std={_listed(std)}"
        )


def _listed(values: Triple | None) -> str:
    return "null" if values is None else "[" + ",".join(f"{v:g}" for v in values) + "]"
