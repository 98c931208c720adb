"""LOST: a seed patch that few others resemble, the patches that go with it, and the box around them.

Siméoni et al. 2021, "Localizing Objects with Self-Supervised Transformers and no Labels", section 3, as its released
code has it where the two differ. "Similar" is A_ij + b > 0 with A = F F^T; LOST has b = 0, the registers paper adds a
constant by hand (section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

CANDIDATES = 100  # LOST, section 4.1: k
BLOCK = 2**22  # similarities held at a time (ours: 16 MiB; a photograph of 2000 x 1500 pixels has 234 million)


@dataclass(frozen=True)
class Discovery:
    """What LOST finds in one image."""

    seed: int  # patch, row-major
    mask: Bool[
        np.ndarray, "h w"
    ]  # the connected region of the seed; all False if it goes with nothing, itself included
    tied: bool  # every patch has the same degree, so that nothing but its place made the seed

    @property
    def cells(self) -> tuple[int, int, int, int] | None:
        """Left, top, right, bottom of the region in patches, the last two exclusive; None if it is empty."""
        if not self.mask.any():
            return None
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def discover(
    features: Float[Tensor, "N D"],
    grid: tuple[int, int],
    *,
    bias: float = 0.0,
    k: int = CANDIDATES,
    expand: bool = True,
) -> Discovery:
    """LOST on the patch features of one image, N = h * w row-major.

    1. The degree of a patch is the number of other patches similar to it. The seed s* has the least degree, the first
       in row-major order where several have.
    2. The k patches of least degree, ties in row-major order, are candidates; S holds those of them similar to s*.
    3. The mask is where sum_{s in S} (A_si + b) > 0; without `expand`, where A_s*i + b > 0.
    4. Of the mask the 4-connected region with s* is kept; nothing if s* is not in the mask, which only a bias below
       -|F_s*|^2, or a feature of zeros, can bring about.
    """
    return discover_each(features, grid, [bias], k=k, expand=expand)[0]


def discover_each(
    features: Float[Tensor, "N D"],
    grid: tuple[int, int],
    biases: Sequence[float],
    *,
    k: int = CANDIDATES,
    expand: bool = True,
) -> list[Discovery]:
    """`discover` for each of several biases, from one pass over the similarities."""
    assert len(features) == grid[0] * grid[1], f"{len(features)} patches on a grid of {grid}"
    found = []
    for bias, degree in zip(biases, degrees(features, biases), strict=True):
        order = torch.sort(degree, stable=True).indices
        seed = int(order[0])
        similar_to_seed = features @ features[seed] + bias
        if expand:
            candidates = order[:k]
            chosen = features[candidates[similar_to_seed[candidates] > 0]]
            joined = features @ chosen.sum(0) + len(chosen) * bias
        else:
            joined = similar_to_seed
        mask = (joined > 0).reshape(grid).cpu().numpy()
        tied = bool(degree.min() == degree.max())
        found.append(Discovery(seed, region_of(mask, divmod(seed, grid[1])), tied))
    return found


def degrees(features: Float[Tensor, "N D"], biases: Sequence[float]) -> Int64[Tensor, "biases N"]:
    """How many other patches are similar to each, for each bias."""
    num = len(features)
    counts = torch.empty(len(biases), num, dtype=torch.int64, device=features.device)
    rows = max(1, BLOCK // num)
    for start in range(0, num, rows):
        similarity = features[start : start + rows] @ features.T
        own = similarity.diagonal(start)
        for count, bias in zip(counts, biases, strict=True):
            count[start : start + rows] = (similarity > -bias).sum(1) - (own > -bias).long()
    return counts


def region_of(mask: Bool[np.ndarray, "h w"], cell: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """The 4-connected region of the mask around a cell (row, column); all False if the cell is not in the mask."""
    if not mask[cell]:
        return np.zeros_like(mask)
    labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)[1]
    region: np.ndarray = labels == labels[cell]
    return region


def centred(features: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    """Features less their mean over the image."""
    return features - features.mean(0)
