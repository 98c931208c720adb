"""Heads: the schedule's formula, resuming exactly, and what happens when something goes wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from quietvit_eval.fit import Schedule, fit, load_state

STEPS = 12


def batches(first: int, stop: int = STEPS) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for step in range(first, stop):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 5, generator=generator)
        yield x, x.sum(dim=1, keepdim=True)


def head() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 1))


def loss_with(module: nn.Module):  # type: ignore[no-untyped-def]
    return lambda batch, step: (module(batch[0]) - batch[1]).pow(2).mean()


def train(module: nn.Module, state: Path | None = None, loss=None, **kwargs) -> list[float]:  # type: ignore[no-untyped-def]
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    schedule = Schedule(STEPS, warmup_steps=3, warmup_factor=0.1)
    return fit(module, loss or loss_with(module), batches, optimizer, schedule, state=state, **kwargs)


@pytest.mark.parametrize("decay", ["poly", "cosine", "none"])
def test_schedule_is_the_documented_product(decay: str) -> None:
    schedule = Schedule(10, warmup_steps=4, warmup_factor=0.01, decay=decay)
    for step in range(10):
        regular = {"poly": 1 - step / 10, "cosine": (1 + math.cos(math.pi * step / 10)) / 2, "none": 1.0}[decay]
        warm = 1 - (1 - step / 4) * (1 - 0.01) if step < 4 else 1.0
        assert schedule.factor(step) == pytest.approx(regular * warm)
    assert Schedule(10, warmup_steps=4, warmup_factor=0.01, decay=decay).factor(0) == pytest.approx(0.01)


def test_schedule_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Schedule(0)
    with pytest.raises(ValueError, match="poly, cosine or none"):
        Schedule(3, decay="linear")


@pytest.mark.parametrize("stop_at", [1, 5, 11])
def test_an_interrupted_head_goes_on_bit_for_bit(tmp_path: Path, stop_at: int) -> None:
    whole = head()
    losses = train(whole)
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]

    parts, state = head(), tmp_path / "heads" / "head.safetensors"

    def interrupted(batch, step: int) -> torch.Tensor:  # type: ignore[no-untyped-def]
        if step == stop_at:
            raise KeyboardInterrupt
        return loss_with(parts)(batch, step)

    with pytest.raises(KeyboardInterrupt):
        train(parts, state, interrupted)
    again = head()
    rest = train(again, state)
    assert rest == losses[stop_at:]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name

    done = head()  # a finished head is taken as it is
    assert train(done, state) == []
    assert torch.equal(done[1].weight, whole[1].weight)  # type: ignore[index]


def test_a_killed_run_loses_only_what_came_after_the_last_save(tmp_path: Path) -> None:
    state = tmp_path / "head.safetensors"
    seen: list[int] = []

    class Killed(BaseException):
        pass

    module = head()

    def loss(batch, step: int) -> torch.Tensor:  # type: ignore[no-untyped-def]
        optimizer = torch.optim.AdamW(head().parameters())
        seen.append(load_state(state, head(), optimizer))
        return loss_with(module)(batch, step)

    train(module, state, loss, save_every=4)
    assert seen == [0] * 4 + [4] * 4 + [8] * 4


def test_a_damaged_state_is_begun_anew_and_a_foreign_one_refused(tmp_path: Path) -> None:
    state = tmp_path / "head.safetensors"
    expected = train(head())
    train(head(), state)
    state.write_bytes(state.read_bytes()[:50])
    assert train(head(), state) == expected

    with pytest.raises(ValueError, match="does not hold this head"):
        train(nn.Sequential(nn.Linear(5, 2), nn.Linear(2, 1)), state)


def test_a_loss_that_is_not_finite_ends_with_advice() -> None:
    module = head()
    with pytest.raises(ValueError, match=r"nan at step 2: a smaller rate"):
        train(module, None, lambda batch, step: module(batch[0]).mean() * (math.nan if step == 2 else 1))


def test_gradients_are_clipped() -> None:
    module = nn.Linear(5, 1)
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    loss = lambda batch, step: 1000 * (module(batch[0]) - batch[1]).pow(2).mean()  # noqa: E731
    fit(module, loss, lambda first: batches(first, 1), optimizer, Schedule(1, decay="none"), clip=0.5)
    moved = torch.cat([module.weight.detach().flatten(), module.bias.detach()])
    assert float(moved.norm()) == pytest.approx(0.5, rel=1e-4)
