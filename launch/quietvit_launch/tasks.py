"""What a Slurm job runs, once per task: a run that saves, requeues itself and goes on; and the evaluation after it."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quietvit.config.load import ConfigError
from quietvit_launch.job import STATUS, Job, on_first_rank, write_status
from quietvit_launch.worker import run_rank, told

STARTS = Path("slurm", "starts.jsonl")  # in the run folder, a line per start
FRUITLESS = 3  # starts of one job in a row from the same step, whatever ended them, are enough (ours)
STEP_FOLDER = re.compile(r"step_(\d{8})")


@dataclass(frozen=True)
class Train:
    """A run in a job that Slurm may end at any time and start again; each start goes on from the newest checkpoint."""

    job: Job
    max_requeues: int
    signal_delay_s: int

    def __call__(self) -> int:
        """Train to the end: 0. A run that left at a signal ends by SystemExit: Slurm, not submitit, knows how it is."""
        with told():
            begin_task()
            if os.environ["RANK"] == "0":
                self._begin()
        if _time_left() < self.signal_delay_s:  # the warning came before there was a task to hear it
            os.kill(os.getpid(), signal.SIGUSR2)
        code = run_rank(self.job, apart=False, after=self._leave, failed=self._failed)
        if code:
            sys.stdout.flush()
            raise SystemExit(code)
        return 0

    def _failed(self, message: str) -> None:
        """Note why, for `quietvit jobs`; what the first rank says counts, else the first that says something."""
        if os.environ["RANK"] == "0" or read_json(self.out_dir / STATUS).get("state") != "failed":
            write_status(self.out_dir, "failed", message=message)

    @property
    def out_dir(self) -> Path:
        return Path(self.job.out_dir)

    def _begin(self) -> None:
        """Note this start. Raises ConfigError if there were too many, or too many without a step in between."""
        this = {"job": os.environ["SLURM_JOB_ID"], "step": newest_step(self.out_dir), "time": round(time.time(), 1)}
        file = self.out_dir / STARTS
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        before = [json.loads(line) for line in lines]
        fruitless = [s for s in before[1 - FRUITLESS :] if (s["job"], s["step"]) == (this["job"], this["step"])]
        problem = None
        if restarts() > self.max_requeues:
            problem = f"given up after {self.max_requeues} restarts: slurm.max_requeues allows no more"
        elif len(fruitless) == FRUITLESS - 1:
            problem = f"given up: {FRUITLESS} starts in a row began at step {this['step']}; the logs of the job say why"
        if problem is not None:
            write_status(self.out_dir, "failed", message=problem)
            raise ConfigError(problem)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as log:
            log.write(json.dumps(this) + "\n")

    def _leave(self, code: int) -> int:
        """After a stop at a signal the first rank has the job requeued, if that is what the signal meant.

        All ranks call and wait: the first one that ends takes the others with it (srun --kill-on-bad-exit).
        """
        from quietvit import dist

        codes = dist.gather_objects(code)
        if any(codes):
            on_first_rank(functools.partial(self._requeue, codes))
        return code

    def _requeue(self, codes: list[int]) -> bool:
        preempted = is_preempted()
        if 128 + signal.SIGUSR2 not in codes and not preempted:
            return False  # cancelled
        step = newest_step(self.out_dir)
        began = json.loads((self.out_dir / STARTS).read_text(encoding="utf-8").splitlines()[-1])["step"]
        problem = None
        if step <= began and not preempted:
            problem = f"not requeued: no step was done in the time of one start (it began at step {began}). Raise "
            problem += "slurm.time_min"
        elif restarts() >= self.max_requeues:
            problem = f"not requeued: it was restarted {restarts()} times, and slurm.max_requeues allows no more"
        if problem is not None:
            write_status(self.out_dir, "failed", message=problem)
            print(f"quietvit: {problem}", file=sys.stderr, flush=True)
            return False
        write_status(self.out_dir, "stopped", message=f"saved at step {step} and requeued")
        try:
            subprocess.run(["scontrol", "requeue", job_id()], check=True, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            reason = str(getattr(error, "stderr", None) or error).strip()
            problem = f"saved at step {step}, but scontrol could not requeue the job: {reason}"
            write_status(self.out_dir, "failed", message=problem)
            raise ConfigError(problem) from error
        print(f"saved at step {step}; job {job_id()} is requeued", flush=True)
        return True


@dataclass(frozen=True)
class Evaluation:
    """What `quietvit eval` is to do with a run once it is trained: the teacher, or that of each kept checkpoint."""

    tasks: str
    data: str
    more: tuple[str, ...] = ()
    each: bool = False

    def words(self, run: Path, checkpoint: str | None = None) -> tuple[str, ...]:
        """The command line, for the run's newest teacher or for a folder of its checkpoints."""
        model = run if checkpoint is None else run / "checkpoints" / checkpoint
        cards = () if checkpoint is None else ("--out", str(run / "eval" / checkpoint))
        return ("eval", self.tasks, *self.more, "--model", str(model), "--data", self.data, *cards)

    def evaluate(self, run: Path) -> int:
        """Run it; returns the first exit code that is not 0, else 0."""
        from quietvit_launch.cli import main

        kept = sorted(p.name for p in (run / "checkpoints").glob("step_*")) if self.each else [None]
        for checkpoint in kept:
            if code := main(self.words(run, checkpoint)):
                return code
        return 0


