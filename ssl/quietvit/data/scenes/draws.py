"""Random numbers of one image: a pure function of integers, the same on every machine and in every NumPy release."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Float64

_POOL = 256  # an image takes 150 to 400 numbers; a second fill costs a microsecond


def uniforms(*key: int, num: int) -> Float64[np.ndarray, " num"]:
    """The first `num` numbers in [0, 1) of the stream named by `key` (non-negative integers).

    Raw PCG64 words, because NumPy promises those for good; the methods of `Generator` may change between releases.
    """
    return _unit(np.random.PCG64(np.random.SeedSequence(key)), num)


class Draws:
    """A stream of uniform numbers read one after the other."""

    def __init__(self, *key: int) -> None:
        self._key = key
        self._bits = np.random.PCG64(np.random.SeedSequence(key))
        self._pool: list[float] = []

    def branch(self, number: int) -> Draws:
        """A stream of its own, whatever has been or will be read from this one."""
        return Draws(*self._key, number)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """One number in [low, high)."""
        if not self._pool:
            self._pool = _unit(self._bits, _POOL).tolist()
        return low + (high - low) * self._pool.pop()

    def below(self, num: int) -> int:
        """One integer in [0, num)."""
        return int(self.uniform(0.0, num))

    def table(self, side: int) -> Float32[np.ndarray, "side side"]:
        """A square of numbers in [0, 1): one tone per cell of a pattern that repeats after `side` cells."""
        return _unit(self._bits, side * side).astype(np.float32).reshape(side, side)


def _unit(bits: np.random.PCG64, num: int) -> Float64[np.ndarray, " num"]:
    raw = np.asarray(bits.random_raw(num), dtype=np.uint64)
    return (raw >> np.uint64(11)) * 2.0**-53  # 53 bits: every value is exact in float64
