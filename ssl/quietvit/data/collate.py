"""From decoded and cropped samples to one contracts.Batch: stack crop-major, list the masked patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from quietvit.contracts import BadSample, Batch

__all__ = ["Views", "collate"]


@dataclass(frozen=True)
class Views:
    """All crops of one image, and what went wrong on the way to it."""

    global_crops: list[UInt8[np.ndarray, "S S 3"]]
    local_crops: list[UInt8[np.ndarray, "s s 3"]]
    index: int  # which sample of the source this is (after replacement)
    bad: tuple[BadSample, ...] = ()


def collate(samples: Sequence[Views], masks: Bool[np.ndarray, "G*B N"]) -> Batch:
    """One batch of B samples. Crops are copied once, from [S S 3] into their place in a contiguous [G*B 3 S S].

    `masks` belongs to the stacked global crops: row g*B + b is view g of sample b. Without local crops `local_crops`
    is empty, [0 3 0 0].
    """
    assert len(masks) == sum(len(sample.global_crops) for sample in samples)
    counts = masks.sum(1)
    return Batch(
        global_crops=_stack([sample.global_crops for sample in samples]),
        local_crops=_stack([sample.local_crops for sample in samples]),
        masks=torch.from_numpy(masks),
        mask_indices=torch.from_numpy(np.flatnonzero(masks)),
        mask_weights=torch.from_numpy(np.repeat(1.0 / np.maximum(counts, 1), counts).astype(np.float32)),
        indices=torch.tensor([sample.index for sample in samples]),
        bad=tuple(bad for sample in samples for bad in sample.bad),
    )


def _stack(crops: Sequence[Sequence[UInt8[np.ndarray, "S S 3"]]]) -> UInt8[Tensor, "views*B 3 S S"]:
    """All first views, then all second views, and so on."""
    num_views = len(crops[0])
    if not num_views:
        return torch.empty(0, 3, 0, 0, dtype=torch.uint8)
    height, width, channels = crops[0][0].shape
    stacked = np.empty((num_views, len(crops), channels, height, width), dtype=np.uint8)
    for b, views in enumerate(crops):
        for g, crop in enumerate(views):
            stacked[g, b] = crop.transpose(2, 0, 1)
    return torch.from_numpy(stacked).flatten(0, 1)
