"""How sure a score is: scores of test sets drawn again from the images of the test set (the bootstrap; Efron 1979)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

DRAWS = 1000  # Efron and Tibshirani 1993: enough for 95 % intervals


@dataclass(frozen=True)
class PerImage:
    """What a task found on every single test image: enough to score any other draw of them.

    rule "mean": `values` are by name of a score [M], and that score is their mean over images.
    rule "iou": `values` are pixel counts "intersection", "predicted" and "target", each [M C], and the scores come from
    their sums over images (`quietvit_eval.segmentation.metrics.scores_of_counts`).
    """

    names: list[str]  # of the images, in the order of the rows
    values: dict[str, np.ndarray]
    rule: str = "mean"

    def __post_init__(self) -> None:
        wrong = {k: len(v) for k, v in self.values.items() if len(v) != len(self.names)}
        assert not wrong, f"{len(self.names)} images, but rows: {wrong}"


def draws(count: int, seed: int, num: int = DRAWS) -> Iterator[Int64[np.ndarray, " M"]]:
    """How often each of `count` images comes, in `num` draws of as many images with replacement."""
    rng = np.random.default_rng(seed)
    for _ in range(num):
        yield np.bincount(rng.integers(0, count, count), minlength=count)


def rescored(per_image: PerImage, main: str, weights: Int64[np.ndarray, " M"]) -> float:
    """The score `main` of a test set in which image i comes weights[i] times."""
    if per_image.rule == "mean":
        return float(weights @ per_image.values[main] / weights.sum())
    from quietvit_eval.segmentation.metrics import scores_of_counts

    # Products of floats are quick, and exact up to 2^53 pixels.
    sums = {name: weights.astype(np.float64) @ counts.astype(np.float64) for name, counts in per_image.values.items()}
    whole = {name: np.rint(values).astype(np.int64) for name, values in sums.items()}
    return scores_of_counts(whole["intersection"], whole["predicted"], whole["target"])[main]


def bootstrap(per_image: PerImage, main: str, *, seed: int = 0, num: int = DRAWS) -> Float64[np.ndarray, " num"]:
    """The score in each of `num` draws."""
    count = len(per_image.names)
    return np.array([rescored(per_image, main, weights) for weights in draws(count, seed, num)])


def standard_error(per_image: PerImage, main: str) -> float:
    """Of a mean over images sqrt(variance / M), for a share of hits thus sqrt(p (1 - p) / M); else by bootstrap."""
    if per_image.rule == "mean":
        return float(np.std(per_image.values[main]) / np.sqrt(len(per_image.names)))
    return float(np.nanstd(bootstrap(per_image, main, num=200)))
