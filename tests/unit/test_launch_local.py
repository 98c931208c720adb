"""Several processes on this machine, started by our launcher and by torchrun: signals, kills, errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from quietvit.config.load import ConfigError
from quietvit.train.metrics import read_metrics
from quietvit.train.signals import StopRequest
from quietvit_launch import worker
from quietvit_launch.job import Job, on_first_rank
from quietvit_launch.jobs import look
from quietvit_launch.local import run_locally
from tiny_run import RECIPE, make_images

SLOW = Path(__file__).parents[1] / "slurm" / "slow"
CLI = (sys.executable, "-m", "quietvit_launch.cli")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", CLI[-1])
STEPS = 12
several_processes = pytest.mark.slow


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "images")


def start(out: Path, images: Path, *words: str, by: Sequence[str] = CLI, step_s: float = 0) -> subprocess.Popen[str]:
    settings = (f"data.path={images}", "health.images=0", f"train.steps={STEPS}", "checkpoint.every=2")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "QUIETVIT_TEST_STEP_S": str(step_s)}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(SLOW), env.get("PYTHONPATH"))))
    command = [*by, "train", str(RECIPE), *settings, *words, "--out", str(out)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(out: Path, step: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while len([r for r in read_metrics(out / "metrics.jsonl") if "loss/total" in r]) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)


def ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The launcher's workers: started in the order of their ranks."""
    children = psutil.Process(process.pid).children()
    return sorted((c for c in children if "spawn_main" in " ".join(c.cmdline())), key=lambda c: c.create_time())


@several_processes
def test_killed_then_stopped_then_finished(tmp_path: Path, images: Path) -> None:
    out = tmp_path / "run"
    process = start(out, images, "--processes", "2", step_s=1)
    wait_for_step(out, 3, process)
    assert len(ranks(process)) == 2
    ranks(process)[1].kill()
    began = time.monotonic()
    _, told = process.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert process.returncode == 128 + signal.SIGKILL
    assert told.splitlines()[-1] == (
        "quietvit: rank 1 was ended by SIGKILL (by the system, if memory ran out); the other ranks were ended too. "
        "The same command resumes from the newest checkpoint"
    )
    row = look(out, {})
    assert (row.state, row.steps) == ("failed", STEPS)
    assert row.message.startswith("rank 1 was ended by SIGKILL")

    process = start(out, images, "--processes", "2", step_s=1)
    wait_for_step(out, 4, process)
    assert look(out, {}).state == "running"
    process.send_signal(signal.SIGTERM)
    shown, told = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, told
    assert "resuming" in shown
    row = look(out, {})
    assert f"SIGTERM: saved at step {row.step} of {STEPS}; the same command resumes" in shown
    assert shown.count("resuming") == 1  # the other rank is quiet
    assert (row.state, row.message) == ("stopped", f"saved at step {row.step} of {STEPS}")

    process = start(out, images, "--processes", "2")
    _, told = process.communicate(timeout=100)
    assert process.returncode == 0, told
    assert [r["step"] for r in read_metrics(out / "metrics.jsonl") if "loss/total" in r] == list(range(1, STEPS + 1))
    assert look(out, {}).state == "finished"


@several_processes
def test_ranks_tell_what_is_wrong(tmp_path: Path, images: Path) -> None:
    process = start(tmp_path / "run", images, "--processes", "2", "train.batch_size=7")
    _, told = process.communicate(timeout=100)
    assert process.returncode == 2, told
    assert "train.batch_size=7 cannot be shared evenly by 2 processes" in told
    assert {line.partition(" cannot")[0] for line in told.splitlines() if "cannot be shared" in line} <= {
        f"quietvit: rank {rank}: train.batch_size=7" for rank in (0, 1)
    }
    assert "Traceback" not in told
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@several_processes
def test_torchrun(tmp_path: Path, images: Path) -> None:
    process = start(tmp_path / "run", images, "train.steps=3", by=TORCHRUN)
    shown, told = process.communicate(timeout=100)
    assert process.returncode == 0, told
    assert shown.count("2 processes (cpu, ddp)") == 1
    assert look(tmp_path / "run", {}).state == "finished"


# ---- in this process


