"""Depth measures against scikit-learn, loops over pixels and least squares; crops by their rows and columns."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import mean_absolute_error, mean_absolute_percentage_error, root_mean_squared_error

from quietvit_eval.depth.metrics import aligned, depth_scores, scored_pixels


def maps(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    target = rng.uniform(0.5, 9.5, (12, 17)).astype(np.float32)
    predicted = (target * rng.uniform(0.5, 2.1, target.shape)).astype(np.float32)
    target[rng.random(target.shape) < 0.2] = 0
    return predicted, target, target > 0


def test_scores_by_other_means() -> None:
    predicted, target, valid = maps()
    scores = depth_scores(predicted, target, valid)
    p, g = predicted[valid].astype(np.float64), target[valid].astype(np.float64)
    assert scores["rmse"] == pytest.approx(root_mean_squared_error(g, p))
    assert scores["mae"] == pytest.approx(mean_absolute_error(g, p))
    assert scores["abs_rel"] == pytest.approx(mean_absolute_percentage_error(g, p))
    assert scores["rmse_log"] == pytest.approx(root_mean_squared_error(np.log(g), np.log(p)))
    assert scores["log10"] == pytest.approx(mean_absolute_error(np.log10(g), np.log10(p)))
    pairs = [(float(a), float(b)) for a, b in zip(p, g, strict=True)]
    assert scores["sq_rel"] == pytest.approx(sum((a - b) ** 2 / b for a, b in pairs) / len(pairs))
    logs = [math.log(a) - math.log(b) for a, b in pairs]
    mean = sum(logs) / len(logs)
    assert scores["silog"] == pytest.approx(100 * math.sqrt(sum(e * e for e in logs) / len(logs) - mean**2))
    for k in (1, 2, 3):
        good = sum(max(a / b, b / a) < 1.25**k for a, b in pairs) / len(pairs)
        assert scores[f"d{k}"] == pytest.approx(good)
        assert 0 < good < 1
    assert depth_scores(2 * g[None], g[None], np.ones((1, len(g)), bool))["silog"] == pytest.approx(0, abs=1e-6)


def test_a_perfect_prediction() -> None:
    _, target, valid = maps()
    scores = depth_scores(target, target, valid)
    assert {k: v for k, v in scores.items() if k[0] == "d"} == {"d1": 1.0, "d2": 1.0, "d3": 1.0}
    assert {v for k, v in scores.items() if k[0] != "d"} == {0.0}


def test_pixels_that_count() -> None:
    target = np.full((480, 640), 2, np.float32)
    target[50, 50], target[51, 51], target[52, 52], target[53, 53] = 0, 0.001, 10, 11

    def mask(crop: str, t: np.ndarray = target) -> np.ndarray:
        return scored_pixels(t, min_depth=0.001, max_depth=10.0, crop=crop)

    whole, eigen = mask("none"), mask("eigen")
    assert whole.sum() == 480 * 640 - 4
    assert eigen.sum() == 426 * 560 - 4
    rows, columns = np.nonzero(eigen)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (45, 470, 41, 600)
    kitti = mask("garg", np.full((352, 1216), 5, np.float32))
    rows, columns = np.nonzero(kitti)
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (143, 349, 43, 1172)
    with pytest.raises(ValueError, match="480 x 640, but a depth map is 640 x 480: set eval_crop=none"):
        mask("eigen", target.T)


def test_alignment_is_least_squares() -> None:
    predicted, target, valid = maps(1)
    p = predicted[valid].astype(np.float64)
    (a, b), *_ = np.linalg.lstsq(np.stack([p, np.ones_like(p)], axis=1), target[valid].astype(np.float64), rcond=None)
    np.testing.assert_allclose(aligned(predicted, target, valid), a * predicted + b, rtol=1e-5)
    flat = aligned(np.full_like(predicted, 3), target, valid)
    np.testing.assert_allclose(flat, target[valid].mean(dtype=np.float64))
