"""Images with boxes: the BOX_SETS table, and which images belong to which split."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from quietvit.data.decode import IMAGE_EXTENSIONS, UnreadableImage, decode_file
from quietvit.data.names import NameTable, fingerprint
from quietvit_eval.dense_data.pair_files import read_image
from quietvit_eval.dense_data.trees import by_stem, choose_listed, found_in, read_names, require_files, some
from quietvit_eval.discovery.annotations import (
    COLUMNS,
    FIRST_PIXELS,
    Annotation,
    columns_of,
    read_coco,
    read_csv,
    read_voc,
)
from quietvit_eval.discovery.boxes import Boxes

BOXES = "boxes"  # the target: any number of boxes an image, at least one
SPLITS = ("train", "val", "trainval", "test")
TUNED = 5  # of so many images one is "train" where a data set has no such lists (ours)
IMAGE_FOLDERS = ("JPEGImages", "images", ".")


class BoxFiles:
    """Base of the layouts (see dense_data.pairs.PairSource): targets are Boxes, clipped to their image."""

    kind = BOXES
    layout: str
    root: Path

    def _open(self, items: Mapping[str, Annotation], note: str) -> None:
        """Take the images (relative to the root) that have boxes. Raises ValueError if none has."""
        self.class_names: list[str] = []
        self._items = sorted((name, a) for name, a in items.items() if len(a.boxes))
        if not self._items:
            raise ValueError(f"{self.layout}:{self.root} {note}: none of its {len(items):,} images has a box")
        empty = len(items) - len(self._items)
        without = f"; {empty:,} without boxes left out" if empty else ""
        self.name = f"{self.layout}:{self.root} {note} ({len(self._items):,} images{without})"

    def __len__(self) -> int:
        return len(self._items)

    def load(self, index: int) -> tuple[UInt8[np.ndarray, "H W 3"], Boxes]:
        """RGB pixels and boxes. Raises UnreadableImage, also if a box lies outside the image."""
        name, annotation = self._items[index]
        path = self.root / name
        image = decode_file(path, name) if annotation.size is None else read_image(path, name, annotation.size)
        height, width = image.shape[:2]
        boxes = annotation.boxes.clip(0, [width, height, width, height])
        if (boxes[:, :2] >= boxes[:, 2:]).any():
            raise UnreadableImage(name, f"a box lies outside its {width} x {height} pixels")
        return image if image.flags.writeable else image.copy(), boxes

    def item_name(self, index: int) -> str:
        """The image's path relative to the data set."""
        return self._items[index][0]

    def fingerprint(self) -> str:
        """sha256 of names and sizes of the image files, and of all boxes."""
        names = [name for name, _ in self._items]
        sizes = np.array([_file_size(self.root / name) for name in names], np.int64)
        digest = hashlib.sha256(b"quietvit boxes 1\0")
        digest.update(fingerprint(NameTable.of(os.fsencode(name) for name in names), sizes).encode())
        for _, annotation in self._items:
            digest.update(len(annotation.boxes).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(annotation.boxes, "<f8").tobytes())
        return digest.hexdigest()


class VocBoxes(BoxFiles):
    """JPEGImages/, Annotations/NAME.xml and, if there, the lists ImageSets/Main/{train,val,trainval,test}.txt.

    Args:
        path: the folder VOC2007, VOCdevkit, or the one that lies in.
        split: a list of that name. Without trainval.txt, "trainval" is train and val together, or all images; without
            both train.txt and val.txt, one in five of it is "train" and the others "val" (`part_of`). Without test.txt,
            "test" means val.
        year: of VOC{year}, if there are several.
        first_pixel: number of the first pixel; VOC counts from 1.

    Raises:
        ValueError: the layout is another, lists name what is not there, or an XML cannot be read.
    """

    layout = "voc"
    looked_for = "VOCdevkit/VOC*/ with JPEGImages/ and Annotations/*.xml (voc)"

    def __init__(self, path: str | Path, *, split: str, year: int | None = None, first_pixel: int = 1) -> None:
        check_first_pixel(first_pixel)
        place = Path(path).expanduser()
        self.root = _voc_root(place, year)
        images = by_stem(self.root / "JPEGImages", IMAGE_EXTENSIONS)
        annotated = by_stem(self.root / "Annotations", {".xml"})
        if not images or not annotated:
            raise ValueError(f"{self.root} has {len(images):,} images in JPEGImages/ and {len(annotated):,} XML files "
                             "in Annotations/")  # fmt: skip
        stems, note = self._listed(split, sorted(annotated))
        if missing := [stem for stem in stems if stem not in images]:
            raise ValueError(f"{self.root / 'JPEGImages'} lacks {len(missing):,} images, for example {some(missing)}")
        items = {}
        for stem in stems:
            file = self.root / "Annotations" / f"{stem}.xml"
            known = read_voc(file, first_pixel) if stem in annotated else Annotation(np.empty((0, 4)), None)
            items[f"JPEGImages/{images[stem]}"] = known
        self._open(items, note)

    @staticmethod
    def fits(path: Path) -> bool:
        """Whether this layout lies there."""
        return bool(_voc_roots(path))

    def _listed(self, split: str, annotated: list[str]) -> tuple[list[str], str]:
        lists = self.root / "ImageSets" / "Main"
        there = {name for name in SPLITS if (lists / f"{name}.txt").is_file()}
        pair = {"train", "val"} <= there
        if split in there and (split not in ("train", "val") or pair):
            return _stems(lists, split), split
        if split == "test" and pair:
            return _stems(lists, "val"), "val; there is no split 'test'"
        if "trainval" in there:
            whole = _stems(lists, "trainval")
        elif pair:
            whole = sorted({*_stems(lists, "train"), *_stems(lists, "val")})
        else:
            whole = annotated
        return part_of(whole, split)


