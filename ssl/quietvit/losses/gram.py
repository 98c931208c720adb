"""Gram anchoring: keep the similarities between patches as an earlier teacher had them (DINOv3, arXiv 2508.10104)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["gram_loss"]


def gram_loss(
    patches: Float[Tensor, "B N D"],
    anchors: Float[Tensor, "B N D"],
    *,
    per_image: bool = True,
    normalize: bool = True,
    negatives: str = "drop",
) -> Float[Tensor, ""]:
    """Mean over all entries of (X X^T - Y Y^T)^2, X the student's patch features and Y the anchor's, in float32.

    `per_image` compares N x N matrices, else one (B N) x (B N) matrix over the whole batch. `normalize` makes
    features unit length first. Similarities below zero: "drop" sets them to 0 on both sides (DINOv3's default),
    "drop_anchor" on the anchor's side only, "keep" leaves them. Raises ValueError for another.
    """
    if negatives not in ("keep", "drop", "drop_anchor"):
        raise ValueError(f"negatives must be 'keep', 'drop' or 'drop_anchor', not {negatives!r}")
    with torch.autocast(patches.device.type, enabled=False):
        x, y = patches.float(), anchors.detach().float()
        if normalize:
            x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
        if not per_image:
            x, y = x.flatten(0, 1), y.flatten(0, 1)
        student, anchor = x @ x.mT, y @ y.mT
        if negatives != "keep":
            anchor = anchor.clamp_min(0.0)
        if negatives == "drop":
            student = student.clamp_min(0.0)
        return (student - anchor).square().mean()
