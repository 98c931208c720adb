"""Which images the live probe looks at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Int64, UInt8
from torch import Tensor

from quietvit.data.center import center_view
from quietvit.data.decode import UnreadableImage
from quietvit.data.sources import Source, open_source


@dataclass(frozen=True)
class HeldOut:
    """Images the probe looks at: uint8, centred views of one size."""

    images: UInt8[Tensor, "Q 3 S S"]
    labels: Int[Tensor, " Q"] | None = None  # None: no k-NN
    bank: UInt8[Tensor, "M 3 S S"] | None = None
    bank_labels: Int[Tensor, " M"] | None = None
    num_classes: int = 0


def val_split(source: str, path: str | None, split: str, options: Mapping[str, Any]) -> Source | None:
    """The val split of training data that is opened so, where there is one."""
    if split != "train":
        return None
    try:
        return open_source(source, path, split="val", **options)
    except ValueError:
        return None


def choose_held_out(
    train: Source, validation: Source | None, *, label: str, num_images: int, num_bank: int, size: int, seed: int
) -> HeldOut:
    """Images for the probe, the same ones for the same seed.

    With a validation split they come from there and the k-NN bank from train. Without one, both are disjoint parts of
    train, at most half of it looked at: the pretraining has seen the images, but never their labels. Where there are
    labels, images of unknown class are left out.
    """
    rng = np.random.default_rng(seed)
    queries = train if validation is None else validation
    order = rng.permutation(len(queries))
    classes = train.classes.get(label, [])
    known = _labels(queries, label, classes)
    bank_known = _labels(train, label, classes)
    order_known = order[known[order] >= 0]
    if len(order_known) < (2 if validation is None else 1) or not (bank_known >= 0).any():
        return HeldOut(_views(queries, order[:num_images], size)[0])
    if validation is None:
        num_images = min(num_images, len(order_known) // 2)
        rest = order_known[num_images:]
    else:
        rest = rng.permutation(len(train))
        rest = rest[bank_known[rest] >= 0]
    images, chosen = _views(queries, order_known[:num_images], size)
    bank, taken = _views(train, rest[:num_bank], size)
    if not len(taken) or not len(chosen):
        return HeldOut(images)
    return HeldOut(
        images=images,
        labels=torch.from_numpy(known[chosen]),
        bank=bank,
        bank_labels=torch.from_numpy(bank_known[taken]),
        num_classes=len(classes),
    )


def _labels(source: Source, label: str, classes: list[str]) -> Int64[np.ndarray, " n"]:
    """Labels of all images as ranks in `classes`, -1 where unknown: two splits may number their classes differently."""
    if label not in source.labels:
        return np.full(len(source), -1, np.int64)
    rank = {name: i for i, name in enumerate(classes)}
    table = np.array([*(rank.get(name, -1) for name in source.classes[label]), -1], np.int64)
    ranks: np.ndarray = table[source.labels[label]]  # -1 is the last entry
    return ranks


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
