"""From the numbers in annotation files to classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int16

from quietvit_eval.dense_data.numbers import Unfit, read_numbers
from quietvit_eval.dense_data.target import IGNORE

MAX_CLASSES = 32_767  # classes are int16
_LOWEST, _HIGHEST = -32_768, 65_535  # what 16 bits hold, signed or not
_NONE = -2  # in the table: no class has this number
_SHOWN = 5


class ClassMap:
    """Gives each number of a file its class, or IGNORE. Numbers that are not in `classes` are errors."""

    def __init__(self, classes: Mapping[int, int]) -> None:
        self.classes = dict(sorted(classes.items()))
        numbers = list(self.classes)
        if numbers[0] < _LOWEST or numbers[-1] > _HIGHEST:
            raise ValueError(f"class numbers in files lie between {_LOWEST} and {_HIGHEST}; got {numbers}")
        self._low = min(numbers[0], 0)
        self._table = np.full(numbers[-1] - self._low + 1, _NONE, np.int16)
        self._table[np.array(numbers) - self._low] = list(self.classes.values())

    def read(self, path: Path) -> Int16[np.ndarray, "H W"]:
        """Classes of an annotation file. Raises ValueError for a broken file, Unfit for one without class numbers."""
        numbers = read_numbers(path)
        if numbers.dtype.kind == "f":
            raise Unfit("an image of floating-point values; class numbers are whole")
        return self.apply(numbers)

    def apply(self, numbers: Any) -> Int16[np.ndarray, "H W"]:
        """Classes of whole numbers [H W]. Raises Unfit, naming the numbers found that have no class."""
        low, high = int(numbers.min()), int(numbers.max())
        if low >= self._low and high - self._low < len(self._table):
            mapped: Int16[np.ndarray, "H W"] = self._table[numbers.astype(np.int32) - self._low]
            if (mapped != _NONE).all():
                return mapped
        strays = [n for n in np.unique(numbers).tolist() if n not in self.classes]
        more = f" and {len(strays) - _SHOWN} more" if len(strays) > _SHOWN else ""
        raise Unfit(
            f"holds {', '.join(map(str, strays[:_SHOWN]))}{more}, which {self.allowed()}; "
            f"its numbers lie between {low} and {high}"
        )

    def allowed(self) -> str:
        """The rule in words."""
        kept = [number for number, class_ in self.classes.items() if class_ != IGNORE]
        ignored = [str(number) for number, class_ in self.classes.items() if class_ == IGNORE]
        ranges = f"{kept[0]} to {kept[-1]}" if kept[-1] - kept[0] + 1 == len(kept) else ", ".join(map(str, kept))
        return f"is no class (classes are {ranges}; ignored: {', '.join(ignored) or 'none'})"


def make_class_map(num_classes: int, ignore: Sequence[int], *, reduce_zero: bool = False) -> ClassMap:
    """Numbers 0 .. C-1 are the classes or, with `reduce_zero`, 1 .. C, and 0 is ignored.

    `ignore` are numbers as they stand in the files, whatever they would mean otherwise. Raises ValueError.
    """
    if not isinstance(num_classes, int) or not 1 <= num_classes <= MAX_CLASSES:
        raise ValueError(f"num_classes is {num_classes!r}; a whole number from 1 to {MAX_CLASSES} is possible")
    if strange := [number for number in ignore if not isinstance(number, int)]:
        raise ValueError(f"ignore holds {strange[0]!r}; whole numbers are possible")
    first = 1 if reduce_zero else 0
    classes = {number + first: number for number in range(num_classes)}
    classes |= dict.fromkeys([0] if reduce_zero else [], IGNORE) | dict.fromkeys(ignore, IGNORE)
    if all(class_ == IGNORE for class_ in classes.values()):
        raise ValueError(f"ignore={list(ignore)} leaves none of the {num_classes} classes")
    return ClassMap(classes)
