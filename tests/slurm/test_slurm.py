"""Runs on a real Slurm, started by the commands that users type."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quietvit.train import checkpoint
from quietvit.train.loop import run
from quietvit.train.metrics import read_metrics
from quietvit_launch import cli, jobs
from quietvit_launch.job import Job
from quietvit_launch.local import spawn
from quietvit_launch.snapshot import snapshot_path
from tiny_run import RECIPE, make_images, tiny_training

SLOW = Path(__file__).parent / "slow"
COMMON = ("health.images=0", "model.drop_path=0.0", "objective.koleo_across_ranks=true")
NODE = ("slurm.gpus_per_node=0", "slurm.cpus_per_task=1", "slurm.time_min=15")
TIMED_STEPS = 27  # of two seconds: longer than the warning takes, which comes 20 to 50 s after the start
pytestmark = pytest.mark.usefixtures("cluster")


def wait(what: str, condition: Callable[[], object], seconds: float = 150) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s\n{squeue()}"
        time.sleep(0.3)


def squeue() -> str:
    return subprocess.run(["squeue"], capture_output=True, text=True, check=True).stdout


def state(out: Path) -> str:
    return jobs.look(out, jobs.ask([out])).state


def job_of(out: Path) -> str:
    return str(json.loads((out / jobs.RECORD).read_text())["job"])


def log(out: Path) -> str:
    return "\n".join(f"{p.name}\n{p.read_text()}" for p in sorted((out / "slurm").glob("*_log.*")))


def train(out: Path, images: Path, *words: str) -> None:
    assert (
        cli.main(
            ["train", str(RECIPE), f"data.path={images}", *COMMON, *NODE, *words, "--out", str(out), "--on", "slurm"]
        )
        == 0
    )


def train_slowly(out: Path, images: Path, seconds: float, *words: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUIETVIT_TEST_STEP_S", str(seconds))
        patch.setenv("PYTHONPATH", str(SLOW), prepend=":")
        train(out, images, *words)


def numbers(out: Path) -> list[dict[str, Any]]:
    records = [r for r in read_metrics(out / "metrics.jsonl") if "loss/total" in r]
    return [{k: v for k, v in r.items() if k == "step" or k.startswith(("loss/", "grad_norm/"))} for r in records]


def weights(out: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.find(out)
    assert found is not None
    return checkpoint.read_whole(found)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module", autouse=True)
def timed(tmp_path_factory: pytest.TempPathFactory, images: Path, cluster: None) -> Path:
    """A run that needs more time than its job has. It goes on beside the other tests; the last one waits for it."""
    out = tmp_path_factory.mktemp("timed") / "run"
    limits = ("slurm.time_min=1", "slurm.signal_delay_s=10", f"train.steps={TIMED_STEPS}", "checkpoint.every=1000")
    train_slowly(out, images, 2.0, "slurm.nodes=2", *limits)
    return out


def test_two_nodes_equal_one_process(tmp_path: Path, images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "two"
    train(out, images, "slurm.nodes=2", "train.steps=6")
    assert capfd.readouterr().out == f"job {job_of(out)}: {out}\n"
    assert (
        cli.main(["train", str(RECIPE), "--out", str(out), f"data.path={images}", *COMMON, "--on", "slurm", *NODE]) == 2
    )
    assert "is in the queue as job" in capfd.readouterr().err
    run(tiny_training(tmp_path / "one", images, *COMMON, "train.steps=6"))
    wait("the run on two nodes", lambda: state(out) not in ("queued", "running"))
    assert state(out) == "finished", log(out)
    for a, b in zip(numbers(out), numbers(tmp_path / "one"), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    one = weights(tmp_path / "one")
    for name, value in weights(out).items():
        if not name.endswith("qkv.bias"):  # a bias of all keys changes no attention: its gradient is rounding
            torch.testing.assert_close(value, one[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    code = next(out.glob("code-*"))
    assert code == snapshot_path(out)
    assert (code / "quietvit" / "configs" / "launch" / "slurm.yaml").is_file()


def test_what_sbatch_refuses_leaves_nothing(tmp_path: Path, images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert (
        cli.main(
            [
                "train",
                str(RECIPE),
                f"data.path={images}",
                *NODE,
                "slurm.partition=nowhere",
                "--out",
                str(out),
                "--on",
                "slurm",
            ]
        )
        == 2
    )
    assert "sbatch refused" in (told := capfd.readouterr().err)
    assert "invalid partition" in told
    assert not out.exists()


def test_a_job_that_fails_by_itself_is_not_started_again(tmp_path: Path, images: Path) -> None:
    out = tmp_path / "run"
    train(out, images, "data.path=/nowhere", "slurm.check_data=false", "slurm.nodes=2")
    wait("the end", lambda: state(out) not in ("queued", "running"))
    row = jobs.look(out, jobs.ask([out]))
    assert (row.state, row.step) == ("failed", 0), log(out)
    assert re.match(r"rank [01]: ", row.message)  # whichever came to it first
    assert "/nowhere does not exist" in row.message
    assert len((out / "slurm" / "starts.jsonl").read_text().splitlines()) == 1


def test_a_sweep_is_an_array_and_evaluations_follow(tmp_path: Path, images: Path) -> None:
    words = [f"data.path={images}", *COMMON, *NODE, "train.steps=3", "model.num_registers=0,2"]
    judge = ["--eval", "knn", "--data", "scenes", "--eval-args", "--limit-train 40 --limit-test 20 --size 32"]
    assert cli.main(["sweep", str(RECIPE), *words, "--out", str(tmp_path), "--on", "slurm", *judge]) == 0
    runs = [tmp_path / f"num_registers={n}" for n in (0, 2)]
    array = {job_of(out) for out in runs}
    assert array == {f"{job_of(runs[0]).partition('_')[0]}_{n}" for n in (0, 1)}
    wait("the evaluations", lambda: all(list(out.glob("eval/knn*.json")) for out in runs))
    for out, registers in zip(runs, (0, 2), strict=True):
        assert state(out) == "finished", log(tmp_path)
        assert f"num_registers: {registers}" in (out / "config.yaml").read_text()
        assert len(numbers(out)) == 3
    assert len(list(tmp_path.glob("code-*"))) == 1


def test_a_job_goes_on_after_a_failure_and_is_cancelled(
    tmp_path: Path, images: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    train_slowly(out, images, 0.5, "train.steps=500", "checkpoint.every=2", "--eval", "knn", "--data", "scenes")
    wait("a checkpoint", lambda: (out / "checkpoints").is_dir() and any(out.glob("checkpoints/step_*")))
    # As after the failure of a node: the processes are killed, nobody asked them to save.
    subprocess.run(["scontrol", "requeue", job_of(out)], check=True)
    wait("the second start", lambda: "resuming" in log(out))
    starts = [json.loads(line) for line in (out / "slurm" / "starts.jsonl").read_text().splitlines()]
    assert [s["step"] > 0 for s in starts] == [False, True]
    wait("training", lambda: state(out) == "running" and len(numbers(out)) > starts[1]["step"] + 1)
    capfd.readouterr()
    assert cli.main(["cancel", str(out)]) == 0
    assert "cancelled job" in capfd.readouterr().out
    wait("the end", lambda: job_of(out) not in squeue())
    record = json.loads((out / jobs.RECORD).read_text())
    assert record["evaluation"] not in squeue()
    row = jobs.look(out, jobs.ask([out]))
    assert (row.state, row.message) == ("stopped", f"saved at step {row.step} of 500"), log(out)
    assert numbers(out)[-1]["step"] == row.step
    assert cli.main(["cancel", str(out)]) == 2
    assert "is not queued or running: it is stopped" in capfd.readouterr().err


def test_the_end_of_the_time_is_not_the_end_of_the_run(tmp_path: Path, images: Path, timed: Path) -> None:
    settings = (f"data.path={images}", *COMMON, f"train.steps={TIMED_STEPS}", "checkpoint.every=1000")
    assert spawn(Job(str(RECIPE), settings, str(tmp_path / "whole")), 2) == 0
    wait("the run with little time", lambda: state(timed) not in ("queued", "running"), 200)
    assert state(timed) == "finished", log(timed)
    starts = [json.loads(line)["step"] for line in (timed / "slurm" / "starts.jsonl").read_text().splitlines()]
    assert len(starts) >= 2
    assert starts == sorted(set(starts))
    assert f"SIGUSR2: saved at step {starts[1]} of {TIMED_STEPS}" in log(timed)
    assert numbers(timed) == numbers(tmp_path / "whole")
    whole = weights(tmp_path / "whole")
    for name, value in weights(timed).items():
        assert torch.equal(value, whole[name]), name


def test_a_job_in_the_way_of_another_goes_on_after_it(tmp_path: Path, images: Path) -> None:
    # Last: it pushes all others off the cluster.
    out = tmp_path / "run"
    train_slowly(out, images, 1.0, "slurm.nodes=2", "train.steps=10", "checkpoint.every=1000")
    wait("training", lambda: len(numbers(out)) > 1)
    other = ["sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    subprocess.run(other, check=True, capture_output=True)
    wait("the end", lambda: state(out) not in ("queued", "running"))
    assert state(out) == "finished", log(out)
    starts = [json.loads(line)["step"] for line in (out / "slurm" / "starts.jsonl").read_text().splitlines()]
    assert len(starts) == 2
    assert starts[1] > 1
    assert [r["step"] for r in numbers(out)] == list(range(1, 11))
