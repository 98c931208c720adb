"""Pages of small maps: rows of panels under common titles, and how numbers become colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from quietvit_eval.pictures import INK, MARGIN, PAPER, TEXT, Image

# All ours.
CELL = 144  # pixels, height of a panel
GAP = 4  # pixels between panels
FRAME = 3  # pixels, width of a mark around a panel
LETTERS = 18  # of a title; more than that is cut at its beginning, names of files differ at their ends
BLUE, MIDDLE, ORANGE = (0, 114, 178), (245, 245, 245), (213, 94, 0)  # Okabe and Ito's, white between them

Map = Float[np.ndarray, "h w"]


@dataclass(frozen=True)
class Row:
    """Panels of one height, what stands to their left, and a line under each (or nothing)."""

    title: str
    panels: Sequence[Image]
    under: Sequence[str] = ()


def heat(values: Map, *, low: float, high: float) -> UInt8[np.ndarray, "h w 3"]:
    """Viridis from `low` (dark) to `high` (bright), values beyond them cut off. Dark all over if the two are equal."""
    table = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_VIRIDIS)[:, 0, ::-1]
    picked: UInt8[np.ndarray, "h w 3"] = table[_levels(values, low, high)]
    return picked


def grey(values: Map, *, low: float, high: float) -> UInt8[np.ndarray, "h w 3"]:
    """Black at `low`, white at `high`; medium grey all over if the two are equal."""
    levels = _levels(values, low, high) if high > low else np.full(values.shape, 128, np.uint8)
    return np.repeat(levels[..., None], 3, axis=2)


def around_zero(values: Map, *, most: float) -> UInt8[np.ndarray, "h w 3"]:
    """Blue at -most, white at 0, orange at +most."""
    x = (values / most).clip(-1, 1)[..., None] if most > 0 else np.zeros((*values.shape, 1))
    ends = np.where(x < 0, np.array(BLUE, np.float64), np.array(ORANGE, np.float64))
    mixed: UInt8[np.ndarray, "h w 3"] = (np.array(MIDDLE) * (1 - abs(x)) + ends * abs(x)).round().astype(np.uint8)
    return mixed


def enlarged(values: Float[np.ndarray, "h w *c"], height: int, *, smooth: bool) -> Float[np.ndarray, "H W *c"]:
    """A map at `height` pixels, as wide as its shape asks: each cell a block (nearest), or bilinear."""
    size = max(1, round(values.shape[1] * height / values.shape[0])), height
    how = cv2.INTER_LINEAR if smooth else cv2.INTER_NEAREST_EXACT
    out: Float[np.ndarray, "H W *c"] = cv2.resize(np.ascontiguousarray(values, np.float32), size, interpolation=how)
    return out


def fitted(image: Image, height: int) -> Image:
    """An image at `height` pixels, as wide as its shape asks: area averages, or blocks if it has to grow."""
    if image.shape[0] == height:
        return image
    size = max(1, round(image.shape[1] * height / image.shape[0])), height
    how = cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_NEAREST
    out: Image = cv2.resize(np.ascontiguousarray(image), size, interpolation=how)
    return out


def framed(panel: Image, colour: Sequence[int]) -> Image:
    """The panel with a coloured line inside its border."""
    out = panel.copy()
    for side in (np.s_[:FRAME], np.s_[-FRAME:], np.s_[:, :FRAME], np.s_[:, -FRAME:]):
        out[side] = colour
    return out


def page(columns: Sequence[str], rows: Sequence[Row], notes: Sequence[str] = (), *, cell: int = CELL) -> Image:
    """One picture of all rows, titles of columns above and of rows to the left, notes below.

    Panels are brought to `cell` pixels of height and stand in columns as wide as the widest of them.
    """
    font, line = ImageFont.load_default(TEXT), TEXT + GAP
    grid = [[fitted(panel, cell) for panel in row.panels] for row in rows]
    widths = [max(r[c].shape[1] for r in grid if c < len(r)) for c in range(max(map(len, grid)))]
    widths = [max(w, int(font.getlength(t)) + 1) for w, t in zip(widths, [*columns, *[""] * len(widths)], strict=False)]
    label = max(int(font.getlength(text)) for row in rows for text in row.title.split("\n")) + MARGIN
    heights = [cell + GAP + (line if row.under else 0) for row in rows]
    width = MARGIN + label + sum(widths) + GAP * len(widths) + MARGIN
    width = max([width, *(int(font.getlength(note)) + 2 * MARGIN for note in notes)])
    top = MARGIN + line
    sheet = Pillow.new("RGB", (width, top + sum(heights) + (line * len(notes)) + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    lefts = MARGIN + label + np.cumsum([0, *(w + GAP for w in widths)])
    for left, title in zip(lefts, columns, strict=False):
        draw.text((int(left), MARGIN), title, INK, font)
    for row, panels, height in zip(rows, grid, heights, strict=True):
        draw.multiline_text((MARGIN, top), row.title, INK, font, spacing=GAP)
        for left, panel in zip(lefts, panels, strict=False):
            sheet.paste(Pillow.fromarray(panel), (int(left), top))
        for left, text in zip(lefts, row.under, strict=False):
            draw.text((int(left), top + cell), text, INK, font)
        top += height
    for note in notes:
        draw.text((MARGIN, top), note, INK, font)
        top += line
    return np.asarray(sheet)


def short(name: str) -> str:
    """The end of a name, as far as it fits beside a row."""
    return name if len(name) <= LETTERS else "..." + name[3 - LETTERS :]


def _levels(values: Map, low: float, high: float) -> UInt8[np.ndarray, "h w"]:
    if high <= low:
        return np.zeros(values.shape, np.uint8)
    return ((values - low) / (high - low) * 255).round().clip(0, 255).astype(np.uint8)
