"""The verdict on norms with a planted high mode and on norms without, against loops and scikit-learn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.mixture import GaussianMixture
from torch import Tensor

from quietvit.features import norms as rule
from quietvit.features.norms import NormHistogram, NormVerdict, judge, outlier_share

TAILS: dict[str, Any] = {
    "normal": lambda r, n: r.normal(size=n) * 0.1,
    "wide normal": lambda r, n: r.normal(size=n),
    "Student 3": lambda r, n: r.standard_t(3, n) * 0.1,
    "Laplace": lambda r, n: r.laplace(size=n) * 0.3,
    "Pareto": lambda r, n: r.exponential(size=n) * 0.3,
    "Weibull": lambda r, n: np.log(r.weibull(1.5, n)),
    "skewed": lambda r, n: -0.25 * np.log(r.gamma(2, size=n)),
    "two usual modes": lambda r, n: r.normal(size=n) * 0.1 - 0.4 * (r.random(n) < 0.3),
}


def planted(
    share: float, ratio: float, *, tokens: int = 20_000, bulk: str = "normal", spread: float = 0.1, seed: int = 0
) -> tuple[Tensor, float]:
    """Norms around 40, `ratio` times as large for about `share` of the tokens; and the share that it became."""
    random = np.random.default_rng(seed)
    logs = TAILS[bulk](random, tokens)
    chosen = random.random(tokens) < share
    logs = np.where(chosen, math.log(ratio) + spread * random.normal(size=tokens), logs)
    return torch.from_numpy(40 * np.exp(logs)).float(), float(chosen.mean())


@pytest.mark.parametrize("ratio", [3.0, 5.0, 10.0, 20.0])
@pytest.mark.parametrize("share", [0.002, 0.005, 0.0237, 0.1, 0.3])
def test_a_planted_high_mode_is_found(share: float, ratio: float) -> None:
    norms, truth = planted(share, ratio)
    verdict = judge(norms)
    assert verdict.bimodal, verdict.reason
    assert verdict.share == pytest.approx(truth, rel=0.01, abs=1e-4)
    assert verdict.ratio == pytest.approx(ratio, rel=0.05)
    assert 40 * math.exp(0.3) < verdict.cutoff < 40 * ratio
    assert verdict.median == pytest.approx(float(norms.median()), rel=0.005)
    assert outlier_share(norms) == verdict.share


def test_one_in_a_thousand_is_found_from_fifty_thousand_tokens_on() -> None:
    for seed, ratio in enumerate((3.0, 5.0, 10.0, 20.0)):
        norms, truth = planted(0.001, ratio, tokens=50_000, seed=seed)
        assert judge(norms).share == pytest.approx(truth, rel=0.02)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_modes_two_times_apart_are_suspicious_and_no_outliers(share: float) -> None:
    norms, truth = planted(share, 2.0)
    verdict = judge(norms)
    assert verdict.kind == "suspicious"
    assert verdict.share == pytest.approx(truth, rel=0.03)
    assert outlier_share(norms) == 0.0


@pytest.mark.parametrize("bulk", [name for name in TAILS if name != "wide normal"])
def test_the_usual_mode_may_have_any_form(bulk: str) -> None:
    """A mixture of two normal distributions would lie on the usual mode and miss the outliers."""
    norms, truth = planted(0.02, 20.0, bulk=bulk)
    assert judge(norms).share == pytest.approx(truth, rel=0.15)  # a tail reaches over too


@pytest.mark.parametrize("bulk", TAILS)
@pytest.mark.parametrize("tokens", [100, 1000, 30_000])
def test_heavy_tails_are_not_accused(bulk: str, tokens: int) -> None:
    for seed in range(5):
        verdict = judge(planted(0.0, 1.0, tokens=tokens, bulk=bulk, seed=seed)[0])
        assert verdict.kind == "none", verdict.reason
        assert verdict.share == 0.0
        assert math.isnan(verdict.cutoff)


def test_a_low_mode_is_no_outlier_and_hides_none() -> None:
    norms, truth = planted(0.02, 8.0)
    low = planted(0.0, 1.0, tokens=8000, seed=1)[0] / 6  # a majority of high tokens: these are the usual ones
    assert judge(torch.cat([planted(0.0, 1.0)[0], low])).kind == "none"
    both = judge(torch.cat([norms, low]))
    assert both.share == pytest.approx(truth * 20 / 28, rel=0.02)


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(1e-3, 1e3), ratio=st.floats(3.2, 20.0))
def test_the_unit_changes_nothing_but_the_cutoff(scale: float, ratio: float) -> None:
    norms, _ = planted(0.05, ratio)
    one, other = judge(norms), judge(norms * scale)
    assert (one.kind, one.tokens) == (other.kind, other.tokens)
    for name in ("share", "ratio", "ashman_d", "spread", "max_over_median", "kurtosis"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=0.03, abs=0.02), name
    # Anywhere in an empty valley is right.
    assert other.cutoff == pytest.approx(one.cutoff * scale, rel=0.1)
    assert other.median == pytest.approx(one.median * scale, rel=0.01)


def test_plain_figures_against_the_samples() -> None:
    norms = planted(0.05, 8.0)[0]
    logs, verdict = norms.double().log().numpy(), judge(norms)
    above = logs > math.log(verdict.cutoff)
    low, high = logs[~above], logs[above]
    assert verdict.tokens == len(logs)
    assert verdict.share == pytest.approx(above.mean(), rel=0.01)
    assert verdict.spread == pytest.approx(logs.std(), rel=0.001)
    assert verdict.max_over_median == pytest.approx(math.exp(logs.max() - np.median(logs)), rel=0.02)
    assert verdict.kurtosis == pytest.approx(((logs - logs.mean()) ** 4).mean() / logs.var() ** 2 - 3, rel=0.01)
    assert verdict.ratio == pytest.approx(math.exp(high.mean() - low.mean()), rel=0.01)
    width = math.sqrt((high.var() + low.var()) / 2)
    assert verdict.ashman_d == pytest.approx((high.mean() - low.mean()) / width, rel=0.01)


@pytest.mark.parametrize(("share", "ratio"), [(0.0, 1.0), (0.02, 8.0), (0.3, 3.0)])
def test_bic_against_scikit_learn_on_the_samples(share: float, ratio: float) -> None:
    norms = planted(share, ratio)[0]
    logs = norms.double().log().numpy()[:, None]
    one, two = (GaussianMixture(k, n_init=3, tol=1e-6, random_state=0).fit(logs).bic(logs) for k in (1, 2))
    assert judge(norms).bic_gain == pytest.approx(one - two, rel=0.01, abs=25)
    assert (judge(norms).bic_gain > 0) == (share > 0)


def dip_by_loops(tail: np.ndarray) -> float:
    """Distance from the least concave majorant, as the largest chord between points of the distribution function."""
    x = np.sort(tail)
    n = len(x)
    points = [(0.0, 0.0), *((float(v), (i + 1) / n) for i, v in enumerate(x))]
    greatest = 0.0
    for v, below in ((float(v), i / n) for i, v in enumerate(x)):
        hull = max(
            a[1] + (b[1] - a[1]) * (v - a[0]) / (b[0] - a[0])
            for a in points if a[0] <= v for b in points if b[0] >= v and b[0] > a[0]
        )  # fmt: skip
        greatest = max(greatest, hull - below)
    return greatest


@pytest.mark.parametrize("seed", range(4))
def test_dip_against_chords(seed: int) -> None:
    random = np.random.default_rng(seed)
    tail = np.concatenate([random.exponential(size=40), 2 + 0.3 * random.random(size=20 * seed)])
    bins, counts = np.unique(np.floor(tail / rule.WIDTH), return_counts=True)
    found = rule._dip((bins + 0.5) * rule.WIDTH, counts.astype(float))
    assert found == pytest.approx(dip_by_loops(tail), abs=0.02)


def test_histograms_of_parts_add_up() -> None:
    norms = planted(0.05, 8.0)[0]
    whole, parts = NormHistogram(3), NormHistogram(3)
    whole.add(norms, 1)
    for part in norms.view(100, 200).split(7):
        piece = NormHistogram(3)
        piece.add(part, 1)
        parts.merge(piece)
    assert torch.equal(whole.counts, parts.counts)
    assert whole.judge(1) == judge(norms)
    assert whole.judge(0).tokens == 0
    with pytest.raises(ValueError, match="histogram of 2 blocks cannot go into one of 3"):
        parts.merge(NormHistogram(2))


def test_counts_by_hand() -> None:
    histogram = NormHistogram()
    histogram.add(torch.tensor([[1.0, 1.005, 2.0], [0.0, 1e-30, 1e30], [math.inf, math.nan, 1.999]]))
    counts = {i: int(c) for i, c in enumerate(histogram.counts[0]) if c}
    one = 20 * 64
    assert counts == {one: 2, one + 63: 1, one + 64: 1, rule.BELOW: 2, rule.ABOVE: 1, rule.NOT_FINITE: 2}


def test_zero_and_non_finite_norms() -> None:
    assert outlier_share(torch.zeros(2, 3)) == 0.0
    assert judge(torch.zeros(2, 3)).kind == "none"
    assert judge(torch.tensor([[0.0, 0.0, 7.0]])).median == pytest.approx(7.0, rel=0.01)
    broken = judge(torch.tensor([[1.0, math.nan]]))
    assert broken.kind == "not finite"
    assert broken.reason == "1 of 2 norms are not finite"
    assert math.isnan(outlier_share(torch.tensor([[1.0, math.nan]])))


@pytest.mark.parametrize("norms", [torch.ones(500), torch.tensor([3.0]), torch.zeros(0), torch.tensor([1.0, 9.0])])
def test_norms_with_nothing_to_tell_apart(norms: Tensor) -> None:
    verdict = judge(norms)
    assert (verdict.kind, verdict.share) == ("none", 0.0)


def test_every_condition_can_say_no() -> None:
    def verdict_of(*groups: tuple[int, float, float]) -> NormVerdict:
        random = np.random.default_rng(0)
        logs = [math.log(at) + spread * random.normal(size=count) for count, at, spread in groups]
        return judge(torch.from_numpy(np.exp(np.concatenate(logs))))

    usual = (10_000, 1.0, 0.1)
    assert verdict_of(usual, (200, 6.0, 0.1)).bimodal
    assert not verdict_of(usual, (4, 6.0, 0.1)).bimodal  # too few
    assert not verdict_of(usual, (9_000, 6.0, 0.1)).bimodal  # no minority
    assert not verdict_of(usual, (200, 1.6, 0.02)).bimodal  # too near
    assert "falling tail" in verdict_of((10_000, 1.0, 0.02), (40, 6.0, 1.2)).reason  # no valley
