"""The linear head of dense features: batch norm over all ranks, and a 1 x 1 convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quietvit import dist
from quietvit_eval.dense_data.pairs import IGNORE
from quietvit_eval.views import to_pixels

WEIGHT_STD = 0.01  # mmsegmentation's decode heads


class FrozenInputBatchNorm(nn.BatchNorm2d):
    """Batch norm whose statistics are those of the maps of all ranks, on any backend.

    The input must need no gradient: none flows through the statistics.
    """

    def forward(self, maps: Float[Tensor, "b C h w"]) -> Float[Tensor, "b C h w"]:
        if not self.training:
            return super().forward(maps)
        assert not maps.requires_grad
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        count = float(dist.sum_over_ranks(torch.tensor(float(maps[:, 0].numel()), device=maps.device)))
        mean = dist.sum_over_ranks(maps.sum(dim=(0, 2, 3))) / count
        # Around the mean: E[x^2] - E[x]^2 would lose the digits of channels far from 0.
        var = dist.sum_over_ranks((maps - mean[:, None, None]).square().sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / max(count - 1, 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(var + self.eps)
        return maps * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


class SegmentationHead(nn.Module):
    """Maps of frozen features to class scores on the same grid.

    DINOv2's BNHead and DINOv3's LinearHead, which drops whole channels before the norm.
    """

    def __init__(self, channels: int, num_classes: int, *, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.norm = FrozenInputBatchNorm(channels)
        self.conv = nn.Conv2d(channels, num_classes, kernel_size=1)
        nn.init.normal_(self.conv.weight, std=WEIGHT_STD, generator=generator)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, maps: Float[Tensor, "b C h w"]) -> Float[Tensor, "b K h w"]:
        out: Tensor = self.conv(self.norm(self.dropout(maps)))
        return out


def pixel_loss(
    logits: Float[Tensor, "b K h w"], targets: Int[Tensor, "b S S"], stride: int, *, average: str, keep_padding: bool
) -> Float[Tensor, ""]:
    """Cross-entropy of the logits, bilinear at the pixels, summed over those that count.

    Divided by the number of all pixels (average="all") or of those that count on all ranks ("valid"), so that the mean
    over ranks is that of the whole batch. One image's pixels are in memory at a time, forwards and backwards.
    """
    if average == "all":
        count = torch.tensor(float(targets.numel()), device=targets.device)
    else:
        count = dist.sum_over_ranks((targets != IGNORE).sum().float()) / dist.world_size()
    sums = [
        checkpoint(_summed_loss, one[None], target[None], stride, keep_padding, use_reentrant=False)
        for one, target in zip(logits, targets, strict=True)
    ]
    return torch.stack(sums).sum() / count.clamp(min=1)


def _summed_loss(
    logits: Float[Tensor, "1 K h w"], targets: Int[Tensor, "1 S S"], stride: int, keep_padding: bool
) -> Float[Tensor, ""]:
    height, width = targets.shape[-2:]
    at_pixels = to_pixels(logits, (height, width), stride, keep_padding=keep_padding)
    return F.cross_entropy(at_pixels, targets, ignore_index=IGNORE, reduction="sum")
