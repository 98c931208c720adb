"""The patch stem: an image cut into squares, each a linear map of its pixels."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["PatchEmbed"]


class PatchEmbed(nn.Module):
    """Convolution with kernel = stride = patch side, its output as a row-major sequence. No norm after it."""

    def __init__(self, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def reset_parameters(self, *, init: str = "trunc_normal", generator: torch.Generator | None = None) -> None:
        """ "xavier": Glorot uniform, the patch seen as one vector. Otherwise PyTorch's default, as DINOv2 leaves it."""
        weight, bias = self.proj.weight, self.proj.bias
        assert bias is not None
        bound = 1 / math.sqrt(weight[0].numel())
        if init == "xavier":
            nn.init.xavier_uniform_(weight.flatten(1), generator=generator)
            nn.init.zeros_(bias)
        else:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
            nn.init.uniform_(bias, -bound, bound, generator=generator)

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> tuple[Float[Tensor, "b N D"], tuple[int, int]]:
        """Patch tokens and their grid (h, w)."""
        x = self.proj(images)
        return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])
