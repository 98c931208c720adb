"""Collate: crop-major order, one contiguous block, mask lists that fit the masks."""

from __future__ import annotations

import numpy as np
import torch

from quietvit.contracts import BadSample
from quietvit.data.collate import Views, collate


def sample(index: int, *, num_local: int = 3, bad: tuple[BadSample, ...] = ()) -> Views:
    """Every pixel of view v of sample i is (10 v + i, 100 + v, column)."""

    def crop(view: int, side: int) -> np.ndarray:
        image = np.zeros((side, side, 3), np.uint8)
        image[..., 0], image[..., 1], image[..., 2] = 10 * view + index, 100 + view, np.arange(side)
        return image

    return Views([crop(v, 8) for v in range(2)], [crop(v, 4) for v in range(num_local)], index, bad)


def test_order_and_layout() -> None:
    masks = np.zeros((4, 4), bool)
    masks[1, 2] = masks[3, 0] = masks[3, 1] = True
    bad = BadSample("a.jpg", "truncated")
    batch = collate([sample(0, bad=(bad,)), sample(5)], masks)
    assert batch.global_crops.shape == (4, 3, 8, 8)
    assert batch.local_crops.shape == (6, 3, 4, 4)
    assert batch.global_crops.is_contiguous()
    assert batch.global_crops[:, 0, 0, 0].tolist() == [0, 5, 10, 15]
    assert batch.local_crops[:, 0, 0, 0].tolist() == [0, 5, 10, 15, 20, 25]
    assert batch.global_crops[2, 1].unique().tolist() == [101]
    assert batch.global_crops[0, 2, 3].tolist() == list(range(8))  # columns stay columns
    assert batch.mask_indices.tolist() == [6, 12, 13]
    assert batch.mask_weights.tolist() == [1.0, 0.5, 0.5]
    assert batch.indices.tolist() == [0, 5]
    assert batch.bad == (bad,)
    assert torch.equal(batch.masks.flatten().nonzero().flatten(), batch.mask_indices)


def test_dtypes() -> None:
    batch = collate([sample(0)], np.zeros((2, 4), bool))
    assert batch.global_crops.dtype is torch.uint8
    assert batch.masks.dtype is torch.bool
    assert batch.mask_indices.dtype is torch.int64
    assert batch.mask_weights.dtype is torch.float32
    assert batch.mask_indices.numel() == batch.mask_weights.numel() == 0


def test_without_local_crops() -> None:
    batch = collate([sample(0, num_local=0), sample(1, num_local=0)], np.ones((4, 4), bool))
    assert len(batch.local_crops) == 0
    assert batch.mask_weights.tolist() == [0.25] * 16
