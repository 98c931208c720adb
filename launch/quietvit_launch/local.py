"""`--on local`: in this process, or one process per GPU of the machine through PyTorch's own launcher."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console

from quietvit.config.load import ConfigError
from quietvit.config.schema import RunConfig
from quietvit.train.signals import StopRequest
from quietvit_launch.job import Job, check_data, check_same_run, check_start, run_job, write_status
from quietvit_launch.worker import run_rank

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


def run_locally(job: Job, processes: int | None = None) -> int:
    """Run a job on this machine. Returns the exit code, as `run_job` does.

    `processes`: how many; None: one per GPU where the run uses GPUs, else one. Several processes on CPUs use gloo.
    Raises ConfigError for more processes than GPUs.
    """
    config = job.config()
    check_start(config, Path(job.out_dir).expanduser())
    check_data(config)
    check_same_run(Path(job.out_dir).expanduser(), config)
    if processes != 1:
        gpus = num_gpus(config)
        if gpus and (processes or 0) > gpus:
            raise ConfigError(
                f"--processes {processes}: this machine has {gpus} GPUs, and two processes cannot share one. Use "
                f"--processes {gpus} or less, or train.device=cpu"
            )
        # Where the recipe says "none" it means one process.
        processes = processes or (1 if config.parallel.strategy == "none" else max(1, gpus))
    return run_job(job, Console()) if processes == 1 else spawn(job, processes)


def num_gpus(config: RunConfig) -> int:
    """GPUs that this process sees, for a run that is to use all of them; else 0."""
    if config.train.device not in ("auto", "cuda"):
        return 0
    import torch

    return torch.cuda.device_count()


def spawn(job: Job, processes: int) -> int:
    """Run a job in `processes` new processes of this machine; a rank that dies ends the others.

    Signals are handed on once to every rank, so that all save and leave. Returns the exit code; says on stderr which
    rank was killed and by what.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what failed is told below
    # Left to itself each process takes all cores for itself.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"quietvit-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,  # the same command resumes; started again at once it would fail again
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        signals_to_handle="SIGQUIT",  # the others are ours: torch's would kill after 30 s what is still saving
    )
    with _handed_on() as asked:
        try:
            codes: dict[int, int] = elastic_launch(config, run_rank)(job)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            return _failed(Path(job.out_dir).expanduser(), rank, failure, asked)
    return max(codes.values())


@contextlib.contextmanager
def _handed_on() -> Iterator[list[int]]:
    """Signals that ask for a stop go to the children, and into the list that is yielded."""
    asked: list[int] = []

    def hand_on(signum: int, frame: FrameType | None) -> None:
        asked.append(signum)
        children = multiprocessing.active_children()
        if not children:
            raise SystemExit(128 + signum)
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid or 0, signum)

    old = {number: signal.signal(number, hand_on) for number in StopRequest.SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _failed(out_dir: Path, rank: int, failure: ProcessFailure, asked: list[int]) -> int:
    """Exit code for a run whose `rank` was the first to fail; killed ranks could not say so themselves."""
    if failure.exitcode >= 0:
        return failure.exitcode
    name = signal.Signals(-failure.exitcode).name
    if asked:
        print(f"quietvit: {signal.Signals(asked[0]).name}: stopped before training began", file=sys.stderr)
        return 128 + asked[0]
    memory = " (by the system, if memory ran out)" if name == "SIGKILL" else ""
    message = f"rank {rank} was ended by {name}{memory}; the other ranks were ended too"
    write_status(out_dir, "failed", message=message)
    print(f"quietvit: {message}. The same command resumes from the newest checkpoint", file=sys.stderr)
    return 128 - failure.exitcode
