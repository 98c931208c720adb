"""LOST against its steps written as loops, on features with known answers; boxes against counted pixels; the scale."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import Tensor

from quietvit_eval.discovery import lost
from quietvit_eval.discovery.boxes import areas, iou, middle_half, pixels_of, rescaled, whole_image
from quietvit_eval.discovery.lost import centred, degrees, discover, discover_each, region_of
from quietvit_eval.discovery.sweep import Candidate, best, candidates, quantiles


def naive(
    features: Tensor, grid: tuple[int, int], bias: float, k: int, expand: bool
) -> tuple[list[int], int, np.ndarray]:
    """Degrees, seed and region, step by step in float64."""
    f = features.double().numpy()
    n = len(f)
    a = [[sum(x * y for x, y in zip(f[i], f[j], strict=True)) + bias for j in range(n)] for i in range(n)]
    degree = [sum(a[i][j] > 0 for j in range(n) if j != i) for i in range(n)]
    order = sorted(range(n), key=lambda i: (degree[i], i))
    seed = order[0]
    chosen = [q for q in order[:k] if a[seed][q] > 0] if expand else [seed]
    mask = [sum(a[s][i] for s in chosen) > 0 for i in range(n)]
    region = np.zeros(grid, bool)
    waiting = deque([seed] if mask[seed] else [])
    while waiting:
        i = waiting.popleft()
        row, column = divmod(i, grid[1])
        if region[row, column]:
            continue
        region[row, column] = True
        for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if 0 <= r < grid[0] and 0 <= c < grid[1] and mask[r * grid[1] + c]:
                waiting.append(r * grid[1] + c)
    return degree, seed, region


@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize("k", [1, 5, 100])
@pytest.mark.parametrize("bias", [0.0, -1.5, 1.5])
def test_the_steps_are_those_of_the_paper(bias: float, k: int, expand: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost, "BLOCK", 100)  # several blocks of rows, the last one shorter
    for seed, grid in enumerate([(5, 7), (1, 9), (6, 4), (1, 1)]):
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(grid[0] * grid[1], 3, generator=generator, dtype=torch.float64) + 0.3
        degree, first, region = naive(features, grid, bias, k, expand)
        found = discover(features, grid, bias=bias, k=k, expand=expand)
        assert degrees(features, [bias])[0].tolist() == degree
        assert found.seed == first
        np.testing.assert_array_equal(found.mask, region)
        assert found.tied == (len(set(degree)) == 1)


def test_each_bias_of_a_sweep_is_as_by_itself() -> None:
    features = torch.randn(40, 4, generator=torch.Generator().manual_seed(3))
    biases = [0.0, 2.0, -0.7]
    for bias, found in zip(biases, discover_each(features, (5, 8), biases), strict=True):
        alone = discover(features, (5, 8), bias=bias)
        assert alone.seed == found.seed
        np.testing.assert_array_equal(alone.mask, found.mask)


def planted(grid: tuple[int, int], top: int, left: int, height: int, width: int) -> Tensor:
    """Ground and object look in opposite directions, with noise across."""
    features = torch.tensor([-1.0, 0.0, 0.0]).repeat(*grid, 1)
    features[top : top + height, left : left + width, 0] = 1.0
    noise = torch.rand(*grid, generator=torch.Generator().manual_seed(0))
    features[..., 1] = 0.1 * noise
    return features.flatten(0, 1)


@pytest.mark.parametrize(("top", "left"), [(2, 3), (0, 0), (5, 7)])  # inside, and on the border
def test_the_smaller_of_two_clusters_is_the_object(top: int, left: int) -> None:
    found = discover(planted((8, 10), top, left, 3, 3), (8, 10))
    assert found.cells == (left, top, left + 3, top + 3)
    assert found.mask.sum() == 9
    assert not found.tied


def test_only_the_part_connected_to_the_seed_is_kept() -> None:
    features = planted((6, 8), 0, 0, 2, 2).unflatten(0, (6, 8))
    features[4, 4:8, 0] = 1.0
    features[2, 2, 0] = 1.0  # touches by a corner alone
    found = discover(features.flatten(0, 1), (6, 8))
    assert (found.seed, found.cells) == (0, (0, 0, 2, 2))


def test_ties_go_to_the_patch_that_comes_first() -> None:
    """Whole numbers below 2 give 400 patches few degrees; which of the many alike are candidates decides the region."""
    for seed in range(3):
        features = torch.randint(-1, 2, (400, 3), generator=torch.Generator().manual_seed(seed)).float()
        degree, first, region = naive(features, (20, 20), 0.0, 30, True)
        assert len(set(degree)) < 30
        found = discover(features, (20, 20), k=30)
        assert found.seed == first == degree.index(min(degree))
        np.testing.assert_array_equal(found.mask, region)


def test_features_that_all_go_together_are_told() -> None:
    same = torch.rand(12, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    found = discover(same, (3, 4))
    assert found.tied
    assert found.seed == 0
    assert found.cells == (0, 0, 4, 3)
    apart = discover(torch.eye(12), (3, 4))
    assert (apart.tied, apart.seed, apart.cells) == (True, 0, (0, 0, 1, 1))
    assert discover(centred(same), (3, 4)).tied is False


@pytest.mark.parametrize("expand", [True, False])
def test_a_seed_that_does_not_go_with_itself_has_no_box(expand: bool) -> None:
    for features, bias in ((torch.zeros(6, 2), 0.0), (torch.eye(6), -2.0)):
        found = discover(features, (2, 3), bias=bias, expand=expand)
        assert found.cells is None
        assert not found.mask.any()
        assert found.tied


def test_regions_are_scipy_s() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = rng.random((7, 9)) < 0.55
        labels = scipy.ndimage.label(mask)[0]
        cell = tuple(rng.integers(0, [7, 9]).tolist())
        expected = (labels == labels[cell]) & mask[cell]
        np.testing.assert_array_equal(region_of(mask, cell), expected)


# ---- boxes


def test_overlap_is_that_of_counted_pixels() -> None:
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 12, (40, 2, 2))
    boxes = np.concatenate([corners.min(1), corners.max(1) + 1], axis=1).astype(np.float64)
    pixels = np.zeros((40, 13, 13), bool)
    for canvas, (left, top, right, bottom) in zip(pixels, boxes.astype(int), strict=True):
        canvas[top:bottom, left:right] = True
    for box, mine in zip(boxes, pixels, strict=True):
        counted = (pixels & mine).sum((1, 2)) / (pixels | mine).sum((1, 2))
        np.testing.assert_allclose(iou(box, boxes), counted, rtol=1e-12)
    np.testing.assert_array_equal(areas(boxes), pixels.sum((1, 2)))


def test_patches_become_pixels_without_the_padding() -> None:
    assert pixels_of((1, 2, 4, 5), 8, (100, 100)).tolist() == [8, 16, 32, 40]
    assert pixels_of((0, 0, 4, 5), 8, (37, 30)).tolist() == [0, 0, 30, 37]
    assert rescaled(np.array([1.0, 2, 3, 4]), (10, 20), (30, 20)).tolist() == [1, 6, 3, 12]


def test_boxes_that_know_nothing() -> None:
    assert whole_image((30, 40)).tolist() == [0, 0, 40, 30]
    middle = middle_half((30, 40))
    assert areas(middle) == pytest.approx(600)
    assert (middle[:2] + middle[2:]).tolist() == pytest.approx([40, 30])
    assert (middle[2] - middle[0]) / (middle[3] - middle[1]) == pytest.approx(4 / 3)


# ---- the scale of biases


def test_quantiles_are_of_pairs_of_different_patches() -> None:
    features = torch.randn(9, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    f = features.numpy()
    pairs = [f[i] @ f[j] for i in range(9) for j in range(9) if i != j]
    np.testing.assert_allclose(quantiles(features, (0.1, 0.5, 0.9)), np.quantile(pairs, (0.1, 0.5, 0.9)), rtol=1e-12)
    assert np.isnan(quantiles(features[:1], (0.5,))).all()


def test_of_large_images_rows_at_even_distances_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quietvit_eval.discovery.sweep.BLOCK", 30)
    features = torch.randn(10, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    f = features.numpy()
    pairs = [f[i] @ f[j] for i in (0, 3, 6) for j in range(10) if i != j]
    np.testing.assert_allclose(quantiles(features, (0.25,)), np.quantile(pairs, 0.25), rtol=1e-12)


def test_candidates_are_0_and_minus_the_mean_quantile() -> None:
    of_images = [np.array([-1.0, 3.0]), np.array([np.nan, np.nan]), np.array([-3.0, 4.0])]
    assert candidates(of_images, (0.1, 0.9)) == [(None, 0.0), (0.1, 2.0), (0.9, -3.5)]
    with pytest.raises(ValueError, match="has two patches"):
        candidates([np.array([np.nan])], (0.5,))


def test_the_best_is_the_one_with_most_objects_and_of_equals_the_smallest() -> None:
    tried = [Candidate(None, 0.0, 0.2, 0, 0), Candidate(0.1, 5.0, 0.6, 0, 0), Candidate(0.2, -3.0, 0.6, 0, 0)]
    assert best(tried).bias == -3.0
    assert best(tried[:1]).bias == 0.0
