"""IoU and accuracies against torchmetrics and scikit-learn; absent classes; images without a pixel that counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, jaccard_score, recall_score
from torchmetrics.classification import MulticlassJaccardIndex

from quietvit_eval.dense_data.pairs import IGNORE
from quietvit_eval.resampling import PerImage, rescored
from quietvit_eval.segmentation.metrics import count_pixels, per_class, scores_of_counts

CLASSES = 6


def images(absent: int | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Predictions and targets of images of several sizes, right in about half of the pixels."""
    rng = np.random.default_rng(7)
    pairs = []
    for height, width in ((9, 11), (30, 4), (16, 16)):
        target = rng.integers(-1, CLASSES, (height, width)).astype(np.int16)
        predicted = np.where(rng.random(target.shape) < 0.5, np.abs(target), rng.integers(0, CLASSES, target.shape))
        if absent is not None:
            target[target == absent], predicted[predicted == absent] = 0, 0
        pairs.append((predicted.astype(np.int64), target))
    return pairs


def sums(pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    return np.sum([count_pixels(p, t, CLASSES) for p, t in pairs], axis=0)


@pytest.mark.parametrize("absent", [None, 3])
def test_scores_are_those_of_torchmetrics_and_scikit_learn(absent: int | None) -> None:
    pairs = images(absent)
    scores = scores_of_counts(*sums(pairs))
    metric = MulticlassJaccardIndex(CLASSES, average="macro", ignore_index=IGNORE)
    for predicted, target in pairs:
        metric.update(torch.from_numpy(predicted)[None], torch.from_numpy(target).long()[None])
    assert scores["mIoU"] == pytest.approx(float(metric.compute()), abs=1e-6)
    p, t = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    p, t = p[t != IGNORE], t[t != IGNORE]
    there = [c for c in range(CLASSES) if c != absent]
    iou, accuracy = per_class(*sums(pairs))
    np.testing.assert_allclose(iou[there], jaccard_score(t, p, labels=there, average=None))
    np.testing.assert_allclose(accuracy[there], recall_score(t, p, labels=there, average=None))
    assert scores["aAcc"] == pytest.approx(accuracy_score(t, p))
    assert scores["mAcc"] == pytest.approx(np.mean(accuracy[there]))
    assert absent is None or (np.isnan(iou[absent]) and np.isnan(accuracy[absent]))


def test_a_class_that_is_only_predicted_counts_as_wrong() -> None:
    predicted, target = np.array([[0, 1, 1, 2]]), np.array([[0, 1, 1, 1]], np.int16)
    scores = scores_of_counts(*count_pixels(predicted, target, 4))
    assert scores["mIoU"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert scores["mAcc"] == pytest.approx((1 + 2 / 3) / 2)  # no pixel of class 2 could be missed


def test_an_image_without_a_pixel_that_counts_changes_nothing() -> None:
    pairs = images()
    blank = (np.zeros((5, 5), np.int64), np.full((5, 5), IGNORE, np.int16))
    assert scores_of_counts(*sums([*pairs, blank])) == scores_of_counts(*sums(pairs))
    assert all(math.isnan(v) for v in scores_of_counts(*sums([blank])).values())


def test_counts_per_image_give_the_score_of_any_draw() -> None:
    pairs = images()
    counts = np.stack([count_pixels(p, t, CLASSES) for p, t in pairs], axis=1)
    per_image = PerImage(
        ["a", "b", "c"], dict(zip(("intersection", "predicted", "target"), counts, strict=True)), "iou"
    )
    drawn = rescored(per_image, "mIoU", np.array([2, 0, 1]))
    assert drawn == pytest.approx(scores_of_counts(*sums([pairs[0], pairs[0], pairs[2]]))["mIoU"])
    assert drawn != pytest.approx(scores_of_counts(*sums(pairs))["mIoU"])


@pytest.mark.parametrize(("predicted", "target"), [(CLASSES, 0), (-1, 0), (0, CLASSES), (0, -2)])
def test_classes_that_are_not_there_are_refused(predicted: int, target: int) -> None:
    with pytest.raises(ValueError, match="classes run from"):
        count_pixels(np.array([[predicted]]), np.array([[target]], np.int16), CLASSES)
    assert count_pixels(np.array([[99]]), np.array([[IGNORE]], np.int16), CLASSES)[1].sum() == 0
