"""Signals that wait for the end of a step."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quietvit_eval.fit import Schedule, fit, load_state
from quietvit_eval.held_signals import held_signals


def test_a_signal_waits_for_the_end_of_the_block() -> None:
    before = signal.getsignal(signal.SIGINT)
    done = []

    def block() -> None:
        with held_signals():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("whole")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done == ["whole"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_one_does_not_wait() -> None:
    done = []

    def block() -> None:
        with held_signals():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            done.append("whole")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done == []


def test_other_threads_have_no_signals_to_hold() -> None:
    done = []

    def block() -> None:
        with held_signals():
            done.append("whole")

    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert done == ["whole"]


def normed() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    head = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    return head, torch.optim.SGD(head.parameters(), lr=0.1)


def train(state: Path, *, failing: int | None = None, interrupted: int | None = None) -> nn.Module:
    head, optimizer = normed()

    def loss_of(batch: Tensor, step: int) -> Tensor:
        loss: Tensor = head(batch).square().mean()
        if step == failing:
            raise ValueError("a bad batch")
        if step == interrupted:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    def batches(first: int) -> list[Tensor]:
        return [torch.full((4, 2), float(i)) + torch.arange(8).view(4, 2) for i in range(first, 6)]

    fit(head, loss_of, batches, optimizer, Schedule(6), state=state, save_every=2)
    return head


def test_running_statistics_see_every_batch_once(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole.safetensors").state_dict()
    for name, at in (("interrupted", 3), ("failing", 3)):
        file = tmp_path / f"{name}.safetensors"
        with pytest.raises(KeyboardInterrupt if name == "interrupted" else ValueError):
            train(file, **{name: at})
        assert load_state(file, *normed()) == (4 if name == "interrupted" else 3)
        again = train(file).state_dict()
        for key, value in whole.items():
            assert torch.equal(value, again[key]), (name, key)
