"""The loop: trouble ends it with a verdict, a signal with everything saved, and a resumed run is the same run."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quietvit.contracts import Batch
from quietvit.train import checkpoint
from quietvit.train.loop import Training, TrainingStoppedError, run
from quietvit.train.metrics import read_metrics
from tiny_run import make_images, said, tiny_training


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "images")


def break_when(training: Training, bad: Callable[[int], bool]) -> None:
    """Spoil the koleo term of the steps (counted from 0) for which `bad` holds."""
    study, calls = training.method.study, itertools.count()

    def spoilt(batch: Batch, targets: Any) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = study(batch, targets)  # type: ignore[operator]
        return losses | {"koleo": losses["koleo"] * float("nan")} if bad(next(calls)) else losses

    training.method.study = spoilt  # type: ignore[assignment]


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    return [r for r in read_metrics(run_dir / "metrics.jsonl") if "loss/total" in r]


def looks_of(run_dir: Path) -> list[Any]:
    return [r["step"] for r in read_metrics(run_dir / "metrics.jsonl") if "health/rank" in r]


def test_ten_bad_steps_in_a_row_end_with_a_verdict(images: Path, tmp_path: Path) -> None:
    training = tiny_training(tmp_path, images)
    break_when(training, lambda step: step >= 2)
    with pytest.raises(
        TrainingStoppedError, match=r"stopped at step 12: 10 steps in a row .*\(loss koleo\).*optim\.lr"
    ):
        run(training)
    assert said(training).count("skipped, nothing changed: not finite: loss koleo") == 10
    records = steps_of(tmp_path)
    assert [r.get("skipped") for r in records] == [None, None, *range(1, 11)]
    assert records[-1]["loss/koleo"] is None  # JSON has no NaN
    assert records[-1]["loss/ibot"] is not None
    found = checkpoint.find(tmp_path)
    assert found is not None
    assert found.step == 10
    assert all(v.isfinite().all() for v in checkpoint.read_whole(found).values())


def test_a_good_step_resets_the_count(images: Path, tmp_path: Path) -> None:
    training = tiny_training(tmp_path, images, "train.max_bad_steps=3")
    break_when(training, lambda step: step % 3 != 0)  # two bad, one good
    finished = run(training)
    assert (finished.step, finished.signum) == (20, None)
    assert steps_of(tmp_path)[-1]["skipped"] == 13
    # A skipped step's targets are not part of the figures.
    health = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "health/teacher/entropy" in r]
    assert [r["step"] for r in health] == [10, 20]


def test_targets_of_skipped_steps_stay_out_of_the_figures(images: Path, tmp_path: Path) -> None:
    training = tiny_training(tmp_path, images, "train.steps=10")
    teach = training.method.teach
    calls = itertools.count()

    def spoilt(batches: Any, *, temp: float) -> Any:
        targets = teach(batches, temp=temp)  # type: ignore[operator]
        if next(calls) == 4:
            targets[0].cls.fill_(float("nan"))
        return targets

    training.method.teach = spoilt  # type: ignore[assignment]
    run(training)
    assert "step 5 skipped" in said(training)
    [last] = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["step"] == 10 and "health/rank" in r]
    assert isinstance(last["health/teacher/entropy"], float)


def test_a_signal_saves_and_the_same_run_goes_on(images: Path, tmp_path: Path) -> None:
    run(tiny_training(tmp_path / "whole", images))
    first = tiny_training(tmp_path / "cut", images)
    batches = first.batches

    def interrupting(start: int) -> Iterator[Batch]:
        for step, batch in enumerate(batches(start), start):
            if step == 13:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    first.batches = interrupting
    finished = run(first)
    assert (finished.step, finished.signum) == (14, signal.SIGTERM)
    assert "SIGTERM: saved at step 14 of 20; the same command resumes" in said(first)
    second = tiny_training(tmp_path / "cut", images)
    assert run(second).signum is None
    assert f"resuming {tmp_path / 'cut'} from step 14 of 20" in said(second)
    a, b = checkpoint.find(tmp_path / "cut"), checkpoint.find(tmp_path / "whole")
    assert a is not None
    assert b is not None
    one, other = checkpoint.read_whole(a), checkpoint.read_whole(b)
    assert one.keys() == other.keys()
    assert [k for k in one if not torch.equal(one[k], other[k])] == []
    timed = ("images_per_s", "data_wait")
    same = [[{k: v for k, v in r.items() if k not in timed} for r in steps_of(tmp_path / d)] for d in ("cut", "whole")]
    assert same[0] == same[1]
    assert looks_of(tmp_path / "cut") == looks_of(tmp_path / "whole") == [0, 10, 20]
    third = tiny_training(tmp_path / "cut", images)
    assert run(third).seconds == 0.0
    assert "already finished: 20 of 20" in said(third)


def test_a_signal_before_the_first_step_saves_too(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tiny_training(tmp_path, images, "train.steps=2")
    assert first.probe is not None
    look = type(first.probe).look

    def interrupted(probe: Any, backbone: Any) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        return look(probe, backbone)

    monkeypatch.setattr(type(first.probe), "look", interrupted)
    assert run(first).step == 0
    monkeypatch.undo()
    found = checkpoint.find(tmp_path)
    assert found is not None
    assert found.step == 0
    assert run(tiny_training(tmp_path, images, "train.steps=2")).step == 2
    assert looks_of(tmp_path) == [0, 2]  # each look stands there once


def test_a_resumed_run_keeps_its_automatic_batch(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = ("train.batch_size=auto", "train.accumulate=2", "train.steps=2")
    first = tiny_training(tmp_path, images, *auto)
    assert first.batch_size == 16  # 20 images: a power of two per micro-batch, times two
    run(first)
    # Next time hardly any memory is free: another batch would be another run.
    monkeypatch.setattr("quietvit.build.free_memory", lambda device: 3_000_000)
    assert tiny_training(tmp_path / "other", images, *auto).batch_size < 16
    assert tiny_training(tmp_path, images, *auto).batch_size == 16
