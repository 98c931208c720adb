"""Writing files so that nothing is lost: under a temporary name in the same folder, flushed, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)`, flush it to disk, then give it the name `path`. A reader sees the old file or the new.

    Raises OSError as the file system does; the temporary file is removed in any case.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes files private
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def free_folder(out: Path, *, what: str) -> Path:
    """Where the folder `out` will be: a new one, or one that is empty. `what` is to be written there.

    Raises FileExistsError if there is a file, or a folder that holds anything or is the one of this process.
    """
    place = out.expanduser().resolve()
    if place.is_dir() and not any(place.iterdir()):
        if place == Path.cwd():
            raise FileExistsError(f"{out} is the folder you are in: choose a new folder for {what}")
        return place
    if place.exists():
        found = "is not empty" if place.is_dir() else "is a file"
        raise FileExistsError(f"{out} {found}: choose a new folder for {what}")
    return place


@contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """An empty folder beside `place`, which gets that name at the end; if anything is raised, nothing remains."""
    made = [p for p in (place.parent, *place.parent.parents) if not p.exists()]  # innermost first
    folder = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        yield folder
        folder.chmod(0o755)  # mkdtemp makes folders private
        os.replace(folder, place)
    except BaseException:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # another's files may have come there
            for parent in made:
                parent.rmdir()
        raise
