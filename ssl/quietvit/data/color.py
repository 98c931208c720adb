"""Colour operations on uint8 images, with the meaning torchvision gives them on PIL images, fused where that is safe.

Brightness, contrast, saturation and grayscale are all of the form y = a x + b gray(x) + t with the same three numbers
for every pixel, gray(x) = .299 R + .587 G + .114 B. Such forms compose to such a form, because gray(y) =
(a + b) gray(x) + t. So several operations cost one pass over the pixels, as long as no value in between leaves
[0, 255]: an operation that may clip (a factor above 1) ends a pass. PIL rounds every blend down; the composed form
takes off the half level that this costs on average, hence the tests' tolerance of about one level.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8

__all__ = ["BRIGHTNESS", "CONTRAST", "HUE", "SATURATION", "Jitter", "recolor", "solarize"]

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # torchvision's numbering of ColorJitter's operations

_GRAY = (0.299, 0.587, 0.114)  # ITU-R 601-2 luma, as PIL's mode "L"
_FLOOR = -0.499  # added before rounding, rounds down; not -0.5, which would leave whole numbers to the rule for ties


class Jitter(NamedTuple):
    """One draw of colour jitter, both by the numbers BRIGHTNESS, CONTRAST, SATURATION, HUE."""

    order: tuple[int, ...]  # which operation comes first, second, ...
    factors: tuple[float, float, float, float]  # factors[op]; that of HUE is a shift in turns, -0.5 to 0.5

    def steps(self) -> list[tuple[int, float]]:
        """The operations with their factors, in order."""
        return [(op, self.factors[op]) for op in self.order]


class _Pending:
    """An image and the linear colour operations that wait to be applied to it."""

    def __init__(self, image: UInt8[np.ndarray, "S S 3"]) -> None:
        self.image = image
        self.a, self.b, self.t = 1.0, 0.0, 0.0
        self.may_clip = False

    def then(self, a: float, b: float, t: float, *, may_clip: bool) -> None:
        """Queue y = a x + b gray(x) + t. What is queued already must not clip: call `settle` before."""
        assert not self.may_clip
        self.a, self.b, self.t = a * self.a, a * self.b + b * (self.a + self.b), (a + b) * self.t + t
        self.may_clip = may_clip

    def settle(self) -> None:
        """Apply what is queued if values may leave [0, 255] there."""
        if self.may_clip:
            self.flush()

    def flush(self) -> None:
        """Apply what is queued, in one pass."""
        if (self.a, self.b, self.t) != (1.0, 0.0, 0.0):
            a, t = self.a, self.t
            r, g, b = (self.b * weight for weight in _GRAY)
            matrix = np.array([[a + r, g, b, t], [r, a + g, b, t], [r, g, a + b, t]], np.float32)
            self.image = cv2.transform(self.image, matrix)
        self.a, self.b, self.t = 1.0, 0.0, 0.0
        self.may_clip = False

    def mean_gray(self) -> float:
        """Mean of gray over the image as it will be after what is queued."""
        means = cv2.mean(self.image)
        gray: float = sum(weight * mean for weight, mean in zip(_GRAY, means, strict=False))
        return (self.a + self.b) * gray + self.t


def recolor(image: UInt8[np.ndarray, "S S 3"], jitter: Jitter | None, *, grayscale: bool) -> UInt8[np.ndarray, "S S 3"]:
    """Colour jitter (torchvision's ColorJitter on a PIL image, at given factors), then grayscale in three channels."""
    work = _Pending(image)
    for op, factor in jitter.steps() if jitter is not None else ():
        if op == HUE:
            work.flush()
            work.image = _shift_hue(work.image, factor)
            continue
        work.settle()
        if op == BRIGHTNESS:  # blend with black
            work.then(factor, 0.0, _FLOOR, may_clip=factor > 1)
        elif op == CONTRAST:  # blend with the mean gray, a whole number in PIL
            work.then(factor, 0.0, (1 - factor) * int(work.mean_gray() + 0.5) + _FLOOR, may_clip=factor > 1)
        else:  # blend with the gray image
            work.then(factor, 1 - factor, _FLOOR, may_clip=factor > 1)
    if grayscale:
        work.settle()
        work.then(0.0, 1.0, 0.0, may_clip=False)
    work.flush()
    return work.image


def _shift_hue(image: UInt8[np.ndarray, "S S 3"], turns: float) -> UInt8[np.ndarray, "S S 3"]:
    """Turn the hue by `turns` of the colour circle, on 8-bit HSV."""
    shift = int(turns * 255) % 256  # whole steps of 1/255 turn, cut towards zero: what torchvision does on PIL images
    if shift == 0:
        return image
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    height, width, _ = hsv.shape
    steps = np.zeros(3 * width, np.uint8)
    steps[::3] = shift
    rows = hsv.reshape(height, 3 * width)
    rows += steps  # uint8 wraps around, as the circle does
    out: UInt8[np.ndarray, "S S 3"] = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
    return out


def solarize(image: UInt8[np.ndarray, "S S 3"], threshold: int) -> UInt8[np.ndarray, "S S 3"]:
    """Invert the values at or above `threshold`."""
    levels = np.arange(256)
    table = np.where(levels < threshold, levels, 255 - levels).astype(np.uint8)
    out: UInt8[np.ndarray, "S S 3"] = cv2.LUT(image, table)
    return out
