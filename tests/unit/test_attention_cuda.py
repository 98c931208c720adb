"""Packed attention on CUDA equals SDPA, forward and backward. Skipped where there is no CUDA."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quietvit.backbones import make_backbone
from quietvit.nn.attention import ATTENTION
from quietvit.nn.packing import Groups

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: packed attention has no CPU kernel"),
]

GROUPS: Groups = ((3, 21), (8, 5), (1, 130))
# relative to the largest value; bf16 keeps 8 bits, fp16 11, and kernels differ in the order of their sums
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def need(name: str, dtype: torch.dtype) -> None:
    able, reason = ATTENTION[name].available(torch.device("cuda"), dtype, 64)
    if not able:
        pytest.skip(f"{name}: {reason}")


def value_and_gradient(name: str, qkv: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    qkv = qkv.clone().requires_grad_()
    out = ATTENTION[name].attend(qkv, GROUPS)
    (gradient,) = torch.autograd.grad((out.float() * weights).sum(), qkv)
    return out.detach().float(), gradient.float()


def assert_near(value: Tensor, expected: Tensor, tolerance: float) -> None:
    assert value.shape == expected.shape
    assert (value - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["varlen", "xformers"])
def test_packed_equals_sdpa(name: str, dtype: torch.dtype, head_dim: int) -> None:
    need(name, dtype)
    torch.manual_seed(0)
    tokens = sum(b * n for b, n in GROUPS)
    qkv = torch.randn(tokens, 3, 4, head_dim, device="cuda", dtype=dtype)
    weights = torch.randn(tokens, 4, head_dim, device="cuda")
    exact = value_and_gradient("sdpa", qkv.double(), weights)
    packed = value_and_gradient(name, qkv, weights)
    for value, expected in zip(packed, exact, strict=True):
        assert_near(value, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["auto", "varlen", "xformers"])
def test_backbone_gives_the_same_features(name: str) -> None:
    if name != "auto":
        need(name, torch.bfloat16)
    torch.manual_seed(0)
    model = make_backbone("vit", size="nano", layer_scale=1.0, attention="sdpa", init="xavier").cuda()
    packed = make_backbone("vit", **{**model.arguments, "attention": name}).cuda()
    packed.load_state_dict(model.state_dict(), strict=True)
    crops = [torch.randn(3, 3, 56, 56, device="cuda"), torch.randn(6, 3, 28, 28, device="cuda")]
    masks = [torch.rand(3, 16, device="cuda") < 0.4, None]
    with torch.autocast("cuda", torch.bfloat16):
        expected, values = model(crops, masks), packed(crops, masks)
    for a, b in zip(values, expected, strict=True):
        assert_near(a.cls, b.cls, 4e-2)
        assert_near(a.patches, b.patches, 4e-2)


def test_packed_training_after_a_teacher_in_inference_mode() -> None:
    """What the packed form caches in the teacher's pass must serve the student's backward."""
    need("varlen", torch.bfloat16)
    model = make_backbone("vit", size="nano", attention="varlen", drop_path=0.5).cuda().train()
    crops = [torch.randn(8, 3, 56, 56, device="cuda"), torch.randn(16, 3, 28, 28, device="cuda")]
    with torch.autocast("cuda", torch.bfloat16):
        with torch.inference_mode():
            model(crops)
        sum(f.cls.float().sum() for f in model(crops)).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.blocks.parameters())
