"""What the tests of exports share: small models whose every weight matters, and a Python that has no quietvit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from quietvit.backbones import make_backbone
from quietvit.contracts import Features
from quietvit.weights.export.target import Opened, Size
from quietvit.weights.extractor import BackboneExtractor

# name -> backbone, what differs from a register ViT of two blocks with patches of 4 pixels
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit", {"num_classes": 5}),
    "plain": ("vit", {"ffn": "swiglu", "num_registers": 0, "layer_scale": 0.0, "qkv_bias": False}),
    "clip": ("vit", {"pre_norm": True, "activation": "quick_gelu", "pos_interpolation": "offset"}),
    "t2t": ("t2t_vit", {"token_dim": 8, "patch_size": 8}),
    "official": (
        "t2t_vit",
        {"token_dim": 8, "patch_size": 8, "stem_attention": "performer_official", "positions": "sinusoid"},
    ),
    "transformer": ("t2t_vit", {"token_dim": 8, "stem_attention": "transformer"}),
    "dense": ("vit", {"dense_groups": "1-1", "growth": 8, "depth": 3}),
    "gated": ("vit", {"attention_layer": "se"}),
    "ghost": ("vit", {"attention_layer": "ghost", "ffn": "ghost", "mlp_ratio": 3.0}),
}


def extractor_of(kind: str, **arguments: Any) -> BackboneExtractor:
    """A model of KINDS at 16 pixels, all of its parameters away from their starting values."""
    name, special = KINDS[kind]
    common = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4, "image_size": 16, "num_registers": 3}
    torch.manual_seed(0)
    backbone = make_backbone(name, **{**common, **special, **arguments})
    with torch.no_grad():
        for p in backbone.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    meta = {
        "backbone": {"name": name, "arguments": backbone.arguments},
        "normalisation": {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.3)},
        "image_size": 16,
        "provenance": {"seed": 0, "data": "pictures"},
    }
    return BackboneExtractor(backbone, meta, device=torch.device("cpu"))


def assert_same(extractor: BackboneExtractor, opened: Opened, size: Size, tolerance: float) -> None:
    """All outputs of an opened export for 1, 2 and 5 images of a size are the model's."""
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, *size)
        ours, theirs = extractor(images), opened(images)
        assert isinstance(theirs, Features)
        for name in ("cls", "registers", "patches"):
            a, b = getattr(ours, name), getattr(theirs, name)
            torch.testing.assert_close(b, a, atol=tolerance, rtol=0.0, msg=lambda m, name=name: f"{name}: {m}")
        if extractor.num_classes:
            torch.testing.assert_close(opened.logits(images), extractor.logits(images), atol=tolerance, rtol=0.0)  # type: ignore[attr-defined]


def run_without_quietvit(code: str, folder: Path) -> str:
    """What Python code prints in a new process, inside a folder, where quietvit cannot be imported."""
    barrier = """
import sys
class Barrier:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0].startswith("quietvit"):
            raise ImportError("quietvit is not to be used here")
sys.meta_path.insert(0, Barrier())
"""
    done = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", barrier + code], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
