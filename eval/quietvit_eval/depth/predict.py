"""A frozen model and a depth head on images: features, and the depth of a whole image at its own size."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn

from quietvit.contracts import Extractor
from quietvit_eval.blocks import spread_blocks
from quietvit_eval.depth.augment import resized
from quietvit_eval.depth.dpt import DptHead
from quietvit_eval.depth.heads import LinearHead
from quietvit_eval.depth.options import DepthOptions
from quietvit_eval.views import feature_maps, to_pixels


def chosen_blocks(extractor: Extractor, options: DepthOptions) -> list[int]:
    """The blocks that the head reads, numbered from 0. Raises ValueError if there are too few."""
    if options.layer_indices is not None:
        return list(options.layer_indices)
    if options.layers == 1:
        return [extractor.num_blocks - 1]
    return spread_blocks(extractor.num_blocks, options.layers)


def make_head(extractor: Extractor, options: DepthOptions, seed: int) -> nn.Module:
    """The untrained head, the same for the same seed on every rank. Raises ValueError for a width that DPT cannot."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if options.head == "dpt":
            return DptHead(extractor.embed_dim, options)
        return LinearHead(extractor.embed_dim * options.num_blocks * (1 + options.with_cls), options)


class DepthModel:
    """An extractor with a head, which lives on `device`. `most`: images that the extractor is given at a time."""

    def __init__(
        self, extractor: Extractor, head: nn.Module, options: DepthOptions, *, device: torch.device, most: int
    ) -> None:
        self.extractor, self.head, self.options = extractor, head.to(device), options
        self.device, self.most = device, most
        self.blocks = chosen_blocks(extractor, options)

    def depth(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B H W"]:
        """Metres at the images' size; differentiable in the head alone, not clamped."""
        with torch.no_grad():
            parts = [
                feature_maps(
                    self.extractor, part, self.blocks, norm=self.options.norm, with_cls=self.options.with_cls
                ).to(self.device)
                for part in images.split(self.most)
            ]
        size = (images.shape[-2], images.shape[-1])
        coarse = self.head(torch.cat(parts))[:, None]
        if not self.head.training:
            coarse = coarse.clamp(self.options.min_depth, self.options.max_depth)
        return to_pixels(coarse, size, self.extractor.stride, keep_padding=self.options.keep_padding)[:, 0]

    def predict(self, image: UInt8[np.ndarray, "H W 3"]) -> Float32[np.ndarray, "H W"]:
        """Metres of a whole image of any size, between min_depth and max_depth.

        The mean of those for the image and its mirror image with options.flip_test. With options.resize the shorter
        side is brought to that first, and the depth back to the image's size.
        """
        own = (image.shape[0], image.shape[1])
        if self.options.resize is not None and self.options.resize != min(own):
            scale = self.options.resize / min(own)
            image = resized(image, (max(1, round(own[0] * scale)), max(1, round(own[1] * scale))))
        x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
        views = torch.cat([x, x.flip(-1)]) if self.options.flip_test else x
        with torch.no_grad():
            found = self.depth(views)
            if self.options.flip_test:
                found = torch.stack([found[0], found[1].flip(-1)]).mean(dim=0, keepdim=True)
            if tuple(found.shape[-2:]) != own:
                found = F.interpolate(found[None], size=own, mode="bilinear", align_corners=False)[0]
        depth: np.ndarray = found[0].clamp(self.options.min_depth, self.options.max_depth).float().cpu().numpy()
        return depth
