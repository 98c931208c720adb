"""Blocks with dense connections (T2T-ViT's dense variant; Huang et al. 2017): each appends channels to its input."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from quietvit.nn.attention import ATTENTION, Attend
from quietvit.nn.block import Block
from quietvit.nn.drop_path import BranchDrop
from quietvit.nn.packing import Groups

__all__ = ["DenseBlock", "Transition", "dense_blocks"]

Drops = tuple[BranchDrop | None, BranchDrop | None]


class DenseBlock(Block):
    """[x | Linear(Block(x))]: what came in, and `growth` new channels."""

    def __init__(self, dim: int, num_heads: int, growth: int, **layer: Any) -> None:
        super().__init__(dim, num_heads, **layer)
        self.dense_linear = nn.Linear(dim, growth)
        self.out_dim = dim + growth

    def forward(
        self,
        x: Float[Tensor, "T D"],
        groups: Groups,
        attend: Attend = ATTENTION["sdpa"].attend,
        drops: Drops = (None, None),
    ) -> Float[Tensor, "T D+growth"]:
        return torch.cat((x, self.dense_linear(super().forward(x, groups, attend, drops))), dim=-1)


class Transition(nn.Module):
    """GELU(Linear x), half as wide: between two groups of dense blocks. It stands in the row of blocks and counts."""

    head_dim = 8  # no attention, so that any will do

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim // 2)
        self.out_dim = dim // 2

    def forward(
        self, x: Float[Tensor, "T D"], groups: Groups, attend: Attend, drops: Drops = (None, None)
    ) -> Float[Tensor, "T D/2"]:
        return F.gelu(self.linear(x))


def dense_blocks(dim: int, num_heads: int, groups: str, growth: int, **layer: Any) -> list[Block | Transition]:
    """Groups of dense blocks ("3-6-6-4": their sizes) with transitions in between; `layer`: keywords of Block.

    Raises ValueError if `groups` cannot be read or a width cannot be divided among the heads.
    """
    if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)*", groups) or growth < 1:
        raise ValueError(
            f"dense_groups must be sizes like '3-6-6-4' with a growth of at least 1, not '{groups}', {growth}"
        )
    blocks: list[Block | Transition] = []
    for size in map(int, groups.split("-")):
        if blocks:
            blocks.append(Transition(dim))
            dim = blocks[-1].out_dim
        for _ in range(size):
            blocks.append(DenseBlock(dim, num_heads, growth, **layer))
            dim = blocks[-1].out_dim
    return blocks
