"""Reads the visual towers of CLIP models: open_clip's, and OpenAI's own weights under the same names.

The tower is a ViT with a LayerNorm before its first block. Text tower and projection are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quietvit.weights import family
from quietvit.weights.family import CLIP, Converted, Family, Hints, count_heads, mask_token
from quietvit.weights.torch_file import plain_names
from quietvit.weights.vit_shapes import vit_arguments

__all__ = ["FAMILY", "folder_weights"]

TOWER = "visual."
# Entries of OpenAI's state dicts that no other has; their MLPs have QuickGELU, which no shape tells.
OPENAI = ("input_resolution", "context_length", "vocab_size")
NORM_EPS = 1e-5  # PyTorch's default, which CLIP leaves as it is
STEM = "class_embedding"
BLOCK = "transformer.resblocks."
PROJECTION = "proj"
CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # beside CONFIG_NAME, on its hub
NAMES: Mapping[str, str] = {
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "conv1": "patch_embed.proj",
    "ln_pre": "norm_pre",
    "ln_post": "norm",
}
BLOCK_NAMES: Mapping[str, str] = {
    "ln_1": "norm1",
    "attn.in_proj_weight": "attn.qkv.weight",
    "attn.in_proj_bias": "attn.qkv.bias",
    "attn.out_proj": "attn.proj",
    "ls_1": "ls1",
    "ln_2": "norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ls_2": "ls2",
}
IN_BLOCK = re.compile(rf"^{re.escape(BLOCK)}(\d+)\.({'|'.join(map(re.escape, BLOCK_NAMES))})(\.\w+)?$")
REFUSED: Mapping[str, str] = {  # how names of the tower begin -> what that is
    "attn_pool": "its tower pools with attention (CoCa), so that no class token carries its features",
    "attnpool": "its tower is a ResNet, not a ViT",
    "layer1": "its tower is a ResNet, not a ViT",
}


def recognises(names: Collection[str]) -> bool:
    tower = any(name.startswith((TOWER + BLOCK, TOWER + "trunk.", TOWER + "layer1.")) for name in names)
    return tower or (STEM in names and f"{BLOCK}0.ln_1.weight" in names)


def convert(tensors: Mapping[str, Tensor], hints: Hints) -> Converted:
    """The visual tower of a CLIP state dict, or of its own.

    Features are after the last norm, `ln_post`, on all tokens; where CLIP norms the pooled token only, patch features
    are that norm's all the same. Raises ValueError for towers that are no ViT of CLIP's form, saying why.
    """
    whole = any(name.startswith(TOWER) for name in tensors)
    tower = {k.removeprefix(TOWER): v for k, v in tensors.items() if not whole or k.startswith(TOWER)}
    if any(name.startswith("trunk.") for name in tower):
        return _timm_tower(tower, hints)
    for start, reason in REFUSED.items():
        if any(name.startswith(start) for name in tower):
            raise ValueError(f"{reason}: it cannot be read")
    kept = {k: v for k, v in tower.items() if k != PROJECTION and k not in OPENAI}
    plain = plain_names(kept, _our_name)
    notes = ["features are after the last norm (ln_post), on all tokens"]
    if PROJECTION in tower:
        notes.append("the projection into the space shared with text is left out")
    if whole:
        notes.append(f"only the visual tower is read: {len(tensors) - len(tower)} other tensors are left out")
    for name, axes in (("cls_token", 2), ("pos_embed", 1)):
        if name in plain:
            plain[name] = plain[name].reshape((1,) * axes + plain[name].shape)
    arguments = vit_arguments(plain, family="CLIP")
    plain.setdefault("patch_embed.proj.bias", torch.zeros(arguments["embed_dim"]))  # CLIP's convolution has none
    plain["mask_token"] = mask_token(arguments["embed_dim"])
    heads, reason = count_heads(arguments["embed_dim"], hints)
    activation, origin = _activation(tensors, hints)
    return Converted(
        backbone="vit",
        arguments={
            **arguments,
            "num_heads": heads,
            "num_classes": 0,
            "norm_eps": NORM_EPS,
            "activation": activation,
            "pos_interpolation": "size",  # open_clip resizes its table bicubically, with antialiasing, at loading
            "pos_antialias": True,
        },
        tensors=plain,
        normalisation=hints.normalisation or CLIP,
        image_size=arguments["image_size"],
        notes=(*notes, family.MASK_TOKEN_NOTE),
        facts={"heads": reason, "activation": f"{activation}, {origin}"},
    )


def _our_name(name: str) -> str:
    """Our name for one of the tower's. Names that it does not know stay, and are then unexpected."""
    if match := IN_BLOCK.match(name):
        block, part, rest = match.groups()
        return f"blocks.{block}.{BLOCK_NAMES[part]}{rest or ''}"
    start, dot, rest = name.partition(".")
    return NAMES.get(start, start) + dot + rest


def _activation(tensors: Mapping[str, Tensor], hints: Hints) -> tuple[str, str]:
    if hints.activation is not None:
        return hints.activation, "as asked for, or as its configuration says"
    if any(name in tensors for name in OPENAI):
        return "quick_gelu", "as in all weights of OpenAI, whose entries the file has"
    return "gelu", "open_clip's default: the file does not tell; models named quickgelu need activation='quick_gelu'"


def _timm_tower(tower: Mapping[str, Tensor], hints: Hints) -> Converted:
    """A tower that is a model of timm: `trunk.` before its names, and a projection behind it."""
    from quietvit.weights import timm

    trunk = {k.removeprefix("trunk."): v for k, v in tower.items() if k.startswith("trunk.")}
    if not timm.recognises(trunk):
        raise ValueError("its tower is a model of timm that is no plain ViT: it cannot be read")
    converted = timm.convert(trunk, hints)
    return replace(converted, notes=(*converted.notes, "a tower of timm in a CLIP model; its projection is left out"))


def hints_beside(path: Path, hints: Hints) -> Hints:
    """`hints`, and what `open_clip_config.json` in the folder of `path` says of heads, activation and normalisation.

    Raises ValueError if that file is broken.
    """
    place = path.parent / CONFIG_NAME
    if not place.is_file():
        return hints
    try:
        config = json.loads(place.read_text(encoding="utf-8"))
        model, input_ = config["model_cfg"], config.get("preprocess_cfg", {})
        vision = model["vision_cfg"]
        said: dict[str, Any] = {"activation": "quick_gelu" if model.get("quick_gelu") else "gelu"}
        if "head_width" in vision:
            said["num_heads"] = int(vision["width"]) // int(vision["head_width"])
        if "mean" in input_ and "std" in input_:
            said |= {key: tuple(float(v) for v in input_[key]) for key in ("mean", "std")}
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, RecursionError) as error:
        raise ValueError(f"{place} is broken, or no configuration of open_clip ({error!r}): copy it again") from error
    if hints.normalisation is not None:
        said |= {"mean": hints.mean, "std": hints.std}
    asked = {key: getattr(hints, key) for key in ("num_heads", "activation") if getattr(hints, key) is not None}
    return replace(hints, **{**said, **asked})


def folder_weights(folder: Path) -> Path | None:
    """The weights in a folder of open_clip's hub form, or None if it is none."""
    if not (folder / CONFIG_NAME).is_file():
        return None
    return next((folder / name for name in WEIGHTS_NAMES if (folder / name).is_file()), None)


FAMILY = Family(
    "open_clip",
    f"a CLIP model has {TOWER}{BLOCK}*, or {STEM} and {BLOCK}* where its visual tower stands alone",
    recognises,
    convert,
    beside=hints_beside,
)
