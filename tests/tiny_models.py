"""Tiny models and images for the tests of `quietvit inspect`, and a model whose patch tokens are the pixels alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from quietvit.backbones import Trunk, make_backbone
from quietvit.contracts import Features
from quietvit.weights import BackboneExtractor, save_teacher

SMALL: dict[str, Any] = {"embed_dim": 24, "depth": 3, "num_heads": 3, "image_size": 32, "num_registers": 2}
BACKBONES: dict[str, dict[str, Any]] = {
    "vit": {"name": "vit", "patch_size": 8, **SMALL},
    "one head, no registers": {"name": "vit", "patch_size": 8, **SMALL, "num_heads": 1, "num_registers": 0},
    "t2t": {"name": "t2t_vit", "patch_size": 8, **SMALL, "token_dim": 16},
    "t2t of three splits": {"name": "t2t_vit", "patch_size": 16, **SMALL, "token_dim": 16},
    "dense": {
        "name": "t2t_vit", "patch_size": 16, **SMALL, "token_dim": 16, "depth": 5, "dense_groups": "2-2", "growth": 6,
    },
}  # fmt: skip
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def build(name: str, **changes: Any) -> Trunk:
    """A backbone in which nothing is zero: biases are, at the start."""
    torch.manual_seed(0)
    backbone = make_backbone(**{**BACKBONES[name], **changes}).eval()
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return backbone


def extractor_of(backbone: Trunk) -> BackboneExtractor:
    """The backbone behind the evaluable signature, on the CPU."""
    name = "vit" if hasattr(backbone, "patch_embed") else "t2t_vit"
    meta = {
        "backbone": {"name": name, "arguments": backbone.arguments},
        "normalisation": {"mean": MEAN, "std": STD},
        "image_size": 32,
        "provenance": {},
    }
    return BackboneExtractor(backbone, meta, device=torch.device("cpu"))


def save_run(folder: Path, name: str = "vit") -> Path:
    """A folder with the teacher of `build(name)`."""
    backbone = build(name)
    kind = BACKBONES[name]["name"]
    save_teacher(folder, backbone, mean=MEAN, std=STD, image_size=32, provenance={}, backbone_name=kind)
    return folder


def write_images(folder: Path, count: int, *, broken: int = 0) -> Path:
    """PNGs of 40 x 36 noise, and files that are no images."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (36, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"image_{i}.png")
    for i in range(broken):
        (folder / f"broken_{i}.png").write_bytes(b"no image")
    return folder


class PatchPixels:
    """An extractor whose patch tokens are the pixels of the patch; it has no attention and no blocks to read."""

    num_blocks, stride, image_size = 2, 4, 32
    mean, std = MEAN, STD
    embed_dim = 3 * 4 * 4

    def __call__(self, images: Tensor) -> Features:
        patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3)
        return Features(patches.mean((1, 2)), patches.new_empty(len(patches), 0, self.embed_dim), patches)

    def last_blocks(self, images: Tensor, num: int) -> list[Features]:
        return [self(images)] * num
