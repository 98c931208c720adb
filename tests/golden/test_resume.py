"""kill -9 at some step, the same command again: losses and final weights are bit-equal to an uninterrupted run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from quietvit.train.checkpoint import find, read_whole
from quietvit.train.metrics import read_metrics

STEPS = 24
# Everything that could lose its place is on: drop path, centers, accumulation, colour, masks, several passes.
SETTINGS = [
    "data.options.num_images=40",
    "data.options.image_size=32",
    "model.embed_dim=32",
    "model.depth=2",
    "model.num_heads=2",
    "model.drop_path=0.3",
    "model.image_size=32",
    "crops.global_size=24",
    "crops.local_size=16",
    "crops.num_local=2",
    "crops.blur_kernel=3",
    "objective.centering=softmax",
    "objective.ibot_weight=1.0",
    "objective.head.num_prototypes=32",
    "objective.head.hidden_dim=32",
    f"train.steps={STEPS}",
    "train.batch_size=8",
    "train.accumulate=2",
    "train.threads=1",
    "health.every=10",
    "health.images=8",
    "health.bank=16",
    "health.size=32",
    "checkpoint.every=5",
]


BACKBONES = {"vit": [], "t2t_vit": ["model.backbone=t2t_vit", "model.stem.token_dim=16", "model.stem.recompute=true"]}


def command(run: Path, workers: int, backbone: str = "vit") -> list[str]:
    return [sys.executable, "-m", "quietvit_launch.cli", "train", "quickstart", *SETTINGS, *BACKBONES[backbone],
            f"data.workers={workers}", "--out", str(run)]  # fmt: skip


def losses(run: Path) -> list[tuple[object, ...]]:
    records = [r for r in read_metrics(run / "metrics.jsonl") if "loss/total" in r]
    return [(r["step"], *(r[k] for k in sorted(r) if k.startswith(("loss/", "grad_norm/")))) for r in records]


def whole(run: Path, backbone: str = "vit") -> Path:
    subprocess.run(command(run, 0, backbone), check=True, capture_output=True, timeout=500)
    assert len(losses(run)) == STEPS
    return run


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole(tmp_path_factory.mktemp("uninterrupted"))


def kill_after(run: Path, workers: int, step: int, backbone: str = "vit") -> None:
    process = subprocess.Popen(
        command(run, workers, backbone), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 400  # a machine busy with other tests takes minutes
    while time.monotonic() < deadline and process.poll() is None:
        if len(losses(run)) >= step:
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("workers", "step"), [(0, 13), (1, 8), (3, 17)])
def test_killed_and_resumed_equals_uninterrupted(uninterrupted: Path, tmp_path: Path, workers: int, step: int) -> None:
    check_resumed(tmp_path, uninterrupted, workers, step)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_tokens_to_token_stem_resumes_as_exactly(tmp_path: Path) -> None:
    check_resumed(tmp_path / "cut", whole(tmp_path / "whole", "t2t_vit"), 1, 13, "t2t_vit")


def check_resumed(run: Path, uninterrupted: Path, workers: int, step: int, backbone: str = "vit") -> None:
    kill_after(run, workers, step, backbone)
    found = find(run)
    assert found is not None
    assert found.step < STEPS, "the run ended before it was killed"
    again = subprocess.run(command(run, workers, backbone), capture_output=True, text=True, timeout=500)
    assert again.returncode == 0, again.stderr
    assert f"resuming {run} from step {found.step} of {STEPS}" in again.stdout.replace("\n", "")
    assert losses(run) == losses(uninterrupted)
    a, b = find(run), find(uninterrupted)
    assert a is not None
    assert b is not None
    one, other = read_whole(a), read_whole(b)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_save_and_leave_cleanly(uninterrupted: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(command(tmp_path, 1), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(losses(tmp_path)) < 7:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    found = find(tmp_path)
    assert found is not None
    assert f"{number.name}: saved at step {found.step} of {STEPS}; the same command resumes" in out
    subprocess.run(command(tmp_path, 0), check=True, capture_output=True, timeout=500)
    assert losses(tmp_path) == losses(uninterrupted)


def test_a_finished_run_says_so(uninterrupted: Path) -> None:
    again = subprocess.run(command(uninterrupted, 0), capture_output=True, text=True, timeout=500)
    assert again.returncode == 0
    assert f"already finished: {STEPS} of {STEPS}" in again.stdout


def test_other_settings_in_the_same_folder_are_refused(uninterrupted: Path) -> None:
    changed = [*command(uninterrupted, 0), "optim.lr=0.1"]
    again = subprocess.run(changed, capture_output=True, text=True, timeout=60)
    assert again.returncode == 2
    assert "holds a run with other settings" in again.stderr
    assert "optim.lr: 0.001 -> 0.1" in again.stderr
