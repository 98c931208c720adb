"""Features on disk: a folder for each model, images and view, filled in any order by one process or several.

    <store>/<key>-<blocks>/
        values.part        fp32 [M n+1 D] in the machine's byte order, one row for each image asked for
        values.f32         the same without the rows of unreadable images; by this name the entry is complete
        state.u8           a byte for each image: MISSING, THERE or UNREADABLE
        unreadable-R.jsonl what process R could not read, and why
        moving.bin         rows on their way while gaps are closed
        about.json         for people: what this is, when it was made, how large it is
        lock               held (flock) by whoever fills the entry or has it mapped; its date is that of the last use

An entry can be lost without harm. A byte of `state.u8` is set once its row has reached the file, so whatever a process
was killed at, the next one computes only what is missing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from quietvit.contracts import BadSample
from quietvit.files import write_atomically, write_text
from quietvit_eval.locks import Lock, take_lock

log = logging.getLogger(__name__)

MISSING, THERE, UNREADABLE = 0, 1, 2
SYNC_SECONDS = 5.0  # work that a kill can cost (ours)
MOVED_BYTES = 64 * 1024**2  # closed up at a time (ours)
TEMPORARY = ".features-"
REMOVED = ".removed-"


@dataclass(frozen=True)
class Place:
    """An entry's folder and shape; all processes of a group are told the same."""

    path: Path
    images: int
    blocks: int
    width: int  # D

    @property
    def row_bytes(self) -> int:
        return 4 * (self.blocks + 1) * self.width

    def complete(self) -> bool:
        """Whether every row is there, by the files' names and sizes, and every missing one has its reason."""
        values = self.path / "values.f32"
        return self._has_state() and values.is_file() and values.stat().st_size == self._kept() * self.row_bytes

    def resumable(self) -> bool:
        """Whether it was begun, and its files are what was begun."""
        part = self.path / "values.part"
        if not self._has_state() or not part.is_file():
            return False
        size = part.stat().st_size
        cut = self._kept() * self.row_bytes if (self.state() != MISSING).all() else None  # killed in `finish`
        return size in (self.images * self.row_bytes, cut)

    def begin(self, about: Mapping[str, Any]) -> None:
        """Empty files, their space on the disk taken. Raises OSError at once if the disk is full."""
        for old in self.path.iterdir():
            if old.name != "lock":
                old.unlink()
        self._tell(about, complete=False)
        _reserve(self.path / "values.part", self.images * self.row_bytes)
        write_atomically(self.path / "state.u8", lambda file: file.write_bytes(bytes(self.images)))

    def state(self, mode: str = "r") -> np.memmap[Any, np.dtype[np.uint8]]:
        return np.memmap(self.path / "state.u8", np.uint8, "r+" if mode == "r+" else "r", shape=(self.images,))

    def mapped(self, blocks: int) -> Float[Tensor, "M n+1 D"]:
        """Rows of the readable images for the last `blocks` blocks, of a complete entry; writing to them is fatal."""
        shape = (self._kept(), self.blocks + 1, self.width)
        values = np.memmap(self.path / "values.f32", np.float32, "r", shape=shape)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(values)[:, self.blocks - blocks :]

    def unreadable(self) -> dict[int, BadSample]:
        """By position, of what has been found so far."""
        marked = set(np.flatnonzero(self.state() == UNREADABLE).tolist())
        found: dict[int, BadSample] = {}
        for file in sorted(self.path.glob("unreadable-*.jsonl")):
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    position, name, reason = json.loads(line)
                    if position in marked:
                        found[position] = BadSample(name, reason)
                except (ValueError, TypeError):  # cut short: its image is not marked, or was read again
                    continue
        return dict(sorted(found.items()))

    def finish(self, about: Mapping[str, Any]) -> None:
        """Close the gaps that unreadable images left, and make the entry complete. One process, all rows done."""
        count = _close_gaps(self)
        os.truncate(self.path / "values.part", count * self.row_bytes)
        self._tell({**about, "bytes": count * self.row_bytes, "unreadable": self.images - count}, complete=True)
        os.replace(self.path / "values.part", self.path / "values.f32")
        (self.path / "moving.bin").unlink(missing_ok=True)

    def _tell(self, about: Mapping[str, Any], *, complete: bool) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        told = {**about, "complete": complete, "written": now}
        write_text(self.path / "about.json", json.dumps(told, indent=2, default=str) + "\n")

    def _has_state(self) -> bool:
        file = self.path / "state.u8"
        if not file.is_file() or file.stat().st_size != self.images:
            return False
        return len(self.unreadable()) == int((self.state() == UNREADABLE).sum())

    def _kept(self) -> int:
        return int((self.state() == THERE).sum())


