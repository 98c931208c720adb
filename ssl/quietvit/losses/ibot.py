"""Patch loss: a masked patch must take the prototypes the teacher gives it unmasked (iBOT, arXiv 2111.07832, eq.
2)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from quietvit.losses.cross_entropy import soft_cross_entropy

__all__ = ["ibot_loss"]


def ibot_loss(
    logits: Float[Tensor, "M K"],
    targets: Float[Tensor, "M K"],
    weights: Float[Tensor, " M"],
    *,
    num_crops: float | Float[Tensor, ""],
    temp: float,
) -> Float[Tensor, ""]:
    """(1 / num_crops) sum_i w_i H(targets[i], softmax(logits[i] / temp)) over masked patches i, w_i = 1 / masks in
    its crop.

    `num_crops` is the denominator. DINOv2 and iBOT count every global crop of the batch, masked or not: with half of
    the crops masked, the mean over masked patches has an effective weight of 1/2. Counting masked crops only gives
    the plain mean over masked crops. Zero if there is no masked patch.
    """
    rows = soft_cross_entropy(logits, targets, temp=temp)
    return (rows * weights.float()).sum() / num_crops
