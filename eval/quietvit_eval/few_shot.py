"""Few-shot: some train images of every class, drawn again and again."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


def draw_per_class(labels: Int[Tensor, " M"], count: int, seed: int) -> Int[Tensor, " m"]:
    """Rows of `count` images of each class, all of a class that has fewer; class by class, drawn in DINOv2's way.

    One generator with this seed permutes the rows of each class in ascending order of the classes; the first are taken.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for label in labels.unique(sorted=True):
        rows = torch.nonzero(labels == label).flatten()
        drawn.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
    return torch.cat(drawn)
