"""Reads folders in the form of timm's models on the hub: config.json with "architecture", and the weights beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quietvit.weights import timm
from quietvit.weights.family import Converted, Hints
from quietvit.weights.hub_folder import CONFIG_NAME, config_or_none, folder_tensors, read_json, three_numbers
from quietvit.weights.torch_file import plain_names, strip_prefixes

__all__ = ["hints_beside", "is_folder", "load_folder"]

PREFIXES = ("timm_model.", "module.", "_orig_mod.")  # transformers' wrapper of timm models; DDP; torch.compile
ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "silu": None, "swish": None}  # SwiGLU has its own
CHECKED = {  # an argument of timm's constructor -> ours
    "embed_dim": "embed_dim",
    "depth": "depth",
    "patch_size": "patch_size",
    "reg_tokens": "num_registers",
    "num_heads": "num_heads",
}


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder with a config.json that names an architecture of timm."""
    return isinstance((config_or_none(path) or {}).get("architecture"), str)


def load_folder(path: Path, hints: Hints) -> Converted:
    """The ViT in a folder of timm's hub form; `hints` go before what config.json says.

    Raises FileNotFoundError if there are no weights; ValueError for broken files, for a configuration that its tensors
    contradict, and as `timm.convert`.
    """
    config = read_json(path / CONFIG_NAME)
    architecture, arguments = str(config["architecture"]), _model_args(config)
    if "radio" in architecture:
        raise ValueError(f"{path}: {architecture} resizes its positions bilinearly, which quietvit does not")
    if "norm_layer" in arguments:
        raise ValueError(
            f"{path}: {architecture} was built with the norm {arguments['norm_layer']!r}; ours is LayerNorm"
        )
    tensors = plain_names(folder_tensors(path), lambda key: strip_prefixes(key, PREFIXES), what=str(path))
    try:
        found = timm.convert(
            tensors,
            _told(config, hints),
            norm_eps=timm.PRE_NORM_EPS if "_clip_" in architecture else timm.NORM_EPS,
            pool=str(config.get("global_pool") or arguments.get("global_pool") or "token"),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    _check(arguments, found, path)
    return replace(found, facts={**found.facts, "architecture": f"timm {architecture}"})


def hints_beside(file: Path, hints: Hints) -> Hints:
    """`hints`, filled up from a config.json of timm's beside a file of weights; as they are where there is none.

    Raises ValueError if it is there and says something impossible.
    """
    config = config_or_none(file.parent) or {}
    return _told(config, hints) if isinstance(config.get("architecture"), str) else hints


def _told(config: Mapping[str, Any], hints: Hints) -> Hints:
    arguments, data = _model_args(config), config.get("pretrained_cfg") or config  # older ones are flat
    told: dict[str, Any] = {}
    if hints.num_heads is None and isinstance(arguments.get("num_heads"), int):
        told["num_heads"] = arguments["num_heads"]
    if hints.activation is None:
        told["activation"] = _activation(str(config["architecture"]), arguments)
    if hints.normalisation is None and "mean" in data and "std" in data:
        told |= {key: three_numbers(data[key], what=f"{key} in {CONFIG_NAME}") for key in ("mean", "std")}
    return replace(hints, **told)


def _activation(architecture: str, arguments: Mapping[str, Any]) -> str | None:
    name = arguments.get("act_layer", "quick_gelu" if "_quickgelu_" in architecture else "gelu")
    if name not in ACTIVATIONS:
        raise ValueError(
            f"{architecture} was built with the activation {name!r}; here they are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _model_args(config: Mapping[str, Any]) -> Mapping[str, Any]:
    arguments = config.get("model_args")
    return arguments if isinstance(arguments, dict) else {}


def _check(arguments: Mapping[str, Any], found: Converted, path: Path) -> None:
    differing = [
        f"{theirs} {arguments[theirs]!r} instead of {found.arguments[ours]}"
        for theirs, ours in CHECKED.items()
        if theirs in arguments and arguments[theirs] not in (found.arguments[ours], [found.arguments[ours]] * 2)
    ]
    if differing:
        raise ValueError(f"{path / CONFIG_NAME} is not of these weights: it says {', '.join(differing)}")
