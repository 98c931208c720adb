"""Reads folders of transformers: Dinov2Model and Dinov2WithRegistersModel, and the models with a head on top of them.

Names are those of the published files (which transformers 4.48 to 5 write) and of the modules of transformers 5.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quietvit.nn.feed_forward import swiglu_width
from quietvit.weights.family import IMAGENET, MASK_TOKEN_NOTE, Converted, Hints, Normalisation, mask_token
from quietvit.weights.hub_folder import CONFIG_NAME, config_or_none, folder_tensors, read_json, three_numbers
from quietvit.weights.torch_file import plain_names
from quietvit.weights.vit_shapes import vit_arguments

__all__ = ["PROCESSOR_NAME", "is_folder", "load_folder", "our_tensors"]

PROCESSOR_NAME = "preprocessor_config.json"
LAYER = re.compile(r"^encoder\.layer\.(\d+)\.")
NAMES: Mapping[str, str] = {  # of published files -> ours, without the layer
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.mask_token": "mask_token",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "attention.attention.query": "attn.q",
    "attention.attention.key": "attn.k",
    "attention.attention.value": "attn.v",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
    # modules of transformers 5
    "attention.q_proj": "attn.q",
    "attention.k_proj": "attn.k",
    "attention.v_proj": "attn.v",
    "attention.o_proj": "attn.proj",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.w3",
}
JOINED: Mapping[str, tuple[str, ...]] = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.w12": ("mlp.gate", "mlp.up")}
ACTIVATIONS = ("gelu", "quick_gelu")
NUMBERS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "layer_norm_eps")
# What transformers assumes where config.json is silent (configuration_dinov2*.py of 5.23).
DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "mlp_ratio": 4, "hidden_act": "gelu",
    "layer_norm_eps": 1e-6, "image_size": 224, "qkv_bias": True, "use_swiglu_ffn": False,
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One model_type that can be read."""

    prefix: str  # of the names in a model with a head on top
    defaults: Mapping[str, Any]
    registers: bool
    antialias: bool  # when positions are resized, which both do to a given size


KINDS: Mapping[str, Kind] = {
    "dinov2": Kind("dinov2.", {"patch_size": 14}, False, False),
    "dinov2_with_registers": Kind(
        "dinov2_with_registers.", {"patch_size": 16, "num_register_tokens": 4}, True, True
    ),
}  # fmt: skip


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder with a config.json of transformers, or one that cannot be read."""
    if not (path / CONFIG_NAME).is_file():
        return False
    config = config_or_none(path)
    return config is None or "model_type" in config


def load_folder(path: Path, hints: Hints) -> Converted:
    """The backbone in a folder of transformers; `hints` say the normalisation, if preprocessor_config.json shall not.

    The class head of `...ForImageClassification` reads the class token and the mean patch, which ours does not: it is
    left out. Raises FileNotFoundError if there are no weights; ValueError for broken files, for another kind of model,
    and where config.json and the tensors disagree (transformers leaves such tensors random, with a warning).
    """
    config = read_json(path / CONFIG_NAME)
    model_type = str(config.get("model_type"))
    if model_type not in KINDS:
        raise ValueError(
            f"{path} holds a model of type {model_type!r}; of transformers, {' and '.join(KINDS)} are read"
        )
    kind = KINDS[model_type]
    config = {**DEFAULTS, **kind.defaults, **config}
    _check_numbers(config, path)
    stored, notes = _without_heads(folder_tensors(path), kind)
    try:
        tensors = our_tensors(stored)
        _check_registers(tensors, kind, config)
        told = vit_arguments(tensors, family="transformers DINOv2")
        if "mask_token" not in tensors:
            tensors["mask_token"] = mask_token(told["embed_dim"])
            notes.append(MASK_TOKEN_NOTE)
        _check(config, told)
        arguments = {
            **told,
            "num_heads": _heads(config, hints),
            "norm_eps": float(config["layer_norm_eps"]),
            "activation": "gelu" if told["ffn"] == "swiglu" else _activation(config),
            "pos_interpolation": "size",
            "pos_antialias": kind.antialias,
        }
    except (RuntimeError, TypeError, ValueError) as error:  # torch.cat of shapes that do not fit is a RuntimeError
        raise ValueError(f"{path}: {error}") from error
    facts = {"model_type": model_type, "heads": f"{arguments['num_heads']}, by {CONFIG_NAME}"}
    normalisation = hints.normalisation or _normalisation(path, notes)
    return Converted("vit", arguments, tensors, normalisation, arguments["image_size"], tuple(notes), facts)


def _check_numbers(config: Mapping[str, Any], path: Path) -> None:
    for name in NUMBERS:
        value = config[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ValueError(f"{path / CONFIG_NAME}: {name} must be a positive number, not {value!r}")


def _without_heads(stored: Mapping[str, Tensor], kind: Kind) -> tuple[dict[str, Tensor], list[str]]:
    """The backbone's own tensors, and notes."""
    if not any(k.startswith(kind.prefix) for k in stored):
        return dict(stored), []
    heads = [k for k in stored if k.startswith("classifier.")]
    notes = ["class head: left out, it reads the class token and the mean patch"] if heads else []
    return {k.removeprefix(kind.prefix): v for k, v in stored.items() if k not in heads}, notes


