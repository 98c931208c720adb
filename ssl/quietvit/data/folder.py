"""Images in folders: any tree without labels, class folders, ImageNet's layout.

A tree is read once with os.scandir and kept (index_cache.py); the next start only asks each folder for its time of
change. Files rewritten in place under their old name do not change that time: `refresh=True` reads everything again.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8

from quietvit.data import index_cache
from quietvit.data.decode import IMAGE_EXTENSIONS, decode_file, is_image_name
from quietvit.data.names import NameTable, fingerprint

log = logging.getLogger(__name__)

# A folder changed this shortly before it was read may have changed again within one tick of its clock (FAT: 2 s).
_TICK_NS = 2_000_000_000

# Which folders a split may live in, best first. Many sets have train/ and test/ only, so each stands in for the other.
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "test"),
    "test": ("test", "val", "valid", "validation"),
}


@dataclass(frozen=True)
class Scan:
    """The images under a folder: per folder first its files, then its sub-folders, both sorted by name."""

    names: NameTable  # relative to the root, parts joined by "/"
    sizes: Int64[np.ndarray, " n"]  # bytes
    others: dict[str, int]  # how many files that are no images, by extension


def scan_folder(root: Path, *, refresh: bool = False) -> Scan:
    """Images under `root`, from the cache where it still holds.

    Links to files and folders are followed; a folder that several paths lead to is read once, so that loops end.
    Hidden files and folders (a dot in front) and macOS's `__MACOSX` are passed over. A folder that may not be read
    raises PermissionError: half a data set must not pass for a whole one.
    """
    root = Path(os.path.realpath(root))
    key = f"folder 1\n{root}"
    if not refresh and (kept := index_cache.load(key)) is not None and _still_holds(root, kept):
        return _from_arrays(kept)
    log.info("reading the names of all images under %s; this is done once", root)
    arrays = _read_tree(root)
    index_cache.save(key, arrays)
    return _from_arrays(arrays)


def _from_arrays(arrays: index_cache.Arrays) -> Scan:
    others = [name.decode() for name in NameTable(arrays["other_blob"], arrays["other_ends"])]
    return Scan(
        names=NameTable(arrays["blob"], arrays["ends"]),
        sizes=arrays["sizes"],
        others=dict(zip(others, arrays["other_counts"].tolist(), strict=True)),
    )


def _still_holds(root: Path, kept: index_cache.Arrays) -> bool:
    started = int(kept["started"])
    folders = NameTable(kept["folder_blob"], kept["folder_ends"])
    base = os.fsencode(root)
    for folder, then in zip(folders, kept["folder_times"].tolist(), strict=True):
        try:
            now = os.stat(os.path.join(base, folder)).st_mtime_ns
        except OSError:
            return False
        if now != then or then > started - _TICK_NS:
            return False
    return True


def _read_tree(root: Path) -> index_cache.Arrays:
    started = time.time_ns()
    blob, ends, sizes = bytearray(), array("q"), array("q")
    others: Counter[str] = Counter()
    folders: list[bytes] = []
    times = array("q")
    for prefix, modified, files in _walk(os.fsencode(root)):
        folders.append(prefix)
        times.append(modified)
        for name, size in files:
            text = os.fsdecode(name)
            if is_image_name(text):
                blob += prefix + name
                ends.append(len(blob))
                sizes.append(size)
            else:
                others[os.path.splitext(text)[1].lower() or "no extension"] += 1
    folder_table = NameTable.of(folders)
    other_table = NameTable.of(os.fsencode(name) for name in others)
    return {
        "blob": np.frombuffer(bytes(blob), np.uint8),
        "ends": np.array(ends, np.int64),
        "sizes": np.array(sizes, np.int64),
        "started": np.array(started, np.int64),
        "folder_blob": folder_table.blob,
        "folder_ends": folder_table.ends,
        "folder_times": np.array(times, np.int64),
        "other_blob": other_table.blob,
        "other_ends": other_table.ends,
        "other_counts": np.array(list(others.values()), np.int64),
    }


def _walk(root: bytes) -> Iterator[tuple[bytes, int, list[tuple[bytes, int]]]]:
    """(folder relative to root with "/" behind it, time of change, sorted files with sizes), depth first.

    Real folders come before linked ones, so that a link never takes a folder's images away from its own name.
    """
    seen: set[tuple[int, int]] = set()
    stack, linked = [b""], list[bytes]()
    while stack or linked:
        prefix = stack.pop() if stack else linked.pop(0)
        status = os.stat(os.path.join(root, prefix))
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        files: list[tuple[bytes, int]] = []
        folders: list[bytes] = []
        links: list[bytes] = []
        with os.scandir(os.path.join(root, prefix)) as entries:
            for entry in entries:
                if entry.name.startswith(b".") or entry.name == b"__MACOSX":
                    continue
                try:
                    status_of_entry = entry.stat()
                except OSError:
                    if entry.is_symlink():  # leads nowhere or to itself
                        continue
                    raise
                if stat.S_ISDIR(status_of_entry.st_mode):
                    (links if entry.is_symlink() else folders).append(prefix + entry.name + b"/")
                elif stat.S_ISREG(status_of_entry.st_mode):
                    files.append((entry.name, status_of_entry.st_size))
        stack.extend(sorted(folders, reverse=True))
        linked.extend(sorted(links))
        yield prefix, status.st_mtime_ns, sorted(files)


def require_folder(path: str | Path) -> Path:
    """The path as a Path; ValueError if it is missing or not a folder."""
    folder = Path(path).expanduser()
    if not folder.exists():
        raise ValueError(f"{folder} does not exist")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder of images")
    return folder


def find_split(root: Path, split: str | None, *, default: str | None = "train") -> Path:
    """The sub-folder of a split, or `root` itself where it is not divided into splits.

    `default` is the split meant by None; with None for it the whole root is meant. Raises ValueError for a split that
    has no folder.
    """
    if split is not None and split not in SPLIT_FOLDERS:
        raise ValueError(f"unknown split {split!r}: one of {', '.join(SPLIT_FOLDERS)}")
    wanted = split or default
    if wanted is None:
        return root
    for name in SPLIT_FOLDERS[wanted]:
        if (root / name).is_dir():
            return root / name
    if wanted == "train":
        return root
    looked_for = ", ".join(f"{name}/" for name in SPLIT_FOLDERS[wanted])
    found = ", ".join(f"{name}/" for name in sub_folders(root)[:8]) or "no sub-folders"
    raise ValueError(f"{root} has no images for split {wanted!r}: looked for {looked_for}; found {found}")


def sub_folders(root: Path) -> list[str]:
    """Names of the visible sub-folders, sorted."""
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(".") and e.name != "__MACOSX")


class FolderSource:
    """All images of a folder tree, without labels (see data.sources.Source).

    Args:
        path: the folder.
        split: None means the whole tree. "train", "val" or "test" mean the sub-folder of that name; without one,
            "train" means the whole tree.
        refresh: read the tree again even if a kept index seems to hold.

    Raises:
        ValueError: the folder is missing, has no images, or has no such split.
    """

    kind = "folder"

    def __init__(self, path: str | Path, *, split: str | None = None, refresh: bool = False) -> None:
        self._open(find_split(require_folder(path), split, default=None), refresh)

    def _open(self, root: Path, refresh: bool) -> None:
        self.root = root
        scan = scan_folder(root, refresh=refresh)
        if len(scan.names) == 0:
            raise ValueError(no_images_message(root, scan.others))
        self._names, self._sizes = scan.names, scan.sizes
        self.name = f"{self.kind}:{root} ({len(scan.names):,} images)"
        self.labels: dict[str, np.ndarray] = {}
        self.classes: dict[str, list[str]] = {}

    def __len__(self) -> int:
        return len(self._names)

    def load(self, index: int, *, min_side: int | None = None) -> UInt8[np.ndarray, "H W 3"]:
        """Decoded RGB; see data.decode. Raises UnreadableImage."""
        name = self._names.text(index)
        return decode_file(self.root / name, name, min_side=min_side)

    def item_name(self, index: int) -> str:
        """Path relative to the folder."""
        return self._names.text(index)

    def fingerprint(self) -> str:
        """sha256 of relative names and file sizes."""
        return fingerprint(self._names, self._sizes)


class ClassFolders(FolderSource):
    """One folder per class, its images at any depth: `root/CLASS/...` or `root/train/CLASS/...`, `root/val/CLASS/...`.

    Classes are the sorted names of the class folders of *all* splits, so that a class which one split lacks does not
    shift the labels of the others. Images beside the class folders have the label -1.
    """

    kind = "classes"

    def __init__(self, path: str | Path, *, split: str | None = None, refresh: bool = False) -> None:
        top = require_folder(path)
        root = find_split(top, split)
        splits = {root}
        if root != top:
            splits |= {top / name for names in SPLIT_FOLDERS.values() for name in names if (top / name).is_dir()}
        classes = sorted({name for folder in splits for name in sub_folders(folder)})
        self._check(top, root, classes)
        self._open(root, refresh)
        rank = {os.fsencode(name): i for i, name in enumerate(classes)}
        labels = [rank[name.split(b"/", 1)[0]] if b"/" in name else -1 for name in self._names]
        self.labels = {"class": np.array(labels, np.int64)}
        self.classes = {"class": classes}

    def _check(self, top: Path, root: Path, classes: list[str]) -> None:
        if not classes:
            raise ValueError(f"{root} has no class folders; for images without labels use source 'folder'")


class ImageNetFolders(ClassFolders):
    """ImageNet as it is unpacked: `train/WNID/*.JPEG` and `val/WNID/*.JPEG`. No other file is needed.

    Labels are ranks of the sorted WNIDs: with all 1,000 classes the usual numbers 0 to 999. Subsets work as well.
    """

    kind = "imagenet"

    def _check(self, top: Path, root: Path, classes: list[str]) -> None:
        if not (top / "train").is_dir():
            found = ", ".join(f"{name}/" for name in sub_folders(top)[:8]) or "no sub-folders"
            raise ValueError(f"{top} has no train/ as ImageNet has; found {found}")
        if not sub_folders(root):
            raise ValueError(
                f"{root} has no class folders: move each image into the folder of its WNID "
                "(ImageNet's validation images come in one flat folder, and their names do not tell the class)"
            )
        if strange := [name for name in classes if not WNID.fullmatch(name)]:
            raise ValueError(
                f"{root}: {strange[0]!r} is not a WNID such as n01440764; for other class folders use source 'classes'"
            )


WNID = re.compile(r"n\d{8}")


def no_images_message(where: Path | str, others: dict[str, int]) -> str:
    """What to say when nothing was found: what was looked for, and what there was instead."""
    looked_for = " ".join(sorted(IMAGE_EXTENSIONS))
    if not others:
        return f"no images in {where}: there are no files at all (looked for {looked_for})"
    kinds = sorted(others.items(), key=lambda item: (-item[1], item[0]))[:6]
    found = ", ".join(f"{count:,} x {extension}" for extension, count in kinds)
    return f"no images in {where}: found {sum(others.values()):,} other files ({found}); looked for {looked_for}"
