"""The outlier rule on norms with a planted high mode, and on norms without."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quietvit.features.norms import outlier_share, outlier_threshold


def planted(share: float, ratio: float, *, spread: float = 0.1) -> tuple[torch.Tensor, float]:
    generator = torch.Generator().manual_seed(0)
    norms = torch.exp(torch.randn(64, 100, generator=generator) * spread) * 40
    chosen = torch.rand(64, 100, generator=generator) < share
    return torch.where(chosen, norms * ratio, norms), float(chosen.float().mean())


@pytest.mark.parametrize("ratio", [3.0, 10.0])
@pytest.mark.parametrize("share", [0.005, 0.0237, 0.2])
def test_a_planted_high_mode_is_found(share: float, ratio: float) -> None:
    norms, truth = planted(share, ratio)
    assert outlier_share(norms) == pytest.approx(truth, abs=1e-3)


@pytest.mark.parametrize("spread", [0.0, 1e-4, 0.1, 0.3])
def test_one_mode_has_no_outliers(spread: float) -> None:
    assert outlier_share(planted(0.0, 1.0, spread=spread)[0]) == 0.0


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(1e-3, 1e3))
def test_the_share_does_not_depend_on_the_unit(scale: float) -> None:
    norms, truth = planted(0.05, 8.0)
    assert outlier_share(norms * scale) == pytest.approx(truth, abs=1e-3)
    assert outlier_threshold(norms * scale) == pytest.approx(outlier_threshold(norms) * scale, rel=1e-3)


def test_threshold_by_hand() -> None:
    logs = torch.tensor([[0.0, 0.1, 0.2, 0.3, 5.0]])  # median .2, absolute deviations .2 .1 0 .1 4.8: MAD .1
    assert outlier_threshold(logs.exp()) == pytest.approx(math.exp(0.2 + max(math.log(2), 5 * 1.4826 * 0.1)), rel=1e-5)
    assert outlier_share(logs.exp()) == pytest.approx(1 / 5)


def test_zero_and_non_finite_norms() -> None:
    assert outlier_share(torch.zeros(2, 3)) == 0.0
    assert outlier_threshold(torch.tensor([[0.0, 0.0, 7.0]])) == pytest.approx(14.0)
    assert math.isnan(outlier_share(torch.tensor([[1.0, math.nan]])))
