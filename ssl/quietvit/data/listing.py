"""Images named by a list: one path per line, or a CSV table with a header.

    cats/1.jpg                     path,label
    dogs/7.jpg                     cats/1.jpg,cat

Paths are relative to `root`, or to the list's own folder. Tables name the path column path, file, filename or image,
and the optional label column label or class. Empty lines, and lines of a text list that begin with #, are passed over.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from quietvit.data.decode import decode_file
from quietvit.data.names import NameTable, fingerprint, labels_from_text

PATH_COLUMNS = ("path", "file", "filename", "image")
LABEL_COLUMNS = ("label", "class")
_NUM_CHECKED = 100  # files looked for at once: enough to notice a wrong root, cheap on a slow disk (ours)


class ListSource:
    """Images of a text or CSV list, in the list's order (see data.sources.Source).

    Args:
        path: the list; .csv and .tsv are tables, anything else is text, all in UTF-8.
        split: None or "train": one list is one split.
        root: what paths are relative to; None: the list's folder.

    Raises:
        ValueError: the list is missing, empty or lacks a path column, or none of the first files it names exists.
    """

    def __init__(self, path: str | Path, *, split: str | None = None, root: str | Path | None = None) -> None:
        file = Path(path).expanduser()
        if not file.is_file():
            raise ValueError(f"{file} is not a file: a list of images is a text file or a CSV table")
        if split not in (None, "train"):
            raise ValueError(f"{file} is one list and has no split {split!r}: give the list of that split as the path")
        self.root = Path(root).expanduser() if root is not None else file.absolute().parent
        try:
            paths, labels = _read_table(file) if file.suffix.lower() in (".csv", ".tsv") else (_read_lines(file), None)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not a text file in UTF-8: {error.reason} at byte {error.start}") from error
        if not paths:
            raise ValueError(f"{file} names no images")
        self._names = NameTable.of(os.fsencode(name) for name in paths)
        if not any((self.root / name).exists() for name in paths[:_NUM_CHECKED]):
            raise ValueError(
                f"{file}: none of the first {min(len(paths), _NUM_CHECKED)} images exists, "
                f"e.g. {self.root / paths[0]}; set `root` to the folder the paths are relative to"
            )
        self.name = f"list:{file} ({len(paths):,} images)"
        self.labels: dict[str, np.ndarray] = {}
        self.classes: dict[str, list[str]] = {}
        if labels is not None and any(labels):
            self.labels["class"], self.classes["class"] = labels_from_text(labels)

    def __len__(self) -> int:
        return len(self._names)

    def load(self, index: int, *, min_side: int | None = None) -> UInt8[np.ndarray, "H W 3"]:
        """Decoded RGB; see data.decode. Raises UnreadableImage, also for a file that does not exist."""
        name = self._names.text(index)
        return decode_file(self.root / name, name, min_side=min_side)

    def item_name(self, index: int) -> str:
        """The path as the list writes it."""
        return self._names.text(index)

    def fingerprint(self) -> str:
        """sha256 of names and file sizes (-1 for a missing file). Asks the file system for every size."""
        sizes = [_size(self.root / os.fsdecode(name)) for name in self._names]
        return fingerprint(self._names, np.array(sizes, np.int64))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _read_lines(file: Path) -> list[str]:
    with file.open(encoding="utf-8-sig") as lines:
        names = (line.strip() for line in lines)
        return [name for name in names if name and not name.startswith("#")]


def _read_table(file: Path) -> tuple[list[str], list[str] | None]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
        header = [column.strip().lower() for column in next(reader, [])]
        path_column = _find(header, PATH_COLUMNS)
        if path_column is None:
            raise ValueError(
                f"{file}: the first line must name the columns, one of them {', '.join(PATH_COLUMNS)}; "
                f"it is {','.join(header)!r}"
            )
        label_column = _find(header, LABEL_COLUMNS)
        paths: list[str] = []
        labels: list[str] = []
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(f"{file}, line {reader.line_num}: {len(row)} fields, the header has {len(header)}")
            if not row[path_column].strip():
                raise ValueError(f"{file}, line {reader.line_num}: the path is empty")
            paths.append(row[path_column].strip())
            if label_column is not None:
                labels.append(row[label_column].strip())
    return paths, labels if label_column is not None else None


def _find(header: list[str], wanted: tuple[str, ...]) -> int | None:
    return next((header.index(name) for name in wanted if name in header), None)
