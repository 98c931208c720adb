"""What every data set with a target per pixel is to the tasks, and the tables of those there are."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from quietvit_eval.dense_data.ade20k import Ade20k
from quietvit_eval.dense_data.cityscapes import Cityscapes
from quietvit_eval.dense_data.depth_folders import DepthFolders
from quietvit_eval.dense_data.depth_lists import NyuLists, SunRgbd
from quietvit_eval.dense_data.mask_folders import MaskFolders
from quietvit_eval.dense_data.nyu_mat import NyuMat
from quietvit_eval.dense_data.scenes import SceneDepth, SceneMasks
from quietvit_eval.dense_data.target import CLASSES, IGNORE, METRES, Target
from quietvit_eval.dense_data.trees import found_in
from quietvit_eval.dense_data.voc import PascalVoc
from quietvit_eval.discovery.data import BOXES, open_boxes

__all__ = [
    "CLASSES",
    "DEPTH_SETS",
    "IGNORE",
    "METRES",
    "PAIR_SETS",
    "SEGMENTATION_SETS",
    "PairSource",
    "Target",
    "detect_layout",
    "open_pairs",
]


@runtime_checkable
class PairSource(Protocol):
    """Images and their targets, fetched by number. Picklable: workers get a copy."""

    name: str  # for logs and cards, e.g. "ade20k:/path val (2,000 pairs)"
    kind: str  # CLASSES, METRES or BOXES
    class_names: list[str]  # by class number; [] for METRES and BOXES

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[UInt8[np.ndarray, "H W 3"], Target]:
        """RGB pixels and the target of the same height and width.

        CLASSES: int16, 0 .. C-1, IGNORE where it does not count. METRES: float32, 0 where nothing was measured.
        BOXES: float64 [n 4] with n > 0 instead, left, top, right, bottom in pixels (`discovery.boxes`).
        Raises UnreadableImage(name, reason) if either file is broken or the two do not fit together.
        """
        ...

    def item_name(self, index: int) -> str:
        """A stable name of the pair, relative to the data set."""
        ...

    def fingerprint(self) -> str:
        """A hash in hex, the same for the same data anywhere; stands on result cards."""
        ...


def _open_masks(path: str, *, split: str, **options: Any) -> PairSource:
    return open_pairs(CLASSES, detect_layout(CLASSES, path), path, split=split, **options)


def _open_depths(path: str, *, split: str, **options: Any) -> PairSource:
    return open_pairs(METRES, detect_layout(METRES, path), path, split=split, **options)


SEGMENTATION_SETS: Mapping[str, Callable[..., PairSource]] = {
    "auto": _open_masks,
    "ade20k": Ade20k,
    "voc": PascalVoc,
    "cityscapes": Cityscapes,
    "folders": MaskFolders,
    "scenes": SceneMasks,
}
DEPTH_SETS: Mapping[str, Callable[..., PairSource]] = {
    "auto": _open_depths,
    "nyu": NyuLists,
    "nyu_mat": NyuMat,
    "sunrgbd": SunRgbd,
    "folders": DepthFolders,
    "scenes": SceneDepth,
}
PAIR_SETS = {CLASSES: SEGMENTATION_SETS, METRES: DEPTH_SETS}
# What "auto" tries, in this order: layouts with names of their own before the ones that other sets share.
_DETECTED: dict[str, tuple[Any, ...]] = {
    CLASSES: (Ade20k, PascalVoc, Cityscapes, MaskFolders),
    METRES: (NyuLists, NyuMat, SunRgbd, DepthFolders),
}


def open_pairs(target: str, kind: str, path: str | None, *, split: str, **options: Any) -> PairSource:
    """Open a row of SEGMENTATION_SETS (`target` CLASSES), of DEPTH_SETS (METRES) or of BOX_SETS (BOXES: `open_boxes`).

    `split` is "train", "val" or "test", of boxes also "trainval"; each row maps these to its own names, and where a set
    has no such split and another one serves, `name` says so. `options` are the row's keywords.
    Raises ValueError: unknown kind, split or option, or data that is not there or not of that layout.
    """
    if target == BOXES:
        return open_boxes(kind, path, split=split, **options)
    table = PAIR_SETS[target]
    if kind not in table:
        near = difflib.get_close_matches(kind, table, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown layout {kind!r} of pixels with {target}{hint} There are: {', '.join(table)}")
    if path is None and kind != "scenes":
        raise ValueError(f"layout {kind!r} of pixels with {target} needs a path; only 'scenes' goes without")
    if kind != "auto":  # which opens another row, with the same options
        allowed = [p for p in inspect.signature(table[kind]).parameters if p not in ("path", "split")]
        if unknown := [name for name in options if name not in allowed]:
            raise ValueError(f"layout {kind!r} has no option {unknown[0]!r}; it has: {', '.join(allowed) or 'none'}")
    return table[kind](path, split=split, **options)


def detect_layout(target: str, path: str) -> str:
    """The row that fits what lies at `path`. Raises ValueError saying what was looked for and what was found."""
    place = Path(path).expanduser()
    looked_for = "; ".join(row.looked_for for row in _DETECTED[target])
    if not place.exists():
        raise ValueError(f"{path} does not exist; looked for {looked_for}")
    table = PAIR_SETS[target]
    for row in _DETECTED[target]:
        if row.fits(place):
            return next(kind for kind, opener in table.items() if opener is row)
    found = found_in(place) if place.is_dir() else "a file"
    raise ValueError(
        f"{path} has no layout of pixels with {target} that is known: looked for {looked_for}; found {found}"
    )
