"""Accuracies of a classifier, as shares in [0, 1]."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def top_k_hits(scores: Float[Tensor, "Q C"], labels: Int[Tensor, " Q"], k: int) -> Bool[Tensor, " Q"]:
    """Whether the right class is among the k best. Of equal scores the lower class ranks first; -inf never counts."""
    own = scores.gather(1, labels[:, None])
    classes = torch.arange(scores.shape[1], device=scores.device)
    ahead = (scores > own) | ((scores == own) & (classes < labels[:, None]))
    return (ahead.sum(dim=1) < k) & ~own[:, 0].isneginf() & ~own[:, 0].isnan()


def per_class(hits: Bool[Tensor, " Q"], labels: Int[Tensor, " Q"], num_classes: int) -> Float[Tensor, " C"]:
    """Share of hits among the images of each class; nan for a class without images."""
    images = torch.bincount(labels, minlength=num_classes)
    return torch.bincount(labels[hits], minlength=num_classes) / images


def mean_per_class(hits: Bool[Tensor, " Q"], labels: Int[Tensor, " Q"], num_classes: int) -> float:
    """Mean over the classes that have images of the share of hits (macro recall)."""
    return float(per_class(hits, labels, num_classes).nanmean())


def scores_of_logits(
    logits: Float[Tensor, "Q C"], labels: Int[Tensor, " Q"], num_classes: int
) -> tuple[dict[str, float], dict[str, Bool[np.ndarray, " Q"]]]:
    """Top-1, mean per class and, with more than 5 classes, top-5; and the hits of those that are means over images."""
    hits = {"top1": top_k_hits(logits, labels, 1)}
    if num_classes > 5:
        hits["top5"] = top_k_hits(logits, labels, 5)
    scores = {name: float(h.double().mean()) for name, h in hits.items()}
    scores["mean_per_class"] = mean_per_class(hits["top1"], labels, num_classes)
    return scores, {name: h.numpy() for name, h in hits.items()}
