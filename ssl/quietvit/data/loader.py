"""From a source to training batches: images, crops and masks, in worker processes that make whole batches.

The item of the data set is a *step*, not an image: a worker hands over one batch of crops and not hundreds of small
arrays, and the batch of step k is the same for any number of workers and after any restart.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from jaxtyping import UInt8
from torch.utils.data import DataLoader, Dataset

from quietvit.contracts import BadSample, Batch
from quietvit.data.collate import Views, collate
from quietvit.data.decode import UnreadableImage
from quietvit.data.masks import batch_masks
from quietvit.data.quarantine import TooManyUnreadable
from quietvit.data.sampler import SampleOrder, batch_rng, replacement, sample_rng
from quietvit.data.sources import Source

MAX_ATTEMPTS = 20  # replacements tried for one image (ours): with 1 % bad images this many in a row never happen
PREFETCH = 2  # batches ready per worker (torch's default)

Pixels = UInt8[np.ndarray, "H W 3"]


class Crops(Protocol):
    """What turns an image into views; data.crops.MultiCrop is one."""

    @property
    def min_side(self) -> int | None:
        """How small the shorter side of a decoded image may be; None: any size but the full one is too small."""
        ...

    def __call__(self, image: Pixels, rng: np.random.Generator, /) -> tuple[list[Pixels], list[Pixels]]:
        """Global and local views."""
        ...


@dataclass(frozen=True)
class MultiCropBatches(Dataset[Batch]):
    """The batches of a run by step: `batches[step]` is a pure function of the arguments and the step.

    Sample order is that of SampleOrder, augmentation draws from (seed, sample, pass), masks from (seed, step). Masks
    are made for the whole batch over all ranks and then shared out, so that a run keeps them at another world size.

    An unreadable image is replaced by another one, chosen by (seed, sample, pass, attempt), and stands in `Batch.bad`.
    The replacement gets the crops' random numbers of the image it replaces: were it to use its own, a batch could hold
    the very same crops twice, which drives KoLeo to infinity.

    Args:
        source: where images come from.
        crops: an image to its views.
        seed: of everything random.
        batch_size: images per step over all ranks; a multiple of `world_size`.
        patch_grid: rows and columns of patches in a global crop.
        mask_probability, mask_ratio: see data.masks.batch_masks.
        num_global: global crops per image.
        rank, world_size: this process takes rows rank * batch_size / world_size and following of each batch.

    Raises:
        ValueError: fewer images than a batch, or a batch that the ranks cannot share evenly.
    """

    source: Source
    crops: Crops
    seed: int
    batch_size: int
    patch_grid: tuple[int, int]
    mask_probability: float = 0.5  # DINOv2
    mask_ratio: tuple[float, float] = (0.1, 0.5)  # DINOv2
    num_global: int = 2  # DINOv2
    rank: int = 0
    world_size: int = 1
    order: SampleOrder = field(init=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size % self.world_size:
            raise ValueError(
                f"a batch of {self.batch_size} images cannot be shared evenly by {self.world_size} processes"
            )
        if len(self.source) < self.batch_size:
            raise ValueError(
                f"{self.source.name} has {len(self.source)} images, fewer than a batch of {self.batch_size}: "
                "lower the batch size or add images"
            )
        assert 0 <= self.rank < self.world_size
        object.__setattr__(self, "order", SampleOrder(len(self.source), self.seed))

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, [batch_size / world_size] images. Raises TooManyUnreadable; see MAX_ATTEMPTS."""
        rows = self.batch_size // self.world_size
        first = self.rank * rows
        start = step * self.batch_size + first
        samples = [self._views(*self.order.sample_at(start + row)) for row in range(rows)]
        masks = batch_masks(
            self.num_global * self.batch_size,
            self.patch_grid,
            probability=self.mask_probability,
            ratio=self.mask_ratio,
            rng=batch_rng(self.seed, step),
        )
        shared_out = masks.reshape(self.num_global, self.batch_size, -1)[:, first : first + rows]
        return collate(samples, np.ascontiguousarray(shared_out).reshape(self.num_global * rows, -1))

    def _views(self, index: int, pass_: int) -> Views:
        bad: list[BadSample] = []
        candidate = index
        while True:
            try:
                image = self.source.load(candidate, min_side=self.crops.min_side)
                break
            except UnreadableImage as error:
                bad.append(BadSample(error.name, error.reason))
            if len(bad) > MAX_ATTEMPTS:
                raise TooManyUnreadable(
                    f"{len(bad)} images in a row cannot be read ({self.source.name}); the last was "
                    f"{bad[-1].name}: {bad[-1].reason}"
                )
            candidate = replacement(len(self.source), self.seed, index, pass_, attempt=len(bad))
        global_crops, local_crops = self.crops(image, sample_rng(self.seed, index, pass_))
        return Views(global_crops, local_crops, candidate, tuple(bad))


def make_loader(
    batches: Dataset[Batch],
    *,
    start_step: int,
    total_steps: int,
    workers: int,
    pin_memory: bool = False,
    prefetch: int = PREFETCH,
) -> DataLoader[Batch]:
    """Iterate over the batches of steps start_step, ..., total_steps - 1, in this order, once.

    With 0 workers batches are made by the caller's process when asked for. Workers use one thread each. `pin_memory`
    is for CUDA. Errors raised in a worker reach the caller under their own type.
    """
    assert 0 <= start_step <= total_steps
    return DataLoader(
        batches,
        batch_size=None,  # items are whole batches already
        sampler=range(start_step, total_steps),
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_use_one_thread,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin_memory,
    )


def make_batches(
    steps: Dataset[Batch], *, total_steps: int, workers: int, device: torch.device
) -> Callable[[int], Iterator[Batch]]:
    """The batches from a step on, as a function of that step.

    `workers` -1: as many as there are cores to spare, 8 at the most; none when training on the CPU itself.
    """
    if workers < 0:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = 0 if device.type == "cpu" else max(0, min(8, cores - 1))

    def batches(start: int) -> Iterator[Batch]:
        pinned = device.type == "cuda"
        return iter(make_loader(steps, start_step=start, total_steps=total_steps, workers=workers, pin_memory=pinned))

    return batches


def _as_it_is(batch: Any) -> Any:
    return batch


def _use_one_thread(worker: int) -> None:
    """Workers are the parallelism: threads inside them would fight for the same cores."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
