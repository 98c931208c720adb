"""The first of the models and sets of benchmarks/gauge.py --false-alarms: none is accused."""

from __future__ import annotations

import pytest
from benchmarks.gauge import HEAVY_TAILS, alarm_of_tail, alarms_of_model, found_of_planted


@pytest.mark.parametrize("seed", range(10))
def test_random_models_are_not_accused(seed: int) -> None:
    assert set(alarms_of_model(seed)) == {"none"}


@pytest.mark.parametrize("seed", range(len(HEAVY_TAILS)))
def test_heavy_tails_are_not_accused(seed: int) -> None:
    assert alarm_of_tail(seed) == "none"


def test_what_is_planted_is_found() -> None:
    """From 1 % of 20,000 tokens and five times the usual norm on; the benchmark has the rest of the table."""
    found = found_of_planted(20_000, sets=2)
    sure = [f"share {share}, ratio {ratio}" for share in ("1.0%", "3.0%", "10.0%", "30.0%") for ratio in (5, 10, 20)]
    assert [name for name in sure if found[name]["found"] < 1 or found[name]["error_of_share"] > 0.05] == []
