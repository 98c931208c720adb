"""Random views of labelled train images, in batches, for tasks that train on pixels instead of on stored features."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from quietvit import dist
from quietvit.contracts import BadSample
from quietvit.data.blur import gaussian_blur
from quietvit.data.color import BRIGHTNESS, CONTRAST, SATURATION, Jitter, recolor, solarize
from quietvit.data.decode import UnreadableImage
from quietvit.data.resample import NUM_TRIES, draw_box, resize_box
from quietvit.data.sampler import SampleOrder, replacement, sample_rng
from quietvit_eval.data import EvalData, Split

MAX_ATTEMPTS = 20  # replacements tried for one unreadable image (ours)
SOLARIZE_FROM = 128  # DeiT III's 3-Augment (PIL's default)
BLUR_KERNEL = 9  # DINOv2's; DeiT III blurs without a bound, by the sigmas of 0.1 to 2 pixels used here too
BLUR_SIGMA = (0.1, 2.0)  # DeiT III


@dataclass(frozen=True)
class RandomView:
    """A random box of an image, resized, half of the time mirrored; with `three_augment` recoloured as well.

    The box is torchvision's RandomResizedCrop. 3-Augment (DeiT III, section 3; Touvron et al. 2022): grey, solarized or
    blurred, each in a third of the views, then brightness, contrast and saturation changed by up to 30 %.
    """

    size: int  # side in pixels
    scale: tuple[float, float] = (0.08, 1.0)  # share of the area; torchvision, and with it DINOv2's linear probe
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # the same
    flip_prob: float = 0.5  # DINOv2's linear probe
    three_augment: bool = False
    jitter: float = 0.3  # DeiT III, with three_augment only

    @property
    def min_side(self) -> int:
        """Shortest side to which a decoder may reduce an image: no box then has fewer pixels than its view."""
        return math.ceil(self.size / math.sqrt(self.scale[0]))

    def __call__(self, image: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "S S 3"]:
        areas, aspects = rng.random((2, NUM_TRIES)).tolist()
        top, left, flip = rng.random(3).tolist()
        box = draw_box(
            *image.shape[:2], scale=self.scale, ratio=self.ratio, areas=areas, aspects=aspects, place=(top, left)
        )
        if not (image.flags.writeable and image.flags.c_contiguous):
            image = image.copy()
        out = resize_box(image, box, self.size)
        if flip < self.flip_prob:
            out = np.ascontiguousarray(out[:, ::-1])
        return self._recoloured(out, rng) if self.three_augment else out

    def _recoloured(self, image: UInt8[np.ndarray, "S S 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "S S 3"]:
        kind = int(rng.integers(3))
        order = tuple(rng.permutation([BRIGHTNESS, CONTRAST, SATURATION]).tolist())
        brightness, contrast, saturation = rng.uniform(max(0.0, 1 - self.jitter), 1 + self.jitter, 3).tolist()
        sigma = float(rng.uniform(*BLUR_SIGMA))
        if kind == 0:
            image = recolor(image, None, grayscale=True)
        elif kind == 1:
            image = solarize(image, SOLARIZE_FROM)
        else:
            image = gaussian_blur(image, sigma, min(BLUR_KERNEL, 2 * self.size - 1))
        return recolor(image, Jitter(order, (brightness, contrast, saturation, 0.0)), grayscale=False)


@dataclass(frozen=True)
class LabelBatch:
    """Rows of this rank only. `step` counts from 0."""

    step: int
    images: UInt8[Tensor, "b 3 S S"]
    labels: Int[Tensor, " b"]


def label_batches(
    data: EvalData, part: Split, view: RandomView, *, batch_size: int, first: int, steps: int
) -> Iterator[LabelBatch]:
    """The training batches of steps `first` .. `steps` - 1, which depend on the seed and the step alone.

    `batch_size` counts the images of all ranks. An unreadable image is replaced by another one, and noted in `data`.
    Raises ValueError if ranks cannot share a batch evenly, or if next to no image can be read.
    """
    world = dist.world_size()
    if batch_size % world:
        raise ValueError(f"a batch of {batch_size} images cannot be shared evenly by {world} processes")
    loader = DataLoader(
        _Views(part, view, data.seed),
        batch_sampler=_Keys(len(part.indices), data.seed, batch_size, first, steps),
        num_workers=data.reading.workers,
        collate_fn=_join,
        worker_init_fn=_one_thread,
    )
    for step, (images, labels, bad) in enumerate(loader, start=first):
        data.note_unreadable("train", bad)
        yield LabelBatch(step, images, labels)


class _Keys:
    """(row of the split, pass) of this rank's images, batch by batch, made as they are needed."""

    def __init__(self, count: int, seed: int, batch_size: int, first: int, steps: int) -> None:
        self.order = SampleOrder(count, seed)
        self.batch_size, self.first, self.steps = batch_size, first, steps

    def __len__(self) -> int:
        return self.steps - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        own = range(dist.rank(), self.batch_size, dist.world_size())
        for step in range(self.first, self.steps):
            yield [self.order.sample_at(step * self.batch_size + row) for row in own]


def _one_thread(worker: int) -> None:
    cv2.setNumThreads(0)


Item = tuple[UInt8[np.ndarray, "S S 3"], int, list[BadSample]]


class _Views(Dataset[Item]):
    def __init__(self, part: Split, view: RandomView, seed: int) -> None:
        self.part, self.view, self.seed = part, view, seed

    def __getitem__(self, key: tuple[int, int]) -> Item:
        row, pass_ = key
        source, bad, candidate = self.part.source, list[BadSample](), row
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                image = source.load(int(self.part.indices[candidate]), min_side=self.view.min_side)
            except UnreadableImage as error:
                bad.append(BadSample(error.name, error.reason))
                candidate = replacement(len(self.part.indices), self.seed, row, pass_, attempt)
                continue
            view = self.view(image, sample_rng(self.seed, row, pass_))
            return view, int(self.part.labels[candidate]), bad
        raise ValueError(
            f"{MAX_ATTEMPTS} images in a row of {source.name} cannot be read; the last: {bad[-1].name}: "
            f"{bad[-1].reason}"
        )


def _join(items: list[Item]) -> tuple[UInt8[Tensor, "b 3 S S"], Int[Tensor, " b"], list[BadSample]]:
    images = torch.from_numpy(np.stack([view for view, _, _ in items])).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor([label for _, label, _ in items]), [b for _, _, bad in items for b in bad]
