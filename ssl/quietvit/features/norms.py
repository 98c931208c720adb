"""Outlier tokens: do the norms of patch tokens form a second, higher mode ("Vision Transformers Need Registers")?

Norms are those of the patch tokens *before* the final norm layer, which would flatten them to about sqrt(D). The paper
cuts DINOv2-g at 150 by eye; that number belongs to that model. Here norms are counted in fine bins of their logarithm
(`NormHistogram`) and `judge` decides from the counts, whatever the model and its scale. Training (health, gauge) and
evaluation call the same function.

A cutoff is looked for at the valleys of the smoothed histogram. All of these must hold there (constants below):

    1. the upper part is a minority: LEAST_SHARE to MOST_SHARE of the tokens
    2. the parts are LEAST_RATIO times apart or more, and Ashman's D is above LEAST_ASHMAN
    3. the valley is real: above the cutoff the density first rises. The distribution whose density only falls and that
       is nearest is the least concave majorant of the empirical one (Grenander 1956); `dip` is how far the empirical
       one lies below it at most, as in Hartigan's dip test, and must be large by itself and against its sampling error
    4. a mixture of two normal distributions of log norm, fitted by EM, has a lower BIC than a single one (five
       parameters against two)

3 carries the decision: 4 also holds for any distribution with a heavy tail once there are tokens enough, and a usual
mode that is not normal draws both components of a mixture onto itself, so that 4 alone neither proves nor finds
outliers. Parts about 2 to 3 times apart (DeiT-III in the paper) are "suspicious": such ratios also come from what is in
the pictures, and are not counted as outliers.

Measured on 2026-11-21 (benchmarks/gauge.py --false-alarms; benchmarks/results/gauge-2026-11-21.json): none of 100
random models and none of 100 heavy-tailed sets is accused. On pictures that all have bars 2 of these models are, and 13
suspicious: a norm does not say why it is high. Of 50,000 tokens 0.1 % outliers are found from five times the usual norm
on, 0.3 % nearly always and 1 % always from three times on; of 5,000 tokens it takes 0.3 % at ten or 1 % at five times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from quietvit import dist

__all__ = ["NormHistogram", "NormVerdict", "judge", "outlier_share"]

OCTAVES = (-20, 28)  # the bins reach from norm 2^-20 to 2^28 (ours: bf16 models of any width stay inside)
BINS_PER_OCTAVE = 64  # ours: a bin is 1.1 % wide, far below any spread that was seen
BINS = (OCTAVES[1] - OCTAVES[0]) * BINS_PER_OCTAVE
WIDTH = math.log(2) / BINS_PER_OCTAVE  # of a bin, in log norm
BELOW, ABOVE, NOT_FINITE = BINS, BINS + 1, BINS + 2  # places of the counts outside the bins; zero is below

LEAST_RATIO = 1.8  # ours: the least of the paper's models, DeiT-III, has 2 to 3
CLEAR_RATIO = 2.8  # ours: about 3; below it "suspicious"
LEAST_ASHMAN = 2.0  # Ashman, Bird and Zepf 1994: above 2 two modes can be told apart
LEAST_SHARE, MOST_SHARE = 5e-4, 0.45  # ours: DINOv2-g has 2.4 % outliers; half and more would be the usual tokens
LEAST_DIP = 0.1  # ours: a normal mode that stands free has 0.26 or more, a falling tail 0
LEAST_DIP_ERRORS = 1.6  # ours: dip * sqrt(tokens above the cutoff); a flat tail passes it once in a hundred times
SCALES = (0.06, 0.12, 0.24)  # of the smoothing, in log norm (ours: a tenth to a third of the least distance of modes)
EM_STEPS, EM_GAIN = 100, 1e-7  # most rounds of EM, and the gain in log likelihood per token at which it ends (ours)


@dataclass(frozen=True)
class NormVerdict:
    """What `judge` says. Figures of a second mode are nan, and the share 0, where there is none; all are nan if a norm
    was not finite. Norms are known to the width of a bin, 1.1 %.
    """

    kind: str  # "none", "suspicious" (a second mode 2 to 3 times above the first), "outliers", "not finite"
    reason: str  # one sentence with the figures that decided
    tokens: int
    median: float  # norm
    spread: float  # standard deviation of the log norms
    max_over_median: float
    kurtosis: float  # excess kurtosis of the log norms; 0 for a lognormal distribution of norms
    bic_gain: float  # BIC of one normal distribution less that of two; above 0: two are better
    cutoff: float  # norm
    share: float  # of the tokens, above the cutoff: of "outliers" and of "suspicious" ones
    ratio: float  # of the geometric means of the norms above and below the cutoff
    ashman_d: float  # |m1 - m2| / sqrt((s1^2 + s2^2) / 2) of the log norms above and below
    dip: float  # in [0, 1]: distance of the tail above the cutoff from one whose density only falls

    @property
    def bimodal(self) -> bool:
        """Whether the upper mode is far enough away to be called outliers."""
        return self.kind == "outliers"


class NormHistogram:
    """Counts of norms in bins of equal ratio, a row for each block. Histograms of parts add up to that of the whole.

    `counts` is int64 [L, BINS + 3] on any device: BINS bins of 2^(1/64) from norm 2^-20 on, then what is below (zero
    too), what is above, and what is not finite.
    """

    def __init__(self, blocks: int = 1, *, device: torch.device | str = "cpu") -> None:
        self.counts: Int[Tensor, "L bins"] = torch.zeros(blocks, BINS + 3, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, norms: Float[Tensor, ...], block: int = 0) -> None:
        """Count norms of any shape into the row of `block`, without waiting for the device."""
        values = norms.detach().float().flatten()
        place = ((values.log2() - OCTAVES[0]) * BINS_PER_OCTAVE).floor()
        place = torch.where(place < 0, BELOW, torch.where(place >= BINS, ABOVE, place))
        place = torch.where(values.isfinite(), place, NOT_FINITE).long()
        self.counts[block].index_add_(0, place, torch.ones_like(place))

    def merge(self, other: NormHistogram) -> None:
        """Add what another histogram of as many blocks counted. Raises ValueError for another number of blocks."""
        if other.counts.shape != self.counts.shape:
            raise ValueError(f"a histogram of {len(other.counts)} blocks cannot go into one of {len(self.counts)}")
        self.counts += other.counts.to(self.counts.device)

    def over_ranks(self) -> NormHistogram:
        """The sum of all ranks' histograms, all of which must call; alone, the same counts."""
        out = NormHistogram(0)
        out.counts = dist.sum_over_ranks(self.counts)
        return out

    def judge(self, block: int = -1) -> NormVerdict:
        """The verdict on the row of `block`; it waits for the device."""
        return _judge(self.counts[block].cpu().numpy())


