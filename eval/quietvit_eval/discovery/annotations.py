"""Boxes from the files that people have: VOC's XML, tables in CSV, COCO's JSON.

Boxes are left, top, right, bottom in pixels from the upper left corner of the image, so that (0, 0, 1, 1) is its first
pixel. Files that number pixels from 1, as VOC does, name the first and the last pixel inside a box.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from quietvit_eval.discovery.boxes import Boxes

FIRST_PIXELS = (0, 1)
# Columns of a CSV by their names elsewhere: TensorFlow's object detection tables have filename.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "name": ("name", "filename", "file", "image"),
    "xmin": ("xmin",),
    "ymin": ("ymin",),
    "xmax": ("xmax",),
    "ymax": ("ymax",),
}
SIZE = ("width", "height")


@dataclass(frozen=True)
class Annotation:
    """What a file says about one image."""

    boxes: Boxes  # may be empty
    size: tuple[int, int] | None  # height and width of the image that was annotated; None: not told


def read_voc(path: Path, first_pixel: int) -> Annotation:
    """One XML of VOC: all objects, difficult and truncated ones too; boxes of parts of objects are none of them.

    Raises ValueError for a file that is no such XML, or has a box that cannot be.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not an XML file that can be read: {error}") from error
    if root.tag != "annotation":
        raise ValueError(f"{path} is no annotation of VOC: it begins with <{root.tag}>, not with <annotation>")
    boxes = []
    for number, item in enumerate(root.findall("object"), 1):
        where = f"{path}, object {number}"
        texts = [item.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
        boxes.append(_box([_number(text, where) for text in texts], first_pixel, where))
    height, width = (_size(root.findtext(f"size/{side}")) for side in ("height", "width"))
    return Annotation(_stacked(boxes), (height, width) if height and width else None)


def read_csv(path: Path, first_pixel: int) -> dict[str, Annotation]:
    """A table with a row for each box: name, xmin, ymin, xmax, ymax, and, if known, width and height; by name.

    A row without corners is an image without boxes. Raises ValueError for a table without these columns, and for a row
    that cannot be read (the message names its line).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error}") from error
    reader = csv.DictReader(text.splitlines())
    columns = columns_of([h.strip() for h in reader.fieldnames or []])
    if missing := [name for name in COLUMNS if name not in columns]:
        raise ValueError(
            f"{path} lacks the columns {', '.join(missing)}; its first line has {', '.join(reader.fieldnames or [])}"
        )
    boxes: dict[str, list[list[float]]] = {}
    sizes: dict[str, tuple[int, int] | None] = {}
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        values = {key.strip(): (value or "").strip() for key, value in row.items() if isinstance(key, str)}
        name = values[columns["name"]]
        if not name:
            raise ValueError(f"{where} has no name")
        corners = [values[columns[side]] for side in ("xmin", "ymin", "xmax", "ymax")]
        own = boxes.setdefault(name, [])
        if any(corners):
            own.append(_box([_number(text, where) for text in corners], first_pixel, where))
        width, height = (_size(values.get(side)) for side in SIZE)
        sizes.setdefault(name, (height, width) if height and width else None)
    return {name: Annotation(_stacked(own), sizes[name]) for name, own in boxes.items()}


def columns_of(header: list[str]) -> dict[str, str]:
    """Which column of a table holds what, of those that it has."""
    return {
        what: next(name for name in names if name in header)
        for what, names in COLUMNS.items()
        if any(name in header for name in names)
    }


def read_coco(path: Path) -> dict[str, Annotation]:
    """COCO's instances: boxes of single objects, crowds (iscrowd) left out; by file name.

    Raises ValueError for a file that is no such JSON, or has a box that cannot be.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file that can be read: {error}") from error
    if not isinstance(tree, dict) or not {"images", "annotations"} <= set(tree):
        raise ValueError(f"{path} holds no instances of COCO: it lacks the lists 'images' and 'annotations'")
    boxes: dict[Any, list[list[float]]] = {}
    try:
        images = {image["id"]: image for image in tree["images"]}
        for number, item in enumerate(tree["annotations"]):
            if not item.get("iscrowd", 0):
                where = f"{path}, annotation {number}"
                left, top, width, height = (_number(value, where) for value in item["bbox"])
                corners = [left, top, left + width, top + height]
                boxes.setdefault(item["image_id"], []).append(_box(corners, 0, where))
        if unknown := set(boxes) - set(images):
            raise ValueError(f"{path} annotates {len(unknown):,} images that its list does not have")
        return {
            str(image["file_name"]): Annotation(_stacked(boxes.get(key, [])), _coco_size(image))
            for key, image in images.items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no instances of COCO: {type(error).__name__} {error}") from error


def _coco_size(image: Mapping[str, Any]) -> tuple[int, int] | None:
    height, width = _size(image.get("height")), _size(image.get("width"))
    return (height, width) if height and width else None


def _box(corners: list[float], first_pixel: int, where: str) -> list[float]:
    left, top, right, bottom = corners
    box = [left - first_pixel, top - first_pixel, right, bottom]
    if not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError(f"{where} has a box without area: {', '.join(f'{c:g}' for c in corners)}")
    return box


def _stacked(boxes: list[list[float]]) -> Boxes:
    return np.array(boxes, np.float64).reshape(-1, 4)


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = np.nan
    if not np.isfinite(number):
        said = "has a box that lacks a corner" if value is None else f"has {value!r} for the corner of a box"
        raise ValueError(f"{where} {said}")
    return number


def _size(value: Any) -> int:
    """A side in pixels; 0 where it is not told, which some annotators also write."""
    try:
        return int(float(value))
    except (TypeError, ValueError, OverflowError):
        return 0
