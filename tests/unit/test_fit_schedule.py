"""DINOv3's one-cycle: the rate and AdamW's first beta by step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from quietvit_eval.fit import Schedule, fit

CYCLE = Schedule(30, warmup_steps=10, warmup_factor=1e-3, decay="one_cycle")


def test_rate_rises_under_a_cosine_and_ends_near_nothing() -> None:
    for step in range(30):
        if step < 10:
            expected = 1e-3 + step / 10 * (1 + math.cos(math.pi * step / 30)) / 2
        else:
            expected = 4e-5 + (1 - 4e-5) * (1 + math.cos(math.pi * (step + 1) / 30)) / 2
        assert CYCLE.factor(step) == pytest.approx(expected)
    assert CYCLE.factor(29) == pytest.approx(4e-5)
    assert max(range(30), key=CYCLE.factor) in (9, 10)


def test_first_beta_is_off_during_the_warm_up_and_rises_afterwards() -> None:
    betas = [CYCLE.beta1(step) for step in range(30)]
    assert betas[:10] == [0.0] * 10
    assert betas[10] == pytest.approx(0.85)
    assert betas[20] == pytest.approx(0.90)
    assert sorted(betas[10:]) == betas[10:]  # type: ignore[type-var]
    assert betas[29] < 0.95  # type: ignore[operator]
    assert Schedule(30, decay="cosine").beta1(3) is None


def test_the_optimizer_sees_both() -> None:
    head, seen = nn.Linear(2, 1), []
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1, betas=(0.9, 0.99))

    def loss_of(batch: torch.Tensor, step: int) -> torch.Tensor:
        group = optimizer.param_groups[0]
        seen.append((group["lr"], group["betas"]))
        return head(batch).square().mean()

    fit(head, loss_of, lambda first: [torch.ones(1, 2)] * (30 - first), optimizer, CYCLE)
    assert seen == [(pytest.approx(0.1 * CYCLE.factor(s)), (CYCLE.beta1(s), 0.99)) for s in range(30)]


def test_a_warm_up_that_is_never_left() -> None:
    schedule = Schedule(5, warmup_steps=8, decay="one_cycle")
    assert [schedule.beta1(s) for s in range(5)] == [0.0] * 5
    assert schedule.factor(4) > schedule.factor(0)