def test_one_process_per_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quietvit_launch.local.spawn", lambda job, count: 100 + count)
    monkeypatch.setattr("quietvit_launch.local.run_job", lambda job, console: 101)

    def processes(asked: int | None, *settings: str) -> int:
        return run_locally(Job("quickstart", settings, str(tmp_path)), asked) - 100

    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert (processes(None), processes(1), processes(3)) == (4, 1, 3)
    assert (processes(None, "train.device=cpu"), processes(8, "train.device=cpu")) == (1, 8)
    assert processes(None, "parallel.strategy=none") == 1
    with pytest.raises(ConfigError, match=r"--processes 5: this machine has 4 GPUs.*Use --processes 4 or less"):
        processes(5)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert (processes(None), processes(2)) == (1, 2)


def test_data_are_checked_before_processes_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quietvit_launch.local.spawn", lambda job, count: pytest.fail("started"))
    with pytest.raises(ConfigError, match="fewer than one batch"):
        run_locally(Job("quickstart", ("data.options.num_images=9",), str(tmp_path / "run")), 2)
    assert not (tmp_path / "run").exists()


def test_a_signal_before_the_loop_is_kept_for_it() -> None:
    with StopRequest() as outer:
        signal.raise_signal(signal.SIGUSR2)
        signal.raise_signal(signal.SIGTERM)
        with StopRequest() as inner:
            assert inner.signum == outer.signum == signal.SIGUSR2  # the first one counts
    with StopRequest(), StopRequest() as inner:
        assert not inner


def test_signals_held_back_are_delivered_in_the_run(tmp_path: Path) -> None:
    # The process is warned while Python starts: without `early` SIGUSR2 ends it.
    (tmp_path / "job.py").write_text(
        "import os, signal\n"
        "from quietvit_launch import worker\n"
        "from quietvit_launch.job import Job\n"
        "from quietvit.train.signals import StopRequest\n"
        "os.kill(os.getpid(), signal.SIGUSR2)\n"
        "def run_job(job, console):\n"
        "    with StopRequest() as stop:\n"
        "        return 128 + stop.signum\n"
        "worker.run_job = run_job\n"
        "raise SystemExit(worker.run_rank(Job('quickstart', (), 'x'), apart=False))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    plain = subprocess.run([sys.executable, "-m", "job"], env=env)
    held = subprocess.run([sys.executable, "-m", "quietvit_launch.early", "-u", "-m", "job"], env=env)
    assert (plain.returncode, held.returncode) == (-signal.SIGUSR2, 128 + signal.SIGUSR2)


@pytest.mark.parametrize(
    ("statement", "code", "told"),
    [
        ("raise ConfigError('x is wrong')", 2, "quietvit: rank 3: x is wrong\n"),
        ("raise ConfigError('rank 3: x is wrong')", 2, "quietvit: rank 3: x is wrong\n"),
        ("raise KeyboardInterrupt", 130, ""),
        ("open('/nowhere/x')", 2, "quietvit: rank 3: /nowhere/x: No such file or directory\n"),
        ("[][0]", 1, "IndexError: list index out of range\n"),
    ],
)
def test_errors_bear_the_rank(statement: str, code: int, told: str) -> None:
    # Raised in a function of quietvit_launch.job, as a message for users is one that quietvit raised.
    text = (
        "import quietvit_launch.job as job\nfrom quietvit_launch.worker import told\n"
        f"exec('def fail():\\n    ' + {statement!r}, vars(job))\n"
        "with told():\n    job.fail()\n"
    )
    done = subprocess.run([sys.executable, "-c", text], env={**os.environ, "RANK": "3"}, capture_output=True, text=True)
    assert done.returncode == code
    assert done.stderr.endswith(told)
    assert done.stderr.startswith("quietvit: rank 3: ") or not told


def test_alone_the_first_rank_is_this_one() -> None:
    assert on_first_rank(lambda: 7) == 7
    with pytest.raises(OSError, match="y"):
        on_first_rank(lambda: (_ for _ in ()).throw(OSError("y")))


def test_what_a_launcher_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in worker.RENDEZVOUS:
        monkeypatch.delenv(name, raising=False)
    assert not worker.launched()
    assert not worker.console().quiet
    for name in worker.RENDEZVOUS:
        monkeypatch.setenv(name, "1")
    assert worker.launched()
    assert worker.console().quiet
