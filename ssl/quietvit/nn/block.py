"""The pre-norm transformer block of DINOv2, on packed groups of sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from quietvit.nn.attention import ATTENTION, Attend, Attention
from quietvit.nn.drop_path import BranchDrop, add_residual
from quietvit.nn.feed_forward import ACTIVATIONS, Mlp, SwiGlu
from quietvit.nn.ghost import GhostAttention, GhostMlp
from quietvit.nn.packing import Groups
from quietvit.nn.squeeze_excitation import GatedAttention

__all__ = ["ATTENTION_LAYERS", "FEED_FORWARD", "Block", "LayerScale"]


class LayerScale(nn.Module):
    """One learned factor per channel (Touvron et al. 2021, CaiT), all equal to `initial` at the start."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.initial)

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return x * self.gamma


FEED_FORWARD: Mapping[str, Callable[..., nn.Module]] = {"mlp": Mlp, "swiglu": SwiGlu, "ghost": GhostMlp}
ATTENTION_LAYERS: Mapping[str, Callable[..., Attention]] = {
    "plain": Attention,
    "se": GatedAttention,
    "ghost": GhostAttention,
}


class Block(nn.Module):
    """x <- x + DP(LS1(Attn(LN1 x))); x <- x + DP(LS2(FFN(LN2 x))).

    Stochastic depth DP comes from outside as one BranchDrop for each branch, so that a block is a function of its
    arguments: recomputing it (activation checkpointing) or injecting recorded draws needs nothing special.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        ffn: str = "mlp",
        activation: str = "gelu",
        attention_layer: str = "plain",
        mlp_ratio: float = 4.0,
        layer_scale: float = 0.0,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        _check_known("ffn", ffn, FEED_FORWARD)
        _check_known("activation", activation, ACTIVATIONS)
        _check_known("attention_layer", attention_layer, ATTENTION_LAYERS)
        if ffn != "mlp" and activation != "gelu":
            raise ValueError(f"activation '{activation}' is for ffn 'mlp'; '{ffn}' has its own: leave activation out")
        self.out_dim = dim
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = ATTENTION_LAYERS[attention_layer](dim, num_heads, qkv_bias=qkv_bias, proj_bias=proj_bias)
        self.head_dim = self.attn.head_dim
        self.ls1 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        own = {"activation": activation} if ffn == "mlp" else {}
        self.mlp = FEED_FORWARD[ffn](dim, int(dim * mlp_ratio), bias=ffn_bias, **own)
        self.ls2 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "T D"],
        groups: Groups,
        attend: Attend = ATTENTION["sdpa"].attend,
        drops: tuple[BranchDrop | None, BranchDrop | None] = (None, None),
    ) -> Float[Tensor, "T D"]:
        def attention(x: Tensor, groups: Groups) -> Tensor:
            return cast(Tensor, self.ls1(self.attn(self.norm1(x), groups, attend)))

        def feed_forward(x: Tensor, groups: Groups) -> Tensor:
            return cast(Tensor, self.ls2(self.feed(self.norm2(x), groups)))

        x = add_residual(x, attention, groups, drops[0])
        return add_residual(x, feed_forward, groups, drops[1])

    def feed(self, x: Float[Tensor, "T D"], groups: Groups) -> Float[Tensor, "T D"]:
        """The feed-forward network on normalised tokens."""
        return cast(Tensor, self.mlp(x))


def _check_known(what: str, name: str, known: Iterable[str]) -> None:
    names = list(known)
    if name not in names:
        near = get_close_matches(name, names, n=1) or names
        raise ValueError(f"unknown {what} '{name}'; did you mean {' or '.join(near)}?")
