"""Reads state dicts of timm's plain ViTs: DINOv2 with and without registers, augreg, DeiT, DeiT-III, CLIP towers.

Names are those of timm 1.0 `VisionTransformer` (models/vision_transformer.py), and of DeiT-III's original files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from quietvit.weights.family import (
    IMAGENET,
    MASK_TOKEN_NOTE,
    Converted,
    Hints,
    Normalisation,
    count_heads,
    mask_token,
)
from quietvit.weights.torch_file import plain_names
from quietvit.weights.vit_shapes import vit_arguments

__all__ = ["ABOUT", "NORM_EPS", "PRE_NORM_EPS", "convert", "recognises"]

ABOUT = "a timm ViT has cls_token, pos_embed, patch_embed.proj.weight, blocks.0.attn.qkv.weight, and no mask_token"
NORM_EPS = 1e-6  # timm's LayerNorm
PRE_NORM_EPS = 1e-5  # all CLIP towers of timm, which are the ones with norm_pre
FOREIGN = ("mask_token", "register_tokens", "tokens_to_token.")  # DINOv2's and T2T-ViT's own names
GAMMA = re.compile(r"\.gamma_([12])$")  # DeiT-III's original files
RENAMED = {"reg_token": "register_tokens"}
PACKED = {".mlp.fc1.": ".mlp.w12.", ".mlp.fc2.": ".mlp.w3."}  # timm's SwiGLUPacked, gate first like ours

# What some name says that quietvit's ViT does not have; asked in this order.
REFUSED: Mapping[str, str] = {
    r"^patch_embed\.(backbone|conv|norm)|^stem\.": "its stem is a convolutional network, or ends in a norm",
    r"^dist_token$|^head_dist\.": "it was distilled, with a second class token (dist_token)",
    r"^attn_pool\.": "it pools by attention (attn_pool), and has no class token to read",
    r"\.(q_norm|k_norm|attn\.norm|mlp\.norm)\.": "it norms inside attention or MLP (qk_norm, scale_norm)",
    r"rope": "its positions are rotary (rope)",
    r"rel_pos|relative_position": "its positions are relative",
    r"\.attn\.(q_proj|q_bias|v_bias)": "it is an EVA or BEiT, with attention weights of its own kind",
    r"^blocks\.\d+\.(attns|in_proj|attn_out_proj)\b": "its blocks run in parallel",
    r"^fc_norm\.": "it averages its patches and norms the average (fc_norm), so that no token is made to be read alone",
}


def recognises(keys: Collection[str]) -> bool:
    """Whether these are names of a timm ViT, perhaps of one that cannot be read (`convert` says why)."""
    stem = any(k.startswith("patch_embed.") for k in keys)
    return stem and any(k.startswith("blocks.0.") for k in keys) and not any(k.startswith(FOREIGN) for k in keys)


def convert(
    tensors: Mapping[str, Tensor], hints: Hints, *, norm_eps: float | None = None, pool: str = "token"
) -> Converted:
    """Tensors of a timm ViT as ours; the mask token, which timm drops, is zeros.

    A position table without a row for the class token gets a row of zeros (timm adds DINOv2's row to `cls_token`);
    rows for registers are added to them. A table of n rows that fits with and without such rows is taken to be
    without, as in all register models of timm. `norm_eps` and `pool` are what a configuration says: without one the
    former is timm's for such names, and a class head reads the class token. Positions are resized to a given size with
    antialiasing (timm, layers/pos_embed.py).

    Raises ValueError, saying why, for a ViT that quietvit's cannot express.
    """
    _refuse(tensors)
    ours = plain_names(tensors, lambda key: RENAMED.get(key, GAMMA.sub(r".ls\1.gamma", key)), what="this file")
    notes = [MASK_TOKEN_NOTE]
    if pool != "token" and "head.weight" in ours:
        ours = {k: v for k, v in ours.items() if not k.startswith("head.")}
        notes.append(f"class head: left out, it reads {pool!r}-pooled tokens and not the class token alone")
    if _is_packed(ours):
        ours = {_unpacked(k): v for k, v in ours.items()}
    class_row = _place_positions(ours)
    arguments = vit_arguments(ours, family="timm")
    embed_dim = arguments["embed_dim"]
    ours["mask_token"] = mask_token(embed_dim)
    if "patch_embed.proj.bias" not in ours:
        ours["patch_embed.proj.bias"] = torch.zeros(embed_dim)
        notes.append("bias of the patch stem: zeros, the file has none")
    heads, reason = count_heads(embed_dim, hints)
    activation = hints.activation or "gelu"
    if arguments["pre_norm"] and hints.activation is None:
        notes.append("activation: GELU assumed, which the names do not tell from QuickGELU (OpenAI's CLIP)")
    arguments |= {
        "num_heads": heads,
        "norm_eps": norm_eps or (PRE_NORM_EPS if arguments["pre_norm"] else NORM_EPS),
        "activation": activation if arguments["ffn"] == "mlp" else "gelu",
        "pos_interpolation": "size",
        "pos_antialias": True,
    }
    normalisation = hints.normalisation or _told_normalisation(arguments, class_row)
    if hints.normalisation is None and normalisation is not None:
        notes.append("normalisation: ImageNet's, as of the released models with these names and shapes")
    return Converted(
        "vit", arguments, ours, normalisation, arguments["image_size"], tuple(notes), {"heads": reason}
    )  # fmt: skip


def _refuse(tensors: Mapping[str, Tensor]) -> None:
    for pattern, reason in REFUSED.items():
        if found := next((k for k in tensors if re.search(pattern, k)), None):
            raise ValueError(f"this timm ViT cannot be read: {reason}. Its names include {found}")
    if "cls_token" not in tensors:
        raise ValueError(
            "this timm ViT cannot be read: it has no class token (cls_token), which quietvit's features need"
        )


def _is_packed(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the MLP is timm's SwiGLUPacked: fc1 makes gate and value, and so is twice as wide as fc2's input."""
    first, second = (tensors.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    two = first is not None and second is not None and first.ndim == second.ndim == 2
    return two and len(first) == 2 * second.shape[1]  # type: ignore[arg-type, union-attr]


def _unpacked(key: str) -> str:
    for theirs, ours in PACKED.items():
        key = key.replace(theirs, ours)
    return key


def _place_positions(tensors: dict[str, Tensor]) -> bool:
    """Give the table a row for the class token and none for registers; whether it had one for the class token."""
    table, registers = tensors.get("pos_embed"), tensors.get("register_tokens")
    if table is None or table.ndim != 3 or (registers is not None and registers.ndim != 3):
        return True  # `vit_arguments` says what is wrong
    if math.isqrt(table.shape[1]) ** 2 == table.shape[1]:
        tensors["pos_embed"] = torch.cat((torch.zeros_like(table[:, :1]), table), dim=1)
        return False
    if registers is not None:
        first = 1 + registers.shape[1]
        tensors["register_tokens"] = registers.float() + table[:, 1:first].float()
        tensors["pos_embed"] = torch.cat((table[:, :1], table[:, first:]), dim=1)
    return True


def _told_normalisation(arguments: Mapping[str, Any], class_row: bool) -> Normalisation | None:
    """ImageNet's for DINOv2 and DeiT-III, which have layer scale; other ViTs were trained with one or the other.

    DINOv2: patches of 14 pixels, 0 or 4 registers (with 1 it is TIPS, which has another). DeiT-III: no row for the
    class token in the position table.
    """
    if not arguments["layer_scale"] or arguments["pre_norm"]:
        return None
    dinov2 = arguments["patch_size"] == 14 and arguments["num_registers"] in (0, 4)
    deit3 = not class_row and not arguments["num_registers"]
    return IMAGENET if dinov2 or deit3 else None
