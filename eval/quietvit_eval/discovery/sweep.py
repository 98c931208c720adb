"""The bias that is added to similarities: a fixed scale of candidates, and the one that finds most objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from quietvit_eval.discovery.lost import BLOCK

# Shares of the similarities within an image that a candidate makes negative, beside the bias of 0 (ours: wide enough
# for any model, close enough that neighbours score alike).
LEVELS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Candidate:
    """A bias, and how many of the tuning images' boxes it gets right."""

    level: float | None  # which quantile of the similarities; None: the bias of 0, which is LOST's own
    bias: float
    corloc: float
    tied: int  # images whose patches all have the same degree
    without_box: int


def quantiles(features: Float[Tensor, "N D"], levels: Sequence[float]) -> Float64[np.ndarray, " levels"]:
    """Quantiles of the similarities of two different patches of one image, NaN for an image of one patch.

    Of images with more similarities than BLOCK, those of rows at even distances are taken.
    """
    num = len(features)
    if num < 2:
        return np.full(len(levels), np.nan)
    count = min(num, max(1, BLOCK // num))
    rows = (torch.arange(count, device=features.device) * num) // count
    similarity = (features[rows] @ features.T).cpu().double().numpy()
    others = np.ones(similarity.shape, bool)
    others[np.arange(count), rows.cpu().numpy()] = False
    found: np.ndarray = np.quantile(similarity[others], levels)
    return found


def candidates(
    of_images: Sequence[Float64[np.ndarray, " levels"]], levels: Sequence[float]
) -> list[tuple[float | None, float]]:
    """(level, bias): 0, then for each level minus the mean over images of that quantile.

    Raises ValueError if no image has two patches.
    """
    known = [q for q in of_images if not np.isnan(q).any()]
    if not known:
        raise ValueError("no image of those to choose the bias on has two patches: their sides are too small")
    means = np.mean(known, axis=0)
    return [(None, 0.0), *((level, -float(mean)) for level, mean in zip(levels, means, strict=True))]


def best(found: Sequence[Candidate]) -> Candidate:
    """The greatest CorLoc; of several, the bias nearest to 0."""
    return min(found, key=lambda c: (-c.corloc, abs(c.bias)))
