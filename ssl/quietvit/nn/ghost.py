"""Attention and MLP with part of their channels made from the others by one factor each (T2T-ViT's ghost variant).

The idea is GhostNet's (Han et al. 2020); here a cheap operation is one learned factor for each channel.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from quietvit.nn.attention import Attention

__all__ = ["ChannelScale", "GhostAttention", "GhostMlp"]


class ChannelScale(nn.Module):
    """A factor for each channel, stored as the convolution over single tokens, one group a channel, that it is."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 1, 1))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Uniform in [-1, 1]: what PyTorch gives such a convolution, and T2T-ViT keeps."""
        nn.init.uniform_(self.weight, -1.0, 1.0, generator=generator)

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return x * self.weight.flatten()


class GhostAttention(Attention):
    """Half of the channels of q, k and v by a linear map, the other half by scaling those."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True, proj_bias: bool = True) -> None:
        super().__init__(dim, num_heads, proj_bias=proj_bias)
        if dim % 2:
            raise ValueError(f"ghost attention needs an even width, not {dim}")
        del self.qkv
        self.q, self.k, self.v = (nn.Linear(dim, dim // 2, bias=qkv_bias) for _ in range(3))
        self.cheap_operation_q, self.cheap_operation_k, self.cheap_operation_v = (
            ChannelScale(dim // 2) for _ in range(3)
        )

    def project(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T 3*D"]:
        q, k, v = self.q(x), self.k(x), self.v(x)
        parts = (q, self.cheap_operation_q(q), k, self.cheap_operation_k(k), v, self.cheap_operation_v(v))
        return torch.cat(parts, dim=-1)


class GhostMlp(nn.Module):
    """A hidden layer of three parts, each `dim` wide: y = GELU(fc1 x), and GELU of two scalings of y."""

    def __init__(self, dim: int, hidden: int, *, bias: bool = True) -> None:
        super().__init__()
        if hidden != 3 * dim:
            raise ValueError(
                f"a ghost MLP is three times as wide inside (hidden {hidden}, width {dim}): in a recipe take "
                "model.size=16-ghost, in Python mlp_ratio=3"
            )
        self.fc1 = nn.Linear(dim, dim, bias=bias)
        self.cheap_operation2 = ChannelScale(dim)
        self.cheap_operation3 = ChannelScale(dim)
        self.fc2 = nn.Linear(3 * dim, dim, bias=bias)

    @property
    def out_layer(self) -> nn.Linear:
        return self.fc2

    def hidden(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T H"]:
        x = F.gelu(self.fc1(x))
        return torch.cat((x, F.gelu(self.cheap_operation2(x)), F.gelu(self.cheap_operation3(x))), dim=-1)

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return cast(Tensor, self.fc2(self.hidden(x)))
