"""The artifact gauge over two gloo processes reads what one process reads of the same batches, sharded or not."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from quietvit.train.loop import run
from quietvit.train.metrics import read_metrics
from tiny_run import make_images, said, tiny_training

SETTINGS = ("model.drop_path=0.0", "health.images=0", "health.gauge_every=1", "train.steps=4", "checkpoint.every=4")
STRATEGIES = ("ddp", "fsdp")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def train(folder: Path, name: str, *overrides: str) -> str:
    """One run whose patch 3 is an artifact; what it printed."""
    training = tiny_training(folder / name, folder / "images", *SETTINGS, *overrides)
    with torch.no_grad():
        for model in (training.method.teacher, training.method.student):
            table: Any = model["backbone"].pos_embed  # type: ignore[index]
            part = table.to_local() if hasattr(table, "to_local") else table
            if part.shape[1] > 4:  # a sharded table [1 1+N D] lies whole on the first rank
                part[:, 4] = 40.0
    run(training)
    return said(training)


def work(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo")
    for strategy in STRATEGIES:
        text = train(Path(folder), strategy, f"parallel.strategy={strategy}", "health.gauge_every=1")
        (Path(folder) / f"said-{strategy}-{rank}").write_text(text)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gauge")
    make_images(folder / "images")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(str(folder), port), nprocs=2, join=True)
    train(folder, "alone")
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_readings_are_those_of_one_process(home: Path, strategy: str) -> None:
    alone, together = (
        [r for r in read_metrics(home / name / "metrics.jsonl") if "artifacts/share" in r]
        for name in ("alone", strategy)
    )
    assert [r["step"] for r in together] == [1, 2, 3, 4]
    for one, other in zip(alone, together, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            # A norm next to the edge of a bin may fall to its other side.
            assert other[key] == pytest.approx(value, rel=0.02), key
        assert other["artifacts/share"] == 1 / 16
    assert (home / "alone" / "artifacts.json").exists()
    assert (home / strategy / "artifacts.json").exists()
    assert "artifacts since step 1" in (home / f"said-{strategy}-0").read_text()
