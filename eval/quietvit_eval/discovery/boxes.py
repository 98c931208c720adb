"""Boxes in pixels: left, top, right, bottom, measured from the upper left corner of the image. Their overlap."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64

Box = Float64[np.ndarray, "4"]
Boxes = Float64[np.ndarray, "n 4"]

HIT = 0.5  # IoU of a box that counts (Deselaers et al. 2010, and all figures of LOST)


def areas(boxes: Boxes) -> Float64[np.ndarray, " n"]:
    """Width times height, nothing added."""
    sides = boxes[..., 2:] - boxes[..., :2]
    out: Float64[np.ndarray, " n"] = np.prod(sides, axis=-1)
    return out


def iou(box: Box, boxes: Boxes) -> Float64[np.ndarray, " n"]:
    """Intersection over union of one box with each of several, all of them with an area."""
    corners = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    common = np.prod((corners[1] - corners[0]).clip(0), axis=1)
    shares: Float64[np.ndarray, " n"] = common / (areas(box) + areas(boxes) - common)
    return shares


def pixels_of(cells: tuple[int, int, int, int], stride: int, size: tuple[int, int]) -> Box:
    """Patches (left, top, right, bottom) as a box, clipped to an image of (height, width) before it was padded."""
    height, width = size
    box: Box = np.minimum(np.array(cells, np.float64) * stride, [width, height, width, height])
    return box


def rescaled(box: Box, size: tuple[int, int], to: tuple[int, int]) -> Box:
    """The box on an image of another (height, width)."""
    rows, columns = to[0] / size[0], to[1] / size[1]
    out: Box = box * np.array([columns, rows, columns, rows])
    return out


def whole_image(size: tuple[int, int]) -> Box:
    """The box that knows nothing: all of an image of (height, width)."""
    return np.array([0, 0, size[1], size[0]], np.float64)


def middle_half(size: tuple[int, int]) -> Box:
    """Half of the area of an image of (height, width), in its middle and of its shape."""
    height, width = size
    side = np.sqrt(0.5)
    margins = np.array([width, height, width, height]) * (1 - side) / 2
    box: Box = np.abs(margins - np.array([0, 0, width, height]))
    return box