class CsvBoxes(BoxFiles):
    """A table with a row for each box, and the images it names, with or without their extension.

    Args:
        path: the CSV, or a folder with one that has the columns name (or filename), xmin, ymin, xmax, ymax.
        split: "trainval" is all; "train" one in five of it (`part_of`), "val" and "test" the others.
        images: their folder relative to the CSV's; None: JPEGImages, images, or the CSV's own.
        names: a text file with the images that count, one a line; None: all.
        first_pixel: number of the first pixel; 0: corners are distances from the border.

    Raises:
        ValueError: the table, a list or an image it names is not there or cannot be read.
    """

    layout = "csv"
    looked_for = f"a CSV with the columns {', '.join(COLUMNS)} (csv)"

    def __init__(
        self, path: str | Path, *, split: str, images: str | None = None, names: str | None = None, first_pixel: int = 0
    ) -> None:
        check_first_pixel(first_pixel)
        tables = _tables(Path(path).expanduser())
        if len(tables) != 1:
            raise ValueError(f"{path}: looked for {self.looked_for}; found {len(tables)}{_such(tables)}")
        table = tables[0]
        self.root = image_folder(table.parent, images)
        stems = by_stem(self.root, IMAGE_EXTENSIONS)
        files = {key: name for stem, name in stems.items() for key in (stem, name)}
        known = read_csv(table, first_pixel)
        if missing := [name for name in known if name not in files]:
            raise ValueError(f"{table} names {len(missing):,} of {len(known):,} images that are not in {self.root}: "
                             f"{some(missing)}")  # fmt: skip
        items = {files[name]: annotation for name, annotation in known.items()}
        chosen, note = part_of(_restricted(items, names, self.root), split)
        self._open({name: items[name] for name in chosen}, note)

    @staticmethod
    def fits(path: Path) -> bool:
        """Whether this layout lies there."""
        return len(_tables(path)) == 1


class CocoBoxes(BoxFiles):
    """COCO's instances in JSON and the images it names; crowds are left out.

    Args:
        path: the JSON, or a folder with one in it or in its annotations/.
        split: "trainval" is all; "train" one in five of it (`part_of`), "val" and "test" the others.
        images: their folder relative to the JSON's; None: the one the JSON is named for (instances_train2014.json:
            train2014/), beside it or beside its folder, or images/.
        names: a text file with the images that count, one a line, as LOST has for COCO20k; None: all.

    Raises:
        ValueError: the JSON, a list or an image it names is not there or cannot be read.
    """

    layout = "coco"
    looked_for = "annotations/instances_*.json (coco)"

    def __init__(self, path: str | Path, *, split: str, images: str | None = None, names: str | None = None) -> None:
        files = _jsons(Path(path).expanduser())
        if len(files) != 1:
            raise ValueError(f"{path}: looked for {self.looked_for}; found {len(files)}{_such(files)}")
        known = read_coco(files[0])
        if not known:
            raise ValueError(f"{files[0]} lists no images")
        self.root = _coco_images(files[0], images, next(iter(known)))
        chosen, note = part_of(_restricted(known, names, self.root), split)
        require_files(self.root, chosen, files[0])
        self._open({name: known[name] for name in chosen}, note)

    @staticmethod
    def fits(path: Path) -> bool:
        """Whether this layout lies there."""
        return len(_jsons(path)) == 1


BOX_SETS: Mapping[str, Callable[..., BoxFiles]] = {"voc": VocBoxes, "csv": CsvBoxes, "coco": CocoBoxes}
_DETECTED: tuple[Any, ...] = (VocBoxes, CocoBoxes, CsvBoxes)


