"""Pictures of what a dense task predicts: panels side by side, classes as colours over the image, a legend."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from quietvit.files import write_atomically
from quietvit_eval.dense_data.pairs import IGNORE

# All ours.
LEAST, MOST = 240, 480  # heights of a panel, at most twice as wide: small ones grow by whole factors, large ones shrink
STRENGTH = 0.6  # of a class's colour over the image
DIM = 0.25  # brightness that is left of pixels that do not count
MARGIN = 8
TEXT = 14  # pixels
SHOWN = 24  # classes in a legend
PAPER, INK = (255, 255, 255), (30, 30, 30)

Image = UInt8[np.ndarray, "H W 3"]


def palette(num: int) -> UInt8[np.ndarray, "num 3"]:
    """A colour for each of `num` classes: each the farthest in CIE Lab from those before it, from black and from white.

    Class c thus has the same colour in every palette. Raises ValueError for more than the 4,096 colours tried.
    """
    levels = np.linspace(0, 255, 16).round().astype(np.uint8)
    tried = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    if num > len(tried) - 2:
        raise ValueError(f"{num} classes are more than there are colours to tell apart")
    lab = cv2.cvtColor((tried[None] / 255).astype(np.float32), cv2.COLOR_RGB2LAB)[0]
    distance = np.minimum(*(np.square(lab - lab[end]).sum(axis=1) for end in (0, -1)))
    chosen = np.empty(num, np.int64)
    for i in range(num):
        chosen[i] = distance.argmax()
        distance = np.minimum(distance, np.square(lab - lab[chosen[i]]).sum(axis=1))
    return tried[chosen]


def overlay(image: Image, classes: Int[np.ndarray, "H W"], colours: UInt8[np.ndarray, "C 3"]) -> Image:
    """Each pixel tinted with the colour of its class; IGNORE is darkened."""
    known = classes != IGNORE
    tint = colours[np.where(known, classes, 0)].astype(np.float32)
    tinted = np.where(known[..., None], (1 - STRENGTH) * image + STRENGTH * tint, DIM * image)
    return tinted.round().astype(np.uint8)


def side_by_side(panels: Sequence[tuple[str, Image]]) -> Image:
    """Panels of one height, each under its title, at a size that can be looked at."""
    fitted = [(title, _fit(panel)) for title, panel in panels]
    top = TEXT + 2 * MARGIN
    width = MARGIN + sum(p.shape[1] + MARGIN for _, p in fitted)
    page = Pillow.new("RGB", (width, top + max(p.shape[0] for _, p in fitted) + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    left = MARGIN
    for title, panel in fitted:
        draw.text((left, MARGIN), title, INK, _font())
        page.paste(Pillow.fromarray(panel), (left, top))
        left += panel.shape[1] + MARGIN
    return np.asarray(page)


def with_legend(picture: Image, entries: Sequence[tuple[str, Sequence[int]]]) -> Image:
    """The picture, and below it a patch of colour with a name for each entry, in columns."""
    if not entries:
        return picture
    font, line = _font(), TEXT + MARGIN
    column = max(int(font.getlength(name)) for name, _ in entries) + TEXT + 3 * MARGIN
    width = max(picture.shape[1], column + MARGIN)
    columns = max(1, (width - MARGIN) // column)
    rows = -(-len(entries) // columns)
    page = Pillow.new("RGB", (width, picture.shape[0] + rows * line + MARGIN), PAPER)
    page.paste(Pillow.fromarray(picture), (0, 0))
    draw = ImageDraw.Draw(page)
    for i, (name, colour) in enumerate(entries):
        x, y = MARGIN + (i % columns) * column, picture.shape[0] + (i // columns) * line
        draw.rectangle((x, y, x + TEXT, y + TEXT), tuple(int(c) for c in colour), INK)
        draw.text((x + TEXT + MARGIN, y), name, INK, font)
    return np.asarray(page)


def segmentation_picture(
    image: Image, truth: Int[np.ndarray, "H W"], predicted: Int[np.ndarray, "H W"], class_names: Sequence[str]
) -> Image:
    """Image, truth and prediction, and the names of the classes that either shows, largest first."""
    colours = palette(len(class_names))
    seen = np.bincount(np.concatenate([truth[truth != IGNORE], predicted.ravel()]), minlength=len(class_names))
    order = [int(c) for c in np.argsort(-seen, kind="stable") if seen[c]]
    entries: list[tuple[str, Sequence[int]]] = [(class_names[c], colours[c].tolist()) for c in order[:SHOWN]]
    if len(order) > SHOWN:
        entries.append((f"and {len(order) - SHOWN} more", PAPER))
    if (truth == IGNORE).any():
        entries.append(("not counted", (0, 0, 0)))
    page = side_by_side(
        [
            ("image", image),
            ("truth", overlay(image, truth, colours)),
            ("prediction", overlay(image, predicted, colours)),
        ]
    )
    return with_legend(page, entries)


def picture_path(folder: Path, task: str, facts: Sequence[Any], name: str) -> Path:
    """`<folder>/pictures/<task>_<hash of facts and name>_<name>.png`, the name without its ending or separators.

    Of long names the end.
    """
    own = hashlib.sha256(repr([*facts, name]).encode()).hexdigest()[:8]
    plain = "".join(c if c.isalnum() or c in "-_." else "-" for c in str(PurePosixPath(name).with_suffix("")))[-80:]
    return folder / "pictures" / f"{task}_{own}_{plain}.png"


def write_png(path: Path, picture: Image) -> None:
    """Write a picture, in a folder that is made if need be. Raises OSError as the file system does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: Pillow.fromarray(picture).save(file, format="PNG"))


def _fit(panel: Image) -> Image:
    height, width = panel.shape[:2]
    factor = min(-(-LEAST // height), 2 * MOST // width)
    if factor > 1:
        return np.repeat(np.repeat(panel, factor, axis=0), factor, axis=1)
    scale = min(1.0, MOST / height, 2 * MOST / width)
    if scale == 1:
        return panel
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    shrunk: Image = cv2.resize(np.ascontiguousarray(panel), size, interpolation=cv2.INTER_AREA)
    return shrunk


def _font() -> Any:
    return ImageFont.load_default(TEXT)
