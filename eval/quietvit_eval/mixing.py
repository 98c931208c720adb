"""Mixup and CutMix: images of a batch mixed in pairs, and their labels with them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor


@dataclass(frozen=True)
class Mixed:
    """`share` of each image (of its brightness, or its area) is of class `first`, the rest of class `second`."""

    images: UInt8[Tensor, "b 3 S S"]
    first: Int[Tensor, " b"]
    second: Int[Tensor, " b"]
    share: float


def mix(
    images: UInt8[Tensor, "b 3 S S"],
    labels: Int[Tensor, " b"],
    rng: np.random.Generator,
    *,
    mixup: float,
    cutmix: float,
) -> Mixed:
    """Image i with image b - 1 - i, by one share for the batch; where both kinds are on, each half of the time (timm).

    Mixup (Zhang et al. 2018) blends by a share drawn from Beta(mixup, mixup); CutMix (Yun et al. 2019) replaces a box
    of (1 - share) of the area, share from Beta(cutmix, cutmix), and counts what of it lies inside. 0 turns a kind off.
    """
    cut = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
    alpha = cutmix if cut else mixup
    if alpha == 0:
        return Mixed(images, labels, labels, 1.0)
    share = float(rng.beta(alpha, alpha))
    others, second = images.flip(0), labels.flip(0)
    if not cut:
        blended = images.float().mul_(share).add_(others.float().mul_(1 - share))
        return Mixed(blended.round_().to(torch.uint8), labels, second, share)
    height, width = images.shape[-2:]
    rows, columns = (_span(side, share, rng) for side in (height, width))
    out = images.clone()
    out[..., rows, columns] = others[..., rows, columns]
    inside = (rows.stop - rows.start) * (columns.stop - columns.start)
    return Mixed(out, labels, second, 1 - inside / (height * width))


def _span(side: int, share: float, rng: np.random.Generator) -> slice:
    """One side of the box: sqrt(1 - share) of the image's, about a random centre, cut at the border."""
    half = int(side * math.sqrt(1 - share)) // 2
    centre = int(rng.integers(side))
    return slice(max(0, centre - half), min(side, centre + half))
