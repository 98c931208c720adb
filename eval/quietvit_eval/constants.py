"""The control of dense tasks: one answer for every pixel, as the train targets suggest, with no look at an image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quietvit_eval.dense_data.pairs import IGNORE, PairSource
from quietvit_eval.segmentation.metrics import count_pixels, scores_of_counts


@dataclass(frozen=True)
class Constant:
    """The answer, and its score on the test set: mIoU as a share, or the RMSE in metres as a mean over images."""

    answer: float
    score: float


def commonest_class(train: PairSource, test: PairSource) -> Constant:
    """The class that most train pixels have, everywhere: its mIoU."""
    count = len(train.class_names)
    pixels = np.zeros(count, np.int64)
    for index in range(len(train)):
        target = train.load(index)[1]
        pixels += np.bincount(target[target != IGNORE].astype(np.int64), minlength=count)
    answer = int(pixels.argmax())
    sums = np.zeros((3, count), np.int64)
    for index in range(len(test)):
        target = test.load(index)[1].astype(np.int64)
        sums += np.stack(count_pixels(np.full_like(target, answer), target, count))
    return Constant(answer, scores_of_counts(*sums)["mIoU"])


def depth_map(train: PairSource, test: PairSource) -> Constant:
    """The mean train depth at each place, for images of one size: its RMSE. The answer is the mean of the map.

    A head that sees one patch at a time does not know where it is, and cannot know even this.
    """
    targets = [train.load(index)[1].astype(np.float64) for index in range(len(train))]
    known = np.sum([t > 0 for t in targets], axis=0)
    average = np.sum(targets, axis=0) / np.maximum(known, 1)
    errors = []
    for index in range(len(test)):
        depth = test.load(index)[1].astype(np.float64)
        valid = (depth > 0) & (known > 0)
        errors.append(float(np.sqrt(np.mean((depth - average)[valid] ** 2))))
    return Constant(float(average[known > 0].mean()), float(np.mean(errors)))


def mean_depth(train: PairSource, test: PairSource) -> Constant:
    """The mean of all known train depths, everywhere: its RMSE, per image and then averaged."""
    total, known = 0.0, 0
    for index in range(len(train)):
        depth = train.load(index)[1]
        total, known = total + float(depth[depth > 0].sum(dtype=np.float64)), known + int((depth > 0).sum())
    answer = total / known
    errors = []
    for index in range(len(test)):
        depth = test.load(index)[1].astype(np.float64)
        errors.append(float(np.sqrt(np.mean((depth[depth > 0] - answer) ** 2))))
    return Constant(answer, float(np.mean(errors)))
