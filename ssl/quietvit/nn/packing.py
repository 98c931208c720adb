"""Several groups of equally long sequences as one long row of tokens: what linear layers, norms and FFN work on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Groups", "group_sizes", "pack", "unpack"]

# One (images, tokens per image) pair for each group. The packed tensor holds the groups one after the other,
# inside a group image after image: T = sum(images * tokens) rows.
Groups = tuple[tuple[int, int], ...]


def group_sizes(groups: Groups) -> list[int]:
    """Rows that each group takes in the packed tensor."""
    return [images * tokens for images, tokens in groups]


def pack(sequences: Sequence[Float[Tensor, "b n D"]]) -> tuple[Float[Tensor, "T D"], Groups]:
    """Lay sequences of several lengths into one tensor. A single group costs no copy."""
    groups = tuple((x.shape[0], x.shape[1]) for x in sequences)
    flat = [x.flatten(0, 1) for x in sequences]
    return (flat[0] if len(flat) == 1 else torch.cat(flat)), groups


def unpack(x: Float[Tensor, "T D"], groups: Groups) -> list[Float[Tensor, "b n D"]]:
    """The groups of a packed tensor, as views of it."""
    parts = torch.split(x, group_sizes(groups))
    return [part.reshape(*group, -1) for part, group in zip(parts, groups, strict=True)]
