"""Whole runs over gloo processes equal those of one process with the same batch, and go on at another world size.

Sums over processes are taken in another order than those of one, which leaves a last bit of difference in a gradient;
AdamW divides each gradient by its own size, so that where it is nearly nothing the bit becomes a part of a step. Hence
1e-6 of losses and weights as in `TOLERANCE`, and gradient norms, which are not averaged over a batch, to 1e-4 of them.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from quietvit.contracts import Batch
from quietvit.dist import gather_objects, whole
from quietvit.train import checkpoint
from quietvit.train.loop import Training, run
from quietvit.train.metrics import read_metrics
from tiny_run import make_images, said, tiny_training

STEPS = 4
CUT = 2  # the step after which one rank is asked to stop
COMMON = ("model.drop_path=0.0", "health.images=0", f"train.steps={STEPS}", f"checkpoint.every={STEPS}")
WIDE = ("train.batch_size=12", "objective.koleo_across_ranks=true", "health.images=7")  # for 1, 2 and 3 processes
CENTERING = ("sinkhorn_knopp", "softmax")
KOLEO = ("false", "true")  # objective.koleo_across_ranks
STRATEGIES = ("ddp", "fsdp")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Case:
    """One run of all processes."""

    name: str
    overrides: tuple[str, ...]
    images: str = "images"
    event: str = ""  # what befalls the last rank: "", "nan" or "signal"


def objective(centering: str, koleo: str) -> tuple[str, ...]:
    return (f"objective.centering={centering}", f"objective.koleo_across_ranks={koleo}")


def matrix() -> Iterator[Case]:
    """All that is run over two processes."""
    for strategy, centering, koleo in itertools.product(STRATEGIES, CENTERING, KOLEO):
        yield Case(f"{strategy}-{centering}-{koleo}", (*objective(centering, koleo), f"parallel.strategy={strategy}"))
    full = ("parallel.checkpointing=full", "objective.separate_heads=true", "parallel.strategy=fsdp")
    yield Case("fsdp-full", full)
    yield Case("ddp-selective", ("parallel.checkpointing=selective", "parallel.strategy=ddp"))
    yield Case("ddp-accumulated", ("parallel.strategy=ddp", "train.accumulate=2", "checkpoint.background=true"))
    yield Case("fsdp-accumulated", ("parallel.strategy=fsdp", "train.accumulate=2", "checkpoint.background=true"))
    for strategy in STRATEGIES:
        wide = (*WIDE, f"parallel.strategy={strategy}")
        yield Case(f"{strategy}-cut", (*wide, "objective.centering=softmax"), event="signal")
        yield Case(f"{strategy}-nan", (*wide, "objective.centering=softmax"), event="nan")
    yield Case("ddp-unreadable", (*WIDE, "parallel.strategy=ddp"), images="spoilt")


def befall(training: Training, event: str) -> None:
    """Let something happen to this process alone in step CUT."""
    if event == "nan":
        study, calls = training.method.study, itertools.count(1)

        def spoilt(batch: Batch, targets: Any) -> dict[str, Tensor]:
            losses: dict[str, Tensor] = study(batch, targets)  # type: ignore[operator]
            return losses | {"ibot": losses["ibot"] * float("nan")} if next(calls) == CUT else losses

        training.method.study = spoilt  # type: ignore[assignment]
    elif event == "signal":
        batches = training.batches

        def interrupting(start: int) -> Iterator[Batch]:
            for step, batch in enumerate(batches(start), start + 1):
                if step == CUT:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        training.batches = interrupting


def several(rank: int, world: int, folder: str, cases: list[Case]) -> None:
    """Each process runs all cases, one after the other."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    for case in cases:
        training = tiny_training(Path(folder) / case.name, Path(folder) / case.images, *COMMON, *case.overrides)
        befall(training, case.event if rank == world - 1 else "")
        finished = run(training)
        ends = gather_objects((finished.step, finished.signum))
        assert ends == [(CUT, signal.SIGTERM) if case.event == "signal" else (STEPS, None)] * world, case
        sums = gather_objects([float(whole(v.detach()).double().sum()) for v in training.method.state_dict().values()])
        assert all(values == sums[0] for values in sums), case
        if rank == 0 and case.event == "nan":
            assert f"step {CUT} skipped, nothing changed: not finite: loss ibot" in said(training)
    dist.destroy_process_group()


def start(world: int, folder: Path, cases: list[Case]) -> None:
    (folder / f"meet{world}").unlink(missing_ok=True)
    mp.spawn(several, (world, str(folder), cases), world)  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    make_images(path / "images")
    bad = make_images(path / "spoilt") / "007.png"
    bad.write_bytes(bad.read_bytes()[:60])
    start(2, path, list(matrix()))
    return path


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Path:
    """One process, without a stop."""
    return alone(folder, Case("whole", (*WIDE, "objective.centering=softmax")))


def alone(folder: Path, case: Case) -> Path:
    training = tiny_training(folder / case.name, folder / case.images, *COMMON, *case.overrides)
    befall(training, case.event)
    run(training)
    return folder / case.name


