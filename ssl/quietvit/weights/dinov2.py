"""Reads DINOv2 backbone checkpoints (`dinov2_vit{s,b,l,g}14[_reg4]_pretrain.pth` and files of its training code).

The architecture is read off the shapes, so a file needs no name or configuration beside it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from quietvit.backbones import make_backbone
from quietvit.weights.native import load_strictly
from quietvit.weights.torch_file import choose_entry, list_names, plain_names, read_torch_file, strip_prefixes

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, RGB in [0, 1]: what DINOv2 was trained with
HEAD_DIM = 64  # every DINOv2 model
PREFIXES = ("module.", "teacher.", "backbone.")
HEADS = ("dino_head.", "ibot_head.")
CONTAINERS = ("teacher", "model", "state_dict")  # where training code of DINOv2 and its relatives nests the weights
CHUNKED = re.compile(r"^blocks\.\d+\.(\d+)\.")
BLOCK = re.compile(r"^blocks\.(\d+)\.")
NEEDED = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight", "norm.weight")


def load_dinov2(path: Path | str) -> tuple[nn.Module, dict[str, Any]]:
    """The backbone of a DINOv2 `.pth`, in eval mode on the CPU, and its description (as `native.load_backbone`).

    Position tables are interpolated as in the source of the file: to a given size with antialiasing for the models with
    registers, by a scale factor with an offset of 0.1 and without antialiasing for the others.
    Raises FileNotFoundError if there is no such file; ValueError if it is truncated, needs code to be unpickled, or is
    not exactly such a backbone.
    """
    path = Path(path)
    return dinov2_backbone(read_torch_file(path), path)


def dinov2_backbone(loaded: Mapping[str, Any], path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """As `load_dinov2`, of a file that has been read."""
    tensors = backbone_tensors(loaded, what=str(path))
    arguments = infer_arguments(tensors, what=str(path))
    backbone = make_backbone("vit", **arguments)
    load_strictly(backbone, tensors, what=str(path))
    meta = {
        "backbone": {"name": "vit", "arguments": arguments},
        "normalisation": {"mean": list(MEAN), "std": list(STD)},
        "image_size": arguments["image_size"],
        "provenance": {"source": "dinov2", "file": path.name},
    }
    return backbone.eval(), meta


def backbone_tensors(loaded: Mapping[str, Any], *, what: str) -> dict[str, Tensor]:
    """Backbone tensors under their released names: teacher chosen, prefixes and chunk indices removed, heads left out.

    Raises ValueError if two keys become one.
    """
    _, entries = choose_entry(loaded, CONTAINERS)
    tensors = {k: v for k, v in entries.items() if isinstance(v, Tensor)}
    if any(k.startswith("teacher.") for k in tensors):  # a whole training state: the student is not what is used
        tensors = {k: v for k, v in tensors.items() if k.startswith("teacher.")}
    tensors = {k: v for k, v in tensors.items() if not _released_name(k).startswith(HEADS)}
    return plain_names(tensors, _released_name, what=what)


def _released_name(key: str) -> str:
    # blocks.{chunk}.{block}: the block's index already counts from the first
    return CHUNKED.sub(r"blocks.\1.", strip_prefixes(key, PREFIXES))


def infer_arguments(tensors: Mapping[str, Tensor], *, what: str) -> dict[str, Any]:
    """Arguments of `make_backbone("vit", ...)`, from the shapes. Raises ValueError for another kind of file."""
    if lacking := [k for k in NEEDED if k not in tensors]:
        raise ValueError(
            f"{what} is not a DINOv2 backbone: it lacks {', '.join(lacking)}. It holds {len(tensors)} tensors: "
            f"{list_names(tensors)}"
        )
    embed_dim = tensors["cls_token"].shape[-1]
    if embed_dim % HEAD_DIM:
        raise ValueError(
            f"{what}: width {embed_dim} is not a multiple of {HEAD_DIM}, so the heads cannot be told apart"
        )
    patch_size = tensors["patch_embed.proj.weight"].shape[-1]
    cells = tensors["pos_embed"].shape[1] - 1
    grid = math.isqrt(max(cells, 0))
    if grid < 1 or grid * grid != cells:
        raise ValueError(f"{what}: a position table of {cells} patches is not square")
    registers = tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0
    return {
        "patch_size": patch_size,
        "image_size": grid * patch_size,
        "embed_dim": embed_dim,
        "depth": 1 + max(int(m[1]) for m in map(BLOCK.match, tensors) if m),
        "num_heads": embed_dim // HEAD_DIM,
        "ffn": "swiglu" if "blocks.0.mlp.w12.weight" in tensors else "mlp",
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "num_registers": registers,
        "layer_scale": 1e-5 if "blocks.0.ls1.gamma" in tensors else 0.0,  # the value is overwritten by the file
        "pos_interpolation": "size" if registers else "offset",
        "pos_antialias": registers > 0,
    }
