"""Depth heads: feature maps of frozen blocks -> metres on a grid somewhat finer than the patches'."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from quietvit_eval.depth.options import DepthOptions
from quietvit_eval.segmentation.head import FrozenInputBatchNorm

BIN_FLOOR = 0.1  # every bin's share before it is normalised, DINOv2
INIT_STD = 0.01  # of the linear head's weights, DINOv2 and DINOv3


def expected_depth(
    logits: Float[Tensor, "B bins h w"], *, min_depth: float, max_depth: float
) -> Float[Tensor, "B h w"]:
    """Metres: the mean of evenly spaced depths weighted by relu(logit) + 0.1 (Bhat et al. 2021; DINOv2).

    Equal logits below 0 give the middle of the range. One channel is regression: relu(logit) + min_depth.
    """
    if logits.shape[1] == 1:
        return F.relu(logits[:, 0]) + min_depth
    mass = F.relu(logits) + BIN_FLOOR
    depths = torch.linspace(min_depth, max_depth, logits.shape[1], device=logits.device, dtype=logits.dtype)
    return torch.einsum("bchw,c->bhw", mass, depths) / mass.sum(dim=1)


class LinearHead(nn.Module):
    """One linear map of the features of each patch to logits of bins, which are then interpolated.

    DINOv2 interpolates the features and maps them afterwards. The two commute (the weights of bilinear interpolation
    sum to 1) and this order moves fewer channels; only the statistics of a batch norm would differ a little.
    """

    def __init__(self, channels: int, options: DepthOptions) -> None:
        super().__init__()
        self.options = options
        self.norm = FrozenInputBatchNorm(channels) if options.batch_norm else nn.Identity()
        self.conv = nn.Conv2d(channels, options.bins or 1, 1)
        nn.init.normal_(self.conv.weight, std=INIT_STD)
        nn.init.constant_(self.conv.bias, 0.0 if options.bins else middle(options))  # type: ignore[arg-type]

    def forward(self, maps: Float[Tensor, "B C h w"]) -> Float[Tensor, "B u*h u*w"]:
        """Metres, u the upsampling."""
        logits = self.conv(self.norm(maps))
        if self.options.upsample > 1:
            logits = F.interpolate(logits, scale_factor=self.options.upsample, mode="bilinear", align_corners=False)
        return expected_depth(logits, min_depth=self.options.min_depth, max_depth=self.options.max_depth)


def middle(options: DepthOptions) -> float:
    """Where a regression starts, metres above min_depth: with bins the middle of the range (ours).

    From a start at 0 a relu that happens to be off everywhere would never learn.
    """
    return (options.max_depth - options.min_depth) / 2
