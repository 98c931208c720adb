"""Training views of a picture and its classes: random scale, crop, flip and colours (mmsegmentation's, as DINOv2 uses
them)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Int16, UInt8

from quietvit_eval.dense_data.pairs import IGNORE

Image = UInt8[np.ndarray, "H W 3"]
Classes = Int16[np.ndarray, "H W"]

REDRAWS = 10  # of a crop in which one class has too great a share (mmsegmentation)
# mmsegmentation's PhotoMetricDistortion, in units of 0 .. 255; hue in steps of 2 degrees.
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32.0, (0.5, 1.5), (0.5, 1.5), 18


@dataclass(frozen=True)
class TrainView:
    """Image and classes -> a crop of a random scale, with its colours distorted. Values depend on `rng` alone.

    What a small image leaves of the crop, below and to the right, is the mean colour and IGNORE. The mean is rounded to
    whole grey levels, so after normalisation it is 0 to within half a level (0.01).
    """

    short_side: int
    crop: int
    ratio: tuple[float, float]  # of the short side to `short_side`, drawn evenly
    max_share: float
    flip: bool
    photometric: bool
    mean: tuple[float, float, float]  # colour, in units of [0, 1]

    def __call__(self, image: Image, target: Classes, rng: np.random.Generator) -> tuple[Image, Classes]:
        size = keep_ratio(target.shape, int(self.short_side * rng.uniform(*self.ratio)))
        image, target = resized(image, size), nearest(target, size)
        top, left = crop_corner(target, self.crop, self.max_share, rng)
        window = slice(top, top + self.crop), slice(left, left + self.crop)
        image, target = image[window], target[window]
        if self.flip and rng.random() < 0.5:
            image, target = image[:, ::-1], target[:, ::-1]
        if self.photometric:
            image = distorted(np.ascontiguousarray(image), draw_distortion(rng))
        return self._padded(image, target)

    def _padded(self, image: Image, target: Classes) -> tuple[Image, Classes]:
        height, width = target.shape
        whole = np.empty((self.crop, self.crop, 3), np.uint8)
        whole[:] = np.round(np.array(self.mean) * 255)
        classes = np.full((self.crop, self.crop), IGNORE, np.int16)
        whole[:height, :width], classes[:height, :width] = image, target
        return whole, classes


def keep_ratio(size: tuple[int, ...], short_side: int) -> tuple[int, int]:
    """Height and width in the same ratio with the given short side, each rounded, at least 1."""
    scale = short_side / min(size)
    height, width = (max(1, int(side * scale + 0.5)) for side in size)
    return height, width


def resized(image: Image, size: tuple[int, int]) -> Image:
    """Bilinear and not antialiased, as OpenCV and thus mmsegmentation do."""
    if image.shape[:2] == size:
        return image
    out: Image = cv2.resize(np.ascontiguousarray(image), size[::-1], interpolation=cv2.INTER_LINEAR)
    return out


def nearest(classes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Each new pixel is the old one that its centre lies in; any dtype."""
    rows, columns = (
        ((2 * np.arange(new) + 1) * old // (2 * new)) for new, old in zip(size, classes.shape, strict=True)
    )
    out: np.ndarray = classes[rows[:, None], columns]
    return out


def crop_corner(target: Classes, crop: int, max_share: float, rng: np.random.Generator) -> tuple[int, int]:
    """Top and left of a random crop, drawn anew up to REDRAWS times while it shows one class only or, of one class,
    `max_share` of the pixels that count. With a `max_share` of 1 the first draw is taken."""
    free = [max(side - crop, 0) for side in target.shape]
    for attempt in range(1 + REDRAWS):
        top, left = (int(rng.integers(0, room + 1)) for room in free)
        if max_share >= 1 or free == [0, 0] or attempt == REDRAWS:
            break
        seen = target[top : top + crop, left : left + crop]
        counts = np.bincount(seen[seen != IGNORE])
        if np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < max_share:
            break
    return top, left


class Distortion(NamedTuple):
    """One draw of colours; what a coin left out has no effect."""

    brightness: float = 0.0  # added
    contrast: float = 1.0  # factor
    contrast_last: bool = False  # after saturation and hue, not before
    saturation: float = 1.0  # factor
    hue: int = 0  # added, of 180


def draw_distortion(rng: np.random.Generator) -> Distortion:
    """Each of brightness, contrast, saturation and hue with probability 1/2, contrast as often before as after."""
    brightness, contrast, contrast_last, saturation, hue = rng.random(5) < 0.5
    drawn = Distortion(
        float(rng.uniform(-BRIGHTNESS, BRIGHTNESS)),
        float(rng.uniform(*CONTRAST)),
        bool(contrast_last),
        float(rng.uniform(*SATURATION)),
        int(rng.integers(-HUE, HUE + 1)),
    )
    off = Distortion()
    return Distortion(
        drawn.brightness if brightness else off.brightness,
        drawn.contrast if contrast else off.contrast,
        drawn.contrast_last,
        drawn.saturation if saturation else off.saturation,
        drawn.hue if hue else off.hue,
    )


def distorted(image: Image, by: Distortion) -> Image:
    """Brightness, contrast (times the values themselves), saturation and hue in HSV, contrast at its place.

    Values are clipped to bytes and rounded between the steps; the original cuts the fraction off.
    """
    image = _looked_up(image, _LEVELS + by.brightness)
    if not by.contrast_last:
        image = _looked_up(image, _LEVELS * by.contrast)
    if by.saturation != 1 or by.hue:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        tables = np.stack([(_LEVELS + by.hue) % 180, _LEVELS * by.saturation, _LEVELS], axis=-1)
        image = cv2.cvtColor(_looked_up(hsv, tables), cv2.COLOR_HSV2RGB)
    if by.contrast_last:
        image = _looked_up(image, _LEVELS * by.contrast)
    return image


_LEVELS = np.arange(256, dtype=np.float64)


def _looked_up(image: Image, table: np.ndarray) -> Image:
    levels = np.clip(np.round(table), 0, 255).astype(np.uint8)
    if levels.ndim == 1 and np.array_equal(levels, _LEVELS):
        return image
    out: Image = cv2.LUT(image, levels[None] if levels.ndim == 2 else levels)
    return out
