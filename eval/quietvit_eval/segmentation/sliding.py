"""From class scores on the patch grid to classes of pixels: sliding windows, several scales, flips."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from quietvit_eval.segmentation.augment import keep_ratio, resized
from quietvit_eval.views import to_pixels

BAND = 2**25  # scores at the pixels that are held at a time (ours: 128 MiB)

# Bytes of windows of one size -> class scores on the patch grid.
Scorer = Callable[[UInt8[Tensor, "b 3 h w"]], Float[Tensor, "b K gh gw"]]


@dataclass(frozen=True)
class WholeView:
    """How a whole picture is looked at."""

    short_side: int  # of the picture, in pixels, at scale 1
    window: int
    stride: int  # from one window to the next
    scales: tuple[float, ...]
    flip: bool  # each scale plain and mirrored
    keep_padding: bool  # as in `to_pixels`
    chunk: int  # windows that go through the model at a time; does not change a score


def starts(side: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows along a side: every `stride`, the last drawn back to end where the image does."""
    count = max(side - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride + window, side) - window, 0) for i in range(count)]


def slide(score: Scorer, image: UInt8[Tensor, "3 H W"], view: WholeView, patch: int) -> Float[Tensor, "K H W"]:
    """Class scores of every pixel, the mean of the windows that see it. `patch`: stride of the grid in pixels.

    An image smaller than the window is one window.
    """
    height, width = image.shape[-2:]
    size = min(view.window, height), min(view.window, width)
    rows, columns = (starts(side, view.window, view.stride) for side in (height, width))
    corners = [(top, left) for top in rows for left in columns]
    canvas: Tensor | None = None
    for start in range(0, len(corners), view.chunk):
        part = corners[start : start + view.chunk]
        windows = torch.stack([image[:, top : top + size[0], left : left + size[1]] for top, left in part])
        for (top, left), grid in zip(part, score(windows), strict=True):
            if canvas is None:
                canvas = grid.new_zeros(len(grid), height, width)
            seen = to_pixels(grid[None], size, patch, keep_padding=view.keep_padding)[0]
            canvas[:, top : top + size[0], left : left + size[1]] += seen
    assert canvas is not None
    canvas /= _visits(rows, size[0], height).to(canvas)[:, None]
    canvas /= _visits(columns, size[1], width).to(canvas)
    return canvas


def _visits(first: Sequence[int], window: int, side: int) -> Tensor:
    """Of how many windows each pixel of a side is part."""
    counts = torch.zeros(side)
    for start in first:
        counts[start : start + window] += 1
    return counts


def classes_of(
    score: Scorer, image: UInt8[np.ndarray, "H W 3"], view: WholeView, patch: int
) -> Int64[np.ndarray, "H W"]:
    """The class of every pixel of the picture at its own size.

    Scores of each scale (and mirrored) are brought to that size, bilinear; the class is that of the highest score, or
    with several passes of the highest mean of their probabilities.
    """
    height, width = image.shape[:2]
    passes = [(scale, mirrored) for scale in view.scales for mirrored in ((False, True) if view.flip else (False,))]
    classes = np.empty((height, width), np.int64)
    mean: Tensor | None = None
    for scale, mirrored in passes:
        seen = resized(image, keep_ratio((height, width), int(view.short_side * scale)))
        pixels = torch.from_numpy(np.ascontiguousarray(seen[:, ::-1] if mirrored else seen)).permute(2, 0, 1)
        scores = slide(score, pixels, view, patch)
        if mirrored:
            scores = scores.flip(-1)
        for band, at_pixels in bands(scores, (height, width)):
            if len(passes) == 1:
                classes[band] = at_pixels.argmax(dim=0).cpu().numpy()
                continue
            if mean is None:
                mean = scores.new_zeros(len(scores), height, width)
            mean[:, band] += at_pixels.softmax(dim=0)
    if mean is not None:
        classes[:] = mean.argmax(dim=0).cpu().numpy()
    return classes


def bands(
    maps: Float[Tensor, "K h w"], size: tuple[int, int], most: int = BAND
) -> Iterator[tuple[slice, Float[Tensor, "K b W"]]]:
    """The maps, bilinear at `size`, some rows at a time: at most `most` numbers, or one row."""
    height, width = size
    step = max(1, most // (len(maps) * max(width, maps.shape[-1])))
    old = maps.shape[1]
    for first in range(0, height, step):
        band = slice(first, min(first + step, height))
        rows = torch.arange(band.start, band.stop, device=maps.device, dtype=torch.float64)
        at = ((rows + 0.5) * old / height - 0.5).clamp(0, old - 1)
        above = at.long()
        below = (above + 1).clamp(max=old - 1)
        share = (at - above).to(maps.dtype)[:, None]
        between = torch.lerp(maps[:, above], maps[:, below], share)
        yield band, F.interpolate(between[None], size=(len(rows), width), mode="bilinear", align_corners=False)[0]
