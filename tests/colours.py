"""A source of plain noisy colours, one for each class: any features can tell them apart, raw pixels too."""

from __future__ import annotations

import numpy as np

from quietvit.data.decode import UnreadableImage


class Colours:
    """Pictures of 20 x 24 pixels; `broken` ones cannot be read. The label set "coin" is a coin toss."""

    TINTS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])

    def __init__(self, split: str, count: int, broken: tuple[int, ...] = ()) -> None:
        self.name, self.count, self.broken = f"colours/{split}", count, broken
        self.offset = {"train": 0, "val": 10_000}[split]
        self.labels = {"class": np.arange(count) % 3, "coin": np.random.default_rng(self.offset).integers(0, 2, count)}
        self.classes = {"class": ["red", "green", "blue"], "coin": ["heads", "tails"]}

    def __len__(self) -> int:
        return self.count

    def load(self, index: int, *, min_side: int | None = None) -> np.ndarray:
        if index in self.broken:
            raise UnreadableImage(self.item_name(index), "cut short")
        noise = np.random.default_rng(index + self.offset).normal(0, 30, (20, 24, 3))
        pixels: np.ndarray = np.clip(self.TINTS[index % 3] + noise, 0, 255).astype(np.uint8)
        return pixels

    def item_name(self, index: int) -> str:
        return f"{index:04d}.png"

    def fingerprint(self) -> str:
        return f"{self.name}-{self.count}"
