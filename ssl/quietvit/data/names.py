"""A million names without a million Python strings, and labels written as text turned into numbers."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int64, UInt8

MAX_CLASSES = 1_000_000  # a greater number is an identifier, not a class (ours)


class NameTable:
    """File names as one block of bytes and their ends: 1M names of 40 letters take 48 MB instead of 97."""

    def __init__(self, blob: UInt8[np.ndarray, " bytes"], ends: Int64[np.ndarray, " n"]) -> None:
        self.blob = blob
        self.ends = ends

    @classmethod
    def of(cls, names: Iterable[bytes]) -> NameTable:
        """Pack names in their order, without keeping more than one of them besides the block."""
        blob, ends = bytearray(), array("q")
        for name in names:
            blob += name
            ends.append(len(blob))
        return cls(np.frombuffer(bytes(blob), np.uint8), np.array(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self.ends):
            raise IndexError(f"name {index} of {len(self.ends)}")
        start = int(self.ends[index - 1]) if index else 0
        return self.blob[start : int(self.ends[index])].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        blob, start = self.blob.tobytes(), 0
        for end in self.ends.tolist():
            yield blob[start:end]
            start = end

    def text(self, index: int) -> str:
        """The name as Python writes file names; names that are not UTF-8 survive the round trip."""
        return os.fsdecode(self[index])


def fingerprint(names: NameTable, sizes: Int64[np.ndarray, " n"]) -> str:
    """sha256 of names and file sizes: cheap, the same on every machine, and different for different data."""
    digest = hashlib.sha256(b"quietvit names and sizes 1\0")
    digest.update(len(names).to_bytes(8, "little"))
    digest.update(names.ends.astype("<i8").tobytes())
    digest.update(names.blob.tobytes())
    digest.update(np.ascontiguousarray(sizes).astype("<i8").tobytes())
    return digest.hexdigest()


def labels_from_text(texts: Sequence[str]) -> tuple[Int64[np.ndarray, " n"], list[str]]:
    """Labels and class names of labels written as text; an empty text is an unknown label, -1.

    Whole numbers are the labels themselves, so that a list of half the classes keeps its numbers. Anything else is a
    class name, and its label is its rank among the sorted names.
    """
    known = {text for text in texts if text}
    if known and all(text.isascii() and text.isdigit() for text in known):
        greatest = max(int(text) for text in known)
        if greatest < MAX_CLASSES:
            classes = [str(i) for i in range(greatest + 1)]
            return np.array([int(text) if text else -1 for text in texts], np.int64), classes
    classes = sorted(known)
    rank = {name: i for i, name in enumerate(classes)} | {"": -1}
    return np.array([rank[text] for text in texts], np.int64), classes
