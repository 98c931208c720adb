"""Feed-forward networks, block, patch stem: formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quietvit.nn.attention import ATTENTION
from quietvit.nn.block import Block
from quietvit.nn.feed_forward import Mlp, SwiGlu, swiglu_width
from quietvit.nn.patch_embed import PatchEmbed


@pytest.mark.parametrize(("dim", "width"), [(384, 1024), (768, 2048), (1024, 2736), (1536, 4096), (32, 88)])
def test_swiglu_widths_of_dinov2(dim: int, width: int) -> None:
    assert swiglu_width(4 * dim) == width


def test_mlp_is_exact_gelu() -> None:
    torch.manual_seed(0)
    mlp = Mlp(4, 6).double()
    x = 3 * torch.randn(5, 4, dtype=torch.double)
    hidden = x @ mlp.fc1.weight.T + mlp.fc1.bias
    gelu = torch.tensor([[h * 0.5 * (1 + math.erf(h / math.sqrt(2))) for h in row] for row in hidden.tolist()])
    torch.testing.assert_close(mlp(x), gelu.double() @ mlp.fc2.weight.T + mlp.fc2.bias, atol=1e-6, rtol=1e-6)


def test_swiglu_gates_with_the_first_half() -> None:
    torch.manual_seed(0)
    ffn = SwiGlu(4, 12).double()
    x = torch.randn(5, 4, dtype=torch.double)
    a, b = (x @ ffn.w12.weight.T + ffn.w12.bias).split(8, dim=1)
    torch.testing.assert_close(ffn(x), (a / (1 + torch.exp(-a)) * b) @ ffn.w3.weight.T + ffn.w3.bias)


def layer_norm(x: Tensor, norm: torch.nn.LayerNorm, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * norm.weight + norm.bias


@pytest.mark.parametrize("layer_scale", [0.0, 0.3])
def test_block_is_two_prenorm_residuals(layer_scale: float) -> None:
    torch.manual_seed(0)
    block = Block(8, 2, layer_scale=layer_scale).double()
    x = 0.01 * torch.randn(6, 8, dtype=torch.double)  # small, so that eps = 1e-6 shows
    scale = layer_scale or 1.0
    normed = layer_norm(x, block.norm1, 1e-6)
    qkv = block.attn.qkv(normed).view(6, 3, 2, 4)
    y = x + scale * block.attn.proj(ATTENTION["sdpa"].attend(qkv, ((2, 3),)).reshape(6, 8))
    y = y + scale * block.mlp(layer_norm(y, block.norm2, 1e-6))
    torch.testing.assert_close(block(x, ((2, 3),)), y)
    assert any("ls1" in key for key in block.state_dict()) == (layer_scale > 0)


def test_the_activation_of_an_mlp_is_chosen_by_name() -> None:
    torch.manual_seed(0)
    exact, quick = Block(8, 2).double(), Block(8, 2, activation="quick_gelu").double()
    assert exact.state_dict().keys() == quick.state_dict().keys()
    x = torch.randn(6, 8, dtype=torch.double)
    for block, gate in (
        (exact, lambda v: 0.5 * (1 + math.erf(v / math.sqrt(2)))),
        (quick, lambda v: 1 / (1 + math.exp(-1.702 * v))),
    ):
        hidden = block.mlp.fc1(x)
        activated = torch.tensor([[v * gate(v) for v in row] for row in hidden.tolist()], dtype=torch.double)
        torch.testing.assert_close(block.mlp(x), block.mlp.fc2(activated))
    with pytest.raises(ValueError, match="unknown activation 'quick'; did you mean quick_gelu"):
        Block(8, 2, activation="quick")
    with pytest.raises(ValueError, match="'quick_gelu' is for ffn 'mlp'; 'swiglu' has its own"):
        Block(8, 2, activation="quick_gelu", ffn="swiglu")


def test_block_without_biases() -> None:
    block = Block(8, 2, qkv_bias=False, proj_bias=False, ffn_bias=False, ffn="swiglu")
    assert [k for k in block.state_dict() if k.endswith("bias")] == ["norm1.bias", "norm2.bias"]


def test_unknown_ffn_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean swiglu"):
        Block(8, 2, ffn="swiglufused")


def test_patch_stem_is_a_linear_map_of_each_square() -> None:
    torch.manual_seed(0)
    stem = PatchEmbed(5, 4).double()
    images = torch.randn(2, 3, 8, 12, dtype=torch.double)
    tokens, grid = stem(images)
    assert grid == (2, 3)
    for row in range(2):
        for column in range(3):
            square = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten(1)
            expected = square @ stem.proj.weight.flatten(1).T + stem.proj.bias
            torch.testing.assert_close(tokens[:, 3 * row + column], expected)


def test_patch_stem_starts_as_pytorch_leaves_a_convolution() -> None:
    stem = PatchEmbed(64, 8)
    stem.reset_parameters(generator=torch.Generator().manual_seed(0))
    bound = 1 / math.sqrt(3 * 8 * 8)
    for parameter in stem.parameters():
        assert parameter.abs().max() <= bound
        assert parameter.abs().max() > 0.9 * bound
    stem.reset_parameters(init="xavier", generator=torch.Generator().manual_seed(0))
    assert stem.proj.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (3 * 8 * 8 + 64)), rel=0.01)
    assert torch.count_nonzero(stem.proj.bias) == 0
