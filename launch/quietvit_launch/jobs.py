"""`quietvit jobs` and `quietvit cancel`: runs found in folders, and what Slurm says of their jobs. Needs no torch."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from rich import box
from rich.console import Console
from rich.table import Table

from quietvit.config.load import load_config
from quietvit_launch.job import STATUS
from quietvit_launch.tasks import newest_step, read_json

RECORD = Path("slurm", "job.json")
TAIL_BYTES = 1 << 20  # of metrics.jsonl: thousands of lines, among them the newest health check
WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED", "RESIZING"}
MAX_DEPTH = 4  # folders below the one asked for


@dataclass(frozen=True)
class Row:
    """A run as it is now."""

    run: str
    state: str  # "queued", "running", "finished", "stopped" (saved at a signal), "failed", "new" (never started)
    job: str | None  # of Slurm
    step: int
    steps: int | None
    loss: float | None
    knn: float | None  # %
    message: str


def run_jobs(folder: Path, form: str) -> int:
    """Print the runs below a folder, as "table" or "json". Raises ValueError where there is no such folder."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: give the one that holds your runs")
    runs = list(find_runs(folder))
    asked = ask(runs)
    rows = [look(run, asked) for run in runs]
    if form == "json":
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return 0
    console = Console(highlight=False)
    if not rows:
        console.print(f"no runs in {folder}", soft_wrap=True)
        return 0
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("run", "state", "job", "step", "loss", "k-NN", "message"):
        side: Literal["left", "right"] = "right" if name in ("step", "loss", "k-NN") else "left"
        table.add_column(name, justify=side, no_wrap=name != "message", overflow="fold")
    for r in rows:
        name = os.path.relpath(r.run, folder) if r.run != str(folder) else r.run
        step = f"{r.step}/{r.steps}" if r.steps else str(r.step)
        loss, knn = "" if r.loss is None else f"{r.loss:.3f}", "" if r.knn is None else f"{r.knn:.1f} %"
        table.add_row(name, r.state, r.job or "", step, loss, knn, r.message)
    console.print(table)
    return 0


def find_runs(folder: Path, depth: int = 0) -> Iterator[Path]:
    """Run folders at or below `folder`, in order of their names; not inside runs, hidden folders or links."""
    signs = (STATUS, RECORD, "metrics.jsonl", "checkpoints")
    if (folder / "config.yaml").is_file() and any((folder / name).exists() for name in signs):
        yield folder
        return
    if depth == MAX_DEPTH:
        return
    try:
        below = sorted(p for p in folder.iterdir() if p.is_dir() and not p.is_symlink() and p.name[0] != ".")
    except PermissionError:
        return
    for path in below:
        yield from find_runs(path, depth + 1)


def look(run: Path, asked: dict[str, str]) -> Row:
    """One run; `asked` is what `ask` returned."""
    status, record = read_json(run / STATUS), read_json(run / RECORD)
    job = record.get("job")
    state, message = str(status.get("state", "new")), str(status.get("message") or "")
    since = float(status.get("time") or 0)
    if job is not None:
        in_slurm = asked.get(job, "")
        if in_slurm in WAITING:
            state = "queued"
        elif in_slurm in ("RUNNING", "CONFIGURING", "COMPLETING", "SIGNALING", "STAGE_OUT"):
            state = "running"
        elif state in ("running", "new") or since < float(record.get("submitted") or 0):
            # It never came to write how it ended.
            ended = in_slurm.partition(" ")[0]
            state = {"": "unknown", "CANCELLED": "stopped", "COMPLETED": "finished"}.get(ended, "failed")
            message = f"Slurm: {in_slurm}" if in_slurm else "Slurm no longer knows its job"
    elif state == "running" and not _alive(status):
        state, message = "failed", "it ended without a word: killed, or the machine went down"
    values = last_values(run / "metrics.jsonl")
    step = int(values.get("step") or 0)
    known = step if state == "running" else max(newest_step(run), step if state == "failed" else 0)
    steps = status.get("steps")
    if not status and known:  # made before runs kept a status
        steps = _planned(run)
        state = "finished" if steps is not None and known >= steps else "stopped"
    return Row(str(run), state, job, known, steps, values.get("loss/total"), values.get("health/knn"), message)


def _planned(run: Path) -> int | None:
    """Steps of a run as its settings have them; None if they tell passes, or cannot be read."""
    try:
        return load_config(str(run / "config.yaml")).train.steps
    except (OSError, ValueError):
        return None


def _alive(status: dict[str, Any]) -> bool:
    """Whether the process that wrote this still runs. On another machine: it is believed."""
    if status.get("host") != socket.gethostname():
        return True
    try:
        # A process that began after the note was written has only the same number.
        return bool(psutil.Process(int(status["pid"])).create_time() <= float(status["time"]) + 1)
    except (psutil.Error, KeyError, ValueError, TypeError):
        return False


def last_values(file: Path) -> dict[str, Any]:
    """The newest value of every key near the end of a metrics.jsonl; {} without one."""
    try:
        with file.open("rb") as log:
            log.seek(max(0, file.stat().st_size - TAIL_BYTES))
            lines = log.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    values: dict[str, Any] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the first may be cut by us, the last by a kill
            continue
        if isinstance(record, dict):
            values |= record
    return values


def ask(runs: list[Path]) -> dict[str, str]:
    """{job: state} of the runs' jobs, from squeue and for those no longer there from sacct; {} without Slurm."""
    jobs = [job for run in runs if (job := read_json(run / RECORD).get("job"))]
    states: dict[str, str] = {}
    if not jobs:
        return states
    states |= _states(
        "squeue", "--noheader", "--array", "--states=all", f"--user={getpass.getuser()}", "--format=%i|%T"
    )
    gone = [job for job in jobs if job not in states]
    if gone:
        states |= _states("sacct", "-X", "-n", "-P", "-o", "JobID,State", "-j", ",".join(gone))
    return states


def _states(*command: str) -> dict[str, str]:
    if shutil.which(command[0]) is None:
        return {}
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return {job: state for line in told.splitlines() for job, _, state in [line.strip().partition("|")]}


def in_queue(run: Path) -> str | None:
    """The run's job if it waits or runs; None otherwise."""
    row = look(run, ask([run]))
    return row.job if row.state in ("queued", "running") else None


def run_cancel(run: Path) -> int:
    """Take a run out of the queue, or ask it to save and leave. Raises ValueError if there is nothing to cancel."""
    record, status = read_json(run / RECORD), read_json(run / STATUS)
    state = look(run, ask([run])).state
    if state not in ("queued", "running"):
        raise ValueError(f"{run} is not queued or running" + (f": it is {state}" if state != "new" else ""))
    if (job := record.get("job")) is not None:
        jobs = [str(j) for j in (job, record.get("evaluation")) if j]
        done = subprocess.run(["scancel", *jobs], capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise ValueError(f"scancel {' '.join(jobs)}: {done.stderr.strip()}")
        print(
            f"cancelled job {' and '.join(jobs)}: a run that has started saves if Slurm's KillWait leaves it the time"
        )
        return 0
    if status.get("host") != socket.gethostname():
        raise ValueError(f"{run} runs on {status.get('host')}: cancel it there")
    os.kill(int(status["pid"]), signal.SIGTERM)
    print(f"asked process {status['pid']} to save and leave")
    return 0
