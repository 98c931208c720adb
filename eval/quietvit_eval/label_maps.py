"""Files that say what counts as right on other test sets: which train class each test class is, and ReaL's labels.

A class map (for ImageNet-V2, -A, -R, -Sketch and the like) gives every class of the test set a train class of its own:

    .json          an object {test class: train class}
    .csv, .tsv     a line for each test class: test class, train class; a first line "test,train" is passed over
    .txt, .npy     train indices alone, one for each test class in the sorted order of their names (.json: a list)
    index          no file but a rule: the names of the test classes are themselves train indices (ImageNet-V2)

A train class is a name, or its index; a text that is both is taken as the name.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

INDEX = "index"
REAL_IMAGES = 50_000  # ImageNet's validation images, one list of ReaL labels each (Beyer et al. 2020)
VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})(?!\d)")
NAMED = 8  # names that a message lists

Pair = tuple[str, Any]  # a test class, and a train class as it was written


def read_class_map(
    given: str | Path, test_names: Sequence[str], used: Iterable[str], train_names: Sequence[str]
) -> Int64[np.ndarray, " T"]:
    """The train class of each of `test_names`; -1 for one that the map leaves out and that no image is of.

    Args:
        given: a file, or "index".
        used: the test classes that have images.

    Raises ValueError for a file that cannot be read, classes that are not there, that come twice or that share a train
    class, test classes left out, and a list of another length.
    """
    pairs = [(name, name) for name in test_names] if str(given) == INDEX else _pairs(Path(given), test_names)
    what = f"class map {given}"
    if str(given) == INDEX and (words := [name for name in test_names if not name.isdecimal()]):
        raise ValueError(f"{what}: test classes must be named by train indices, as in ImageNet-V2; not {_list(words)}")
    if twice := [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]:
        raise ValueError(f"{what} lists test classes more than once: {_list(twice)}")
    if unknown := [name for name, _ in pairs if name not in set(test_names)]:
        raise ValueError(f"{what} lists classes that the test set has not: {_hint(unknown, test_names)}")
    targets = _train_indices(pairs, train_names, what, numbers_only=str(given) == INDEX)
    if missing := [name for name in used if name not in targets]:
        raise ValueError(f"{what} leaves out classes of the test set: {_list(missing)}")
    if shared := [index for index, count in Counter(targets.values()).items() if count > 1]:
        both = [name for name, index in targets.items() if index == shared[0]]
        raise ValueError(f"{what} gives one train class, {train_names[shared[0]]!r}, to several: {_list(both)}")
    return np.array([targets.get(name, -1) for name in test_names], np.int64)


def map_hash(train_classes: Int64[np.ndarray, " T"], test_names: Sequence[str], train_names: Sequence[str]) -> str:
    """The same for the same pairs of names, in whatever form they were written."""
    pairs = sorted((test, train_names[i]) for test, i in zip(test_names, train_classes.tolist(), strict=True) if i >= 0)
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:12]


def _pairs(path: Path, test_names: Sequence[str]) -> list[Pair]:
    suffix = path.suffix.lower()
    if suffix not in (".json", ".csv", ".tsv", ".txt", ".npy"):
        raise ValueError(f"class map {path}: must be a .json, .csv, .tsv, .txt or .npy file, or the word {INDEX!r}")
    try:
        content = np.load(path, allow_pickle=False) if suffix == ".npy" else path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"class map {path} cannot be read: {error}") from error
    if isinstance(content, np.ndarray):
        return _in_order(content, path, test_names)
    if suffix == ".txt":
        return _in_order(np.array(content.split()), path, test_names)
    if suffix == ".json":
        return _json_pairs(content, path, test_names)
    return _table_pairs(content, "\t" if suffix == ".tsv" else ",", path)


def _json_pairs(text: str, path: Path, test_names: Sequence[str]) -> list[Pair]:
    try:
        content = json.loads(text, object_pairs_hook=_Object)
    except json.JSONDecodeError as error:
        raise ValueError(f"class map {path} is not JSON: {error}") from error
    if isinstance(content, _Object):
        return list(content.pairs)
    if isinstance(content, list):
        return _in_order(np.array(content, dtype=object), path, test_names)
    raise ValueError(
        f"class map {path} must hold an object {{test class: train class}}, not a {type(content).__name__}"
    )


class _Object:
    """A JSON object with its keys as they stand, so that one given twice is seen."""

    def __init__(self, pairs: list[Pair]) -> None:
        self.pairs = pairs


def _table_pairs(text: str, delimiter: str, path: Path) -> list[Pair]:
    pairs: list[Pair] = []
    reader = csv.reader(text.splitlines(), delimiter=delimiter)
    for row in reader:
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if len(cells) != 2:
            raise ValueError(
                f"class map {path}, line {reader.line_num}: {len(cells)} columns instead of 2 (test class, train class)"
            )
        if pairs or [cell.lower() for cell in cells] != ["test", "train"]:
            pairs.append((cells[0], cells[1]))
    return pairs


def _in_order(values: np.ndarray, path: Path, test_names: Sequence[str]) -> list[Pair]:
    names = sorted(test_names)
    if values.shape != (len(names),):
        raise ValueError(
            f"class map {path} must list {len(names)} train indices, one for each class of the test set in sorted "
            f"order; it has the shape {tuple(values.shape)}"
        )
    if all(name.isdecimal() for name in names) and names != sorted(names, key=int):
        raise ValueError(
            f"class map {path}: the test classes are numbers, which sort as texts ({_list(names[:4])}, ...), so that "
            f"a plain list is easily misread: use {INDEX!r} if they are train indices, else a .json or .csv map"
        )
    pairs: list[Pair] = []
    for name, value in zip(names, values.tolist(), strict=True):
        if isinstance(value, str) and re.fullmatch(r"-?\d+", value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"class map {path} must list train indices, whole numbers; it has {value!r}")
        pairs.append((name, value))
    return pairs


def _train_indices(
    pairs: Sequence[Pair], train_names: Sequence[str], what: str, *, numbers_only: bool
) -> dict[str, int]:
    indices = {} if numbers_only else {name: i for i, name in enumerate(train_names)}
    found: dict[str, int] = {}
    unknown: list[str] = []
    for name, value in pairs:
        if isinstance(value, str) and value in indices:
            found[name] = indices[value]
            continue
        if isinstance(value, str) and value.isdecimal():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            if not 0 <= value < len(train_names):
                raise ValueError(
                    f"{what}: test class {name!r} has the train index {value}, but indices run from 0 to "
                    f"{len(train_names) - 1}"
                )
            found[name] = value
        elif isinstance(value, str):
            unknown.append(value)
        else:
            raise ValueError(f"{what}: test class {name!r} needs the name or index of one train class, not {value!r}")
    if unknown:
        raise ValueError(f"{what} names train classes that are not there: {_hint(unknown, train_names)}")
    return found


def _list(names: Sequence[object]) -> str:
    shown = ", ".join(str(name) for name in names[:NAMED])
    return shown + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _hint(unknown: Sequence[str], known: Sequence[str]) -> str:
    near = difflib.get_close_matches(unknown[0], known, n=1)
    return _list(unknown) + (f" (nearest to {unknown[0]}: {near[0]})" if near else "")


def read_real_labels(path: Path, names: Sequence[str], num_classes: int) -> Int64[np.ndarray, "M A"]:
    """ReaL's right classes of each of ImageNet's validation images named, padded with -1; a row of -1: it has none.

    Args:
        path: real.json of google-research/reassessed-imagenet: 50,000 lists, entry i of ILSVRC2012_val_<i + 1>.JPEG.
        names: of the images, whatever folders stand before.

    Raises ValueError for a file that is no such list, classes beyond `num_classes`, and images not named so.
    """
    lists = _real_lists(path)
    rows = [_real_row(name, path) for name in names]
    if len(set(rows)) < len(rows):
        row = next(row for row, count in Counter(rows).items() if count > 1)
        raise ValueError(f"the test set has image ILSVRC2012_val_{row + 1:08d} more than once; ReaL needs each once")
    chosen = [lists[row] for row in rows]
    if (most := max((max(labels) for labels in chosen if labels), default=-1)) >= num_classes:
        raise ValueError(
            f"{path} has class {most}, but the train set has {num_classes} classes: ReaL's labels are those of all "
            "1,000 classes of ImageNet"
        )
    accepted = np.full((len(chosen), max((len(labels) for labels in chosen), default=0)), -1, np.int64)
    for i, labels in enumerate(chosen):
        accepted[i, : len(labels)] = labels
    return accepted


def _real_lists(path: Path) -> list[list[int]]:
    try:
        lists = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"ReaL's labels {path} cannot be read: {error}") from error
    if not isinstance(lists, list) or len(lists) != REAL_IMAGES:
        found = f"{len(lists):,} entries" if isinstance(lists, list) else f"a {type(lists).__name__}"
        raise ValueError(f"{path} must be a list of {REAL_IMAGES:,} lists of classes (ReaL's real.json), not {found}")
    for i, labels in enumerate(lists):
        if not isinstance(labels, list) or not all(type(label) is int and label >= 0 for label in labels):
            raise ValueError(f"{path}: entry {i} must be a list of classes, whole numbers from 0; it is {labels!r}")
    return lists


def _real_row(name: str, path: Path) -> int:
    match = VAL_NAME.match(name.rsplit("/", 1)[-1])
    if match is None or not 1 <= int(match[1]) <= REAL_IMAGES:
        raise ValueError(
            f"test image {name!r} is not named as ImageNet's validation images are (ILSVRC2012_val_00000001.JPEG to "
            f"ILSVRC2012_val_{REAL_IMAGES:08d}.JPEG), so that {path} cannot tell its classes"
        )
    return int(match[1]) - 1


def file_hash(path: Path) -> str:
    """sha256 of the bytes, 12 digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
