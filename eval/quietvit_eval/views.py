"""Bytes to feature maps: normalising, padding to whole patches, and back from the patch grid to pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from quietvit.contracts import Extractor
from quietvit_eval.blocks import read_blocks


def normalised(extractor: Extractor, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
    """As the extractor wants its images, on its device (bytes travel there: a quarter of what floats would)."""
    device = getattr(extractor, "device", torch.device("cpu"))
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) * 255 for v in (extractor.mean, extractor.std))
    return (images.to(device).float() - mean) / std


def padding(size: int, stride: int) -> tuple[int, int]:
    """Pixels before and after that make a side a multiple of the stride; of an odd number the greater part after."""
    missing = -size % stride
    return missing // 2, missing - missing // 2


def center_pad(images: Float[Tensor, "B C H W"], stride: int) -> Float[Tensor, "B C h*P w*P"]:
    """Zeros around normalised images, up to whole patches (DINOv2's CenterPadding)."""
    top, bottom = padding(images.shape[-2], stride)
    left, right = padding(images.shape[-1], stride)
    return F.pad(images, (left, right, top, bottom))


def feature_maps(
    extractor: Extractor,
    images: UInt8[Tensor, "B 3 H W"],
    which: Sequence[int],
    *,
    norm: bool,
    with_cls: bool = False,
) -> Float[Tensor, "B C h w"]:
    """Patch tokens of the listed blocks as one map of channels, block after block, images padded to whole patches.

    C is D for each block, or 2D with_cls: the patch and then [CLS], the same everywhere. Registers are left out.
    """
    x = center_pad(normalised(extractor, images), extractor.stride)
    maps = []
    for features in read_blocks(extractor, x, which, norm=norm):
        maps.append(features.patches.permute(0, 3, 1, 2))
        if with_cls:
            maps.append(features.cls[:, :, None, None].expand(-1, -1, *maps[-1].shape[-2:]))
    return torch.cat(maps, dim=1)


def to_pixels(
    maps: Float[Tensor, "B C h w"], size: tuple[int, int], stride: int, *, keep_padding: bool = False
) -> Float[Tensor, "B C H W"]:
    """Maps of the patch grid (or a whole multiple of it), bilinear, at the image's own (H, W).

    The padding is cut off again. DINOv2 does not (`keep_padding`): it squeezes the padded grid into the image, about
    1 % out of place.
    """
    if keep_padding:
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    padded = [s + -s % stride for s in size]
    whole = F.interpolate(maps, size=padded, mode="bilinear", align_corners=False)
    top, left = padding(size[0], stride)[0], padding(size[1], stride)[0]
    return whole[..., top : top + size[0], left : left + size[1]]
