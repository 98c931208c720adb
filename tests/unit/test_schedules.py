"""Schedules: ends, warm-up, rest, and no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from quietvit.schedules import Cosine, Linear, Schedules


def test_no_torch() -> None:
    code = "import sys, quietvit.schedules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_ends() -> None:
    curve = Cosine(1.0, 0.1, 100, warmup_steps=10, freeze_steps=5)
    assert [curve.at(i) for i in range(5)] == [0.0] * 5
    assert curve.at(5) == 0.0  # the warm-up starts at zero
    assert curve.at(14) == curve.at(15) == 1.0
    assert 0.1 < curve.at(99) < 0.101
    assert curve.at(100) == curve.at(10**9) == 0.1


def test_monotonic() -> None:
    curve = Cosine(1.0, 0.0, 50, warmup_steps=10)
    values = [curve.at(i) for i in range(51)]
    assert values[:10] == sorted(values[:10])
    assert values[10:] == sorted(values[10:], reverse=True)


@pytest.mark.parametrize("warmup", [0, 1, 8])
def test_all_warmup(warmup: int) -> None:
    curve = Cosine(1.0, 0.5, warmup, warmup_steps=warmup)
    assert all(0 <= curve.at(i) <= 1 for i in range(warmup))
    assert curve.at(warmup) == 0.5


def test_closed_reaches_its_end_within_the_run() -> None:
    assert Cosine(1.0, 0.2, 20, closed=True).at(19) == pytest.approx(0.2)
    assert Cosine(1.0, 0.2, 20, closed=True, truncation=0.5).at(19) == pytest.approx(0.2)
    assert Cosine(1.0, 0.2, 1, closed=True).at(0) == 1.0


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="do not fit into a run of 10 steps"):
        Cosine(1.0, 0.0, 10, warmup_steps=8, freeze_steps=3)
    with pytest.raises(ValueError, match="closed=True"):
        Cosine(1.0, 0.0, 10, truncation=0.5)


def test_linear() -> None:
    assert [Linear(0.04, 0.07, 4).at(i) for i in range(6)] == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07])
    assert Linear(0.04, 0.07, 0).at(0) == 0.07
    assert Linear(0.04, 0.07, 1).at(0) == 0.04


def test_last_layer_rests() -> None:
    lr = Cosine(1.0, 0.0, 10)
    schedules = Schedules(lr, Cosine(0.04, 0.4, 10), Cosine(0.9, 1.0, 10), Linear(0.04, 0.07, 3), 2)
    assert [schedules.at(i).last_layer_lr for i in range(3)] == [0.0, 0.0, lr.at(2)]
    assert schedules.at(0).lr == 1.0
    assert schedules.at(12).momentum == 1.0
