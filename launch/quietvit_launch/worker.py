"""One process of a run that has several: what torchrun, our own launcher and Slurm start, each once per rank."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta

from rich.console import Console

from quietvit.config.load import ConfigError
from quietvit.config.schema import RunConfig
from quietvit.train.signals import StopRequest
from quietvit_launch.job import Job, run_job
from quietvit_launch.mistakes import message_for_user

RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets for every process
EXIT_USER_ERROR, EXIT_FAULT = 2, 1
# A rank that waits for another is told by the run's own watch (parallel.timeout), before torch gives up.
PATIENCE = timedelta(seconds=60)


def launched() -> bool:
    """Whether torchrun, or another that sets the same variables, started this process."""
    return all(name in os.environ for name in RENDEZVOUS)


def run_rank(
    job: Job,
    *,
    apart: bool = True,
    after: Callable[[int], int] = int,
    failed: Callable[[str], None] | None = None,
) -> int:
    """Join the group that the environment describes, run the job, leave the group. Returns the exit code.

    Signals that come before the loop can stop at them are kept for it. An error is told on stderr with the rank before
    it and ends the process with exit code 2 (the user's) or 1 (ours), so that the launcher ends the others.

    `apart`: leave the terminal's process group: a Ctrl-C there reaches the launcher, which sends it to each rank, and
    twice would mean to stop without saving. `after(exit code)` is called, and its value returned, inside the group.
    `failed(message)` is called before an error ends the process.
    """
    if apart:
        with contextlib.suppress(OSError):
            os.setpgrp()
    with StopRequest(), told(failed):
        # Sent between fork and here, under quietvit_launch.early, they are delivered now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, StopRequest.SIGNALS)
        with group(job.config()):
            return after(run_job(job, console()))


def console() -> Console:
    """That of the first rank prints; the others' are quiet."""
    return Console(quiet=rank() != 0)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def group(config: RunConfig) -> Iterator[None]:
    """The process group of the environment: NCCL between GPUs, gloo between CPUs. One process alone needs none.

    Raises ConfigError when the ranks do not find each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and config.parallel.strategy != "fsdp":
        yield
        return
    import torch.distributed as dist

    from quietvit.train.device import own_device, pick_device

    device = own_device(pick_device(config.train.device))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=config.parallel.timeout) + PATIENCE)
    except (dist.DistError, RuntimeError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConfigError(
            f"{os.environ['WORLD_SIZE']} processes did not meet at {where}: {str(error).splitlines()[0]}. Is that "
            "address reachable from all nodes? GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose the network interface"
        ) from error
    yield
    # Not after an error: a group that lost a member cannot be left in order.
    dist.destroy_process_group()


@contextlib.contextmanager
def told(failed: Callable[[str], None] | None = None) -> Iterator[None]:
    """Errors become a message (the user's) or a traceback (ours) with the rank before it, and end this process."""
    try:
        yield
    except KeyboardInterrupt:
        os._exit(130)
    except Exception as error:
        message = message_for_user(error)
        said = message if message is not None else traceback.format_exc().rstrip()
        before = f"rank {rank()}: "
        said = said if said.startswith(before) else before + said
        print(f"quietvit: {said}", file=sys.stderr, flush=True)
        if failed is not None:
            failed(said if message is not None else before + said.splitlines()[-1])
        sys.stdout.flush()
        # Straight out: threads that wait in a collective would keep the process alive.
        os._exit(EXIT_USER_ERROR if message is not None else EXIT_FAULT)
