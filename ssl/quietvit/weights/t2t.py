"""Reads T2T-ViT checkpoints: the released ones (`81.5_T2T_ViT_14.pth.tar`, ...) and others of its training code.

Everything but the number of attention heads is read off names and shapes, the architecture study's variants included.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from quietvit.backbones import make_backbone
from quietvit.backbones.t2t_vit import OFFICIAL
from quietvit.nn.position import sinusoid_positions
from quietvit.weights.family import IMAGENET, Converted, Family, Hints
from quietvit.weights.torch_file import list_names

__all__ = ["FAMILY", "infer_arguments"]

OURS = ("mask_token", "register_tokens")  # what a supervised model has no use for
HEAD_DIM = 64  # 7 to 24, t-14 to t-24, wide, SE and ghost
DENSE_HEADS = 8  # dense, whatever the width of its blocks
RESNEXT_HEADS = 32  # 14-resnext, whose shapes are those of 14
# Greatest difference from the sinusoids. Averaging weights in float32 with T2T-ViT's decay of 0.99996 moves even a
# constant table, by up to 1.3e-4 (ours, simulated); bfloat16 rounds by 4e-3. Other tables differ by far more.
TABLE_TOLERANCE = 1e-2
STEM = "tokens_to_token.attention1."
NEEDED = {  # and the number of axes
    "cls_token": 3,
    "pos_embed": 3,
    f"{STEM}norm2.weight": 1,
    "tokens_to_token.project.weight": 2,
    "blocks.0.norm1.weight": 1,
    "blocks.0.mlp.fc2.weight": 2,
    "norm.weight": 1,
}
BLOCK = re.compile(r"^blocks\.(\d+)\.")


def recognises(names: Collection[str]) -> bool:
    return any(name.startswith("tokens_to_token.") for name in names)


def convert(tensors: Mapping[str, Tensor], hints: Hints) -> Converted:
    """A T2T-ViT with its supervised head (`Trunk.logits`).

    The mask token, which no such file has, and `hints.num_registers` registers start as they would in training, drawn
    with seed 0: class token and patches attend to registers too. `hints.num_heads`: shapes do not tell it. None: 32 if
    the file's name or its "arch" has "resnext" in it, 8 for the dense variant, else heads 64 wide, as all other
    released models have.

    Raises ValueError for tensors that cannot be such a backbone's, and for another position table than the sinusoids.
    """
    _check_kind(tensors)
    heads, reason = (hints.num_heads, "as asked for") if hints.num_heads is not None else _guess_heads(tensors, hints)
    arguments = {**infer_arguments(tensors), "num_heads": heads, "num_registers": hints.num_registers}
    with torch.random.fork_rng(devices=[]):  # the same registers at every load: a frozen model has one hash
        torch.manual_seed(0)
        initial = make_backbone("t2t_vit", **arguments).state_dict()
    _check_positions(tensors["pos_embed"])
    return Converted(
        backbone="t2t_vit",
        arguments=arguments,
        tensors={**{k: initial[k] for k in OURS if k in initial}, **tensors},
        normalisation=IMAGENET,
        image_size=arguments["image_size"],
        facts={"heads": f"{heads}, {reason}"},
    )


def infer_arguments(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `make_backbone("t2t_vit", ...)` but for the heads, from names and shapes, which must hold NEEDED.

    Raises ValueError for a position table that is not square, and a stem of convolutions.
    """
    embed_dim, patch_size = tensors["cls_token"].shape[-1], OFFICIAL["patch_size"]
    cells = tensors["pos_embed"].shape[1] - 1
    grid = math.isqrt(max(cells, 0))
    if grid < 1 or grid * grid != cells:
        raise ValueError(f"a position table of {cells} patches is not square")
    return {
        **OFFICIAL,
        "image_size": grid * patch_size,
        "embed_dim": embed_dim,
        "depth": _depth(tensors),
        "mlp_ratio": tensors["blocks.0.mlp.fc2.weight"].shape[1] / embed_dim,
        "token_dim": len(tensors[f"{STEM}norm2.weight"]),
        "stem_attention": _stem_attention(tensors),
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors or "blocks.0.attn.q.bias" in tensors,
        "num_classes": len(tensors["head.weight"]) if "head.weight" in tensors else 0,
        **_variant(tensors),
        **_dense(tensors),
    }


