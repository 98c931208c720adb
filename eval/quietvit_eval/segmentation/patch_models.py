"""Classifiers of single patches: k nearest neighbours, each with one vote, and multinomial logistic regression."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from torch import Tensor

COSINE, L2 = "cosine", "l2"
CHUNK = 8192  # bank rows and queries that meet at a time (ours: 256 MiB)


class PatchModel(Protocol):
    """Gives every patch a class."""

    def __call__(self, features: Float[Tensor, "Q D"]) -> Int64[np.ndarray, " Q"]: ...


@dataclass(frozen=True)
class Scaling:
    """Brings every channel to mean 0 and standard deviation 1 over the patches it was made from; constant ones to 0."""

    mean: Float[Tensor, " D"]
    std: Float[Tensor, " D"]

    @classmethod
    def of(cls, features: Float[Tensor, "M D"]) -> Scaling:
        """Sums are taken in double precision, a chunk at a time."""
        count = len(features)
        mean = sum((part.double().sum(dim=0) for part in features.split(CHUNK)), start=torch.tensor(0.0)) / count
        square = sum(((part.double() - mean).square().sum(dim=0) for part in features.split(CHUNK)), torch.tensor(0.0))
        std = (square / count).sqrt()
        return cls(mean.float(), torch.where(std > 0, std, 1.0).float())

    def __call__(self, features: Float[Tensor, "Q D"]) -> Float[Tensor, "Q D"]:
        return (features - self.mean.to(features)) / self.std.to(features)


class Neighbours:
    """The bank of a k-NN over patches."""

    def __init__(
        self, features: Float[Tensor, "M D"], labels: Int[Tensor, " M"], metric: str, num_classes: int
    ) -> None:
        """`features`: on the device where neighbours are looked for, not scaled yet."""
        self.scaling, self.metric, self.num_classes = Scaling.of(features.cpu()), metric, num_classes
        self.bank, self.labels = self._prepared(features), labels.to(features.device)
        self.half_squares = self.bank.square().sum(dim=1) / 2

    def _prepared(self, features: Tensor) -> Tensor:
        scaled = self.scaling(features)
        return F.normalize(scaled, dim=1) if self.metric == COSINE else scaled

    def nearest(self, queries: Float[Tensor, "Q D"], count: int) -> Int[Tensor, "Q k"]:
        """Bank rows, the nearest first; `count` of them or the whole bank."""
        count = min(count, len(self.bank))
        return torch.cat([self._nearest(part, count) for part in queries.split(CHUNK)])

    def _nearest(self, queries: Tensor, count: int) -> Tensor:
        queries = self._prepared(queries.to(self.bank))
        values = queries.new_empty(len(queries), 0)
        rows = self.labels.new_empty(len(queries), 0)
        for start in range(0, len(self.bank), CHUNK):
            part = slice(start, start + CHUNK)
            # Of equal order as minus the distance: |q - b|^2 = |q|^2 - 2 (q b - |b|^2 / 2); cosines have |b| = 1.
            near = queries @ self.bank[part].T - self.half_squares[part]
            best = near.topk(min(count, near.shape[1]), dim=1)
            values, rows = torch.cat([values, best.values], dim=1), torch.cat([rows, best.indices + start], dim=1)
            kept = values.topk(min(count, values.shape[1]), dim=1)
            values, rows = kept.values, rows.gather(1, kept.indices)
        return rows

    def vote(self, nearest: Int[Tensor, "Q K"], k: int) -> Int64[np.ndarray, " Q"]:
        """The class of most of the first k neighbours; of equally many the lowest."""
        labels = self.labels[nearest[:, :k]]
        votes = torch.zeros(len(labels), self.num_classes, device=labels.device)
        votes.scatter_add_(1, labels, torch.ones_like(labels, dtype=votes.dtype))
        classes: Int64[np.ndarray, " Q"] = votes.argmax(dim=1).cpu().numpy()
        return classes

    def model(self, k: int) -> PatchModel:
        return lambda features: self.vote(self.nearest(features, k), k)


@dataclass(frozen=True)
class Logistic:
    """A fitted regression."""

    scaling: Scaling
    regression: Any  # scikit-learn's
    converged: bool

    def __call__(self, features: Float[Tensor, "Q D"]) -> Int64[np.ndarray, " Q"]:
        classes: Int64[np.ndarray, " Q"] = self.regression.predict(self.scaling(features.cpu()).numpy())
        return classes


def fit_logistic(features: Float[Tensor, "M D"], labels: Int[Tensor, " M"], c: float, max_iter: int) -> Logistic:
    """Multinomial, L2 penalty |W|^2 / 2 beside `c` times the summed loss, L-BFGS.

    Raises ValueError for patches of one class only.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if len(found := labels.unique()) < 2:
        raise ValueError(f"all {len(labels)} train patches are of class {found.tolist()[0]}: nothing to tell apart")
    scaling = Scaling.of(features.cpu())
    regression = LogisticRegression(C=c, max_iter=max_iter)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        regression.fit(scaling(features.cpu()).numpy(), labels.cpu().numpy())
    return Logistic(scaling, regression, not any(issubclass(w.category, ConvergenceWarning) for w in caught))


def knn_predictions(
    neighbours: Neighbours, queries: Float[Tensor, "Q D"], ks: Sequence[int]
) -> dict[int, Int64[np.ndarray, " Q"]]:
    """The classes that each k gives; neighbours are looked for once."""
    nearest = neighbours.nearest(queries, max(ks))
    return {k: neighbours.vote(nearest, k) for k in ks}
