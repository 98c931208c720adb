"""Attention whose output channels are gated, each image by its own mean (T2T-ViT's SE variant; Hu et al. 2018)."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from quietvit.nn.attention import Attend, Attention
from quietvit.nn.packing import Groups, pack, unpack

__all__ = ["REDUCTION", "GatedAttention"]

REDUCTION = 16  # T2T-ViT's code; Hu et al. 2018, table 10


class GatedAttention(Attention):
    """y * sigmoid(W2 relu(W1 mean(y))), y the output of attention, its mean over all tokens of an image."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True, proj_bias: bool = True) -> None:
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, proj_bias=proj_bias)
        hidden = max(dim // REDUCTION, 1)
        fc = nn.Sequential(
            nn.Linear(dim, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, dim, bias=False), nn.Sigmoid()
        )
        self.se_layer = nn.ModuleDict({"fc": fc})

    def forward(self, x: Float[Tensor, "T D"], groups: Groups, *attend: Attend) -> Float[Tensor, "T D"]:
        y = super().forward(x, groups, *attend)
        means = torch.cat([part.mean(1) for part in unpack(y, groups)])  # [images D]
        gates = cast(Tensor, self.se_layer["fc"](means)).split([images for images, _ in groups])
        rows = [gate[:, None].expand(-1, tokens, -1) for gate, (_, tokens) in zip(gates, groups, strict=True)]
        return y * pack(rows)[0]
