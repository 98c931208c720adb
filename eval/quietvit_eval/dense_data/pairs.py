"""What every data set with a target per pixel is to the tasks, and the table of those there are."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int16, UInt8

from quietvit_eval.dense_data.scenes import SceneDepth, SceneMasks

IGNORE = -1  # the class of pixels that are neither trained on nor scored, whatever a data set's files call them
CLASSES, METRES = "classes", "metres"  # what a pixel's target is

Target = Int16[np.ndarray, "H W"] | Float32[np.ndarray, "H W"]


@runtime_checkable
class PairSource(Protocol):
    """Images and their targets, fetched by number. Picklable: workers get a copy."""

    name: str  # for logs and cards, e.g. "ade20k:/path (2,000 pairs)"
    kind: str  # CLASSES or METRES
    class_names: list[str]  # by class number; [] for METRES

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[UInt8[np.ndarray, "H W 3"], Target]:
        """RGB pixels and the target of the same height and width.

        CLASSES: int16, 0 .. C-1, IGNORE where it does not count. METRES: float32, 0 where nothing was measured.
        Raises UnreadableImage(name, reason) if either file is broken or the two do not fit together.
        """
        ...

    def item_name(self, index: int) -> str:
        """A stable name of the pair, relative to the data set."""
        ...

    def fingerprint(self) -> str:
        """A hash in hex, the same for the same data anywhere; stands on result cards."""
        ...


SEGMENTATION_SETS: Mapping[str, Callable[..., PairSource]] = {"scenes": SceneMasks}
DEPTH_SETS: Mapping[str, Callable[..., PairSource]] = {"scenes": SceneDepth}
PAIR_SETS = {CLASSES: SEGMENTATION_SETS, METRES: DEPTH_SETS}


def open_pairs(target: str, kind: str, path: str | None, *, split: str, **options: Any) -> PairSource:
    """Open a row of SEGMENTATION_SETS (`target` CLASSES) or DEPTH_SETS (METRES).

    `split` is "train", "val" or "test"; each row maps these to its own names. `options` are the row's keywords.
    Raises ValueError: unknown kind or option, or data that is not there or not of that layout.
    """
    table = PAIR_SETS[target]
    if kind not in table:
        near = difflib.get_close_matches(kind, table, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown layout {kind!r} of pixels with {target}{hint} There are: {', '.join(table)}")
    allowed = [p for p in inspect.signature(table[kind]).parameters if p not in ("path", "split")]
    if unknown := [name for name in options if name not in allowed]:
        raise ValueError(f"layout {kind!r} has no option {unknown[0]!r}; it has: {', '.join(allowed) or 'none'}")
    return table[kind](path, split=split, **options)
