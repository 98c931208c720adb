"""Rank, world size and the few collectives the objective needs. Alone (no process group) each is a no-op."""

from __future__ import annotations

from typing import Any, TypeVar, cast

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


def group_size() -> int:
    """Processes of the group that is up, also if it is only one. Raises ValueError without a group."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("no process group is up: parallel.strategy=fsdp needs one, also for a single process")
    return dist.get_world_size()


def make_group_of_one(device: torch.device) -> bool:
    """Make a process group that holds this process alone, unless one is up. Returns whether it was made."""
    if dist.is_initialized():
        return False
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=cast(Any, dist).HashStore(), rank=0, world_size=1)
    return True


def barrier() -> None:
    """Wait until all ranks are here."""
    if is_distributed():
        dist.barrier()


def own_part(tensor: Tensor) -> Tensor:
    """Of a tensor sharded over ranks the part that is here; any other tensor as it is."""
    return cast(Tensor, tensor.to_local()) if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all ranks, all of which must call; any other tensor as it is."""
    return cast(Tensor, tensor.full_tensor()) if hasattr(tensor, "full_tensor") else tensor


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


def anywhere(flag: bool, device: torch.device) -> bool:
    """Whether it is so on any rank."""
    return bool(max_over_ranks(torch.tensor(float(flag), device=device)) > 0)


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
