"""Joining the process group that torchrun started this process for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

TIMEOUT = timedelta(hours=3)  # ours: ranks wait for the slowest slice, or for features that another command extracts


@contextmanager
def ranks(device: str = "auto") -> Iterator[str]:
    """In a process of torchrun: its group, left at the end. Yields the device to use; alone just the one given.

    `device` "auto" and "cuda" become this process's own GPU (LOCAL_RANK), and tensors there travel by NCCL; tensors on
    the CPU travel by gloo. A process waits 3 hours for another before it gives up.

    Raises ValueError for a device that all processes would share, for more processes than GPUs, or for an incomplete
    environment.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        yield device
        return
    rank, world, local = (_number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    import torch
    import torch.distributed as dist

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        count = torch.cuda.device_count()
        if local >= count:
            raise ValueError(
                f"process {local} of this machine has no GPU of its own: torch sees {count}. Start torchrun with "
                f"--nproc-per-node={max(1, count)}, or use --device cpu"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    elif device != "cpu":
        raise ValueError(f"{world} processes cannot share the device {device!r}: use cpu, cuda or auto under torchrun")
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, rank=rank, world_size=world, timeout=TIMEOUT)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdigit():
        raise ValueError(f"torchrun's environment is incomplete: {name} is {text!r}. Start the command with torchrun")
    return int(text)
