"""What timm and transformers have in common as targets: the plain ViT, positions resized by their own rule."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from quietvit.backbones import Trunk
from quietvit.contracts import Features
from quietvit.weights.export.target import Size
from quietvit.weights.extractor import BackboneExtractor

__all__ = [
    "CROP_SHARE",
    "fp32",
    "missing_extra",
    "not_a_plain_vit",
    "positions_are",
    "sizes_to_compare",
    "split_tokens",
]

CROP_SHARE = 224 / 256  # of the shorter side, that is cropped to the model's size: ImageNet's evaluation since AlexNet


def missing_extra(package: str) -> str | None:
    """That a package is missing, through which an export is checked, and how to get it; or None."""
    if importlib.util.find_spec(package):
        return None
    return f"{package} is not installed, and the export is checked through it: pip install 'quietvit[{package}]'"


def not_a_plain_vit(extractor: BackboneExtractor, library: str) -> str | None:
    """Why the ViT of timm or transformers cannot express the model, and what can be done; or None."""
    name = extractor.meta["backbone"]["name"]
    others = "export it to safetensors, onnx or torch"
    if name != "vit":
        return f"{library} has no architecture for {name}: {others}"
    o = cast(Trunk, extractor.backbone).options
    odd = {
        "attention_layer": o.attention_layer != "plain",
        "ffn": o.ffn == "ghost",
        "dense_groups": bool(o.dense_groups),
        "register_neurons": bool(o.register_neurons),
    }
    for option in (key for key, differs in odd.items() if differs):
        return f"{library}'s ViT has nothing like {option} {getattr(o, option)!r}: {others}"
    if o.positions != "learned":
        return f"{library}'s ViT has a learned table of positions, and this one has {o.positions} ones: {others}"
    return None


def positions_are(extractor: BackboneExtractor, *, antialias: bool) -> bool:
    """Whether positions are resized to a given size, with or without antialiasing."""
    o = cast(Trunk, extractor.backbone).options
    return o.pos_interpolation == "size" and o.pos_antialias == antialias


def sizes_to_compare(extractor: BackboneExtractor, *, every_size: bool) -> Sequence[Size]:
    """The native size, then a larger, a smaller and a non-square one, where positions are resized alike."""
    side, stride = extractor.backbone.image_size, extractor.stride
    assert isinstance(side, int)
    if not every_size:
        return [(side, side)]
    smaller = max(stride, side // (2 * stride) * stride)
    return [(side, side), (side + stride, side + stride), (smaller, smaller), (smaller, side + stride)]


def split_tokens(tokens: Tensor, grid: tuple[int, int], num_registers: int) -> Features:
    """[class | registers | patches] as Features; detached."""
    first = 1 + num_registers
    tokens = tokens.detach()
    return Features(tokens[:, 0], tokens[:, 1:first], tokens[:, first:].unflatten(1, grid))


def fp32(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU (or the meta device, if it is there) that shares memory with nothing."""
    device = "meta" if tensor.is_meta else "cpu"
    return tensor.detach().to(device, torch.float32, copy=True).contiguous()
