"""What the shapes of a ViT's tensors, under quietvit's names, tell about it: arguments that rebuild it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from quietvit.weights.family import check_needed, count_blocks, ratio_of, square_grid, swiglu_ratio
from quietvit.weights.torch_file import list_names

__all__ = ["vit_arguments"]

NEEDED = {  # tensors without which nothing can be told, and how many axes they have
    "cls_token": 3,
    "pos_embed": 3,
    "patch_embed.proj.weight": 4,
    "blocks.0.norm1.weight": 1,
    "blocks.0.attn.qkv.weight": 2,
    "norm.weight": 1,
}
OPTIONAL = {"register_tokens": 3, "head.weight": 2}
FFN = {"swiglu": "blocks.0.mlp.w12", "mlp": "blocks.0.mlp.fc1"}


def vit_arguments(tensors: Mapping[str, Tensor], *, family: str) -> dict[str, Any]:
    """Arguments of `make_backbone("vit", ...)` but for `num_heads`, `norm_eps`, `activation` and how positions resize.

    Only names and shapes are looked at, so tensors may be on the meta device. Raises ValueError, naming `family`, for
    tensors that are no square ViT over RGB images with a class token.
    """
    check_needed(tensors, {**NEEDED, **{k: n for k, n in OPTIONAL.items() if k in tensors}}, family=family)
    embed_dim = tensors["cls_token"].shape[-1]
    channels, height, width = tensors["patch_embed.proj.weight"].shape[1:]
    if channels != 3 or height != width:
        raise ValueError(f"its patches are {height} x {width} pixels of {channels} channels; here they are square, RGB")
    return {
        "patch_size": width,
        "image_size": square_grid(tensors["pos_embed"].shape[1] - 1) * width,
        "embed_dim": embed_dim,
        "depth": count_blocks(tensors),
        **_feed_forward(tensors, embed_dim, family),
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "proj_bias": "blocks.0.attn.proj.bias" in tensors,
        "num_registers": tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0,
        "layer_scale": 1e-5 if "blocks.0.ls1.gamma" in tensors else 0.0,  # the value is overwritten by the file
        "pre_norm": "norm_pre.weight" in tensors,
        "num_classes": len(tensors["head.weight"]) if "head.weight" in tensors else 0,
    }


def _feed_forward(tensors: Mapping[str, Tensor], embed_dim: int, family: str) -> dict[str, Any]:
    kind = next((k for k, name in FFN.items() if f"{name}.weight" in tensors), None)
    if kind is None:
        raise ValueError(
            f"this is not a {family} backbone: its first block has neither an MLP nor a SwiGLU, but "
            + list_names(k for k in tensors if k.startswith("blocks.0."))
        )
    hidden = len(tensors[f"{FFN[kind]}.weight"])
    ratio = swiglu_ratio(hidden // 2, embed_dim) if kind == "swiglu" else ratio_of(hidden, embed_dim)
    return {"ffn": kind, "mlp_ratio": ratio, "ffn_bias": f"{FFN[kind]}.bias" in tensors}
