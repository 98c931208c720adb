"""Block masks: exact counts on any grid, sane inputs, no dependence on global random state."""

from __future__ import annotations

import numpy as np
import pytest

from quietvit.data.masks import batch_masks, block_mask, mask_counts

GRIDS = [(1, 2), (2, 2), (3, 3), (4, 4), (3, 7), (12, 5), (14, 14)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("roll", [False, True])
def test_count_is_exact_on_every_grid(grid: tuple[int, int], roll: bool) -> None:
    rng = np.random.default_rng(0)
    for count in range(grid[0] * grid[1] + 1):
        mask = block_mask(grid, count, rng, roll=roll)
        assert mask.shape == grid
        assert mask.dtype == bool
        assert mask.sum() == count


@pytest.mark.parametrize("count", [-1, 10])
def test_impossible_count(count: int) -> None:
    with pytest.raises(ValueError, match="cannot hide"):
        block_mask((3, 3), count, np.random.default_rng(0))


def test_blocks_are_connected_not_scattered() -> None:
    """Hidden cells have far more hidden neighbours than scattered ones would (share .25 at random)."""
    rng = np.random.default_rng(0)
    masks = np.stack([block_mask((16, 16), 64, rng) for _ in range(50)])
    assert (masks[:, :, 1:] & masks[:, :, :-1]).sum() / masks.sum() > 0.6


def test_roll_evens_out_the_borders() -> None:
    rng = np.random.default_rng(0)
    corner = [np.mean([block_mask((10, 10), 30, rng, roll=roll)[0, 0] for _ in range(600)]) for roll in (False, True)]
    assert corner[0] < 0.15
    assert corner[1] == pytest.approx(0.3, abs=0.08)


def test_rectangles_follow_a_rectangular_grid() -> None:
    rng = np.random.default_rng(0)
    masks = np.stack([block_mask((4, 20), 30, rng) for _ in range(300)])
    assert masks.any(0).all()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("num_crops", [2, 4, 16])
def test_batches_have_the_same_counts_each_time(grid: tuple[int, int], num_crops: int) -> None:
    expected = mask_counts(num_crops, grid[0] * grid[1], probability=0.5, ratio=(0.1, 0.5))
    assert len(expected) == num_crops // 2
    assert min(expected) >= 1
    seen = set()
    for seed in range(5):
        masks = batch_masks(num_crops, grid, probability=0.5, rng=np.random.default_rng(seed))
        counts = masks.sum(1)
        assert sorted(counts[counts > 0]) == expected
        assert not masks.all(1).any()
        seen.add(tuple(counts))
    assert len(seen) > 1  # which crops are masked changes


def test_one_image_still_gets_a_mask() -> None:
    masks = batch_masks(2, (2, 2), probability=0.3, ratio=(0.1, 0.1), rng=np.random.default_rng(0), exact=False)
    assert masks.sum() == 1


def test_no_masks_when_asked_for_none() -> None:
    assert not batch_masks(8, (4, 4), probability=0.0, rng=np.random.default_rng(0)).any()


def test_rounding_does_not_lose_a_patch() -> None:
    """0.1 + 0.2 * 10 tokens is 2.9999999999999996 in floating point; the count is 3."""
    assert mask_counts(2, 10, probability=0.5, ratio=(0.1, 0.1 + 0.2 - 1e-16)) == [3]


def test_same_generator_state_same_masks() -> None:
    a, b = (batch_masks(8, (6, 6), probability=0.5, rng=np.random.default_rng(7)) for _ in range(2))
    assert (a == b).all()


@pytest.mark.parametrize(("probability", "ratio"), [(1.5, (0.1, 0.5)), (0.5, (0.5, 0.1)), (0.5, (0.1, 1.5))])
def test_bad_settings(probability: float, ratio: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="mask probability"):
        mask_counts(4, 16, probability=probability, ratio=ratio)