def our_tensors(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under our names. Raises ValueError for a query without its key and value, or a gate without its value."""
    tensors = plain_names(stored, _our_name, what="it")
    for joined, parts in JOINED.items():
        for first in [k for k in tensors if f".{parts[0]}." in k]:
            names = [first.replace(f".{parts[0]}.", f".{part}.") for part in parts]
            if lacking := [n for n in names if n not in tensors]:
                raise ValueError(f"{first} is there without {', '.join(lacking)}")
            tensors[first.replace(f".{parts[0]}.", f".{joined}.")] = torch.cat([tensors.pop(n) for n in names])
    registers = tensors.get("register_tokens")
    if registers is not None and not registers.shape[1:2].numel():
        del tensors["register_tokens"]  # how a model with 0 registers is stored
    return tensors


def _our_name(key: str) -> str:
    layer = LAYER.match(key)
    rest = LAYER.sub("", key)
    stem, dot, last = rest.rpartition(".")
    ours = NAMES.get(rest) or (NAMES[stem] + dot + last if stem in NAMES else rest)
    return f"blocks.{layer[1]}.{ours}" if layer else ours


def _check_registers(tensors: Mapping[str, Tensor], kind: Kind, config: Mapping[str, Any]) -> None:
    """Registers that are dropped or drawn at random go unnoticed (dinov2 issue 505), so this is said first."""
    said = config["num_register_tokens"] if kind.registers else 0
    there = tensors["register_tokens"].shape[1:2].numel() if "register_tokens" in tensors else 0
    if said != there:
        raise ValueError(
            f"{CONFIG_NAME} (model_type {config['model_type']!r}) says {said} registers, and the weights have {there}: "
            "one of them belongs to another model"
        )


def _check(config: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    hidden = int(told["embed_dim"] * told["mlp_ratio"])
    said_hidden = int(config["hidden_size"] * config["mlp_ratio"])
    swiglu = told["ffn"] == "swiglu"
    pairs = {
        "hidden_size": told["embed_dim"],
        "num_hidden_layers": told["depth"],
        "image_size": told["image_size"],
        "patch_size": told["patch_size"],
        "use_swiglu_ffn": swiglu,
        "qkv_bias": told["qkv_bias"],
        "num_channels": 3,
    }
    wrong = [
        f"{name} {config[name]!r}, where the weights have {value}"
        for name, value in pairs.items()
        if name in config and config[name] not in (value, [value, value])
    ]
    if swiglu_width(said_hidden) != swiglu_width(hidden) if swiglu else said_hidden != hidden:
        wrong.append(f"mlp_ratio {config['mlp_ratio']!r}, where the weights have {hidden / told['embed_dim']:g}")
    if wrong:
        raise ValueError(f"{CONFIG_NAME} and the weights disagree: it says {'; '.join(wrong)}")


def _heads(config: Mapping[str, Any], hints: Hints) -> int:
    heads = config["num_attention_heads"]
    if not isinstance(heads, int) or heads < 1 or config["hidden_size"] % heads:
        raise ValueError(
            f"{CONFIG_NAME}: width {config['hidden_size']} cannot be divided among {heads!r} attention heads"
        )
    if hints.num_heads not in (None, heads):
        raise ValueError(f"{CONFIG_NAME} says {heads} attention heads; leave num_heads {hints.num_heads} out")
    return heads


def _activation(config: Mapping[str, Any]) -> str:
    if config["hidden_act"] not in ACTIVATIONS:
        raise ValueError(f"{CONFIG_NAME}: activation {config['hidden_act']!r}; here they are {', '.join(ACTIVATIONS)}")
    return str(config["hidden_act"])


def _normalisation(path: Path, notes: list[str]) -> Normalisation:
    """What the image processor does to pixels of 0 to 255, in units of [0, 1]; ImageNet's if the folder has none."""
    if not (path / PROCESSOR_NAME).is_file():
        notes.append(f"normalisation: ImageNet's, as there is no {PROCESSOR_NAME}")
        return IMAGENET
    processor = read_json(path / PROCESSOR_NAME)
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    if not isinstance(factor, (int, float)) or not factor > 0:
        raise ValueError(f"{path / PROCESSOR_NAME}: rescale_factor must be a positive number, not {factor!r}")
    unit = 1 / (255 * factor)
    if abs(unit - 1) < 1e-6:
        unit = 1.0
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if processor.get("do_normalize", True):
        mean, std = (
            three_numbers(processor.get(key, list(default)), what=f"{key} in {path / PROCESSOR_NAME}")
            for key, default in zip(("image_mean", "image_std"), IMAGENET, strict=True)
        )
    red, green, blue = mean
    return (red * unit, green * unit, blue * unit), (std[0] * unit, std[1] * unit, std[2] * unit)
