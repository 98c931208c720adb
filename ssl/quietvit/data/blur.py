"""Gaussian blur of uint8 images."""

from __future__ import annotations

import math

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

__all__ = ["gaussian_blur", "gaussian_taps"]


def gaussian_taps(sigma: float, kernel: int) -> Float32[np.ndarray, " k"]:
    """Weights exp(-x^2 / 2 sigma^2), |x| <= kernel // 2, normalised and rounded to 1/256; their sum is exactly 1.

    Outer weights that round to 0 (together under one grey level) are left out, so k <= kernel: narrow blurs cost
    less. Whole 256ths are what OpenCV's integer filter computes without further error. `sigma` is in pixels.
    """
    side = [math.exp(-0.5 * (x / sigma) ** 2) for x in range(kernel // 2, 0, -1)]
    scale = 256 / (1.0 + 2.0 * sum(side))
    steps: list[int] = []
    rest = 0.0  # what rounding took off further out is given to the next weight, so that the centre is off by 1 at most
    for weight in side:
        step = round(weight * scale + rest)
        rest += weight * scale - step
        if step > 0 or steps:
            steps.append(step)
    return np.array([*steps, 256 - 2 * sum(steps), *reversed(steps)], np.float32) / 256


def gaussian_blur(image: UInt8[np.ndarray, "S S 3"], sigma: float, kernel: int) -> UInt8[np.ndarray, "S S 3"]:
    """Blur with a Gaussian of `sigma` pixels cut to `kernel` taps, mirrored at the borders without repeating them."""
    taps = gaussian_taps(sigma, kernel)
    if len(taps) == 1:
        return image
    out: UInt8[np.ndarray, "S S 3"] = cv2.sepFilter2D(image, -1, taps, taps, borderType=cv2.BORDER_REFLECT_101)
    return out