def judge(norms: Float[Tensor, ...] | NormHistogram) -> NormVerdict:
    """Whether norms have an upper mode of outliers: the test at the head of this file.

    Takes norms of any shape, all tokens of all images together, or a histogram, of which the last row counts. Its cost
    does not depend on the number of tokens once they are counted.
    """
    if isinstance(norms, NormHistogram):
        return norms.judge()
    histogram = NormHistogram(device=norms.device)
    histogram.add(norms)
    return histogram.judge()


def outlier_share(norms: Float[Tensor, ...]) -> float:
    """Share of tokens, in [0, 1], above the cutoff of `judge` if it finds outliers, else 0; nan where a norm is not
    finite."""
    verdict = judge(norms)
    return verdict.share if verdict.kind in ("outliers", "not finite") else 0.0


Array = NDArray[np.float64]


@dataclass(frozen=True)
class _Logs:
    """Log norms as counts at the centres of the bins that hold any, ascending."""

    at: Array
    counts: Array

    def moments(self) -> tuple[float, float]:
        """Mean and variance."""
        mean = float(self.counts @ self.at / self.counts.sum())
        return mean, float(self.counts @ (self.at - mean) ** 2 / self.counts.sum())

    def above(self, cut: float) -> _Logs:
        return _Logs(self.at[self.at > cut], self.counts[self.at > cut])

    def below(self, cut: float) -> _Logs:
        return _Logs(self.at[self.at <= cut], self.counts[self.at <= cut])

    def quantile(self, share: float) -> float:
        """Counts are taken as spread evenly over their bins."""
        upto = self.counts.cumsum()
        i = int(np.searchsorted(upto, share * upto[-1]))
        inside = (share * upto[-1] - (upto[i] - self.counts[i])) / self.counts[i]
        return float(self.at[i] + (inside - 0.5) * WIDTH)


