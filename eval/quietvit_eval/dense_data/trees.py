"""Finding pairs on disk: splits and their names, files of a folder, lists of names, images matched with targets."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quietvit.data.folder import sub_folders

# Names of a split's folder or list, best first; and the splits that stand in for one that is not there, most sets
# having two. Train images never stand in for others.
SPLIT_WORDS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
STAND_INS = {"train": ("train",), "val": ("val", "test"), "test": ("test", "val")}
SHOWN = 3  # names in an error message

Pairs = list[tuple[str, str]]  # image and target, relative to one folder, parts joined by "/"


def stand_ins(split: str) -> tuple[str, ...]:
    """The splits that may serve as `split`, itself first. Raises ValueError for an unknown one."""
    if split not in STAND_INS:
        raise ValueError(f"unknown split {split!r}: one of {', '.join(STAND_INS)}")
    return STAND_INS[split]


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def found_in(folder: Path) -> str:
    """The sub-folders that are there, for an error message."""
    return ", ".join(f"{name}/" for name in sub_folders(folder)[:8]) or "no sub-folders"


def list_files(folder: Path, extensions: Collection[str]) -> list[str]:
    """Files of these kinds at any depth, sorted, relative to the folder: hidden ones passed over, links followed."""
    names = []
    seen: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        prefix = Path(place).relative_to(folder)
        names += [
            (prefix / name).as_posix()
            for name in files
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in extensions
        ]
    return sorted(names)


def by_stem(folder: Path, extensions: Collection[str], suffix: str = "") -> dict[str, str]:
    """Files of a folder by what pairs them: the relative name without `suffix` and extension.

    Files whose name does not end in `suffix` are passed over. Raises ValueError if two have the same stem.
    """
    stems: dict[str, str] = {}
    for name in list_files(folder, extensions):
        stem = os.path.splitext(name)[0]
        if not stem.endswith(suffix):
            continue
        stem = stem.removesuffix(suffix)
        if stem in stems:
            raise ValueError(f"{folder}: {stems[stem]} and {name} differ in their extension only; keep one of them")
        stems[stem] = name
    return stems


def match(
    images: Mapping[str, str], targets: Mapping[str, str], *, where: tuple[Path, Path], all_targets: bool
) -> Pairs:
    """Images and targets of the same stem. Raises ValueError for an image without target and, if `all_targets`, the
    reverse: pairs that fall out in silence would change the score.
    """
    if not images:
        raise ValueError(f"no images in {where[0]}")
    if alone := [images[stem] for stem in images if stem not in targets]:
        raise ValueError(
            f"{len(alone):,} of {len(images):,} images in {where[0]} have no file of the same name in {where[1]}: "
            f"{some(alone)}"
        )
    if all_targets and (alone := [targets[stem] for stem in targets if stem not in images]):
        raise ValueError(
            f"{len(alone):,} of {len(targets):,} files in {where[1]} have no image of the same name in {where[0]}: "
            f"{some(alone)}"
        )
    return [(images[stem], targets[stem]) for stem in images]


def read_names(file: Path) -> list[str]:
    """Lines of a list in UTF-8; empty ones and those that begin with # are passed over. Raises ValueError."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text file in UTF-8: {error.reason} at byte {error.start}") from error
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise ValueError(f"{file} names nothing")
    return names


def choose_listed(stems: Mapping[str, str], file: Path, folder: Path) -> dict[str, str]:
    """The files that a list names, with or without extension, suffix, and folders in front.

    Raises ValueError for names that are not there.
    """
    known = {key: stem for stem, name in stems.items() for key in (name, os.path.splitext(name)[0])}
    known |= {stem: stem for stem in stems}
    chosen, missing = {}, []
    for name in read_names(file):
        parts = name.split("/")
        stem = next((known[end] for i in range(len(parts)) if (end := "/".join(parts[i:])) in known), None)
        if stem is None:
            missing.append(name)
        else:
            chosen[stem] = stems[stem]
    if missing:
        raise ValueError(f"{file} names {len(missing):,} files that are not in {folder}: {some(missing)}")
    return chosen


def require_files(root: Path, names: Iterable[str], listed_by: Path) -> None:
    """Raises ValueError, with the first and the count, if files of a list are not there. Reads each folder once."""
    folders: dict[str, set[str]] = {}
    names = list(names)
    missing = []
    for name in names:
        folder, _, file = name.rpartition("/")
        if folder not in folders:
            try:
                folders[folder] = set(os.listdir(root / folder))
            except OSError:
                folders[folder] = set()
        if file not in folders[folder]:
            missing.append(name)
    if missing:
        raise ValueError(
            f"{listed_by} names {len(missing):,} files (of {len(names):,}) that are not in {root}; "
            f"the first: {missing[0]}"
        )


@dataclass(frozen=True)
class Trees:
    """Where a split's images and targets lie."""

    images: str  # folders relative to the root
    targets: str
    names: Path | None  # the list of those that belong to the split; None: all
    split: str
    all_targets: bool  # whether each target belongs to the split


def find_trees(root: Path, patterns: Sequence[tuple[str, str]], split: str, lists: str | None) -> Trees | None:
    """The first pair of folders that exist, "{split}" standing for any name of the split or of its stand-in.

    Folders that are not divided into splits need a list, by default "{split}.txt" in the root. None if nothing fits.
    """
    for used in stand_ins(split):
        for images, targets in patterns:
            first, second = _existing(root, images, used), _existing(root, targets, used)
            if first is None or second is None:
                continue
            divided = "{split}" in images or "{split}" in targets
            names = _existing(root, lists or "{split}.txt", used, folder=False) if lists or not divided else None
            if names is None and (lists or not divided):
                continue
            both = "{split}" in images and "{split}" in targets
            return Trees(first, second, None if names is None else root / names, used, both and names is None)
    return None


def _existing(root: Path, pattern: str, split: str, *, folder: bool = True) -> str | None:
    if Path(pattern).is_absolute():
        raise ValueError(f"{pattern!r} must be relative to the data set's folder, {root}")
    for word in SPLIT_WORDS[split]:
        name = pattern.replace("{split}", word)
        if (root / name).is_dir() if folder else (root / name).is_file():
            return name
    return None
