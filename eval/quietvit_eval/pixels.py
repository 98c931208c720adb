"""The pixel control: what k-NN reaches with no model at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from quietvit.contracts import Extractor, Features

MOST = 64  # ours: 12,288 numbers an image; at 224 pixels a bank of ImageNet would take 770 GB


class PixelExtractor:
    """Flattened normalised pixels as `cls` (and as the one "patch"), in the input format of another extractor.

    Images larger than 64 pixels are averaged down to 64 x 64 first.
    """

    num_blocks = 1
    has_patches = False  # one vector an image: nothing to average

    def __init__(self, like: Extractor, image_size: int) -> None:
        self.stride, self.mean, self.std = like.stride, like.mean, like.std
        self.image_size = image_size
        self.side = min(image_size, MOST)
        self.embed_dim = 3 * self.side**2

    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Features:
        pixels = F.adaptive_avg_pool2d(images, self.side).flatten(1)
        return Features(pixels, torch.empty(len(pixels), 0, self.embed_dim), pixels[:, None, None])

    def last_blocks(self, images: Float[Tensor, "B 3 H W"], num: int) -> Sequence[Features]:
        if num != 1:
            raise ValueError(f"pixels have 1 block, not {num}")
        return [self(images)]

    def identity(self) -> dict[str, Any]:
        """For the card."""
        return {"hash": f"pixels-{self.side}"}
