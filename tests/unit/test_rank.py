"""Effective rank against an SVD, and where it is known by hand."""

from __future__ import annotations

import math

import pytest
import torch

from quietvit.features.rank import rankme


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (12, 12)])
def test_it_is_the_entropy_of_the_singular_values(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.rand(shape[1]).add(0.1)
    s = torch.linalg.svdvals(x.double())
    p = [float(v / s.sum()) for v in s]
    assert rankme(x) == pytest.approx(math.exp(-sum(v * math.log(v) for v in p if v > 0)), rel=1e-6)


def test_known_ranks() -> None:
    torch.manual_seed(0)
    assert rankme(torch.eye(6)) == pytest.approx(6.0)
    assert rankme(torch.eye(6).repeat(10, 1)) == pytest.approx(6.0)
    line = torch.randn(50, 1) @ torch.randn(1, 20)
    assert rankme(line) == pytest.approx(1.0, abs=1e-3)  # a collapsed model
    assert rankme(torch.ones(30, 8)) == pytest.approx(1.0, abs=1e-3)  # not centred: one constant direction counts


def test_scale_does_not_matter_but_zero_and_nan_show() -> None:
    torch.manual_seed(0)
    x = torch.randn(30, 10)
    assert rankme(x * 1e4) == pytest.approx(rankme(x), rel=1e-5)
    assert rankme(torch.zeros(5, 4)) == 0.0
    x[3, 2] = math.inf
    assert math.isnan(rankme(x))
