"""`quietvit jobs` tells of every run below a folder how it is; `cancel` reaches the one that is meant."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from quietvit_launch import cli, jobs
from quietvit_launch.job import write_status
from quietvit_launch.jobs import Row, find_runs, last_values, look


def a_run(out: Path, step: int | None = None, **status: Any) -> Path:
    out.mkdir(parents=True)
    (out / "config.yaml").write_text("")
    if step is not None:
        (out / "checkpoints" / f"step_{step:08}").mkdir(parents=True)
    if status:
        write_status(out, status["state"], message=status.get("message", ""), steps=status.get("steps"))
    return out


def in_slurm(out: Path, job: str) -> Path:
    (out / "slurm").mkdir()
    (out / "slurm" / "job.json").write_text(json.dumps({"job": job, "evaluation": None, "submitted": time.time() - 9}))
    return out


def test_only_runs_are_found(tmp_path: Path) -> None:
    a = a_run(tmp_path / "b" / "a", state="finished")
    z = a_run(tmp_path / "z", 3)
    a_run(z / "inside", 3)  # a run holds no runs
    a_run(tmp_path / ".hidden", 3)
    a_run(tmp_path / "only a config")
    (tmp_path / "link").symlink_to(a)
    assert list(find_runs(tmp_path)) == [a, z]
    assert list(find_runs(a)) == [a]


def test_states_without_slurm(tmp_path: Path) -> None:
    done = a_run(tmp_path / "done", 8, state="finished", steps=8)
    saved = a_run(tmp_path / "saved", 3, state="stopped", steps=8, message="saved at step 3 of 8")
    here = a_run(tmp_path / "here", 3, state="running", steps=8)
    (here / "metrics.jsonl").write_text(
        '{"step": 4, "loss/total": 6.5}\n{"step": 5, "health/knn": 25.0}\n{"step": 6, "lo'
    )
    assert look(done, {}) == Row(str(done), "finished", None, 8, 8, None, None, "")
    assert look(saved, {}) == Row(str(saved), "stopped", None, 3, 8, None, None, "saved at step 3 of 8")
    assert look(here, {}) == Row(str(here), "running", None, 5, 8, 6.5, 25.0, "")
    status = json.loads((here / "status.json").read_text())
    for change in ({"pid": 2**22 + 1}, {"time": 1000.0}):  # gone; another process has its number
        (here / "status.json").write_text(json.dumps(status | change))
        row = look(here, {})
        assert (row.state, row.message) == ("failed", "it ended without a word: killed, or the machine went down")
    (here / "status.json").write_text(json.dumps(status | {"pid": 2**22 + 1, "host": "elsewhere"}))
    assert look(here, {}).state == "running"
    (here / "status.json").write_text('{"state": ')
    assert look(here, {}).state == "stopped"  # as its checkpoint has it


@pytest.mark.parametrize(
    ("in_queue", "status", "expected"),
    [
        ("PENDING", "new", ("queued", "")),
        ("PENDING", "stopped", ("queued", "m")),
        ("RUNNING", "new", ("running", "")),
        ("COMPLETED", "finished", ("finished", "m")),
        ("FAILED", "failed", ("failed", "m")),
        ("TIMEOUT", "running", ("failed", "Slurm: TIMEOUT")),
        ("CANCELLED by 0", "new", ("stopped", "Slurm: CANCELLED by 0")),
        ("", "running", ("unknown", "Slurm no longer knows its job")),
        ("", "finished", ("finished", "m")),
    ],
)
def test_states_with_slurm(tmp_path: Path, in_queue: str, status: str, expected: tuple[str, str]) -> None:
    words = {} if status == "new" else {"state": status, "message": "m"}
    run = in_slurm(a_run(tmp_path / "run", **words), "17_3")
    row = look(run, {"17_3": in_queue} if in_queue else {})
    assert (row.state, row.message, row.job) == (*expected, "17_3")


def test_an_old_end_is_not_that_of_the_new_job(tmp_path: Path) -> None:
    run = in_slurm(a_run(tmp_path / "run", state="finished"), "17")
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"time": time.time() - 99}))
    assert look(run, {"17": "OUT_OF_MEMORY"}).state == "failed"


def test_squeue_first_and_sacct_for_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name, lines in {"squeue": "17_3|PENDING\\n17_4|RUNNING", "sacct": "18|CANCELLED by 0"}.items():
        (tmp_path / name).write_text(f'#!/bin/sh\nprintf "{lines}\\n"\necho "$@" > {tmp_path}/{name}.args\n')
        (tmp_path / name).chmod(0o755)
    runs = [in_slurm(a_run(tmp_path / "runs" / job), job) for job in ("17_3", "17_4", "18", "19")]
    asked = jobs.ask(runs)
    assert asked == {"17_3": "PENDING", "17_4": "RUNNING", "18": "CANCELLED by 0"}
    assert (tmp_path / "sacct.args").read_text().split()[-2:] == ["-j", "18,19"]
    assert [jobs.in_queue(run) for run in runs] == ["17_3", "17_4", None, None]
    (tmp_path / "squeue").write_text("#!/bin/sh\nexit 1\n")
    assert jobs.ask(runs[:1]) == {"18": "CANCELLED by 0"}


def test_the_end_of_a_long_log_is_enough(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": n, "loss/total": 1.0 / (n + 1)}) + "\n" for n in range(40_000)))
    assert file.stat().st_size > jobs.TAIL_BYTES
    assert last_values(file) == {"step": 39_999, "loss/total": 1 / 40_000}
    assert last_values(tmp_path / "nowhere") == {}


def test_the_table_and_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path / "runs" / "first", 8, state="finished", steps=8)
    (run / "metrics.jsonl").write_text('{"step": 8, "loss/total": 6.5, "health/knn": 25.1}\n')
    assert cli.main(["jobs", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out.split()[-6:] == ["first", "finished", "8/8", "6.500", "25.1", "%"]
    assert cli.main(["jobs", str(tmp_path), "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["run"], row["state"], row["knn"]) == (str(run), "finished", 25.1)
    (tmp_path / "empty").mkdir()
    assert cli.main(["jobs", str(tmp_path / "empty")]) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path / 'empty'}\n"


def test_cancel_asks_the_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path / "run", state="running")
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        status = {"state": "running", "pid": process.pid, "host": socket.gethostname(), "time": time.time() + 1}
        (run / "status.json").write_text(json.dumps(status))
        assert cli.main(["cancel", str(run)]) == 0
        assert process.wait(20) == -signal.SIGTERM
    assert capsys.readouterr().out == f"asked process {process.pid} to save and leave\n"
    assert cli.main(["cancel", str(run)]) == 2
    assert "is not queued or running: it is failed" in capsys.readouterr().err
    (run / "status.json").write_text(json.dumps(status | {"host": "elsewhere", "pid": os.getpid()}))
    assert cli.main(["cancel", str(run)]) == 2
    assert "runs on elsewhere: cancel it there" in capsys.readouterr().err


def test_runs_without_a_status_are_judged_by_their_settings(tmp_path: Path) -> None:
    for name, step, state in (("half", 3, "stopped"), ("whole", 8, "finished")):
        run = a_run(tmp_path / name, step)
        (run / "config.yaml").write_text("train: {steps: 8}\n")
        assert look(run, {}) == Row(str(run), state, None, step, 8, None, None, "")
    passes = a_run(tmp_path / "passes", 3)
    (passes / "config.yaml").write_text("train: {passes: 2.0}\n")
    assert look(passes, {}).state == "stopped"
    broken = a_run(tmp_path / "broken", 3)
    (broken / "config.yaml").write_text("train: [")
    assert (look(broken, {}).state, look(broken, {}).steps) == ("stopped", None)
