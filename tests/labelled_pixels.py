"""Tiny labelled pictures, and an extractor whose features are their pixels: what a task must find is known."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from quietvit.contracts import Features

SIDE = 4


class Pictures:
    """A source of pictures of 4 x 4 pixels, each its class's own picture and noise."""

    def __init__(
        self, name: str, labels: Sequence[int], classes: Sequence[str], *, seed: int = 0, noise: float = 60.0
    ) -> None:
        self.name = name
        self.labels = {"class": np.array(labels, np.int64)}
        self.classes = {"class": list(classes)}
        own = [np.random.default_rng(sum(map(ord, c))).uniform(60, 195, (SIDE, SIDE, 3)) for c in classes]
        random = np.random.default_rng([seed, *map(ord, name)])
        grey = np.full((SIDE, SIDE, 3), 127.0)
        means = np.stack([own[label] if label >= 0 else grey for label in labels])
        self.pixels = np.clip(means + random.normal(0, noise, means.shape), 0, 255).astype(np.uint8)
        self.names = [f"{i:04d}.png" for i in range(len(labels))]

    def __len__(self) -> int:
        return len(self.pixels)

    def load(self, index: int, *, min_side: int | None = None) -> np.ndarray:
        picture: np.ndarray = self.pixels[index]
        return picture

    def item_name(self, index: int) -> str:
        return self.names[index]

    def fingerprint(self) -> str:
        return hashlib.sha256(self.pixels.tobytes() + self.labels["class"].tobytes()).hexdigest()

    def features(self) -> torch.Tensor:
        """What `Pixels` makes of all pictures, float64."""
        return torch.from_numpy(self.pixels).permute(0, 3, 1, 2).flatten(1).double() / 255


class Pixels:
    """[CLS] is the flattened picture."""

    embed_dim, num_blocks, stride, image_size = 3 * SIDE**2, 1, SIDE, SIDE
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def __call__(self, images: torch.Tensor) -> Features:
        cls = images.flatten(1)
        return Features(cls, torch.empty(len(cls), 0, self.embed_dim), cls[:, None, None])

    def last_blocks(self, images: torch.Tensor, num: int) -> list[Features]:
        assert num == 1
        return [self(images)]
