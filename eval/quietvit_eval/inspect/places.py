"""Where high tokens sit: on the patch grid, and on what kind of patch (registers paper, figures 4 and 5a)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

BINS = 200  # of cosine similarity over [-1, 1] (ours)
REDUNDANT = 0.9  # ours: cosine similarity from which a patch is counted as like its neighbours


def share_map(high: Bool[np.ndarray, "M N"], grid: tuple[int, int]) -> Float64[np.ndarray, "h w"]:
    """Share of the images in which the patch at each place is high. Raises ValueError if N is not that of the grid."""
    if high.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"{high.shape[1]} patch tokens are not a grid of {grid[0]} x {grid[1]}")
    share: Float64[np.ndarray, "h w"] = high.mean(axis=0, dtype=np.float64).reshape(grid)
    return share


def border_share(high: Bool[np.ndarray, "M N"], grid: tuple[int, int]) -> tuple[float, float]:
    """Shares of the high tokens, and of all places, that lie in the outermost ring of the grid; the first nan if no
    token is high."""
    inside = np.zeros(grid, bool)
    inside[1:-1, 1:-1] = True
    ring = ~inside.ravel()
    counts = high.sum(axis=0)
    return (float(counts[ring].sum() / counts.sum()) if counts.sum() else float("nan")), float(ring.mean())


def neighbour_similarity(tokens: Float[Tensor, "b h w D"]) -> Float[Tensor, "b h w"]:
    """Mean cosine similarity of each token with its neighbours above, below, left and right, as many as there are.

    nan on a grid of one place. Tokens of zero length have similarity 0 with all.
    """
    unit = F.normalize(tokens, dim=-1)
    total = tokens.new_zeros(tokens.shape[:-1])
    count = tokens.new_zeros(tokens.shape[1:-1])
    down = (unit[:, 1:] * unit[:, :-1]).sum(-1)
    right = (unit[:, :, 1:] * unit[:, :, :-1]).sum(-1)
    for pairs, first, second in (
        (down, np.s_[:-1, :], np.s_[1:, :]),
        (right, np.s_[:, :-1], np.s_[:, 1:]),
    ):
        for half in (first, second):
            total[(slice(None), *half)] += pairs
            count[half] += 1
    return total / count


@dataclass
class Similarities:
    """Counts of similarities of high tokens (row 0) and of the rest (row 1), in BINS bins over [-1, 1]."""

    counts: Int64[np.ndarray, "2 bins"]

    @classmethod
    def none(cls) -> Similarities:
        return cls(np.zeros((2, BINS), np.int64))

    def add(self, similarity: Float[Tensor, "b N"], high: Bool[np.ndarray, "b N"]) -> None:
        """Count those of a batch; nan, of tokens without neighbours, is left out."""
        values = similarity.cpu().numpy()
        for row, chosen in enumerate((high, ~high)):
            some = values[chosen]
            some = np.clip(some[np.isfinite(some)], -1, 1)
            place = np.minimum(((some + 1) / 2 * BINS).astype(np.int64), BINS - 1)
            self.counts[row] += np.bincount(place, minlength=BINS)

    def about(self) -> dict[str, Any] | None:
        """For result.json; None if no token has a neighbour. Means and shares are those of bins 0.01 wide."""
        if not self.counts.sum():
            return None
        edges = np.linspace(-1, 1, BINS + 1)
        centres = (edges[1:] + edges[:-1]) / 2
        totals = self.counts.sum(axis=1)
        redundant = self.counts[:, centres > REDUNDANT].sum(axis=1)
        with np.errstate(invalid="ignore"):
            means, shares = self.counts @ centres / totals, redundant / totals
        return {
            "edges": edges.tolist(),
            "high": {"tokens": int(totals[0]), "mean": float(means[0]), "above_0.9": float(shares[0])},
            "rest": {"tokens": int(totals[1]), "mean": float(means[1]), "above_0.9": float(shares[1])},
            "counts": {"high": self.counts[0].tolist(), "rest": self.counts[1].tolist()},
            "more_alike": self.more_alike(),
        }

    def more_alike(self) -> float:
        """Probability that a high token, drawn at random, is more like its neighbours than one of the rest; ties, to
        the width of a bin, count half. nan where one of the groups is empty."""
        high, rest = (row / row.sum() if row.sum() else np.full(BINS, np.nan) for row in self.counts)
        below = rest.cumsum() - rest
        return float(high @ (below + rest / 2))
