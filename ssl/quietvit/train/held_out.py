"""Which images the live probe looks at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from quietvit.data.center import center_view
from quietvit.data.decode import UnreadableImage
from quietvit.data.sources import Source


@dataclass(frozen=True)
class HeldOut:
    """Images the probe looks at: uint8, centred views of one size."""

    images: UInt8[Tensor, "Q 3 S S"]
    labels: Int[Tensor, " Q"] | None = None  # None: no k-NN
    bank: UInt8[Tensor, "M 3 S S"] | None = None
    bank_labels: Int[Tensor, " M"] | None = None
    num_classes: int = 0


def choose_held_out(
    train: Source, validation: Source | None, *, label: str, num_images: int, num_bank: int, size: int, seed: int
) -> HeldOut:
    """Images for the probe, the same ones for the same seed.

    With a validation split they come from there and the k-NN bank from train. Without one, both are disjoint parts of
    train: the pretraining has seen the images, but never their labels.
    """
    rng = np.random.default_rng(seed)
    queries = train if validation is None else validation
    order = rng.permutation(len(queries))
    chosen, rest = order[:num_images], order[num_images:]
    images, chosen = _views(queries, chosen, size)
    if label not in train.labels or label not in queries.labels:
        return HeldOut(images)
    bank, taken = _views(train, rest[:num_bank] if validation is None else rng.permutation(len(train))[:num_bank], size)
    if not len(taken) or not len(chosen):
        return HeldOut(images)
    return HeldOut(
        images=images,
        labels=torch.from_numpy(queries.labels[label][chosen]),
        bank=bank,
        bank_labels=torch.from_numpy(train.labels[label][taken]),
        num_classes=len(train.classes[label]),
    )


def _views(source: Source, indices: np.ndarray, size: int) -> tuple[Tensor, np.ndarray]:
    views, read = [], []
    for index in indices.tolist():
        try:
            image = source.load(index, min_side=size)
        except UnreadableImage:
            continue  # the training loop reports it when it comes by
        views.append(np.moveaxis(center_view(image, size), -1, 0))
        read.append(index)
    stacked = np.stack(views) if views else np.zeros((0, 3, size, size), np.uint8)
    return torch.from_numpy(stacked), np.array(read, dtype=np.int64)
