"""How sure a mean over seeds is: Student's t (1908), of scores and of paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over seeds; the bounds are None for fewer than two values, which have no spread."""

    values: tuple[float, ...]
    mean: float
    low: float | None
    high: float | None

    @property
    def half_width(self) -> float | None:
        """From the mean to either bound."""
        return None if self.high is None else self.high - self.mean

    def excludes(self, value: float) -> bool:
        """Whether `value` lies outside; False where there are no bounds."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high


def t_interval(values: Sequence[float], *, comparisons: int = 1) -> Interval:
    """Mean and its 95 % interval, mean +- t_(n-1) s / sqrt(n) with s^2 = sum (x - mean)^2 / (n - 1).

    `comparisons` above 1 widens it so that of so many intervals all hold at once with 95 % or more (Bonferroni).
    Raises ValueError for no values.
    """
    if not values:
        raise ValueError("a mean of no values")
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return Interval(tuple(values), mean, None, None)
    spread = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1))
    half = t_factor(n, comparisons=comparisons) * spread / math.sqrt(n)
    return Interval(tuple(values), mean, mean - half, mean + half)


def t_factor(n: int, *, comparisons: int = 1) -> float:
    """Student's t of n - 1 degrees of freedom: 12.7 at n = 2, 4.3 at 3, 2.8 at 5, 1.96 at the limit."""
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, 1 - (1 - LEVEL) / comparisons / 2))


def paired(base: Mapping[int, float], other: Mapping[int, float]) -> dict[int, float]:
    """other - base of every seed that both have, ascending by seed."""
    return {seed: other[seed] - base[seed] for seed in sorted(base.keys() & other.keys())}
