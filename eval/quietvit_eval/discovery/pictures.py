"""A sheet of test images with the box that was found, the true ones, and the region and seed it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import cv2
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image as Pillow

from quietvit_eval.discovery.boxes import Box, Boxes
from quietvit_eval.pictures import DIM, INK, MARGIN, PAPER, STRENGTH, side_by_side, with_legend

# Okabe and Ito's colours, which people without full colour vision tell apart.
FOUND, TRUE, SEED = (230, 159, 0), (86, 180, 233), (240, 228, 66)
HEIGHT, NARROWEST, WIDEST = 240, 240, 480  # pixels of a panel (ours)
LINE = 2
ACROSS = 2  # images side by side
LETTERS = 16  # of a name

Image = UInt8[np.ndarray, "H W 3"]


@dataclass(frozen=True)
class Shown:
    """One image of the sheet: the image with its boxes, and its region."""

    title: str
    boxes: Image
    region: Image


def draw(
    image: Image,
    true: Boxes,
    found: Box | None,
    *,
    mask: Bool[np.ndarray, "h w"],
    seed: int,
    covered: tuple[float, float],
    title: str,
) -> Shown:
    """Panels of one image. `covered`: rows and columns of the image that a patch covers; the last may be cut off."""
    scale = min(HEIGHT / image.shape[0], WIDEST / image.shape[1])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    small = cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=cv2.INTER_AREA)
    factors = np.array([width / image.shape[1], height / image.shape[0]] * 2)
    boxes = small.copy()
    for box, colour in [*((b, TRUE) for b in true), *([] if found is None else [(found, FOUND)])]:
        _rectangle(boxes, box * factors, colour)
    rows, columns = (
        ((np.arange(n) + 0.5) / n * side / cell).astype(int)
        for n, side, cell in zip((height, width), image.shape[:2], covered, strict=True)
    )
    inside = mask[np.ix_(rows.clip(max=mask.shape[0] - 1), columns.clip(max=mask.shape[1] - 1))]
    tinted = np.where(inside[..., None], (1 - STRENGTH) * small + STRENGTH * np.array(FOUND), DIM * small)
    region = tinted.round().astype(np.uint8)
    row, column = divmod(seed, mask.shape[1])
    cell = np.array([column, row, column + 1, row + 1]) * [*covered[::-1], *covered[::-1]]
    _rectangle(region, cell * factors, SEED)
    return Shown(title, boxes, region)


def sheet(shown: Sequence[Shown]) -> Image:
    """All of them on one page, with a legend."""
    rows = []
    for start in range(0, len(shown), ACROSS):
        panels = []
        for one in shown[start : start + ACROSS]:
            panels += [(one.title, _widened(one.boxes)), ("region, seed", _widened(one.region))]
        rows.append(side_by_side(panels))
    width = max(row.shape[1] for row in rows)
    page = Pillow.new("RGB", (width, sum(row.shape[0] for row in rows) + MARGIN), PAPER)
    top = 0
    for row in rows:
        page.paste(Pillow.fromarray(row), (0, top))
        top += row.shape[0]
    legend = [("found box and its region", FOUND), ("true boxes", TRUE), ("seed patch", SEED)]
    return with_legend(np.asarray(page), legend)


def short(name: str) -> str:
    """What fits over a panel: the file's name without its ending, of a long one the end."""
    stem = PurePosixPath(name).stem
    return stem if len(stem) <= LETTERS else "..." + stem[3 - LETTERS :]


def _widened(panel: Image) -> Image:
    """With paper to the right, so that a title has room."""
    missing = max(0, NARROWEST - panel.shape[1])
    return np.pad(panel, ((0, 0), (0, missing), (0, 0)), constant_values=PAPER[0])


def _rectangle(picture: Image, box: Box, colour: tuple[int, int, int]) -> None:
    """Drawn inside the box and the picture, with a dark line around so that it shows on any ground."""
    height, width = picture.shape[:2]
    left, top = (int(np.clip(round(v), 0, most - 1)) for v, most in zip(box[:2], (width, height), strict=True))
    right, bottom = (int(np.clip(round(v) - 1, 0, most - 1)) for v, most in zip(box[2:], (width, height), strict=True))
    cv2.rectangle(picture, (left, top), (right, bottom), INK, LINE + 2)
    cv2.rectangle(picture, (left, top), (right, bottom), colour, LINE)
