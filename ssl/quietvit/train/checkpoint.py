"""Checkpoints: a folder per kept step, written under a temporary name and renamed, so a reader never sees half of one.

<run>/checkpoints/step_00001000/state/*.safetensors  student, teacher, optimizer moments, centers, in shards
                                state.json           counters and the hash of the config
                                teacher.safetensors  the backbone to use, whole, and its JSON
<run>/teacher.safetensors, teacher.json              the newest of them

State goes through torch.distributed.checkpoint in its safetensors form: every process writes what it holds, and any
number of processes under any strategy reads it. (Its other form keeps an index as a pickle, which runs code when read.)
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from quietvit import dist
from quietvit.files import write_atomically, write_text

STEP_NAME = re.compile(r"step_(\d{8})")
STATE = "state"  # folder of shards
OLD_STATE = "state.safetensors"  # all of it in one file, as it was before runs could have several processes


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says why and what is still there."""


@dataclass(frozen=True)
class Found:
    """A complete checkpoint."""

    step: int
    meta: dict[str, Any]
    path: Path
    shapes: dict[str, tuple[int, ...]]  # whole shapes by name
    dtypes: dict[str, torch.dtype]


@contextlib.contextmanager
def _explained(run_dir: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        reason = "the disk is full: free some space" if full else _reason(error)
        kept = ", ".join(p.name for p in complete(run_dir)) or "none"
        raise CheckpointError(
            f"could not write {what} in {run_dir}: {reason}. Complete checkpoints there: {kept}. "
            "The same command resumes from the newest once the folder can be written."
        ) from error


def _reason(error: BaseException) -> str:
    """One line: torch hands the errors of other ranks on with their tracebacks before them."""
    return (str(error).strip().splitlines() or [repr(error)])[-1]


def complete(run_dir: Path) -> list[Path]:
    """Complete checkpoint folders, oldest first. A folder counts when it has its name: renaming is the last act."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and STEP_NAME.fullmatch(p.name))


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` is when it is complete."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """Of a checkpoint folder."""
    return int(folder.name.removeprefix("step_"))


def read_meta(folder: Path) -> dict[str, Any]:
    """Counters and notes of a complete checkpoint. Raises CheckpointError when they are damaged."""
    with _damaged(folder.parents[1], folder):
        return cast(dict[str, Any], json.loads((folder / "state.json").read_text(encoding="utf-8")))


def write_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    """Replace the counters and notes of a complete checkpoint. Raises CheckpointError when it cannot be written."""
    with _explained(folder.parents[1], f"the notes of {folder.name}"):
        write_text(folder / "state.json", json.dumps(meta, indent=1))


def publish(folder: Path) -> None:
    """Make the teacher of a complete checkpoint that of the run."""
    for file in folder.glob("teacher.*"):
        write_atomically(folder.parents[1] / file.name, functools.partial(shutil.copyfile, file))


def drop_after(run_dir: Path, step: int) -> None:
    """Remove every complete checkpoint of a later step than `step`, the newest first.

    Each loses its name before its files, so that one half removed is not taken for a checkpoint.
    """
    with _explained(run_dir, f"the return to step {step}"):
        for folder in reversed([p for p in complete(run_dir) if step_of(p) > step]):
            leftover = folder.with_name(f".writing_dropped_{folder.name}")
            os.replace(folder, leftover)
            shutil.rmtree(leftover)


class Writer:
    """Writes the checkpoints of one run. All ranks call `save` with the same arguments.

    In the background (`background=True`) the tensors are copied to memory and written while training goes on; the
    folder gets its name when all of it is there, at the latest when the next one is begun or at `close`.
    """

    def __init__(self, run_dir: Path, *, keep: int, background: bool = False) -> None:
        self.run_dir, self.keep = run_dir, keep
        self.kept: frozenset[int | None] = frozenset()  # steps whose checkpoints stay, however old
        self._pending: tuple[Future[Any], int] | None = None
        self._group: Any = None
        if background and torch.distributed.is_initialized():
            self._group = torch.distributed.new_group(backend="gloo")  # apart from the collectives of training
        self._background = background and self._group is not None

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        *,
        save_teacher: Callable[[Path], None],
    ) -> Path:
        """Write one checkpoint, then drop all but the newest `keep` and those of the steps in `kept`.

        `save_teacher(folder)` writes teacher.safetensors and teacher.json into a folder; all ranks call it. Raises
        CheckpointError when the folder cannot be written; what was complete before stays.
        """
        self.close()
        temporary = self._temporary(step)
        with _explained(self.run_dir, f"the checkpoint of step {step}"):
            if dist.rank() == 0:
                temporary.parent.mkdir(parents=True, exist_ok=True)
                for leftover in temporary.parent.glob(".writing_*"):  # a killed process left it
                    shutil.rmtree(leftover, ignore_errors=True)
                (temporary / STATE).mkdir(parents=True)
                about = {"step": step, "processes": dist.world_size(), **meta}
                (temporary / "state.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
            dist.barrier()
            with self._cleared_on_error(step):
                save_teacher(temporary)
                self._write(step, {k: v.detach().contiguous() for k, v in tensors.items()}, temporary / STATE)
        return folder_of(self.run_dir, step)

    def _write(self, step: int, tensors: dict[str, Tensor], folder: Path) -> None:
        storage = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        with _without_notices():
            if self._background:
                pending = async_save(cast(Any, tensors), storage_writer=storage, process_group=self._group)
                self._pending = (cast("Future[Any]", pending), step)
                return
            save(cast(Any, tensors), storage_writer=storage, no_dist=not torch.distributed.is_initialized())
        self._finish(step)

    def settle(self) -> None:
        """Give a checkpoint written in the background its name if all of it is there. Cheap: call it every step."""
        if self._pending is not None and self._pending[0].done():
            self.close()

    def close(self) -> None:
        """Wait for a checkpoint that is being written in the background. Raises CheckpointError if it failed."""
        if self._pending is None:
            return
        (pending, step), self._pending = self._pending, None
        with _explained(self.run_dir, f"the checkpoint of step {step}"), self._cleared_on_error(step):
            pending.result()
            self._finish(step)

    @contextlib.contextmanager
    def _cleared_on_error(self, step: int) -> Iterator[None]:
        try:
            yield
        except BaseException:
            if dist.rank() == 0:
                shutil.rmtree(self._temporary(step), ignore_errors=True)
            raise

    def _finish(self, step: int) -> None:
        """Rank 0: everything is on disk; name it, publish the teacher, drop old ones."""
        # Its save has ended on rank 0 only when all ranks have told it that theirs did.
        if dist.rank() != 0:
            return
        temporary = self._temporary(step)
        final = folder_of(self.run_dir, step)
        for file in (p for p in temporary.rglob("*") if p.is_file()):
            with file.open("rb") as f:
                os.fsync(f.fileno())
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        publish(final)
        for old in complete(self.run_dir)[: -self.keep]:
            if step_of(old) not in self.kept:
                shutil.rmtree(old)

    def _temporary(self, step: int) -> Path:
        return self.run_dir / "checkpoints" / f".writing_{step:08d}"


def find(run_dir: Path) -> Found | None:
    """The newest complete checkpoint, or None. Raises CheckpointError when it is damaged, naming the one before."""
    found = complete(run_dir)
    if not found:
        return None
    newest = found[-1]
    if (newest / OLD_STATE).exists() and not (newest / STATE).exists():
        raise CheckpointError(
            f"the checkpoint {newest} was written by an earlier version of quietvit, whose {OLD_STATE} this one does "
            "not read: finish the run with that version, or choose another --out. Its teacher.safetensors is good here"
        )
    with _damaged(run_dir, newest):
        meta = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        index = HuggingFaceStorageReader(str(newest / STATE)).read_metadata().state_dict_metadata
        if not index:
            raise ValueError("there are no tensors in it")
        shapes = {name: tuple(cast(Any, stored).size) for name, stored in index.items()}
        dtypes = {name: cast(Any, stored).properties.dtype for name, stored in index.items()}
    return Found(int(meta["step"]), meta, newest, shapes, dtypes)


def read(found: Found, tensors: Mapping[str, Tensor]) -> None:
    """Read a checkpoint into tensors of the same names and shapes, sharded or whole. Raises CheckpointError."""
    storage = HuggingFaceStorageReader(str(found.path / STATE))
    with _damaged(found.path.parents[1], found.path), _without_notices():
        load(cast(Any, dict(tensors)), storage_reader=storage, no_dist=not torch.distributed.is_initialized())


def read_whole(found: Found) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole and on the CPU, however many processes wrote it. Raises CheckpointError."""
    tensors = {name: torch.zeros(shape, dtype=found.dtypes[name]) for name, shape in found.shapes.items()}
    read(found, tensors)
    return tensors


@contextlib.contextmanager
def _damaged(run_dir: Path, folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError, CheckpointException) as error:
        earlier = [p for p in complete(run_dir) if p.name < folder.name]
        before = f" Remove it to resume from {earlier[-1].name}." if earlier else " Remove it to start anew."
        raise CheckpointError(f"the checkpoint {folder} is damaged ({_reason(error)}).{before}") from error


@contextlib.contextmanager
def _without_notices() -> Iterator[None]:
    """A run of one process is meant to have no process group: torch need not say so at every save."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is (disabled|unavailable).*")
        yield
