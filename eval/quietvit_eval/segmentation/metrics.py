"""Scores of a segmentation: pixels are counted per image and class, and scores come from the sums over the data set."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int, Int64

from quietvit_eval.dense_data.pairs import IGNORE

Counts = Int64[np.ndarray, " C"]


def count_pixels(
    predicted: Int[np.ndarray, "H W"], target: Int[np.ndarray, "H W"], num_classes: int
) -> tuple[Counts, Counts, Counts]:
    """Pixels of each class that are right, that were predicted, and that there are; IGNORE is left out of all three.

    Raises ValueError for a class outside 0 .. C-1, in the prediction or the target.
    """
    counted = target != IGNORE
    p, t = predicted[counted].astype(np.int64), target[counted].astype(np.int64)
    for name, values in (("predicted", p), ("target", t)):
        if len(values) and (values.min() < 0 or values.max() >= num_classes):
            raise ValueError(f"{name} classes run from {values.min()} to {values.max()}; there are {num_classes}")
    right = np.bincount(t[p == t], minlength=num_classes)
    return right, np.bincount(p, minlength=num_classes), np.bincount(t, minlength=num_classes)


def scores_of_counts(intersection: Counts, predicted: Counts, target: Counts) -> dict[str, float]:
    """mIoU, mAcc and aAcc of counts summed over the data set, as shares.

    IoU_c = I_c / (P_c + G_c - I_c) and Acc_c = I_c / G_c; their means leave out classes where these are 0 / 0; aAcc =
    sum I / sum G (mmsegmentation's IoUMetric, used by DINOv2). nan where there is nothing to divide by.
    """
    iou, accuracy = per_class(intersection, predicted, target)
    total = float(np.sum(target))
    return {
        "mIoU": _mean(iou),
        "mAcc": _mean(accuracy),
        "aAcc": float(np.sum(intersection)) / total if total else float("nan"),
    }


def per_class(intersection: Counts, predicted: Counts, target: Counts) -> tuple[np.ndarray, np.ndarray]:
    """IoU and accuracy of each class, float64 [C]; nan for 0 / 0."""
    union = predicted + target - intersection
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(union > 0, intersection / union, np.nan), np.where(target > 0, intersection / target, np.nan)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
