"""Depth sets described by lists of pairs of paths: NYU Depth v2 as BTS lays it out, SUN RGB-D."""

from __future__ import annotations

import os
from pathlib import Path

from quietvit.data.folder import require_folder
from quietvit_eval.dense_data.depth_rule import DepthRule
from quietvit_eval.dense_data.pair_files import DepthFiles
from quietvit_eval.dense_data.trees import Pairs, found_in, read_names, require_files, stand_ins

# The names of the toolboxes that read this layout, then those of BTS itself.
NYU_LISTS = {
    "train": ("nyu_train.txt", "nyudepthv2_train_files_with_gt.txt"),
    "val": (),
    "test": ("nyu_test.txt", "nyudepthv2_test_files_with_gt.txt"),
}
SUN_LISTS = {"train": ("SUNRGBD_train_splits.txt",), "val": ("SUNRGBD_val_splits.txt",), "test": ()}
# Where BTS unpacks train and test, relative to the data set's folder.
BASES = ("", "sync", "official_splits/test", "nyu_depth_v2/sync", "nyu_depth_v2/official_splits/test")
_PROBED = 20  # lines looked up to find the folder that the paths start from (ours)


class NyuLists(DepthFiles):
    """NYU Depth v2: nyu_train.txt and nyu_test.txt with lines "rgb depth focal", depth as 16-bit millimetres.

    A slash in front of a path, as the train list has it, means nothing. 0 is a hole.

    Args:
        path: the folder; the lists may lie anywhere in it, the paths start from it, from the list's folder, or from
            where BTS unpacks its archives (sync/, official_splits/test/).
        split: "train", or "val" or "test": both mean the 654 test images, there being no third split.

    Raises:
        ValueError: a list or a file that it names is missing, a line is not of this form, depth has 8 bits.
    """

    layout = "nyu"
    looked_for = "nyu_train.txt or nyu_test.txt, at any depth (nyu)"

    def __init__(self, path: str | Path, *, split: str) -> None:
        hint = "The NYU copy with 8-bit training depth (Kaggle's) is another set; this layout is that of BTS"
        self._open_lists(path, split, NYU_LISTS, DepthRule(), hint)

    def _open_lists(
        self, path: str | Path, split: str, lists: dict[str, tuple[str, ...]], rule: DepthRule, hint: str
    ) -> None:
        root = require_folder(path)
        asked = stand_ins(split)[0]
        for used in stand_ins(split):
            if (file := _find_list(root, lists[used])) is not None:
                break
        else:
            names = [name for used in stand_ins(split) for name in lists[used]]
            raise ValueError(f"no list {' or '.join(names)} anywhere in {root}; found {found_in(root)}")
        pairs = _read_pairs(file)
        base = _find_base(root, file, pairs)
        require_files(base, (name for pair in pairs for name in pair), file)
        self._open(base, pairs, rule, asked=asked, used=used, hint=hint)

    @staticmethod
    def fits(path: Path) -> bool:
        """Whether this layout lies there."""
        return any(_find_list(path, names) is not None for names in NYU_LISTS.values())


class SunRgbd(NyuLists):
    """SUN RGB-D: SUNRGBD_val_splits.txt with lines "rgb depth", as the Monocular-Depth-Estimation-Toolbox has it.

    Depth words are rotated left by three bits; turned back they are millimetres, and more than 8 m count as 8 m.

    Args:
        path: the folder that holds SUNRGBD/ and the list.
        split: "val" or "test": the list above; "train": SUNRGBD_train_splits.txt, of the same form.

    Raises:
        ValueError: as NyuLists.
    """

    layout = "sunrgbd"
    looked_for = "SUNRGBD_val_splits.txt (sunrgbd)"

    def __init__(self, path: str | Path, *, split: str) -> None:
        self._open_lists(path, split, SUN_LISTS, DepthRule(max_depth=8.0, rotate=3), "")

    @staticmethod
    def fits(path: Path) -> bool:
        """Whether this layout lies there."""
        return any(_find_list(path, names) is not None for names in SUN_LISTS.values())


def _find_list(root: Path, names: tuple[str, ...]) -> Path | None:
    """The list nearest to the root. Raises ValueError for several that differ."""
    for name in names:
        if (root / name).is_file():
            return root / name
    found = []
    for folder, _, files in os.walk(root):
        found += [Path(folder) / name for name in names if name in files]
    found.sort(key=lambda file: (len(file.parts), file))
    if len({file.read_bytes() for file in found}) > 1:
        raise ValueError(f"{root} holds different lists: {found[0]} and {found[1]}; give the folder that is meant")
    return found[0] if found else None


def _read_pairs(file: Path) -> Pairs:
    pairs = []
    for line in read_names(file):
        fields = line.split()
        if len(fields) not in (2, 3) or fields[1] == "None":
            raise ValueError(f"{file}: each line must be 'rgb depth' or 'rgb depth focal'; found {line!r}")
        pairs.append((fields[0].lstrip("/\\"), fields[1].lstrip("/\\")))
    return pairs


def _find_base(root: Path, file: Path, pairs: Pairs) -> Path:
    bases = [root / base for base in BASES] + [file.parent]
    hits = [sum((base / image).is_file() for image, _ in pairs[:_PROBED]) for base in bases]
    if max(hits) == 0:
        looked_in = ", ".join(dict.fromkeys(str(base) for base in bases if base.is_dir()))
        raise ValueError(
            f"{file} names {len(pairs):,} pairs, but the first images are not there, e.g. {pairs[0][0]}; "
            f"looked in {looked_in}"
        )
    return bases[hits.index(max(hits))]