class Filling:
    """One process writing rows into an entry; others may write other rows at the same time."""

    def __init__(self, place: Place, rank: int) -> None:
        self.state = place.state("r+")
        shape = (place.images, place.blocks + 1, place.width)
        self.values = np.memmap(place.path / "values.part", np.float32, "r+", shape=shape)
        self.log = (place.path / f"unreadable-{rank}.jsonl").open("a", encoding="utf-8")
        self.log.write("\n")  # a line that was cut short ends here
        self.marks: list[tuple[Int64[np.ndarray, " m"], int]] = []
        self.synced = time.monotonic()

    def write(
        self, positions: Sequence[int], rows: Float32[np.ndarray, "m n+1 D"], bad: Mapping[int, BadSample]
    ) -> None:
        """Rows of some images, and which others could not be read."""
        self.values[np.array(positions, dtype=np.int64)] = rows
        for position, sample in bad.items():
            self.log.write(json.dumps([position, sample.name, sample.reason]) + "\n")
        self.marks.append((np.array(positions, dtype=np.int64), THERE))
        self.marks.append((np.array(list(bad), dtype=np.int64), UNREADABLE))
        if time.monotonic() - self.synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Mark as done what was written, once the disk has it."""
        self.values.flush()
        self.log.flush()
        os.fsync(self.log.fileno())
        for positions, mark in self.marks:
            self.state[positions] = mark
        self.state.flush()
        self.marks.clear()
        self.synced = time.monotonic()

    def close(self) -> None:
        self.sync()
        self.log.close()


@dataclass(frozen=True)
class FeatureStore:
    """A folder of entries, kept below a number of bytes by removing those that were used longest ago.

    Several processes may use one folder; an entry that a process fills or has mapped is never removed. What a store
    holds is let go when the store is.
    """

    folder: Path
    limit: int  # bytes
    _held: dict[Path, Lock] = field(default_factory=dict, init=False, repr=False, compare=False)

    def find(
        self, key: str, *, images: int, blocks: int, width: int, stale: Callable[[Iterable[int]], bool]
    ) -> Place | None:
        """A complete entry of `blocks` last blocks or more, held from now on.

        `stale`: is told which images could not be read, and says whether the entry must be made anew.
        """
        there = {int(p.name.rpartition("-")[2]): p for p in self.folder.glob(f"{key}-[0-9]*") if p.is_dir()}
        for number, path in sorted(there.items()):
            place = Place(path, images, number, width)
            if number < blocks or not place.complete() or not self._hold(path, shared=True):
                continue
            if place.complete():
                if not stale(place.unreadable()):
                    os.utime(path / "lock")
                    return place
                self.release(place)
                self._remove(path)
                continue
            self.release(place)
        return None

    def claim(self, key: str, *, images: int, blocks: int, width: int, about: Mapping[str, Any]) -> Place | None:
        """The entry to be filled, begun or gone on with, for this process group alone. None: it does not fit the limit.

        Waits while another process fills it; it may be complete then. Raises OSError if the disk is full.
        """
        place = Place(self.folder / f"{key}-{blocks}", images, blocks, width)
        if not self._make_room(images * place.row_bytes, place.path):
            return None
        if not self._hold(place.path, shared=False):
            log.warning("another process extracts the same features; waiting for it (%s)", place.path)
            self._hold(place.path, shared=False, wait=True)
        if not place.complete():
            self._begin(place, about)
        os.utime(place.path / "lock")
        return place

    def temporary(self, *, images: int, blocks: int, width: int) -> Place:
        """An entry to be removed once it is mapped. Those that killed processes left here are removed too.

        Raises OSError if the disk is full.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clean()
        place = Place(Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=self.folder)), images, blocks, width)
        self._hold(place.path, shared=False, wait=True)
        self._begin(place, {})
        return place

    def share(self, place: Place) -> None:
        """Let others map it too, now that it is complete."""
        self._held[place.path].share()

    def release(self, place: Place) -> None:
        """Let go of an entry."""
        if lock := self._held.pop(place.path, None):
            lock.close()

    def discard(self, place: Place) -> None:
        """Remove an entry that is held here; what is mapped stays mapped."""
        _unlink(place.path)
        self.release(place)

    def _begin(self, place: Place, about: Mapping[str, Any]) -> None:
        if place.resumable():
            return
        try:
            place.begin(about)
        except BaseException:
            self.discard(place)
            raise

    def _hold(self, path: Path, *, shared: bool, wait: bool = False) -> bool:
        if path not in self._held:
            lock = take_lock(path / "lock", shared=shared, wait=wait)
            if lock is None:
                return False
            self._held[path] = lock
        return True

    def _make_room(self, wanted: int, path: Path) -> bool:
        """Whether `wanted` bytes for the entry at `path` fit, older entries removed if need be."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clean()
        others = [p for p in self.folder.iterdir() if (p / "lock").is_file() and p != path]
        sizes = {p: _size(p) for p in others}
        total = sum(sizes.values())

        def order(p: Path) -> tuple[bool, float]:  # interrupted work is given up last
            return not (p / "values.f32").is_file(), _used(p)

        for old in sorted(others, key=order):
            if total + wanted <= self.limit:
                break
            if self._remove(old):
                total -= sizes[old]
        return total + wanted <= self.limit

    def _remove(self, path: Path) -> bool:
        """Remove an entry unless it is in use."""
        if path in self._held or not path.is_dir():
            return False
        lock = take_lock(path / "lock", shared=False, wait=False)
        if lock is None:
            return False
        _unlink(path)
        lock.close()
        return True

    def _clean(self) -> None:
        for path in self.folder.glob(f"{TEMPORARY}*"):
            try:
                self._remove(path)
            except PermissionError:  # another user's, in a folder for all
                continue
        for path in self.folder.glob(f"{REMOVED}*"):
            shutil.rmtree(path, ignore_errors=True)


def key_of(facts: Mapping[str, Any]) -> str:
    """The name that entries made from the same facts have in common."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def open_store(folder: Path, limit: int, *, asked_for: bool) -> FeatureStore | None:
    """The store in a folder, which is made. If it cannot be written: ValueError if the user named it, else a warning
    and None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except OSError as error:
        reason = f"{folder} cannot hold features ({error.strerror or error})"
        if asked_for:
            raise ValueError(f"{reason}: name a folder that can be written") from error
        log.warning("%s: they are not kept. Set QUIETVIT_CACHE to a folder that can be written.", reason)
        return None
    return FeatureStore(folder, limit)


def _reserve(path: Path, size: int) -> None:
    """A file whose space on the disk is taken. Raises OSError if there is not enough."""
    with path.open("wb") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
                return
            if shutil.disk_usage(path).free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            file.truncate(size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error


def _close_gaps(place: Place) -> int:
    """Move rows forward over those of unreadable images; returns how many there are.

    Rows are kept in moving.bin while they move: a block that moved by less than its length cannot be read twice.
    """
    kept = np.flatnonzero(place.state() == THERE)
    first = int((kept == np.arange(len(kept))).sum())  # rows before it are where they belong
    per_move = max(1, MOVED_BYTES // place.row_bytes)
    moving = place.path / "moving.bin"
    with (place.path / "values.part").open("r+b") as file:

        def put(start: int, block: bytes) -> None:
            file.seek(start * place.row_bytes)
            file.write(block)
            file.flush()
            os.fsync(file.fileno())

        if moving.is_file():
            interrupted = moving.read_bytes()
            start, block = int.from_bytes(interrupted[:8], "little"), interrupted[8:]
            put(start, block)
            first = start + len(block) // place.row_bytes
        for start in range(first, len(kept), per_move):
            rows = kept[start : start + per_move]
            file.seek(int(rows[0]) * place.row_bytes)
            span = file.read(int(rows[-1] + 1 - rows[0]) * place.row_bytes)
            block = np.frombuffer(span, np.uint8).reshape(-1, place.row_bytes)[rows - rows[0]].tobytes()
            content = start.to_bytes(8, "little") + block
            write_atomically(moving, lambda new, content=content: new.write_bytes(content))  # type: ignore[misc]
            put(start, block)
    return len(kept)


def _unlink(path: Path) -> None:
    gone = path.with_name(f"{REMOVED}{path.name}-{os.getpid()}-{time.monotonic_ns()}")
    os.replace(path, gone)  # at once: nobody finds half an entry
    shutil.rmtree(gone, ignore_errors=True)


def _size(path: Path) -> int:
    total = 0
    for file in path.iterdir():
        try:
            total += file.stat().st_size
        except FileNotFoundError:  # it got its last name in between
            continue
    return total


def _used(path: Path) -> float:
    try:
        return (path / "lock").stat().st_mtime
    except FileNotFoundError:
        return 0.0
