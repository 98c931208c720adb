"""Checkpoints: a folder per kept step, written under a temporary name and renamed, so a reader never sees half of one.

<run>/checkpoints/step_00001000/state.safetensors   student, teacher, optimizer moments, centers
                                state.json           counters and the hash of the config
                                teacher.safetensors  the backbone to use, and its JSON
<run>/teacher.safetensors, teacher.json              the newest of them
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from quietvit.files import write_atomically

STEP_NAME = re.compile(r"step_(\d{8})")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says why and what is still there."""


@dataclass(frozen=True)
class Checkpoint:
    """What `load` returns."""

    step: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    path: Path


@contextlib.contextmanager
def _explained(run_dir: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)
        full = code == errno.ENOSPC or "No space left" in str(error)
        reason = "the disk is full: free some space" if full else f"{error}"
        kept = ", ".join(p.name for p in complete(run_dir)) or "none"
        raise CheckpointError(
            f"could not write {what} in {run_dir}: {reason}. Complete checkpoints there: {kept}. "
            "The same command resumes from the newest once the folder can be written."
        ) from error


def complete(run_dir: Path) -> list[Path]:
    """Complete checkpoint folders, oldest first. A folder counts when it has its name: renaming is the last act."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and STEP_NAME.fullmatch(p.name))


def save(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    keep: int,
    save_teacher: Callable[[Path], None],
) -> Path:
    """Write one checkpoint, then drop all but the newest `keep`.

    `save_teacher(folder)` writes teacher.safetensors and teacher.json into a folder. Raises CheckpointError when the
    folder cannot be written; what was complete before stays.
    """
    final = run_dir / "checkpoints" / f"step_{step:08d}"
    with _explained(run_dir, f"the checkpoint of step {step}"):
        final.parent.mkdir(parents=True, exist_ok=True)
        for leftover in final.parent.glob(".writing_*"):  # a killed process left it
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = final.parent / f".writing_{step:08d}"
        try:
            temporary.mkdir()
            save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, temporary / "state.safetensors")
            (temporary / "state.json").write_text(json.dumps({"step": step, **meta}, indent=1), encoding="utf-8")
            save_teacher(temporary)
            for file in temporary.iterdir():
                with file.open("rb") as f:
                    os.fsync(f.fileno())
            if final.exists():
                shutil.rmtree(final)
            os.replace(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for file in final.glob("teacher.*"):
            write_atomically(run_dir / file.name, functools.partial(shutil.copyfile, file))
        for old in complete(run_dir)[:-keep]:
            shutil.rmtree(old)
    return final


def load(run_dir: Path) -> Checkpoint | None:
    """The newest complete checkpoint, or None. Raises CheckpointError when it is damaged, naming the one before."""
    found = complete(run_dir)
    if not found:
        return None
    newest = found[-1]
    try:
        tensors = load_file(newest / "state.safetensors")
        meta = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        before = f" Remove it to resume from {found[-2].name}." if len(found) > 1 else " Remove it to start anew."
        raise CheckpointError(f"the checkpoint {newest} is damaged ({error}).{before}") from error
    return Checkpoint(step=int(meta["step"]), tensors=tensors, meta=meta, path=newest)
