"""Which patches the student does not see: blocks on the patch grid (BEiT, arXiv 2106.08254, alg. 1; iBOT; DINOv2)."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool

__all__ = ["batch_masks", "block_mask", "mask_counts"]

TRIES = 10  # BEiT, DINOv2: blocks drawn before a mask counts as full


def block_mask(
    grid_hw: tuple[int, int],
    count: int,
    rng: np.random.Generator,
    *,
    min_cells: int = 4,
    max_fraction: float = 0.5,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    exact: bool = True,
    roll: bool = False,
) -> Bool[np.ndarray, "h w"]:
    """A mask of `count` cells made of random rectangles; True is hidden.

    Rectangles have an area between `min_cells` and what is still missing, at most `max_fraction` of the grid, and a
    log-uniform `aspect` (height / width); they are smaller than the grid on both sides. Defaults: DINOv2.
    `exact` fills the last few cells one by one, so that shapes are static (DINOv3); without it a mask may end 1 to 4
    cells short in 3 to 14 % of cases (DINOv2's quirk). `roll` shifts the mask around the borders, which rectangles
    seldom touch (DINOv3, Franca).

    Raises ValueError if `count` is not within the grid.
    """
    height, width = grid_hw
    if not 0 <= count <= height * width:
        raise ValueError(f"cannot hide {count} of {height * width} patches")
    mask = np.zeros(grid_hw, dtype=bool)
    largest = max(max_fraction * height * width, 1.0)
    missing = count
    while missing > 0:
        added = _add_block(mask, min(missing, largest), rng, min_cells=min_cells, aspect=aspect)
        if not added:
            break
        missing -= added
    if exact and missing:
        free = np.flatnonzero(~mask)
        mask.flat[rng.choice(free, size=missing, replace=False)] = True
    if roll:
        mask = np.roll(mask, (rng.integers(height), rng.integers(width)), axis=(0, 1))
    return mask


def _add_block(
    mask: Bool[np.ndarray, "h w"],
    most: float,
    rng: np.random.Generator,
    *,
    min_cells: int,
    aspect: tuple[float, float],
) -> int:
    """Hide one more rectangle that adds between 1 and `most` cells; returns how many it added, 0 if no try did."""
    height, width = mask.shape
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(TRIES):
        # Towards the end `most` may be below `min_cells`: areas between the two still find small gaps (as in DINOv2).
        area = min_cells + (most - min_cells) * rng.random()
        ratio = math.exp(low + (high - low) * rng.random())
        rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if rows >= height or columns >= width:
            continue
        top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
        block = mask[top : top + rows, left : left + columns]
        added = block.size - int(np.count_nonzero(block))
        if 0 < added <= most:
            block[:] = True
            return added
    return 0


def mask_counts(num_crops: int, num_patches: int, *, probability: float, ratio: tuple[float, float]) -> list[int]:
    """How many patches are hidden in each masked crop of a batch, ascending: the same for every batch (DINOv3).

    floor(num_crops * probability) crops get a mask; their shares are spread evenly over `ratio`, the upper end
    included. With a probability above zero at least one crop is masked, and a masked crop hides at least one patch
    and never all: so the patch loss is never empty, however small batch and grid are.

    Raises ValueError for a probability or ratio outside of [0, 1], and for ratio ends in the wrong order.
    """
    low, high = ratio
    if not 0 <= probability <= 1 or not 0 <= low <= high <= 1:
        raise ValueError(
            f"mask probability {probability} and ratio {ratio} must lie in [0, 1], the smaller end of the ratio first"
        )
    if probability == 0:
        return []
    num_masked = max(_floor(num_crops * probability), 1)
    edges = np.linspace(low, high, num_masked + 1)[1:]
    return [min(max(_floor(num_patches * edge), 1), num_patches - 1) for edge in edges]


def batch_masks(
    num_crops: int,
    grid_hw: tuple[int, int],
    *,
    probability: float,
    ratio: tuple[float, float] = (0.1, 0.5),
    rng: np.random.Generator,
    exact: bool = True,
    roll: bool = False,
) -> Bool[np.ndarray, "crops N"]:
    """Masks of all global crops of a batch, flattened row by row; which crops are masked is drawn anew each time.

    Default ratio: DINOv2. `exact` as in block_mask; without it each count is also drawn between two neighbouring
    shares (DINOv2) instead of being the greater one. Raises ValueError as mask_counts does.
    """
    num_patches = grid_hw[0] * grid_hw[1]
    counts = mask_counts(num_crops, num_patches, probability=probability, ratio=ratio)
    masks = np.zeros((num_crops, num_patches), dtype=bool)
    shares = np.linspace(*ratio, len(counts) + 1)
    for i, (crop, most) in enumerate(zip(rng.permutation(num_crops), counts, strict=False)):
        count = most if exact else max(int(num_patches * rng.uniform(shares[i], shares[i + 1])), 1)
        masks[crop] = block_mask(grid_hw, count, rng, exact=exact, roll=roll).ravel()
    return masks


def _floor(x: float) -> int:
    """Floor that takes 57.99999999 for the 58 that rounding made of it."""
    return math.floor(x + 1e-6)
