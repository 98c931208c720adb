"""The tokens-to-token stem (Yuan et al. 2021, T2T-ViT, section 3.1): overlapping soft splits with attention in between.

A soft split unfolds the image, or the map that attention made of the last split, into overlapping windows; attention
mixes the windows of one image and shortens them; re-structurisation lays them out as a map again. The last split is
not followed by attention but projected to the width of the trunk. Parameter names are those of the T2T-ViT checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quietvit.nn.feed_forward import Mlp
from quietvit.nn.performer import performer_attention, random_features

__all__ = ["SOFT_SPLITS", "STEM_ATTENTION", "SoftSplit", "TokenPerformer", "TokenTransformer", "TokensToToken"]

Grid = tuple[int, int]


class SoftSplit(NamedTuple):
    """Square windows: side, distance and zero padding in pixels (of the image, or of the map before)."""

    kernel: int
    stride: int
    padding: int


# By the side of a token's cell in pixels. 16 is T2T-ViT's own; the others are ours, for small images: the same windows
# with one iteration less.
SOFT_SPLITS: Mapping[int, tuple[SoftSplit, ...]] = {
    16: (SoftSplit(7, 4, 2), SoftSplit(3, 2, 1), SoftSplit(3, 2, 1)),
    8: (SoftSplit(7, 4, 2), SoftSplit(3, 2, 1)),
    4: (SoftSplit(3, 2, 1), SoftSplit(3, 2, 1)),
}
OFFICIAL_EPSILON = 1e-8  # T2T-ViT's Performer; see performer_attention


class TokenTransformer(nn.Module):
    """y = v + proj(softmax(q k' / sqrt(dim)) v), then y + MLP(LN y): one head of width `token_dim`.

    `dim` is the width that comes in, which is what T2T-ViT scales by (not the width of q and k). The skip starts at v,
    because the widths before and after differ.
    """

    KEPT_WIDTHS = 8  # for the backward pass: q, k, v, attention, norm before and after, MLP before and after its GELU

    def __init__(self, dim: int, token_dim: int, *, norm_eps: float) -> None:
        super().__init__()
        self.scale = dim**-0.5
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(dim, 3 * token_dim, bias=False), "proj": nn.Linear(token_dim, token_dim)}
        )
        self.norm2 = nn.LayerNorm(token_dim, eps=norm_eps)
        self.mlp = Mlp(token_dim, token_dim)

    def forward(self, x: Float[Tensor, "b n d"], visible: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n c"]:
        q, k, v = self.attn["qkv"](self.norm1(x)).unsqueeze(1).chunk(3, dim=-1)  # each [b 1 n c]
        mask = None if visible is None else visible[:, None, None]
        y = v + self.attn["proj"](F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale))
        y = y.squeeze(1)
        return cast(Tensor, y + self.mlp(self.norm2(y)))


class TokenPerformer(nn.Module):
    """As TokenTransformer, with attention of linear cost: memory grows with the number of windows, not its square.

    By default an estimate of softmax(q k' / sqrt(token_dim)): q and k shortened by token_dim^(1/4), features of length
    sqrt(token_dim). `official` is T2T-ViT's own kernel, for its weights: no temperature, features of length
    sqrt(their number), 1e-8 in the denominator. Its dropout of 0.1 is left out: the teacher would not have it.
    """

    KEPT_WIDTHS = 11  # as TokenTransformer, and: shortened keys, two exponentials half as wide, the numerator
    w: Float[Tensor, "m c"]

    def __init__(self, dim: int, token_dim: int, *, norm_eps: float, official: bool = False) -> None:
        super().__init__()
        self.official = official
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.kqv = nn.Linear(dim, 3 * token_dim)  # T2T-ViT's order: keys first
        self.register_buffer("w", torch.empty(token_dim // 2, token_dim))
        self.proj = nn.Linear(token_dim, token_dim)
        self.norm2 = nn.LayerNorm(token_dim, eps=norm_eps)
        self.mlp = nn.Sequential(nn.Linear(token_dim, token_dim), nn.GELU(), nn.Linear(token_dim, token_dim))

    def forward(self, x: Float[Tensor, "b n d"], visible: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n c"]:
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        if self.official:
            mixed = performer_attention(q, k, v, self.w, visible, epsilon=OFFICIAL_EPSILON)
        else:
            shorten = k.shape[-1] ** -0.25
            mixed = performer_attention(q * shorten, k * shorten, v, self.w, visible)
        y = v + self.proj(mixed.to(v.dtype))
        return cast(Tensor, y + self.mlp(self.norm2(y)))

    @torch.no_grad()
    def reset_features(self, generator: torch.Generator | None) -> None:
        """Draw the random features anew."""
        count, dim = self.w.shape
        self.w.copy_(random_features(count, dim, math.sqrt(count if self.official else dim), generator))


STEM_ATTENTION = ("performer", "performer_official", "transformer")


class TokensToToken(nn.Module):
    """Soft splits with attention in between: images to tokens of width `embed_dim`.

    The feature maps are the memory of this stem: attention never holds an n x n matrix (SDPA or Performer), the last
    split is a convolution that never holds its windows, and `recompute` keeps only the maps between the stages for the
    backward pass, computing each stage twice.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        splits: Sequence[SoftSplit],
        token_dim: int,
        attention: str,
        norm_eps: float,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if attention not in STEM_ATTENTION:
            raise ValueError(f"stem_attention must be one of {STEM_ATTENTION}, not '{attention}'")
        if token_dim < 2 or token_dim % 2:
            raise ValueError(f"token_dim must be even (the Performer has half as many features), not {token_dim}")
        self.splits = tuple(splits)
        self.token_dim = token_dim
        self.recompute = recompute
        dim = 3
        for i, split in enumerate(self.splits[:-1], start=1):
            window = dim * split.kernel**2
            if attention == "transformer":
                stage: nn.Module = TokenTransformer(window, token_dim, norm_eps=norm_eps)
            else:
                stage = TokenPerformer(window, token_dim, norm_eps=norm_eps, official=attention == "performer_official")
            self.add_module(f"attention{i}", stage)
            dim = token_dim
        self.project = nn.Linear(dim * self.splits[-1].kernel ** 2, embed_dim)

    def init_weights(
        self, init_linear: Callable[[nn.Linear, torch.Generator | None], None], generator: torch.Generator | None
    ) -> None:
        """Starting values: linear layers as the trunk's, norms 1 and 0, random features drawn."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module, generator)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, TokenPerformer):
                module.reset_features(generator)

    def forward(
        self, images: Float[Tensor, "b 3 H W"], visible: Bool[Tensor, "b H W"] | None = None
    ) -> tuple[Float[Tensor, "b N D"], Grid]:
        """Tokens, row-major, and their grid (h, w). Sides must be multiples of the product of the strides.

        `visible` marks the pixels that may be seen. A window without any is no key of the attention; what it holds is
        up to the caller, who has to blank the other pixels.
        """
        x = images
        for i, split in enumerate(self.splits[:-1], start=1):
            stage = self.get_submodule(f"attention{i}")
            seen = None
            if visible is not None:
                visible = _windows_with_any(visible, split)
                seen = visible.flatten(1)
                seen = seen | ~seen.any(1, keepdim=True)  # attention over nothing is no number
            arguments = (stage, split, x, seen)
            x = checkpoint(_stage, *arguments, use_reentrant=False) if self._recomputes(x) else _stage(*arguments)
        x = self._project(x)
        return x.flatten(2).mT, (x.shape[2], x.shape[3])

    def kept_values(self, side: int) -> int:
        """Numbers kept for the backward pass of one square image: an estimate.

        For every window: its pixels before and after the norm, and of what attention and MLP make of them so many
        times the token width as the class says; besides, the map that the last split reads. With `recompute`: the image
        and all maps. The stage that is being computed again is not counted: the trunk's values are gone by then.
        """
        pixels, maps, inside = 3 * side**2, 0, 0
        for i, split in enumerate(self.splits[:-1], start=1):
            side = _out_grid((side, side), split)[0]
            stage = cast("TokenPerformer | TokenTransformer", self.get_submodule(f"attention{i}"))
            inside += side**2 * (2 * stage.norm1.weight.numel() + stage.KEPT_WIDTHS * self.token_dim)
            maps += side**2 * self.token_dim
        return pixels + maps if self.recompute else inside + side**2 * self.token_dim

    def _recomputes(self, x: Tensor) -> bool:
        return self.recompute and torch.is_grad_enabled() and self.project.weight.requires_grad

    def _project(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b D h w"]:
        """The last split and its projection: a linear map of windows is a convolution."""
        split = self.splits[-1]
        weight = self.project.weight.unflatten(1, (x.shape[1], split.kernel, split.kernel))
        return F.conv2d(x, weight, self.project.bias, stride=split.stride, padding=split.padding)


def _stage(
    attention: nn.Module, split: SoftSplit, x: Float[Tensor, "b c h w"], seen: Bool[Tensor, "b n"] | None
) -> Float[Tensor, "b e h w"]:
    """Soft split, attention, re-structurisation."""
    grid = _out_grid((x.shape[2], x.shape[3]), split)
    windows = F.unfold(x, split.kernel, stride=split.stride, padding=split.padding).mT
    tokens: Tensor = attention(windows, seen)
    return cast(Tensor, tokens.mT.unflatten(2, grid))


def _out_grid(grid: Grid, split: SoftSplit) -> Grid:
    rows, columns = ((side + 2 * split.padding - split.kernel) // split.stride + 1 for side in grid)
    return rows, columns


def _windows_with_any(visible: Bool[Tensor, "b h w"], split: SoftSplit) -> Bool[Tensor, "b r c"]:
    """Whether a window holds anything visible; padding is not."""
    return F.max_pool2d(visible.float()[:, None], split.kernel, split.stride, split.padding)[:, 0] > 0
