"""AdamW with layer-wise learning rates, and gradient clipping of each submodule on its own (DINOv2)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from quietvit import dist

__all__ = ["apply_schedule", "clip_by_module", "make_optimizer", "parameter_groups"]

# Everything before the first block: tokens, position table, patch stem, tokens-to-token stem, CLIP's first norm.
FIRST_LAYER = (
    "pos_embed",
    "patch_embed",
    "tokens_to_token",
    "cls_token",
    "mask_token",
    "register_tokens",
    "storage_tokens",
    "norm_pre",
)
STEM = ("patch_embed", "tokens_to_token")
BLOCK = re.compile(r"(?:^|\.)blocks\.(?:\d+\.)?(\d+)\.")  # blocks.7. or, in chunks, blocks.1.7.


def parameter_groups(
    modules: Mapping[str, nn.Module],
    *,
    num_blocks: int,
    layer_decay: float,
    patch_embed_lr_mult: float,
    decay_tokens: bool,
) -> list[dict[str, Any]]:
    """Trainable parameters of the submodules, grouped by learning rate and weight decay multiplier.

    Learning rate: layer_decay ** (num_blocks + 1 - l) with l = 0 for tokens, position table and stem, l = i + 1 for
    block i, and l = num_blocks + 1 for the final norm and the heads; the stem additionally times
    `patch_embed_lr_mult`. Weight decay: none for biases, norms and LayerScale. The other tokens, the position table
    and the prototypes' lengths decay as in DINOv2 if `decay_tokens`, and do not otherwise.

    Each group is {"params", "names", "lr_mult", "wd_mult", "is_last_layer"}. Names start with the submodule's key;
    groups and parameters come in the order of first appearance, so that an optimizer state finds its way back.
    """
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    for key, module in modules.items():
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            lr_mult = layer_decay ** (num_blocks + 1 - _layer(name, num_blocks))
            if any(part in name for part in STEM):
                lr_mult *= patch_embed_lr_mult
            wd_mult = 1.0 if _decays(name, parameter, decay_tokens) else 0.0
            of = (lr_mult, wd_mult, "last_layer" in name)
            if of not in groups:
                groups[of] = {"params": [], "names": [], "lr_mult": of[0], "wd_mult": of[1], "is_last_layer": of[2]}
            groups[of]["params"].append(parameter)
            groups[of]["names"].append(f"{key}.{name}")
    return list(groups.values())


def _layer(name: str, num_blocks: int) -> int:
    if any(part in name for part in FIRST_LAYER):
        return 0
    block = BLOCK.search(name)
    return int(block[1]) + 1 if block else num_blocks + 1


def _decays(name: str, parameter: Tensor, decay_tokens: bool) -> bool:
    if name.endswith(".bias") or "norm" in name or "gamma" in name:
        return False
    token = name.endswith(("pos_embed", "_token", "_tokens", "weight_g")) or parameter.ndim <= 1
    return decay_tokens or not token


def make_optimizer(
    groups: Iterable[dict[str, Any]],
    betas: tuple[float, float] = (0.9, 0.999),  # DINOv2
    eps: float = 1e-8,  # DINOv2 (PyTorch's own)
) -> torch.optim.AdamW:
    """AdamW over parameter_groups; rates are zero until apply_schedule sets them. Fused where all parameters are on
    CUDA."""
    groups = list(groups)
    fused = all(p.is_cuda for group in groups for p in group["params"])
    return torch.optim.AdamW(
        groups, lr=0.0, betas=betas, eps=eps, weight_decay=0.0, fused=fused or None, foreach=None if fused else True
    )


def apply_schedule(optimizer: torch.optim.Optimizer, *, lr: float, last_layer_lr: float, weight_decay: float) -> None:
    """Set this step's rates on every group, times the group's multipliers."""
    for group in optimizer.param_groups:
        group["lr"] = (last_layer_lr if group["is_last_layer"] else lr) * group["lr_mult"]
        group["weight_decay"] = weight_decay * group["wd_mult"]


def clip_by_module(modules: Mapping[str, nn.Module], max_norm: float) -> dict[str, Float[Tensor, ""]]:
    """Scale each submodule's gradient down to an L2 norm of at most `max_norm`; returns the norms from before.

    A norm that is not finite names the submodule whose gradient is broken (its gradient is then spoilt: skip the
    step). Nothing is read back from the device.
    """
    norms = {}
    for key, module in modules.items():
        norm = nn.utils.clip_grad_norm_(module.parameters(), max_norm, foreach=True)
        norms[key] = dist.whole(norm)
    return norms
