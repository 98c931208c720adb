"""What patch tokens know of their own patch: linear probes of its place and of its pixels (registers paper, 4.1).

Both are trained on tokens of all places of some images, and asked about high tokens and the rest of other images. The
view of every image is the same resize and central crop, so that a place is a place on one fixed grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor

from quietvit_eval.resampling import DRAWS, draws

GROUPS = ("high", "rest")
# The paper prints neither optimiser nor schedule of its linear layers. All ours; test_inspect_artifacts_probes.py holds
# them against tokens of which it is known what they tell.
EPOCHS = 10
LEAST_STEPS = 300  # for few tokens
BATCH = 1024
LEARNING_RATE = 0.01  # of Adam, on channels of unit variance; falls to 0 as a cosine
RIDGE = 1e-6  # of the mean variance of a channel: normed tokens lie in a hyperplane, where the plain solution fails
CHUNK = 4096  # tokens whose scores are held at a time

Tokens = Float[Tensor, "n D"]


@dataclass(frozen=True)
class Linear:
    """A linear layer on tokens as they come: tokens @ weight.T + bias."""

    weight: Float[Tensor, "out D"]
    bias: Float[Tensor, " out"]

    def __call__(self, tokens: Tokens) -> Float[Tensor, "n out"]:
        return tokens.to(self.weight) @ self.weight.T + self.bias


def fit_positions(tokens: Tokens, positions: Int[Tensor, " n"], count: int, *, seed: int) -> Linear:
    """A linear layer that tells which of `count` places a token comes from: cross-entropy, on the tokens' device.

    Channels are centred and brought to unit variance for the training; the layer returned takes tokens as they are.
    """
    x = tokens.float()
    mean, std = x.mean(0), x.std(0, correction=0)
    std = std.clamp(min=1e-6 * float(std.max()) + 1e-30)
    weight = torch.zeros(count, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(count, device=x.device, requires_grad=True)
    steps = max(LEAST_STEPS, EPOCHS * -(-len(x) // BATCH))
    optimiser = torch.optim.Adam([weight, bias], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if not len(order):
            order = torch.randperm(len(x), generator=generator)
        rows, order = order[:BATCH].to(x.device), order[BATCH:]
        optimiser.zero_grad()
        F.cross_entropy(F.linear((x[rows] - mean) / std, weight, bias), positions[rows]).backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        scaled = weight / std
        return Linear(scaled.detach(), (bias - scaled @ mean).detach())


@dataclass
class PixelFit:
    """Least squares from tokens to the pixels of their patch, over as many tokens as there are in memory of D (D + P):
    sums of products in float64."""

    sums: tuple[Tensor, ...] | None = None
    tokens: int = 0

    def add(self, tokens: Tokens, pixels: Float[Tensor, "n P"]) -> None:
        """Take in tokens and what they should tell."""
        x, y = tokens.double(), pixels.double()
        new = (x.sum(0), y.sum(0), x.T @ x, x.T @ y)
        self.sums = new if self.sums is None else tuple(a + b for a, b in zip(self.sums, new, strict=True))
        self.tokens += len(x)

    def solve(self) -> Linear:
        """The regression with its intercept; RIDGE keeps directions that tokens do not have out of it."""
        assert self.sums is not None
        x, y, xx, xy = self.sums
        mean, wanted = x / self.tokens, y / self.tokens
        spread = xx / self.tokens - mean.outer(mean)
        shared = xy / self.tokens - mean.outer(wanted)
        ridge = RIDGE * float(spread.diagonal().mean()) + 1e-30
        weight = torch.linalg.solve(spread + ridge * torch.eye(len(mean)).to(spread), shared).T
        return Linear(weight, wanted - weight @ mean)

    @property
    def mean_pixels(self) -> Float[Tensor, " P"]:
        """The answer that knows nothing of the token."""
        assert self.sums is not None
        return self.sums[1] / self.tokens


def patch_pixels(images: Float[Tensor, "b 3 H W"], patch: int) -> Float[Tensor, "b N 3*P*P"]:
    """Normalised pixels of each place of the grid, row-major."""
    return F.unfold(images, patch, stride=patch).transpose(1, 2)


def places_of(grid: tuple[int, int]) -> Float[Tensor, "N 2"]:
    """Row and column of each place."""
    return torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).float()


def distance_of_a_guess(grid: tuple[int, int]) -> float:
    """Mean Euclidean distance, in patches, between two places drawn independently."""
    places = places_of(grid).double()
    return float(torch.cdist(places, places).mean())


@dataclass
class Answers:
    """Sums over the tokens of each test image, by what was asked: the high ones (column 0) and the rest (column 1)."""

    grid: tuple[int, int]
    counts: list[Int64[np.ndarray, "b 2"]] = field(default_factory=list)
    sums: dict[str, list[Float64[np.ndarray, "b 2"]]] = field(default_factory=dict)

    def add(self, values: Mapping[str, Float[Tensor, "b N"]], high: Bool[np.ndarray, "b N"]) -> None:
        """What was found for each token of a batch of images."""
        groups = np.stack([high, ~high], axis=-1)
        self.counts.append(groups.sum(axis=1))
        for name, found in values.items():
            self.sums.setdefault(name, []).append((found.double().cpu().numpy()[..., None] * groups).sum(axis=1))

    def ask_places(self, probe: Linear, tokens: Float[Tensor, "b N D"]) -> dict[str, Float[Tensor, "b N"]]:
        """Whether the place said is right, and how far off it is, in patches."""
        said = torch.cat([probe(part).argmax(1) for part in tokens.flatten(0, 1).split(CHUNK)])
        said = said.view(tokens.shape[:2])
        places, true = places_of(self.grid).to(tokens.device), torch.arange(tokens.shape[1], device=tokens.device)
        off = torch.linalg.vector_norm(places[said] - places[true], dim=-1)
        return {"top1": (said == true).float(), "distance": off}

    @staticmethod
    def ask_pixels(
        probe: Linear, mean: Float[Tensor, " P"], tokens: Float[Tensor, "b N D"], pixels: Float[Tensor, "b N P"]
    ) -> dict[str, Float[Tensor, "b N"]]:
        """Norm of what is left of the patch's normalised pixels: after the probe's answer, and after the mean patch."""
        wanted = pixels.to(probe.weight)
        answer = probe(tokens.flatten(0, 1)).view(wanted.shape)
        return {
            "pixel_error": torch.linalg.vector_norm(wanted - answer, dim=-1),
            "pixel_error_of_mean": torch.linalg.vector_norm(wanted - mean, dim=-1),
        }

    def about(self, *, seed: int) -> dict[str, Any]:
        """For each figure its mean over tokens in both groups, and their difference, with 95 % intervals by bootstrap
        over images (DRAWS draws); None where a group has no tokens."""
        counts = np.concatenate(self.counts)
        weights = np.stack(list(draws(len(counts), seed, DRAWS)))
        out: dict[str, Any] = {
            "tokens": dict(zip(GROUPS, counts.sum(axis=0).tolist(), strict=True)),
            "images": len(counts),
        }
        for name, parts in self.sums.items():
            sums = np.concatenate(parts)
            with np.errstate(invalid="ignore", divide="ignore"):
                mean, drawn = sums.sum(axis=0) / counts.sum(axis=0), (weights @ sums) / (weights @ counts)
            out[name] = {
                "high": _estimate(mean[0], drawn[:, 0]),
                "rest": _estimate(mean[1], drawn[:, 1]),
                "difference": _estimate(mean[0] - mean[1], drawn[:, 0] - drawn[:, 1]),
            }
        return out


def _estimate(value: float, drawn: Float64[np.ndarray, " draws"]) -> dict[str, float] | None:
    if not np.isfinite(value):
        return None
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high)}
