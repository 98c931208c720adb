"""The two feed-forward networks of DINOv2: MLP with GELU, and SwiGLU. Parameter names are those of its checkpoints."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["Mlp", "SwiGlu", "swiglu_width"]


class Mlp(nn.Module):
    """fc2(GELU(fc1 x)), with the exact GELU; `hidden` is the width in between."""

    def __init__(self, dim: int, hidden: int, *, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return cast(Tensor, self.fc2(F.gelu(self.fc1(x))))


def swiglu_width(hidden: int) -> int:
    """Width of the gate: two thirds of an MLP's `hidden` (same parameter count), rounded up to a multiple of 8."""
    return (int(hidden * 2 / 3) + 7) // 8 * 8


class SwiGlu(nn.Module):
    """w3(SiLU(a) * b) with (a, b) = w12 x (Shazeer 2020). `hidden` is what an MLP would have, see swiglu_width."""

    def __init__(self, dim: int, hidden: int, *, bias: bool = True) -> None:
        super().__init__()
        width = swiglu_width(hidden)
        self.w12 = nn.Linear(dim, 2 * width, bias=bias)
        self.w3 = nn.Linear(width, dim, bias=bias)

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return cast(Tensor, self.w3(F.silu(gate) * value))
