"""Accuracies of a classifier, as shares in [0, 1]."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Answers:
    """What counts as right for Q test images."""

    labels: Int[Tensor, " Q"]
    num_classes: int
    candidates: Int[Tensor, " c"] | None = None  # the only classes that may be answered; None: all
    accepted: Int[Tensor, "Q A"] | None = None  # every right class, padded with -1 (ReaL); None: the label alone

    def part(self, rows: slice, device: torch.device) -> Answers:
        """Those of some images, on `device`."""
        accepted = None if self.accepted is None else self.accepted[rows].to(device)
        candidates = None if self.candidates is None else self.candidates.to(device)
        return Answers(self.labels[rows].to(device), self.num_classes, candidates, accepted)

    @property
    def tops(self) -> tuple[int, ...]:
        """For which k a top-k says something: 5 only among more than 5 classes."""
        count = self.num_classes if self.candidates is None else len(self.candidates)
        return (1, 5) if count > 5 else (1,)


def top_k_hits(scores: Float[Tensor, "Q C"], labels: Int[Tensor, " Q"], k: int) -> Bool[Tensor, " Q"]:
    """Whether the right class is among the k best. Of equal scores the lower class ranks first; -inf never counts."""
    own = scores.gather(1, labels[:, None])
    classes = torch.arange(scores.shape[1], device=scores.device)
    ahead = (scores > own) | ((scores == own) & (classes < labels[:, None]))
    return (ahead.sum(dim=1) < k) & ~own[:, 0].isneginf() & ~own[:, 0].isnan()


def hits_of(scores: Float[Tensor, "Q C"], answers: Answers, k: int) -> Bool[Tensor, " Q"]:
    """Whether a right class is among the k best candidates, with the ranks of `top_k_hits`."""
    if answers.candidates is not None:
        kept = scores[:, answers.candidates]
        scores = torch.full_like(scores, -math.inf).index_copy_(1, answers.candidates, kept)
    if answers.accepted is None:
        return top_k_hits(scores, answers.labels, k)
    hits = torch.zeros_like(answers.labels, dtype=torch.bool)
    for labels in answers.accepted.T:
        hits |= top_k_hits(scores, labels.clamp(min=0), k) & (labels >= 0)
    return hits


def per_class(hits: Bool[Tensor, " Q"], labels: Int[Tensor, " Q"], num_classes: int) -> Float[Tensor, " C"]:
    """Share of hits among the images of each class; nan for a class without images."""
    images = torch.bincount(labels, minlength=num_classes)
    return torch.bincount(labels[hits], minlength=num_classes) / images


def mean_per_class(hits: Bool[Tensor, " Q"], labels: Int[Tensor, " Q"], num_classes: int) -> float:
    """Mean over the classes that have images of the share of hits (macro recall)."""
    return float(per_class(hits, labels, num_classes).nanmean())


def scores_of_logits(
    logits: Float[Tensor, "Q C"], answers: Answers
) -> tuple[dict[str, float], dict[str, Bool[np.ndarray, " Q"]]]:
    """Top-1, with more than 5 classes top-5, and mean per class; and the hits of those that are means over images.

    No mean per class where images have several right classes: they belong to no single one.
    """
    hits = {f"top{k}": hits_of(logits, answers, k) for k in answers.tops}
    scores = {name: float(h.double().mean()) for name, h in hits.items()}
    if answers.accepted is None:
        scores["mean_per_class"] = mean_per_class(hits["top1"], answers.labels, answers.num_classes)
    return scores, {name: h.numpy() for name, h in hits.items()}