def _check_kind(tensors: Mapping[str, Tensor]) -> None:
    if lacking := [k for k in NEEDED if k not in tensors]:
        raise ValueError(
            f"it is not a T2T-ViT backbone: it lacks {', '.join(lacking)}. It holds {len(tensors)} tensors: "
            f"{list_names(tensors)}"
        )
    if wrong := [k for k, axes in NEEDED.items() if tensors[k].ndim != axes or not tensors[k].numel()]:
        shapes = ", ".join(f"{k} {tuple(tensors[k].shape)}" for k in wrong)
        raise ValueError(f"it is not a T2T-ViT backbone: it cannot have the shapes {shapes}")


def _stem_attention(tensors: Mapping[str, Tensor]) -> str:
    if f"{STEM}w" in tensors and f"{STEM}kqv.weight" in tensors:
        return "performer_official"
    if f"{STEM}attn.qkv.weight" in tensors:
        return "transformer"
    raise ValueError(
        f"its stem is neither a Performer ({STEM}w and {STEM}kqv.weight) nor a transformer "
        f"({STEM}attn.qkv.weight). It holds: {list_names(k for k in tensors if k.startswith('tokens_to_token.'))}"
    )


def _variant(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The kinds of attention and MLP of the trunk, where they are not the plain ones."""
    kinds = {}
    if "blocks.0.attn.se_layer.fc.0.weight" in tensors:
        kinds["attention_layer"] = "se"
    if "blocks.0.attn.cheap_operation_q.weight" in tensors:
        kinds["attention_layer"] = "ghost"
    if "blocks.0.mlp.cheap_operation2.weight" in tensors:
        kinds["ffn"] = "ghost"
    return kinds


def _depth(tensors: Mapping[str, Tensor]) -> int:
    return 1 + max(int(m[1]) for m in map(BLOCK.match, tensors) if m)


def _dense(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Growth and groups of dense blocks, between which transitions stand; nothing for any other trunk."""
    growth = tensors.get("blocks.0.dense_linear.bias")
    if growth is None:
        return {}
    kinds = "".join("t" if f"blocks.{i}.linear.weight" in tensors else "b" for i in range(_depth(tensors)))
    return {"growth": len(growth), "dense_groups": "-".join(str(len(group)) for group in kinds.split("t"))}


def _guess_heads(tensors: Mapping[str, Tensor], hints: Hints) -> tuple[int, str]:
    """The number of attention heads and why. Raises ValueError for a width that no released model has."""
    embed_dim = tensors["cls_token"].shape[-1]
    for place, name in hints.names.items():
        if "resnext" in name.lower():
            return RESNEXT_HEADS, f"since {place} says resnext"
    if "blocks.0.dense_linear.bias" in tensors:
        return DENSE_HEADS, "as in the dense variant"
    if embed_dim % HEAD_DIM:
        raise ValueError(
            f"shapes do not tell the number of attention heads, and width {embed_dim} is no multiple of "
            f"{HEAD_DIM}, which all released models have in a head: give num_heads"
        )
    return embed_dim // HEAD_DIM, f"each {HEAD_DIM} wide"


def _check_positions(table: Tensor) -> None:
    """Positions of other grids are computed by the formula, so a table of another origin would be wrong there."""
    formula = sinusoid_positions(table.shape[1], table.shape[2])
    difference = float((table.float() - formula).abs().max())
    if not difference <= TABLE_TOLERANCE:
        side = math.isqrt(table.shape[1] - 1)
        raise ValueError(
            f"its position table is not the sinusoids of T2T-ViT for {side} x {side} patches (greatest "
            f"difference {difference:.3g}): it was trained, or resized from another grid. Load the file it was made "
            "from; any image size is computed from that"
        )


FAMILY = Family("t2t_vit", f"a T2T-ViT has {', '.join(NEEDED)}", recognises, convert, adds_registers=True)