@dataclass(frozen=True)
class _Part:
    """The tokens above a cutoff (in log norm) that could be an upper mode."""

    cut: float
    count: float
    share: float
    ratio: float
    ashman_d: float
    dip: float


def _judge(counts: NDArray[np.int64]) -> NormVerdict:
    tokens, broken = int(counts.sum()), int(counts[NOT_FINITE])
    inside = np.flatnonzero(counts[:BINS])
    if broken or not len(inside):
        nan, kind = math.nan, "not finite" if broken else "none"
        reason = f"{broken} of {tokens} norms are not finite" if broken else "no norm above zero was counted"
        return NormVerdict(kind, reason, tokens, nan, nan, nan, nan, nan, nan, nan if broken else 0.0, nan, nan, nan)
    centres: Array = OCTAVES[0] * math.log(2) + (inside + 0.5).astype(np.float64) * WIDTH
    logs = _Logs(centres, counts[inside].astype(np.float64))
    (mean, variance), median = logs.moments(), logs.quantile(0.5)
    fourth = float(logs.counts @ (logs.at - mean) ** 4 / logs.counts.sum())
    parts = [part for cut in _valleys(logs, median) if (part := _part(logs, cut, tokens)) is not None]
    best = max(parts, key=lambda part: part.dip * math.sqrt(part.count), default=None)
    return NormVerdict(
        tokens=tokens,
        median=math.exp(median),
        spread=math.sqrt(variance),
        max_over_median=math.exp(logs.at[-1] - median),
        kurtosis=fourth / variance**2 - 3 if variance > 0 else 0.0,
        **_decide(best, _bic_gain(logs, best.cut if best else None)),
    )


def _decide(part: _Part | None, bic_gain: float) -> dict[str, Any]:
    """The fields of a verdict that speak of two modes."""
    none: dict[str, Any] = {"kind": "none", "bic_gain": bic_gain, "cutoff": math.nan, "share": 0.0, "ratio": math.nan,
                            "ashman_d": math.nan, "dip": math.nan if part is None else part.dip}  # fmt: skip
    if part is None:
        return none | {"reason": "one mode: no valley in the norms has a minority far above it"}
    if part.dip < LEAST_DIP or part.dip * math.sqrt(part.count) < LEAST_DIP_ERRORS:
        return none | {
            "reason": f"one mode: the upper {part.share:.2%} ({part.count:.0f} tokens, {part.ratio:.1f} times the rest)"
            f" is no more apart than a falling tail gets by chance (dip {part.dip:.2f})"
        }
    if bic_gain <= 0:
        return none | {"reason": f"one mode: two normal distributions are no better than one (BIC {bic_gain:+.0f})"}
    clear = part.ratio >= CLEAR_RATIO
    return {
        "kind": "outliers" if clear else "suspicious",
        "reason": f"two modes: {part.share:.2%} of the tokens have {part.ratio:.1f} times the norm of the others"
        + ("" if clear else ", which may come from the pictures: suspicious"),
        "bic_gain": bic_gain,
        "cutoff": math.exp(part.cut),
        "share": part.share,
        "ratio": part.ratio,
        "ashman_d": part.ashman_d,
        "dip": part.dip,
    }


