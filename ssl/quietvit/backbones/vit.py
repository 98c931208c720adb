"""ViT: the trunk behind a patch stem, as in DINOv2 with registers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from quietvit.backbones.trunk import Trunk, TrunkOptions
from quietvit.nn.patch_embed import PatchEmbed

__all__ = ["VIT_SIZES", "VisionTransformer"]

# small to giant: DINOv2 paper, table 17 (base has 12 blocks in code and checkpoints, not 18).
# tiny: DeiT, table 1. nano and micro: ours, for CPUs; heads 32 wide, so that there are several.
VIT_SIZES: Mapping[str, Mapping[str, Any]] = {
    "nano": {"embed_dim": 96, "depth": 4, "num_heads": 3},
    "micro": {"embed_dim": 128, "depth": 6, "num_heads": 4},
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "giant": {"embed_dim": 1536, "depth": 40, "num_heads": 24, "ffn": "swiglu"},
}


class VisionTransformer(Trunk):
    """Patches of `patch_size` pixels (default 14: the released DINOv2 models); other keywords: see TrunkOptions."""

    SIZES = VIT_SIZES

    def __init__(self, *, patch_size: int = 14, **options: Any) -> None:
        trunk = TrunkOptions(**options)
        super().__init__(trunk, stride=patch_size)
        self.arguments = {"patch_size": patch_size, **asdict(trunk)}
        self.patch_embed = PatchEmbed(trunk.embed_dim, patch_size)
        self.init_weights()

    def init_stem(self, generator: torch.Generator | None) -> None:
        self.patch_embed.reset_parameters(init=self.options.init, generator=generator)

    def tokenize(
        self, images: Float[Tensor, "b 3 H W"], mask: Bool[Tensor, "b N"] | None
    ) -> tuple[Float[Tensor, "b N D"], tuple[int, int]]:
        """A patch depends on its own pixels only, so putting the mask token in its place hides them for good."""
        x, grid = self.patch_embed(images)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        return x, grid
