"""Queries, keys and values of a block are those that its attention works on, whatever the stem and the layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quietvit.backbones import Trunk, make_backbone
from quietvit.weights import BackboneExtractor

SMALL: dict[str, Any] = {"embed_dim": 48, "depth": 3, "num_heads": 3, "image_size": 32, "num_registers": 2}
BACKBONES: dict[str, dict[str, Any]] = {
    "vit": {"name": "vit", "patch_size": 8, **SMALL},
    "vit without bias": {"name": "vit", "patch_size": 8, **SMALL, "qkv_bias": False, "num_registers": 0},
    "se": {"name": "vit", "patch_size": 8, **SMALL, "attention_layer": "se"},
    "ghost": {"name": "vit", "patch_size": 8, **SMALL, "attention_layer": "ghost", "ffn": "ghost", "mlp_ratio": 3.0},
    "t2t": {"name": "t2t_vit", "patch_size": 8, **SMALL, "token_dim": 16},
    "dense": {
        "name": "t2t_vit", "patch_size": 16, **SMALL, "token_dim": 16, "depth": 4, "dense_groups": "2-1", "growth": 6,
    },
}  # fmt: skip


def build(name: str) -> Trunk:
    torch.manual_seed(0)
    backbone = make_backbone(**BACKBONES[name]).double().eval()
    for parameter in backbone.parameters():  # biases are zero at the start
        torch.nn.init.normal_(parameter, std=0.2)
    return backbone


def attended(backbone: Trunk, images: Tensor, block: int) -> Tensor:
    """What the block's attention hands to its last projection [B*T D]."""
    seen: list[Tensor] = []
    handle = backbone.blocks[block].attn.proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    backbone(images)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", BACKBONES)
def test_attention_of_what_is_given_is_the_block_s_own(name: str) -> None:
    backbone = build(name)
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    for block in (0, backbone.num_blocks - 1):
        q, k, v = backbone.attention_inputs(images, block)
        tokens = 1 + backbone.num_registers + 32 * 48 // backbone.stride**2
        assert q.shape == k.shape == v.shape
        assert (q.shape[0], q.shape[1], q.shape[2]) == (2, 3, tokens)
        ours = torch.softmax(q @ k.transpose(2, 3) / q.shape[3] ** 0.5, dim=-1) @ v
        torch.testing.assert_close(ours.transpose(1, 2).flatten(2).flatten(0, 1), attended(backbone, images, block))
    last = backbone.attention_inputs(images)
    for mine, its in zip(last, backbone.attention_inputs(images, backbone.num_blocks - 1), strict=True):
        assert torch.equal(mine, its)


def test_a_block_without_attention_is_refused() -> None:
    backbone = build("dense")
    with pytest.raises(ValueError, match="block 2 of this dense trunk is a transition"):
        backbone.attention_inputs(torch.zeros(1, 3, 32, 32, dtype=torch.float64), 2)
    for block in (4, -5):
        with pytest.raises(ValueError, match=f"block {block} asked for; this model has 4"):
            backbone.attention_inputs(torch.zeros(1, 3, 32, 32, dtype=torch.float64), block)


def test_extractors_give_them_in_fp32_without_gradients() -> None:
    backbone = build("vit").float()
    meta = {
        "backbone": {"name": "vit", "arguments": backbone.arguments},
        "normalisation": {"mean": [0.5] * 3, "std": [0.25] * 3},
        "image_size": 32,
        "provenance": {},
    }
    extractor = BackboneExtractor(backbone, meta, device=torch.device("cpu"))
    images = torch.randn(1, 3, 16, 24)
    for mine, its in zip(extractor.attention_inputs(images), backbone.attention_inputs(images), strict=True):
        assert not mine.requires_grad
        assert mine.dtype == torch.float32
        assert torch.equal(mine, its)
