"""A run that lost a process, or whose process is stuck, ends with the name of the rank and the place."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from quietvit.train import checkpoint, watch
from quietvit.train.loop import run
from quietvit.train.metrics import read_metrics
from quietvit.train.watch import LostRankError, Watch
from tiny_run import RECIPE, make_images, tiny_training

STEPS = 30
AGAIN = "The same command resumes from the newest checkpoint"


# ---- real processes, as torchrun starts them


def start(run_dir: Path, images: Path, *overrides: str) -> list[subprocess.Popen[str]]:
    """Rank 0, which holds the store, and rank 1."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    settings = [f"data.path={images}", f"train.steps={STEPS}", "health.images=0", "checkpoint.every=5", *overrides]
    command = [sys.executable, "-m", "quietvit_launch.cli", "train", str(RECIPE), *settings, "--out", str(run_dir)]
    started = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment = os.environ | place | {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
    return started


def curve(run_dir: Path) -> list[dict[str, Any]]:
    kept = ("step", "loss/", "grad_norm/")
    found = [r for r in read_metrics(run_dir / "metrics.jsonl") if "loss/total" in r]
    return [{k: v for k, v in r.items() if k.startswith(kept)} for r in found]


def wait_for_step(run_dir: Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 200  # a machine busy with other tests takes minutes
    while time.monotonic() < deadline and len(curve(run_dir)) < step:
        assert [p.poll() for p in processes] == [None, None], [p.communicate() for p in processes]
        time.sleep(0.02)


def end_of(process: subprocess.Popen[str]) -> tuple[str, float]:
    """What a process still says on stderr, and in how many seconds it ends."""
    began = time.monotonic()
    _, err = process.communicate(timeout=120)
    return err, time.monotonic() - began


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    both = start(run_dir, images)
    said = [p.communicate(timeout=250) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    return run_dir


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_other_and_both_go_on_exactly(
    uninterrupted: Path, images: Path, tmp_path: Path, victim: int
) -> None:
    both = start(tmp_path / "run", images)
    wait_for_step(tmp_path / "run", 8, both)
    both[victim].kill()
    err, seconds = end_of(both[1 - victim])
    both[victim].communicate()
    assert both[1 - victim].returncode not in (0, None)
    assert seconds < 60
    assert f"rank {1 - victim}: stopped at step " in err
    assert AGAIN in err
    assert "Traceback" not in err
    if victim == 1:  # rank 0 takes the store with it: then nobody can say more than that
        assert "lost rank 1 at step " in err
    found = checkpoint.find(tmp_path / "run")
    assert found is not None
    assert 5 <= found.step < STEPS
    again = start(tmp_path / "run", images)
    said = [p.communicate(timeout=250) for p in again]
    assert [p.returncode for p in again] == [0, 0], said
    assert f"from step {found.step} of {STEPS}" in said[0][0]
    assert curve(tmp_path / "run") == curve(uninterrupted)
    ends = [checkpoint.find(path) for path in (tmp_path / "run", uninterrupted)]
    one, other = (checkpoint.read_whole(end) for end in ends if end is not None)
    assert [k for k in one if not torch.equal(one[k], other[k])] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rank_that_stands_still_is_named(images: Path, tmp_path: Path) -> None:
    both = start(tmp_path / "run", images, "parallel.timeout=8", "train.steps=4000")
    wait_for_step(tmp_path / "run", 3, both)
    both[1].send_signal(signal.SIGSTOP)
    try:
        err, seconds = end_of(both[0])
    finally:
        both[1].kill()
        both[1].communicate()
    assert both[0].returncode == watch.EXIT_LOST
    assert 7 < seconds < 60
    assert "rank 0: no step was finished for 8 s: rank 1 was last heard of at step " in err
    assert AGAIN in err


# ---- what is said, in processes of a spawn


def scene(rank: int, world: int, folder: str, images: str) -> None:
    """Several endings one after the other in one group; each process writes down what it was told."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    watch.BEAT_S, watch.LOOK_S, watch.GRACE_S = 0.1, 0.2, 0.5
    told = {"stuck": stands_still(rank), "left": leaves_alone(rank), "raised": raises(rank, Path(folder), images)}
    for name, text in told.items():
        (Path(folder) / f"{name}{rank}.txt").write_text(text)


def stands_still(rank: int) -> str:
    """Rank 1 does not come out of its data; the others wait for it in the teacher's collective."""
    said: list[str] = []
    with Watch(1.0, end=said.append) as watching:
        watching.at("data", 3)
        if rank != 1:
            watching.at("teacher")
        deadline = time.monotonic() + 60
        while not said and time.monotonic() < deadline:
            time.sleep(0.05)
        dist.barrier()
    return said[0]


def leaves_alone(rank: int) -> str:
    """Rank 1 ends with an error, and the others are where nothing tells them but the watch."""
    said: list[str] = []
    try:
        with Watch(60.0, end=said.append) as watching:
            watching.at("student", 5)
            if rank == 1:
                raise ValueError("too dark\nto see")
            deadline = time.monotonic() + 60
            while not said and time.monotonic() < deadline:
                time.sleep(0.05)
    except ValueError as error:
        said.append(str(error))
    dist.barrier()
    return said[0]


def raises(rank: int, folder: Path, images: str) -> str:
    """An error in the data of rank 1, in a real run: the others' collectives break off."""
    watch.GRACE_S = 30.0  # the error of the collective is what is looked at here
    training = tiny_training(folder / "run", Path(images), "train.batch_size=6", "health.images=0")
    batches = training.batches

    def failing(start: int) -> Iterator[Any]:
        if rank != 1:
            return batches(start)
        return itertools.chain(itertools.islice(batches(start), 2), broken())

    def broken() -> Iterator[Any]:
        raise OSError(5, "Input/output error", "the disk of rank 1")
        yield

    training.batches = failing
    try:
        run(training)
    except OSError as error:
        dist.destroy_process_group()  # as the end of its process does
        return str(error)
    except LostRankError as error:
        return str(error) if error.__suppress_context__ else "with the traceback of the collective"
    return "nothing"


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, images: Path) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("scene")
    mp.spawn(scene, (3, str(folder), str(images)), 3)  # type: ignore[no-untyped-call]
    return {path.stem: path.read_text() for path in folder.glob("*.txt")}


def test_who_is_behind(told: dict[str, str]) -> None:
    for rank in range(3):
        assert told[f"stuck{rank}"] == (
            f"rank {rank}: no step was finished for 1 s: rank 1 is at step 3 (data); the others wait for it at "
            f"step 3 (teacher). {AGAIN}"
        )


def test_a_last_word_reaches_those_who_wait(told: dict[str, str]) -> None:
    assert told["left1"] == "too dark\nto see"
    for rank in (0, 2):
        assert told[f"left{rank}"] == (
            f"rank {rank}: stopped at step 5 (student): lost rank 1 at step 5 (student), which said: "
            f"ValueError: too dark. {AGAIN}"
        )


def test_an_error_on_one_rank_is_told_by_the_others(told: dict[str, str]) -> None:
    assert told["raised1"] == "[Errno 5] Input/output error: 'the disk of rank 1'"
    for rank in (0, 2):
        text = told[f"raised{rank}"]
        assert text.startswith(f"rank {rank}: stopped at step 3 (")
        assert "lost rank 1 at step 3 (data), which said: OSError: [Errno 5] Input/output error" in text


# ---- alone


def test_alone_it_only_notes(capsys: pytest.CaptureFixture[str]) -> None:
    with Watch(1e-9) as watching:
        for place in watch.PLACES:
            watching.at(place, 1)
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match="Connection closed"), Watch(1.0):
        raise RuntimeError("Connection closed by peer")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "broken"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:9"), True),
        (RuntimeError("Connection reset by peer"), True),
        (dist.DistBackendError("ncclRemoteError"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_which_errors_mean_a_lost_connection(error: Exception, broken: bool) -> None:
    assert watch._is_broken_connection(error) is broken
    outer = checkpoint.CheckpointError("could not write")
    outer.__cause__ = error
    assert watch._is_broken_connection(outer) is broken
