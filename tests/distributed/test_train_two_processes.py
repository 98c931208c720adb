"""Whole runs over gloo processes equal those of one process with the same batch, and go on at another world size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from quietvit.train import checkpoint
from quietvit.train.loop import run
from quietvit.train.metrics import read_metrics
from tiny_run import make_images, tiny_training

STEPS = 6
COMMON = ("model.drop_path=0.0", "health.images=0", f"train.steps={STEPS}", "checkpoint.every=3")
CENTERING = ("sinkhorn_knopp", "softmax")
KOLEO = ("false", "true")  # objective.koleo_across_ranks
SHARDED = ("parallel.checkpointing=full", "objective.separate_heads=true")


def settings(centering: str, koleo: str) -> tuple[str, ...]:
    return (f"objective.centering={centering}", f"objective.koleo_across_ranks={koleo}")


def name_of(*parts: str) -> str:
    return "-".join(parts)


def several(rank: int, world: int, folder: str, jobs: list[tuple[str, tuple[str, ...]]]) -> None:
    """Each process runs all jobs (folder of the run, overrides), one after the other."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    for name, overrides in jobs:
        run(tiny_training(Path(folder) / name, Path(folder) / "images", *COMMON, *overrides))
    dist.destroy_process_group()


def start(world: int, folder: Path, jobs: list[tuple[str, tuple[str, ...]]]) -> None:
    (folder / f"meet{world}").unlink(missing_ok=True)
    mp.spawn(several, (world, str(folder), jobs), world)  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Every combination over two processes."""
    path = tmp_path_factory.mktemp("runs")
    make_images(path / "images")
    jobs = [
        (name_of(strategy, c, k), (*settings(c, k), f"parallel.strategy={strategy}"))
        for strategy, c, k in itertools.product(("ddp", "fsdp"), CENTERING, KOLEO)
    ]
    jobs.append(("fsdp-full", (*SHARDED, "parallel.strategy=fsdp")))
    jobs.append(("ddp-accumulated", ("parallel.strategy=ddp", "train.accumulate=2", "checkpoint.background=true")))
    start(2, path, jobs)
    return path


def losses(run_dir: Path) -> list[dict[str, Any]]:
    keys = ("loss/", "grad_norm/")
    records = [r for r in read_metrics(run_dir / "metrics.jsonl") if "loss/total" in r]
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    return [{k: v for k, v in r.items() if k.startswith(keys)} for r in records]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.find(run_dir)
    assert found is not None
    assert found.step == STEPS
    return checkpoint.read_whole(found)


def assert_same_run(one: Path, other: Path) -> None:
    for a, b in zip(losses(one), losses(other), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        if name.endswith("qkv.bias"):  # a bias of all keys changes no attention: its gradient is rounding, AdamW scales it up
            value, second[name] = (t.unflatten(0, (3, -1))[[0, 2]] for t in (value, second[name]))
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def alone(folder: Path, name: str, *overrides: str) -> Path:
    run(tiny_training(folder / name, folder / "images", *COMMON, *overrides))
    return folder / name


@pytest.mark.parametrize("koleo", KOLEO)
@pytest.mark.parametrize("centering", CENTERING)
def test_two_processes_equal_one(folder: Path, centering: str, koleo: str) -> None:
    # Neighbours on each rank alone are those of micro-batches of one process.
    parts = 1 if koleo == "true" else 2
    one = alone(folder, name_of("one", centering, koleo), *settings(centering, koleo), f"train.accumulate={parts}")
    for strategy in ("ddp", "fsdp"):
        assert_same_run(one, folder / name_of(strategy, centering, koleo))


def test_sharded_with_recomputation_and_two_heads(folder: Path) -> None:
    one = alone(folder, "one-full", "objective.separate_heads=true", "train.accumulate=2")
    assert_same_run(one, folder / "fsdp-full")


def test_accumulation_on_each_process(folder: Path) -> None:
    one = alone(folder, "one-accumulated", "train.accumulate=4")
    assert_same_run(one, folder / "ddp-accumulated")
