"""Gradient accumulation that keeps the objective: one batch cut into micro-batches by image."""

from __future__ import annotations

import torch
from torch import Tensor

from quietvit.contracts import Batch


def split(batch: Batch, parts: int) -> list[Batch]:
    """Cut a batch of B images into `parts` batches of B/parts images, each crop-major again.

    The masks stay with their crops, so the micro-batches together hold exactly the batch. Teacher targets are those of
    all of them (methods.*.teach), and the mean of the micro-batch losses is the loss of the whole batch; only KoLeo
    looks for neighbours within a micro-batch, as it does within one GPU's batch in DINOv2.
    """
    if parts == 1:
        return [batch]
    images = batch.num_images
    assert images % parts == 0, "checked when the config is read"
    size = images // parts
    return [_slice(batch, start, size) for start in range(0, images, size)]


def _slice(batch: Batch, start: int, size: int) -> Batch:
    images = batch.num_images

    def rows(crops: Tensor) -> Tensor:
        by_view = crops.unflatten(0, (-1, images)) if len(crops) else crops
        return by_view[:, start : start + size].flatten(0, 1) if len(crops) else crops

    masks = rows(batch.masks)
    counts = masks.sum(1)
    weights = (1.0 / counts.clamp_min(1)).to(batch.mask_weights.dtype)
    return Batch(
        global_crops=rows(batch.global_crops),
        local_crops=rows(batch.local_crops),
        masks=masks,
        mask_indices=masks.flatten().nonzero().flatten(),
        mask_weights=torch.repeat_interleave(weights, counts),
        indices=batch.indices[start : start + size],
        bad=batch.bad if start == 0 else (),
    )
