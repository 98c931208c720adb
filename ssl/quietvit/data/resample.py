"""Random boxes and antialiased resizing of uint8 pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8

__all__ = ["NUM_TRIES", "Box", "draw_box", "resize_box"]

NUM_TRIES = 10  # torchvision's RandomResizedCrop looks for a fitting box this often, then takes a central one


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def draw_box(
    height: int,
    width: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    areas: Sequence[float],
    aspects: Sequence[float],
    place: tuple[float, float],
) -> Box:
    """Box of random area, aspect and position (torchvision's RandomResizedCrop, from given uniform numbers).

    Try k asks for the share `scale[0] + areas[k] * (scale[1] - scale[0])` of the image's area and for a
    width/height ratio that is log-uniform in `ratio`; the first that fits is placed uniformly. If none fits: the
    largest central box whose ratio lies within `ratio`. `areas` and `aspects` hold NUM_TRIES numbers of [0, 1).
    """
    area = height * width
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for u_area, u_aspect in zip(areas, aspects, strict=True):
        target = area * (scale[0] + u_area * (scale[1] - scale[0]))
        aspect = math.exp(log_low + u_aspect * (log_high - log_low))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(place[0] * (height - h + 1)), int(place[1] * (width - w + 1)), h, w)
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return Box((height - h) // 2, (width - w) // 2, h, w)


def resize_box(image: UInt8[np.ndarray, "H W 3"], box: Box, size: int) -> UInt8[np.ndarray, "S S 3"]:
    """`box` of the image, resized to `size` x `size` with the antialiased bicubic filter (a = -0.5, as PIL's).

    `image` must be writable and without negative strides (torch.from_numpy). torch's uint8 kernel works on interleaved
    channels: nothing is converted to float. It is within 0.1 grey level of PIL on average
    (tests/unit/test_resample.py).
    """
    top, left, height, width = box
    # The batch axis is added before the permutation: only with these strides does torch take its interleaved path;
    # the other order gives the same numbers after a costly planar copy.
    pixels = torch.from_numpy(image[top : top + height, left : left + width])[None]
    out = F.interpolate(pixels.permute(0, 3, 1, 2), (size, size), mode="bicubic", antialias=True)
    return np.ascontiguousarray(out.permute(0, 2, 3, 1)[0].numpy())
