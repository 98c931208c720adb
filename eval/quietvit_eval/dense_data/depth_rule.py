"""From depth files to metres."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from quietvit_eval.dense_data.numbers import NUMBER_EXTENSIONS, Unfit, read_numbers

DEPTH_EXTENSIONS = NUMBER_EXTENSIONS | {".npy"}
MILLIMETRES = 1000.0  # units per metre: NYUd as BTS writes it, and what most depth cameras' tools write


@dataclass(frozen=True)
class DepthRule:
    """What the numbers of depth files mean.

    Whole numbers are divided by `scale`, units per metre; None means millimetres, and that 8-bit files, which cannot
    hold them, are refused. Floating-point numbers are metres. What is not finite or not above 0 was not measured: 0.
    `max_depth`: greater depths become this many metres. `rotate`: 16-bit words are first rotated right by so many bits
    (SUN RGB-D stores them rotated left by 3).
    """

    scale: float | None = None
    max_depth: float | None = None
    rotate: int = 0

    def __post_init__(self) -> None:
        for name, value in (("scale", self.scale), ("max_depth", self.max_depth)):
            if value is not None and not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value!r}; it must be a number above 0")

    def read(self, path: Path) -> Float32[np.ndarray, "H W"]:
        """Metres, 0 where nothing was measured. Raises ValueError for a broken file, Unfit for one of another kind."""
        numbers = _read_npy(path) if path.suffix.lower() == ".npy" else read_numbers(path)
        if numbers.dtype.kind == "f":
            return self.clean(numbers)
        if numbers.dtype.itemsize == 1 and self.scale is None:
            raise Unfit("8-bit depth, which cannot hold millimetres")
        if self.rotate:
            if numbers.dtype.itemsize != 2:
                raise Unfit(f"depth of {8 * numbers.dtype.itemsize} bits; 16 are wanted")
            words = numbers.astype(np.uint16)
            numbers = (words >> self.rotate) | (words << (16 - self.rotate))
        return self.clean(numbers.astype(np.float32) / np.float32(self.scale or MILLIMETRES))

    def clean(self, metres: Any) -> Float32[np.ndarray, "H W"]:
        """float32, unmeasured pixels 0, clipped to `max_depth`."""
        known = np.isfinite(metres) & (metres > 0)
        out: Float32[np.ndarray, "H W"] = np.where(known, metres, 0).astype(np.float32)
        return out if self.max_depth is None else np.minimum(out, np.float32(self.max_depth))


def _read_npy(path: Path) -> Any:
    try:
        numbers = np.load(path, allow_pickle=False)
    except OSError as error:
        raise ValueError(error.strerror or f"damaged .npy file ({error})") from error
    except (ValueError, EOFError) as error:
        raise ValueError(f"damaged .npy file ({error})") from error
    if not isinstance(numbers, np.ndarray) or numbers.ndim != 2 or numbers.dtype.kind not in "fiu" or not numbers.size:
        raise Unfit(f"{type(numbers).__name__} {getattr(numbers, 'shape', '')}; [H W] of real numbers is wanted")
    return numbers
