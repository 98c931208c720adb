"""Rank, world size and the few collectives the objective needs. Alone (no process group) each is a no-op."""

from __future__ import annotations

from typing import TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_fn
from jaxtyping import Float, Shaped
from torch import Tensor

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether a process group of more than one process is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def sum_over_ranks(x: Shaped[Tensor, ...]) -> Shaped[Tensor, ...]:
    """Sum over all ranks. Returns a new tensor: the caller's is never changed."""
    if not is_distributed():
        return x
    out = x.clone()
    dist.all_reduce(out, op=dist.ReduceOp.SUM)
    return out


def max_over_ranks(x: Shaped[Tensor, ...]) -> Shaped[Tensor, ...]:
    """Elementwise maximum over all ranks, as a new tensor."""
    if not is_distributed():
        return x
    out = x.clone()
    dist.all_reduce(out, op=dist.ReduceOp.MAX)
    return out


def gather_rows(x: Float[Tensor, "B D"]) -> Float[Tensor, "W*B D"]:
    """Rows of all ranks in rank order, with gradient flowing back to each owner. All ranks hold equally many."""
    if not is_distributed():
        return x
    return torch.cat(dist_fn.all_gather(x), dim=0)


def gather_objects(own: T) -> list[T]:
    """What every rank holds, in rank order; small picklable things only. Alone: a list of one."""
    if not is_distributed():
        return [own]
    out: list[T | None] = [None] * world_size()
    dist.all_gather_object(out, own)
    return cast("list[T]", out)
