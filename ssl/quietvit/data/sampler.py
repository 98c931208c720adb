"""Which sample comes when, and with which random numbers: pure functions of the seed, so that runs resume exactly.

The order of a pass depends on (seed, pass), the augmentation of a sample on (seed, sample, pass), the masks of a batch
on (seed, step). Workers, world size and restarts do not come into it.

Orders are drawn from the raw numbers of Philox, which NumPy promises to keep; the methods of its Generator may change
between versions.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64

# First word of every seed sequence: keeps the streams of different purposes apart.
_ORDER, _SAMPLE, _BATCH, _REPLACEMENT = 1, 2, 3, 4


class SampleOrder:
    """An endless row of samples: pass after pass over the data, each in a new random order.

    Position `step * batch_size + row` is a sample's place in the run, whoever loads it. A batch at the end of a pass
    goes on into the next one.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise ValueError("there are no samples to put into an order")
        if seed < 0:
            raise ValueError(f"the seed must not be negative, got {seed}")
        self.num_samples, self.seed = num_samples, seed
        self._orders: dict[int, np.ndarray] = {}

    def sample_at(self, position: int) -> tuple[int, int]:
        """(index of the sample, pass) at a position of the run."""
        assert position >= 0
        pass_, place = divmod(position, self.num_samples)
        return int(self._order(pass_)[place]), pass_

    def _order(self, pass_: int) -> np.ndarray:
        order = self._orders.get(pass_)
        if order is None:
            order = pass_order(self.num_samples, self.seed, pass_)
            # A batch sees two passes at most; more would fill the memory of every worker.
            self._orders = {p: o for p, o in self._orders.items() if p == pass_ - 1}
            self._orders[pass_] = order
        return order

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_orders": {}}  # cheaper drawn again than sent to a worker


def pass_order(num_samples: int, seed: int, pass_: int) -> np.ndarray:
    """The permutation of one pass, [num_samples], in 4 bytes each where they suffice."""
    raw = np.random.Philox(np.random.SeedSequence((_ORDER, seed, pass_))).random_raw(num_samples)
    order: Int64[np.ndarray, " n"] = np.argsort(raw, kind="stable")
    return order.astype(np.int32) if num_samples < 2**31 else order


def sample_rng(seed: int, index: int, pass_: int) -> np.random.Generator:
    """Random numbers of one sample in one pass (15 microseconds to make)."""
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence((_SAMPLE, seed, index, pass_))))


def batch_rng(seed: int, step: int) -> np.random.Generator:
    """Random numbers of the batch of one step, as a whole over all ranks."""
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence((_BATCH, seed, step))))


def replacement(num_samples: int, seed: int, index: int, pass_: int, attempt: int) -> int:
    """Which sample stands in for an unreadable one; attempts count from 1."""
    raw = np.random.Philox(np.random.SeedSequence((_REPLACEMENT, seed, index, pass_, attempt))).random_raw()
    return int(raw) % num_samples
