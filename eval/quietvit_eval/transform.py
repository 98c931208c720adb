"""The view that is scored: a resize and a central crop, chosen once per data set and written on the card."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from quietvit.contracts import Extractor
from quietvit.data.center import center_view
from quietvit.data.decode import UnreadableImage
from quietvit.data.sources import Source

MOST = 224  # DINOv2 scores at 224 pixels whatever the training size (518 for the released models)
BORDER = 256 / 224  # DINOv2, and ImageNet practice before it: shorter side 256, crop 224
LOOKS = 16  # images looked at to tell photographs from small pictures (ours)


@dataclass(frozen=True)
class EvalTransform:
    """Shorter side to `resize` pixels, antialiased bicubic, then the central `image_size` square."""

    image_size: int
    resize: int
    rule: str  # why, for the card

    def __call__(self, pixels: UInt8[np.ndarray, "H W 3"]) -> UInt8[Tensor, "3 S S"]:
        view = center_view(pixels, self.image_size, resize=self.resize)
        return torch.tensor(view).permute(2, 0, 1).contiguous()


def eval_size(extractor: Extractor, image_size: int | None = None) -> int:
    """The side to score at: as asked for, else the training size but 224 at the most, in whole patches.

    Raises ValueError if a size asked for is no multiple of the stride.
    """
    stride = extractor.stride
    if image_size is None:
        return max(stride, min(extractor.image_size, MOST) // stride * stride)
    if image_size < stride or image_size % stride:
        below = max(stride, image_size // stride * stride)
        raise ValueError(f"image size {image_size} is no multiple of {stride} pixels: use {below} or {below + stride}")
    return image_size


def choose_transform(source: Source, image_size: int) -> EvalTransform:
    """Resize to 256/224 of `image_size` and crop, as for photographs; but pictures too small for that are kept whole.

    A source is small if the median shorter side of 16 of its images, evenly spread, is below that resize target:
    enlarging a picture only to cut its border off would throw pixels away. The choice holds for the whole data set.
    """
    target = round(image_size * BORDER)
    sides = []
    for index in np.linspace(0, len(source) - 1, min(LOOKS, len(source))).astype(int):
        try:
            sides.append(min(source.load(int(index)).shape[:2]))
        except UnreadableImage:  # counted when features are extracted
            continue
    if sides and statistics.median(sides) < target:
        return EvalTransform(image_size, image_size, f"small source (median shorter side {statistics.median(sides):g})")
    return EvalTransform(image_size, target, "photographs (resize 256/224, central crop)")