@dataclass(frozen=True)
class Evaluate:
    """The job that follows a run."""

    evaluation: Evaluation
    run: Path

    def __call__(self) -> int:
        """0 when the cards are written; anything else ends by SystemExit, so that the job counts as failed."""
        begin_task()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGUSR2, signal.SIGTERM))
        if code := self.evaluation.evaluate(self.run):
            raise SystemExit(code)
        return 0


def begin_task() -> None:
    """Set what torch.distributed reads, and drop the result that an earlier start of this task may have left.

    A rank that lost its peers while the first one requeued the job leaves an error there, which would be taken for the
    result of the start that succeeded.
    """
    import submitit

    here = submitit.JobEnvironment()
    here.paths.result_pickle.unlink(missing_ok=True)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(here.global_rank), str(here.num_tasks)
    os.environ["LOCAL_RANK"] = str(here.local_rank)
    os.environ["MASTER_ADDR"] = here.hostnames[0]
    # Below the ports that systems hand out to anybody (32768 on Linux), and another for each job of a node.
    os.environ["MASTER_PORT"] = str(10000 + int(os.environ["SLURM_JOB_ID"]) % 10000)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none, or nothing that can be read."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def newest_step(out_dir: Path) -> int:
    """Step of the newest complete checkpoint; 0 without one. Needs no torch."""
    folder = out_dir / "checkpoints"
    names = [STEP_FOLDER.fullmatch(p.name) for p in folder.iterdir()] if folder.is_dir() else []
    return max((int(m[1]) for m in names if m), default=0)


def restarts() -> int:
    """How often Slurm started this job before."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def job_id() -> str:
    """As scontrol takes it."""
    return os.environ["SLURM_JOB_ID"]


def is_preempted() -> bool:
    """Whether Slurm is taking this job's nodes for another one; False where it cannot be asked."""
    command = ["scontrol", "--oneliner", "show", "job", job_id()]
    try:
        told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return False
    values = dict(re.findall(r"(JobState|PreemptTime)=(\S+)", told))
    return values.get("JobState") == "RUNNING" and values.get("PreemptTime", "None") not in ("None", "Unknown")


def _time_left() -> float:
    """Seconds until this job's time is over, where Slurm says (SLURM_JOB_END_TIME, from 23.02); else infinite."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(end) - time.time() if end.isdecimal() else float("inf")
