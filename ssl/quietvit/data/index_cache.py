"""Keeps what reading a data set's index has cost: arrays in .npz files (no pickle) under the user's cache folder.

The folder is `$QUIETVIT_CACHE`, else `$XDG_CACHE_HOME/quietvit`, else `~/.cache/quietvit`. Whoever saves here says in
its own arrays how to tell whether they still hold. Losing the folder costs time, never correctness.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from quietvit.files import write_atomically

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]


def cache_folder() -> Path:
    """Where indices are kept; see the module's text."""
    if folder := os.environ.get("QUIETVIT_CACHE"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "quietvit"
    try:
        return Path.home() / ".cache" / "quietvit"
    except RuntimeError:  # a container's user without a home
        return Path(tempfile.gettempdir()) / "quietvit"


def load(key: str) -> Arrays | None:
    """Arrays saved under `key`; None if there are none, or if the file is damaged or somebody else's."""
    try:
        with np.load(_file_of(key), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None
    stored = arrays.pop("key", None)
    if stored is None or stored.tobytes() != key.encode():
        return None
    return arrays


def save(key: str, arrays: Arrays) -> None:
    """Keep arrays under `key`. A folder that cannot be written is worth a warning, not an end."""
    content: dict[str, Any] = {**arrays, "key": np.frombuffer(key.encode(), np.uint8)}
    path = _file_of(key)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # np.savez would add .npz to a name
            np.savez(file, **content)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, write)
    except OSError as error:
        log.warning(
            "the image index is not kept (%s: %s); the next start reads the data set's names again. "
            "Set QUIETVIT_CACHE to a folder that can be written.",
            path.parent,
            error.strerror or error,
        )


def _file_of(key: str) -> Path:
    return cache_folder() / f"index-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