def _valleys(logs: _Logs, median: float) -> list[float]:
    """Local minima above the median of the histogram, smoothed with a normal kernel of each of SCALES; of a flat bottom
    the middle."""
    first = logs.at[0]
    dense = np.zeros(round((logs.at[-1] - first) / WIDTH) + 1)
    dense[np.rint((logs.at - first) / WIDTH).astype(int)] = logs.counts
    found: set[float] = set()
    for scale in SCALES:
        reach = math.ceil(4 * scale / WIDTH)
        kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) * WIDTH / scale) ** 2)
        steps = np.diff(np.convolve(dense, kernel)[reach : reach + len(dense)])
        moves = np.flatnonzero(steps)
        turns = np.flatnonzero((steps[moves[:-1]] < 0) & (steps[moves[1:]] > 0))
        bottoms = (moves[turns] + 1 + moves[turns + 1]) // 2
        found |= {float(first + b * WIDTH) for b in bottoms}
    return sorted(cut for cut in found if cut > median)


def _part(logs: _Logs, cut: float, tokens: int) -> _Part | None:
    """What is above a cutoff, unless it is too many or too few, too near or not apart."""
    above = logs.above(cut)
    count = float(above.counts.sum())
    if not LEAST_SHARE <= count / tokens <= MOST_SHARE:
        return None
    (high, high_variance), (low, low_variance) = above.moments(), logs.below(cut).moments()
    width = math.sqrt((high_variance + low_variance) / 2 + WIDTH**2 / 12)
    ratio, ashman = math.exp(high - low), (high - low) / width
    if ratio < LEAST_RATIO or ashman <= LEAST_ASHMAN:
        return None
    return _Part(cut, count, count / tokens, ratio, ashman, _dip(above.at - cut, above.counts))


def _dip(distance: Array, counts: Array) -> float:
    """Greatest distance between a tail's distribution function and its least concave majorant, in [0, 1].

    `distance` [bins] are bin centres above the start of the tail; the tokens of a bin are spread evenly over it.
    """
    ends, upto = distance + WIDTH / 2, counts.cumsum() / counts.sum()
    starts, before = np.maximum(distance - WIDTH / 2, 0), upto - counts / counts.sum()
    hull = [(0.0, 0.0)]
    for x, y in zip(ends.tolist(), upto.tolist(), strict=True):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    xs, ys = np.array(hull).T
    return float((np.interp(starts, xs, ys) - before).max())


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _bic_gain(logs: _Logs, cut: float | None) -> float:
    """BIC of one normal distribution less that of a mixture of two, the better one of EM from two starts: the parts
    above and below `cut`, and those with the greatest variance between them (Otsu 1979)."""
    n = logs.counts.sum()
    alone = _likelihood(logs, np.ones((1, len(logs.at))))
    starts = [_widest_split(logs)] if cut is None else [cut, _widest_split(logs)]
    both = []
    for start in starts:
        upper = np.where(logs.at > start, 0.99, 0.01)
        both.append(_likelihood(logs, np.stack([1 - upper, upper])))
    return 2 * (max(both) - alone) - 3 * math.log(n)


def _likelihood(logs: _Logs, resp: Array) -> float:
    """Log likelihood of normal distributions after EM, from first guesses at who made each bin, `resp` [part, bin].

    Variances have that of a bin added, so that no part falls onto a single one.
    """
    n, last = logs.counts.sum(), -math.inf
    for _ in range(EM_STEPS):
        mass = resp * logs.counts
        total = np.maximum(mass.sum(1, keepdims=True), 1e-12)
        means = (mass @ logs.at)[:, None] / total
        variances = (mass * (logs.at - means) ** 2).sum(1, keepdims=True) / total + WIDTH**2 / 12
        joint = np.log(total / n) - 0.5 * (logs.at - means) ** 2 / variances - 0.5 * np.log(2 * math.pi * variances)
        density = np.logaddexp.reduce(joint, axis=0)
        likelihood, resp = float(logs.counts @ density), np.exp(joint - density)
        if likelihood - last < EM_GAIN * n:
            break
        last = likelihood
    return likelihood


def _widest_split(logs: _Logs) -> float:
    """The log norm that leaves the greatest variance between the parts on its sides."""
    below, total = logs.counts.cumsum(), logs.counts.sum()
    first, whole = (logs.counts * logs.at).cumsum(), logs.counts @ logs.at
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (whole * below - total * first) ** 2 / (below * (total - below))
    return float(logs.at[np.nan_to_num(between[:-1], posinf=0.0).argmax()]) if len(below) > 1 else float(logs.at[0])
