"""The feed-forward networks of DINOv2, MLP and SwiGLU, with the activations that CLIP's relatives put into the MLP.

Parameter names are those of DINOv2's checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "FeedForward", "Mlp", "SwiGlu", "quick_gelu", "swiglu_width"]


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x): the GELU's approximation in OpenAI's CLIP (Hendrycks and Gimpel 2016)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class FeedForward(Protocol):
    """What every kind is, the ghost variant too: `out_layer(hidden(x))`."""

    @property
    def out_layer(self) -> nn.Linear: ...

    def hidden(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T H"]:
        """Activations of the hidden units."""
        ...


class Mlp(nn.Module):
    """fc2(act(fc1 x)) with one of ACTIVATIONS, by default the exact GELU; `hidden` is the width in between."""

    def __init__(self, dim: int, hidden: int, *, bias: bool = True, activation: str = "gelu") -> None:
        super().__init__()
        self.act = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    @property
    def out_layer(self) -> nn.Linear:
        return self.fc2

    def hidden(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T H"]:
        return self.act(cast(Tensor, self.fc1(x)))

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return cast(Tensor, self.fc2(self.hidden(x)))


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

    @property
    def out_layer(self) -> nn.Linear:
        return self.w3

    def hidden(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T H"]:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return cast(Tensor, F.silu(gate) * value)

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return cast(Tensor, self.w3(self.hidden(x)))