def records(run_dir: Path, *keys: str) -> list[dict[str, Any]]:
    found = [r for r in read_metrics(run_dir / "metrics.jsonl") if any(k.startswith(keys) for k in r)]
    return [{k: v for k, v in r.items() if k.startswith(("step", *keys))} for r in found]


def weights(run_dir: Path) -> dict[str, Tensor]:
    found = checkpoint.find(run_dir)
    assert found is not None
    assert found.step == STEPS
    return checkpoint.read_whole(found)


def assert_same_run(one: Path, other: Path) -> None:
    ours, theirs = records(one, "loss/"), records(other, "loss/")
    assert [r["step"] for r in ours] == list(range(1, STEPS + 1))
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    for a, b in zip(records(one, "grad_norm/"), records(other, "grad_norm/"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        if "qkv.bias" in name:  # what is added to all keys alike changes no attention: its gradient is rounding alone
            value, second[name] = (t.unflatten(0, (3, -1))[[0, 2]] if t.ndim else t for t in (value, second[name]))
        torch.testing.assert_close(second[name], value, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("koleo", KOLEO)
@pytest.mark.parametrize("centering", CENTERING)
def test_two_processes_equal_one(folder: Path, centering: str, koleo: str) -> None:
    # Neighbours on each rank alone are those of micro-batches of one process.
    parts = 1 if koleo == "true" else 2
    settings = (*objective(centering, koleo), f"train.accumulate={parts}")
    one = alone(folder, Case(f"one-{centering}-{koleo}", settings))
    for strategy in STRATEGIES:
        assert_same_run(one, folder / f"{strategy}-{centering}-{koleo}")


def test_sharded_with_recomputation_and_two_heads(folder: Path) -> None:
    one = alone(folder, Case("one-full", ("objective.separate_heads=true", "train.accumulate=2")))
    assert_same_run(one, folder / "fsdp-full")


def test_selective_recomputation(folder: Path) -> None:
    assert_same_run(folder / "ddp-sinkhorn_knopp-false", folder / "ddp-selective")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_accumulation_on_each_process_and_saving_in_the_background(folder: Path, strategy: str) -> None:
    if not (folder / "one-accumulated").exists():
        alone(folder, Case("one-accumulated", ("train.accumulate=4",)))
    assert_same_run(folder / "one-accumulated", folder / f"{strategy}-accumulated")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_all(folder: Path, strategy: str) -> None:
    if not (folder / "one-nan").exists():
        alone(folder, Case("one-nan", (*WIDE, "objective.centering=softmax"), event="nan"))
    a, b = (records(folder / name, "skipped") for name in ("one-nan", f"{strategy}-nan"))
    assert a == b == [{"step": CUT, "skipped": 1.0}]
    kept, now = weights(folder / "one-nan"), weights(folder / f"{strategy}-nan")
    assert int(now["optimizer.student.backbone.cls_token.step"]) == STEPS - 1
    for name in ("method.cls_center.center", "method.teacher.backbone.cls_token"):
        torch.testing.assert_close(now[name], kept[name], **TOLERANCE)


def test_an_unreadable_image_on_one_rank(folder: Path) -> None:
    one = alone(folder, Case("one-unreadable", WIDE, images="spoilt"))
    assert_same_run(one, folder / "ddp-unreadable")
    lists = [folder / "ddp-unreadable" / name for name in ("unreadable.txt", "unreadable.rank1.txt")]
    met = [path.read_text() for path in lists if path.exists()]
    assert met
    assert all("007.png" in text for text in met)


def test_the_health_look_is_that_of_one_process(folder: Path, uninterrupted: Path) -> None:
    """Seven images do not divide by two: the last rank sees one of them twice, which must not count."""
    [first, *_] = records(uninterrupted, "health/")
    assert first["health/rank"] > 1
    for strategy in STRATEGIES:
        [now, *_] = records(folder / f"{strategy}-cut", "health/")
        assert now == pytest.approx(first, rel=1e-4)


def test_saved_by_two_goes_on_as_one_and_as_three(folder: Path, uninterrupted: Path) -> None:
    """A signal came to one rank alone: both left together, and what they saved fits any number and strategy."""
    cases = [
        Case(f"{saved}-then-{strategy}", (*WIDE, "objective.centering=softmax", f"parallel.strategy={strategy}"))
        for saved, strategy in (("fsdp", "ddp"), ("ddp", "fsdp"))
    ]
    for case in cases:
        saved = case.name.partition("-")[0]
        shutil.copytree(folder / f"{saved}-cut", folder / case.name)
        shutil.copytree(folder / f"{saved}-cut", folder / f"{saved}-then-one")
        alone(folder, replace(case, name=f"{saved}-then-one", overrides=(*case.overrides[:-1],)))
        assert_same_run(uninterrupted, folder / f"{saved}-then-one")
    start(3, folder, cases)
    for case in cases:
        assert_same_run(uninterrupted, folder / case.name)
