"""Stochastic depth (Huang et al. 2016) in the two forms of DINOv2: on a subset of the batch, and sample by sample.

The subset form computes the residual branch for `kept` images only and so saves their compute; it adds the result
scaled by batch / kept, the exact inverse of the realised fraction. Its realised rate is a multiple of 1 / batch, which
for a small batch can be far from the rate asked for (2 images at rate 0.3: half are dropped; 1 image: never). So here:

    the subset form is used when its realised rate is within 10 % of the rate asked for (SUBSET_TOLERANCE),
    otherwise each image is dropped by its own draw with probability `rate` and kept ones are scaled by 1 / (1 - rate).

At rate 0.3 that is the subset form from 28 images on, and for most sizes from 10 (10, 13, 16, 19, 20, ...). DINOv2
instead takes the subset form at any batch size, for rates above 0.1. Both forms have the full residual as expectation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from quietvit.nn.packing import Groups, group_sizes

__all__ = [
    "BranchDrop",
    "Draw",
    "add_residual",
    "branch_drop",
    "draw_drop",
    "drop_rates",
    "subset_is_faithful",
    "subset_size",
]

SUBSET_TOLERANCE = 0.1  # ours: largest relative error of the realised rate

# One group's draw. Integers: the images to compute (subset form). Booleans: which images are kept (per-sample form).
Draw = Int[Tensor, " kept"] | Bool[Tensor, " b"]


@dataclass(frozen=True)
class BranchDrop:
    """What one residual branch computes in this step, and by which factor each row is added."""

    groups: Groups  # the groups of the rows that are computed
    rows: Int[Tensor, " K"] | None  # packed rows that are computed; None: all
    scale: Float[Tensor, "K 1"] | float


def drop_rates(rate: float, depth: int, *, uniform: bool) -> list[float]:
    """Rate of each block: the same for all, or rising linearly from 0 to `rate`."""
    if uniform or depth < 2:
        return [rate] * depth
    return [rate * i / (depth - 1) for i in range(depth)]


def subset_size(batch: int, rate: float) -> int:
    """Images whose branch is computed: floor(batch (1 - rate)), at least one."""
    return max(int(batch * (1 - rate)), 1)


def subset_is_faithful(batch: int, rate: float) -> bool:
    """Whether the subset form realises about the rate asked for (rule in the head of this file)."""
    realised = 1 - subset_size(batch, rate) / batch
    return abs(realised - rate) <= SUBSET_TOLERANCE * rate


def draw_drop(groups: Groups, rate: float, *, device: torch.device, dtype: torch.dtype) -> BranchDrop:
    """Draw one branch's stochastic depth from torch's global generator of `device`, each group on its own."""
    draws: list[Draw] = []
    for batch, _ in groups:
        if subset_is_faithful(batch, rate):
            draws.append(torch.randperm(batch, device=device)[: subset_size(batch, rate)])
        else:
            draws.append(torch.rand(batch, device=device) >= rate)
    return branch_drop(groups, draws, rate, dtype=dtype)


def branch_drop(groups: Groups, draws: Sequence[Draw], rate: float, *, dtype: torch.dtype) -> BranchDrop:
    """The BranchDrop that given draws (one for each group) stand for. `rate` scales the per-sample form only."""
    device = draws[0].device
    subset = [draw.dtype != torch.bool for draw in draws]
    if all(subset):
        kept = tuple((len(draw), tokens) for draw, (_, tokens) in zip(draws, groups, strict=True))
        scale = _subset_scale(groups, kept, dtype, device)
    else:
        kept = tuple(
            (len(draw), tokens) if is_subset else (batch, tokens)
            for draw, is_subset, (batch, tokens) in zip(draws, subset, groups, strict=True)
        )
        scale = _mixed_scale(groups, kept, draws, rate, dtype)
    if not any(subset):
        return BranchDrop(kept, None, scale)
    rows = [
        table.index_select(0, draw).flatten() if is_subset else table.flatten()
        for table, draw, is_subset in zip(_packed_rows(groups, device), draws, subset, strict=True)
    ]
    return BranchDrop(kept, rows[0] if len(rows) == 1 else torch.cat(rows), scale)


def add_residual(
    x: Float[Tensor, "T D"],
    branch: Callable[[Float[Tensor, "K D"], Groups], Float[Tensor, "K D"]],
    groups: Groups,
    drop: BranchDrop | None,
) -> Float[Tensor, "T D"]:
    """x + branch(x), under stochastic depth if `drop` is given. Rows that are not kept pass unchanged."""
    if drop is None:
        return x + branch(x, groups)
    if drop.rows is None:
        return x + branch(x, groups) * drop.scale
    residual = branch(x.index_select(0, drop.rows), drop.groups) * drop.scale
    return x.index_add(0, drop.rows, residual.to(x.dtype))  # plain index_add: xFormers' crashes at some widths


@lru_cache(maxsize=64)
def _packed_rows(groups: Groups, device: torch.device) -> tuple[Int[Tensor, "b n"], ...]:
    """For each group, the packed row of every token."""
    with torch.inference_mode(False):  # cached tensors must be usable in a later backward
        rows = torch.arange(sum(group_sizes(groups)), device=device)
        return tuple(r.view(group) for r, group in zip(torch.split(rows, group_sizes(groups)), groups, strict=True))


@lru_cache(maxsize=256)
def _subset_scale(
    groups: Groups, kept: Groups, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "K 1"] | float:
    """batch / kept for every computed row; a plain number where all groups agree."""
    factors = [batch / k for (batch, _), (k, _) in zip(groups, kept, strict=True)]
    if len(set(factors)) == 1:
        return factors[0]
    with torch.inference_mode(False):
        columns = [
            torch.full((size, 1), f, dtype=dtype, device=device)
            for f, size in zip(factors, group_sizes(kept), strict=True)
        ]
        return torch.cat(columns)


def _mixed_scale(
    groups: Groups, kept: Groups, draws: Sequence[Draw], rate: float, dtype: torch.dtype
) -> Float[Tensor, "K 1"]:
    """The factor of every computed row where some group is dropped sample by sample."""
    columns = []
    for draw, (batch, _), (k, tokens) in zip(draws, groups, kept, strict=True):
        if draw.dtype == torch.bool:
            column = draw.to(dtype) / (1 - rate)
        else:
            column = torch.full((k,), batch / k, dtype=dtype, device=draw.device)
        columns.append(column[:, None].expand(k, tokens).reshape(-1, 1))
    return torch.cat(columns)