def open_boxes(kind: str, path: str | None, *, split: str, **options: Any) -> BoxFiles:
    """Open a row of BOX_SETS, or "auto": the first that fits what lies there.

    `split` is "train", "val", "trainval" or "test"; `options` are the row's keywords. Raises ValueError: unknown
    kind, split or option, or data that is not there or not of that layout.
    """
    if kind != "auto" and kind not in BOX_SETS:
        near = difflib.get_close_matches(kind, BOX_SETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown layout {kind!r} of images with boxes{hint} There are: auto, {', '.join(BOX_SETS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
    if path is None:
        raise ValueError(f"layout {kind!r} of images with boxes needs a path")
    place = Path(path).expanduser()
    if not place.exists():
        raise ValueError(f"{path} does not exist; looked for {'; '.join(row.looked_for for row in _DETECTED)}")
    row = BOX_SETS[kind] if kind != "auto" else next((row for row in _DETECTED if row.fits(place)), None)
    if row is None:
        found = found_in(place) if place.is_dir() else "a file"
        raise ValueError(f"{path} has no layout of images with boxes that is known: looked for "
                         f"{'; '.join(r.looked_for for r in _DETECTED)}; found {found}")  # fmt: skip
    allowed = [p for p in inspect.signature(row).parameters if p not in ("path", "split")]
    if unknown := [name for name in options if name not in allowed]:
        raise ValueError(f"this layout of boxes has no option {unknown[0]!r}; it has: {', '.join(allowed)}")
    return row(path, split=split, **options)


def part_of(names: Sequence[str], split: str) -> tuple[list[str], str]:
    """The names of a split of a data set that has no lists, and a note that says so.

    In the order of the SHA-256 of the names, the first fifth is "train", the rest "val", which also stands in for
    "test"; "trainval" is all. Raises ValueError for a part without images.
    """
    if split == "trainval":
        return list(names), "all"
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode(errors="surrogateescape")).digest())
    count = max(1, len(ordered) // TUNED)
    part = ordered[:count] if split == "train" else ordered[count:]
    if not part:
        raise ValueError(f"{len(names)} images cannot be divided: to score them all, take the split trainval")
    kept = "one in five" if split == "train" else "four in five"
    note = f"{'train' if split == 'train' else 'val'}, {kept} by hash of the name"
    return sorted(part), note + ("; there is no split 'test'" if split == "test" else "")


def check_first_pixel(number: int) -> None:
    """Raises ValueError unless pixels are numbered from 0 or from 1."""
    if number not in FIRST_PIXELS or isinstance(number, bool):
        raise ValueError(f"first_pixel is 0 or 1, the number that the first pixel of a row has, not {number!r}")


def image_folder(root: Path, given: str | None) -> Path:
    """The folder of a table's images. Raises ValueError if it is not there."""
    if given is not None:
        if not (root / given).is_dir():
            raise ValueError(f"{root} has no folder {given!r} with images; found {found_in(root)}")
        return root / given
    return next(root / name for name in IMAGE_FOLDERS if (root / name).is_dir())


def _voc_roots(path: Path) -> list[Path]:
    places = [path, *sorted(path.glob("VOC[0-9]*")), *sorted((path / "VOCdevkit").glob("VOC[0-9]*"))]
    return [p for p in places if (p / "JPEGImages").is_dir() and (p / "Annotations").is_dir()]


def _voc_root(path: Path, year: int | None) -> Path:
    roots = _voc_roots(path)
    if year is not None:
        roots = [root for root in roots if root.name == f"VOC{year}" or root == path]
    if not roots:
        wanted = "" if year is None else f" of {year}"
        found = found_in(path) if path.is_dir() else "no folder"
        raise ValueError(f"{path}: looked for {VocBoxes.looked_for}{wanted}; found {found}")
    if len(roots) > 1:
        raise ValueError(f"{path} holds {', '.join(root.name for root in roots)}: choose one by its year, or its path")
    return roots[0]


def _stems(lists: Path, split: str) -> list[str]:
    return sorted({line.split()[0] for line in read_names(lists / f"{split}.txt")})


def _tables(path: Path) -> list[Path]:
    """CSV files with the columns that boxes need."""
    files = [path] if path.is_file() else sorted(path.glob("*.csv"))
    found = []
    for file in files:
        try:
            with file.open(encoding="utf-8-sig") as opened:
                header = [h.strip() for h in opened.readline().split(",")]
        except (OSError, UnicodeDecodeError):
            continue
        if len(columns_of(header)) == len(COLUMNS):
            found.append(file)
    return found


def _jsons(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix == ".json" else []
    return [*sorted(path.glob("instances*.json")), *sorted((path / "annotations").glob("instances*.json"))]


def _coco_images(file: Path, given: str | None, first: str) -> Path:
    if given is not None:
        return image_folder(file.parent, given)
    named = file.stem.split("_")[-1]
    places = [base / name for base in (file.parent, file.parent.parent) for name in (named, "images", ".")]
    for place in places:
        if (place / first).is_file():
            return place
    raise ValueError(f"the images of {file} are in none of {', '.join(map(str, places))}: looked for {first}; name "
                     "their folder by the option images")  # fmt: skip


def _restricted(items: Iterable[str], names: str | None, root: Path) -> list[str]:
    if names is None:
        return list(items)
    return list(choose_listed({os.path.splitext(n)[0]: n for n in items}, Path(names).expanduser(), root).values())


def _such(files: Sequence[Path]) -> str:
    return f": {', '.join(f.name for f in files[:4])}" if files else ""


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
