"""Where images come from: the protocol that every source meets, and the table of the sources there are."""

from __future__ import annotations

import difflib
import glob
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from quietvit.data.decode import is_image_name
from quietvit.data.folder import (
    SPLIT_FOLDERS,
    WNID,
    ClassFolders,
    FolderSource,
    ImageNetFolders,
    find_split,
    sub_folders,
)
from quietvit.data.listing import ListSource
from quietvit.data.tar import PACKED, TarSource

__all__ = ["DATASETS", "Source", "open_source"]


@runtime_checkable
class Source(Protocol):
    """Images that can be fetched by number. Sources are picklable: workers get a copy."""

    name: str  # for logs, e.g. "folder:/path (12,345 images)"
    labels: dict[str, np.ndarray]  # label sets by name, int64 [len]; -1 = unknown; {} where there are none
    classes: dict[str, list[str]]  # class names per label set

    def __len__(self) -> int: ...

    def load(self, index: int, *, min_side: int | None = None) -> UInt8[np.ndarray, "H W 3"]:
        """RGB pixels, C-contiguous. With `min_side` the image may come smaller, its shorter side at least that long.

        Raises UnreadableImage(name, reason).
        """
        ...

    def item_name(self, index: int) -> str:
        """A stable name of the item, relative to the data set."""
        ...

    def fingerprint(self) -> str:
        """A hash in hex, the same for the same data anywhere; stands on result cards."""
        ...


def _open_scenes(path: str | None = None, *, split: str | None = None, **options: Any) -> Source:
    # Imported here: the renderer is not needed by anyone who brings images.
    from quietvit.data.scenes import Scenes

    if path is not None:
        raise ValueError(f"source 'scenes' is rendered on the fly and takes no path, got {path!r}")
    _check_options("scenes", Scenes, options)
    return Scenes(split or "train", **options)


def _open_auto(path: str, *, split: str | None = None, **options: Any) -> Source:
    return open_source(detect_kind(path), path, split=split, **options)


DATASETS: Mapping[str, Callable[..., Source]] = {
    "auto": _open_auto,
    "folder": FolderSource,
    "classes": ClassFolders,
    "list": ListSource,
    "tar": TarSource,
    "imagenet": ImageNetFolders,
    "scenes": _open_scenes,
}


def open_source(kind: str, path: str | None, *, split: str | None = None, **options: Any) -> Source:
    """Open a row of DATASETS. `options` are the keywords of that source; "auto" finds the kind out from the path.

    Raises ValueError: unknown kind or option, or data that is not there or not of that kind.
    """
    if kind not in DATASETS:
        near = difflib.get_close_matches(kind, DATASETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown data source {kind!r}{hint} There are: {', '.join(DATASETS)}")
    if path is None and kind != "scenes":
        raise ValueError(f"data source {kind!r} needs a path; only 'scenes' goes without")
    _check_options(kind, DATASETS[kind], options)
    return DATASETS[kind](path, split=split, **options)


def _check_options(kind: str, opener: Callable[..., Source], options: Mapping[str, Any]) -> None:
    """ValueError for an option that the opener does not have; an opener with **options looks at them itself."""
    parameters = inspect.signature(opener).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    allowed = [name for name in parameters if name not in ("path", "split")]
    if unknown := [name for name in options if name not in allowed]:
        raise ValueError(f"data source {kind!r} has no option {unknown[0]!r}; it has: {', '.join(allowed)}")


def detect_kind(path: str) -> str:
    """The row of DATASETS that fits what lies at `path`; ValueError says what was looked for and what was found.

    In this order: a .tar file, a pattern, or a folder of .tar files: "tar". A .txt, .csv or .tsv file: "list". A folder
    with train/ and WNID folders in it: "imagenet". Folders that hold the images, none beside them, at the top or in
    train/: "classes". Any other folder: "folder".
    """
    place = Path(path).expanduser()
    if not place.exists():
        if glob.has_magic(path) or "{" in path:
            return "tar"
        raise ValueError(f"{path} does not exist (looked for a folder of images, a .tar file, or a .txt or .csv list)")
    if place.is_file():
        suffix = place.suffix.lower()
        if suffix in (".txt", ".csv", ".tsv"):
            return "list"
        if suffix == ".tar" or place.name.lower().endswith(PACKED):
            return "tar"
        raise ValueError(
            f"{path} is a file of kind {suffix or '(none)'}; "
            "looked for a folder of images, a .tar file, or a .txt or .csv list"
        )
    root = find_split(place, "train")
    if any(root.glob("*.tar")):
        return "tar"
    folders = sub_folders(root)
    if root != place and folders and all(WNID.fullmatch(name) for name in folders):
        return "imagenet"
    if len(folders) > 1 and not _has_images(root) and all(_has_images(root / name) for name in folders):
        return "folder" if set(folders) <= {n for names in SPLIT_FOLDERS.values() for n in names} else "classes"
    return "folder"


def _has_images(folder: Path) -> bool:
    """Whether there is an image directly in the folder; stops at the first."""
    return any(is_image_name(entry.name) for entry in folder.iterdir())
