"""T2T-ViT: the trunk behind a tokens-to-token stem (Yuan et al. 2021, arXiv 2101.11986)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from quietvit.backbones.trunk import Trunk, TrunkOptions
from quietvit.nn.tokens_to_token import SOFT_SPLITS, TokensToToken

__all__ = ["OFFICIAL", "T2T_SIZES", "T2TViT"]


def _size(embed_dim: int, depth: int, num_heads: int, mlp_ratio: float, **others: Any) -> dict[str, Any]:
    return {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio, **others}


# 7 to t-24: T2T-ViT's code (7 has seven blocks there, eight in the paper's table 1); "t-": transformer in the stem.
# The five after them are the architecture study of its section 3.2; "wide" and "ghost" have the depth of the code.
# nano and micro: ours, for CPUs, as wide and deep as those of ViT.
T2T_SIZES: Mapping[str, Mapping[str, Any]] = {
    "nano": _size(96, 4, 3, 4.0, token_dim=32),
    "micro": _size(128, 6, 4, 4.0, token_dim=32),
    "7": _size(256, 7, 4, 2.0),
    "10": _size(256, 10, 4, 2.0),
    "12": _size(256, 12, 4, 2.0),
    "14": _size(384, 14, 6, 3.0),
    "19": _size(448, 19, 7, 3.0),
    "24": _size(512, 24, 8, 3.0),
    "t-14": _size(384, 14, 6, 3.0, stem_attention="transformer"),
    "t-19": _size(448, 19, 7, 3.0, stem_attention="transformer"),
    "t-24": _size(512, 24, 8, 3.0, stem_attention="transformer"),
    "14-wide": _size(768, 4, 12, 3.0),
    "14-resnext": _size(384, 14, 32, 3.0),
    "14-se": _size(384, 14, 6, 3.0, attention_layer="se"),
    "16-ghost": _size(384, 16, 6, 3.0, attention_layer="ghost", ffn="ghost"),
    "dense": _size(128, 22, 8, 2.0, dense_groups="3-6-6-4", growth=64),
}

# What released weights were trained with, where it differs from our defaults.
OFFICIAL: Mapping[str, Any] = {
    "patch_size": 16,
    "num_registers": 0,
    "layer_scale": 0.0,
    "qkv_bias": False,
    "norm_eps": 1e-5,
    "positions": "sinusoid",
}


class T2TViT(Trunk):
    """Tokens of `patch_size` pixels, made by a row of SOFT_SPLITS; other keywords: see TrunkOptions.

    `token_dim`: width inside the stem (T2T-ViT: 64). `stem_attention`: "performer", "transformer", or
    "performer_official", the form that released weights need. `recompute`: hold less of the stem for the backward pass.
    """

    SIZES = T2T_SIZES

    def __init__(
        self,
        *,
        patch_size: int = 16,
        token_dim: int = 64,
        stem_attention: str = "performer",
        recompute: bool = False,
        **options: Any,
    ) -> None:
        trunk = TrunkOptions(**options)
        if patch_size not in SOFT_SPLITS:
            raise ValueError(
                f"patch_size of a tokens-to-token stem must be one of {sorted(SOFT_SPLITS)}, not {patch_size}"
            )
        super().__init__(trunk, stride=patch_size)
        stem = {
            "patch_size": patch_size,
            "token_dim": token_dim,
            "stem_attention": stem_attention,
            "recompute": recompute,
        }
        self.arguments = {**stem, **asdict(trunk)}
        self.tokens_to_token = TokensToToken(
            trunk.embed_dim,
            splits=SOFT_SPLITS[patch_size],
            token_dim=token_dim,
            attention=stem_attention,
            norm_eps=trunk.norm_eps,
            recompute=recompute,
        )
        self.init_weights()

    def init_stem(self, generator: torch.Generator | None) -> None:
        self.tokens_to_token.init_weights(self.init_linear, generator)

    def stem_values(self, side: int) -> int:
        return self.tokens_to_token.kept_values(side)

    def tokenize(
        self, images: Float[Tensor, "b 3 H W"], mask: Bool[Tensor, "b N"] | None
    ) -> tuple[Float[Tensor, "b N D"], tuple[int, int]]:
        """Windows overlap and attend to each other, so a mask has to hide pixels before it replaces tokens.

        Pixels under the mask become 0 (the data set's mean, once normalised), windows that see nothing else are no keys
        of the stem's attention, and masked tokens become the mask token.
        """
        if mask is None:
            return self.tokens_to_token(images)  # type: ignore[no-any-return]
        rows, columns = images.shape[2] // self.stride, images.shape[3] // self.stride
        hidden = mask.unflatten(1, (rows, columns))
        hidden = hidden.repeat_interleave(self.stride, 1).repeat_interleave(self.stride, 2)
        x, grid = self.tokens_to_token(images.masked_fill(hidden[:, None], 0.0), ~hidden)
        return torch.where(mask[..., None], self.mask_token.to(x.dtype), x), grid
