"""What every row of BACKBONES must do, whatever its stem."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from quietvit.backbones import BACKBONES, Trunk, make_backbone
from quietvit.contracts import Features

pytestmark = pytest.mark.parametrize("name", BACKBONES)


def small(name: str, **arguments: Any) -> Trunk:
    """A tiny backbone with lively weights, so that every part of it shows in the output."""
    torch.manual_seed(0)
    given = {"embed_dim": 32, "depth": 2, "num_heads": 2, "layer_scale": 0.5, "num_registers": 3, **arguments}
    model = make_backbone(name, **given).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def images(model: Trunk, batch: int, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, rows * model.stride, columns * model.stride, dtype=dtype)


def assert_same(a: Features, b: Features, tolerance: float = 0.0) -> None:
    for x, y in zip((a.cls, a.registers, a.patches), (b.cls, b.registers, b.patches), strict=True):
        torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("registers", [0, 1, 5])
@pytest.mark.parametrize("grid", [(4, 4), (2, 5), (7, 1)])
def test_shapes(name: str, registers: int, grid: tuple[int, int]) -> None:
    model = small(name, num_registers=registers)
    features = model(images(model, 2, *grid))
    assert features.cls.shape == (2, 32)
    assert features.registers.shape == (2, registers, 32)
    assert features.patches.shape == (2, *grid, 32)
    assert ("register_tokens" in model.state_dict()) == (registers > 0)


def test_attributes(name: str) -> None:
    model = small(name)
    assert (model.embed_dim, model.num_blocks, model.num_registers) == (32, 2, 3)
    assert model.image_size == model.native_grid[0] * model.stride


def test_patches_are_in_reading_order(name: str) -> None:
    """A change in one corner of the image moves that corner's token most, once attention is switched off."""
    model = small(name)
    for block in model.blocks:
        block.attn.proj.weight.data.zero_()
    x = images(model, 1, 3, 5)
    y = x.clone()
    y[:, :, : model.stride, -model.stride :] += 1.0
    moved = (model(x).patches - model(y).patches).norm(dim=-1)[0]
    assert moved.argmax() == 4


def test_grouped_equals_separate_with_gradients(name: str) -> None:
    model = small(name).double()
    groups = [images(model, b, h, w, torch.double) for b, h, w in ((3, 4, 4), (5, 2, 2), (1, 2, 3))]
    masks = [torch.rand(3, 16) < 0.4, None, torch.rand(1, 6) < 0.4]

    def energy(features: list[Features]) -> Tensor:
        parts = [t.pow(3).mean() for f in features for t in (f.cls, f.registers, f.patches)]
        return torch.stack(parts).sum()

    together = model(groups, masks)
    apart = [model(x, m) for x, m in zip(groups, masks, strict=True)]
    for a, b in zip(together, apart, strict=True):
        assert_same(a, b, 1e-11)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(energy(together), parameters), torch.autograd.grad(energy(apart), parameters), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9)


def test_masked_pixels_change_nothing(name: str) -> None:
    """Bit for bit, for any value under the mask; and the gradient there is exactly zero."""
    model = small(name)
    x = images(model, 2, 4, 4)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, 1:3, 1:4] = True
    mask[1, 3, 0] = True
    hidden = mask.repeat_interleave(model.stride, 1).repeat_interleave(model.stride, 2)[:, None].expand_as(x)
    reference = model(x, mask.flatten(1))
    for value in (0.0, 1e4, float("nan"), float("inf")):
        assert_same(reference, model(torch.where(hidden, value, x), mask.flatten(1)))
    together = model([torch.where(hidden, 7.0, x), x[:1]], [mask.flatten(1), None])
    assert_same(together[0], model([x, x[:1]], [mask.flatten(1), None])[0])

    x.requires_grad_()
    out = model(x, mask.flatten(1))
    (out.cls.pow(2).sum() + out.patches.pow(2).sum() + out.registers.pow(2).sum()).backward()
    assert x.grad is not None
    assert torch.count_nonzero(x.grad[hidden]) == 0
    assert torch.count_nonzero(x.grad[~hidden]) > 0


def test_mask_matters_and_keeps_position(name: str) -> None:
    model = small(name)
    x = images(model, 1, 4, 4)
    everything = torch.ones(1, 16, dtype=torch.bool)
    features = model(x, everything)
    assert not torch.equal(features.patches, model(x).patches)
    assert not torch.allclose(features.patches[0, 0, 0], features.patches[0, 2, 1])  # same token, another position


def test_registers_never_leak_into_patches(name: str) -> None:
    """Without attention nothing can carry a register to another token: patches and cls stay bit for bit."""
    model = small(name)
    for block in model.blocks:
        block.attn.proj.weight.data.zero_()
    x = images(model, 2, 3, 4)
    before = model(x)
    model.register_tokens.data.copy_(1e3 * torch.randn_like(model.register_tokens))
    after = model(x)
    assert torch.equal(before.patches, after.patches)
    assert torch.equal(before.cls, after.cls)
    assert not torch.equal(before.registers, after.registers)


def test_registers_take_part_in_attention_without_a_position(name: str) -> None:
    model = small(name)
    x = images(model, 2, 3, 4)
    before = model(x)
    model.register_tokens.data = model.register_tokens.data.flip(1)  # no position: only the order of outputs changes
    after = model(x)
    torch.testing.assert_close(before.registers.flip(1), after.registers)
    torch.testing.assert_close(before.patches, after.patches)
    model.register_tokens.data += torch.randn_like(model.register_tokens)
    assert not torch.allclose(before.patches, model(x).patches, atol=1e-4)


def test_tokens_and_split_give_the_forward(name: str) -> None:
    model = small(name)
    x, y = images(model, 2, 4, 4), images(model, 3, 2, 2)
    tokens = model.tokens([x, y])
    assert [tuple(t.shape) for t in tokens] == [(2, 1 + 3 + 16, 32), (3, 1 + 3 + 4, 32)]
    for part, grid, features in zip(tokens, ((4, 4), (2, 2)), model([x, y]), strict=True):
        assert_same(model.split(part, grid), features, 1e-6)


def test_last_blocks(name: str) -> None:
    model = small(name, depth=4)
    x = images(model, 2, 2, 3)
    layers = model.last_blocks(x, 4)
    assert len(layers) == 4
    assert_same(layers[-1], model(x), 1e-6)
    for picked, index in zip(model.last_blocks(x, [3, 1]), (1, 3), strict=True):
        assert_same(picked, layers[index])
    assert_same(model.last_blocks(x, 2)[0], layers[2])
    raw = model.last_blocks(x, 1, norm=False)[0]
    torch.testing.assert_close(model.norm(raw.patches), layers[-1].patches)
    for bad in (0, 5, [4], [-1], []):
        with pytest.raises(ValueError, match="this model has 4"):
            model.last_blocks(x, bad)


def test_arguments_rebuild_it(name: str) -> None:
    model = small(name, ffn="swiglu", drop_path=0.2, qkv_bias=False, pos_interpolation="offset")
    again = make_backbone(name, **json.loads(json.dumps(model.arguments))).eval()
    assert again.arguments == model.arguments
    again.load_state_dict(model.state_dict(), strict=True)
    x = images(model, 1, 3, 3)
    assert_same(model(x), again(x))
    assert_same(model(x), copy.deepcopy(model)(x))


@pytest.mark.parametrize("init", ["trunc_normal", "xavier"])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_initialisation_forgets_no_parameter(name: str, ffn: str, init: str) -> None:
    model = small(name, ffn=ffn, init=init)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.fill_(float("nan"))
    model.init_weights(torch.Generator().manual_seed(1))
    left = [k for k, v in model.named_parameters() if not torch.isfinite(v).all()]
    assert left == []
    weights = copy.deepcopy(model.state_dict())
    torch.manual_seed(99)  # all draws come from the generator given
    model.init_weights(torch.Generator().manual_seed(1))
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_initial_values(name: str) -> None:
    model = make_backbone(name, embed_dim=128, depth=1, num_heads=2, layer_scale=1e-5, init_std=0.05)
    block = model.blocks[0]
    assert 0 < model.cls_token.std() < 2e-6
    assert 0 < model.register_tokens.std() < 2e-6
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.count_nonzero(model.mask_token) == 0
    for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
        assert linear.weight.std().item() == pytest.approx(0.05, rel=0.05)
        assert torch.count_nonzero(linear.bias) == 0
    assert torch.all(block.ls1.gamma == 1e-5)
    for norm in (block.norm1, block.norm2, model.norm):
        assert norm.eps == 1e-6
        assert torch.all(norm.weight == 1)
        assert torch.all(norm.bias == 0)


def test_every_parameter_learns(name: str) -> None:
    model = small(name, drop_path=0.3).train()
    out = model([images(model, 4, 4, 4), images(model, 8, 2, 2)], [torch.rand(4, 16) < 0.4, None])
    sum(f.cls.pow(2).sum() + f.patches.pow(3).sum() for f in out).backward()
    idle = [k for k, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == []


def test_training_after_inference_mode(name: str) -> None:
    """What a teacher's pass keeps for later (resized positions, row numbers) must serve a student's backward."""
    model = small(name, drop_path=0.5).train()
    crops = [images(model, 8, 3, 3), images(model, 12, 2, 2)]
    with torch.inference_mode():
        model(crops)
    sum(f.cls.sum() for f in model(crops)).backward()


def test_stochastic_depth_computes_kept_rows_only(name: str) -> None:
    model = small(name, drop_path=0.5).train()
    rows: list[int] = []
    model.blocks[0].attn.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    crops = [images(model, 8, 2, 2), images(model, 16, 1, 2)]
    model(crops)
    model.eval()(crops)
    sequence = 1 + 3 + 4, 1 + 3 + 2
    assert rows == [4 * sequence[0] + 8 * sequence[1], 8 * sequence[0] + 16 * sequence[1]]


def test_stochastic_depth_sleeps_in_eval(name: str) -> None:
    model = small(name, drop_path=0.5)
    x = images(model, 4, 2, 2)
    assert_same(model(x), model(x))
    model.train()
    assert not torch.equal(model(x).cls, model(x).cls)


def test_bfloat16_autocast(name: str) -> None:
    model = small(name, drop_path=0.25).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model([images(model, 4, 4, 4), images(model, 8, 2, 2)])
    assert all(torch.isfinite(f.patches).all() for f in out)
    model.eval()
    x = images(model, 2, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x)
    torch.testing.assert_close(rough.patches.float(), model(x).patches, atol=0.15, rtol=0.15)


def test_tracing_leaves_nothing_behind(name: str) -> None:
    """An exported program equals the model, and nothing the tracer made is kept for later passes."""
    model = small(name)
    x = images(model, 1, 3, 5)

    class Parts(torch.nn.Module):
        """torch.export wants plain tensors out."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            features = self.model(images)
            return features.cls, features.registers, features.patches

    program = torch.export.export(Parts(), (x,), strict=False)
    assert_same(Features(*program.module()(x)), model(x), 1e-6)
    assert_same(model(x), small(name)(x))


def test_bad_input_is_explained(name: str) -> None:
    model = small(name)
    s = model.stride
    with pytest.raises(ValueError, match=f"height {2 * s + 1} is no multiple of {s}; use {2 * s} or {3 * s}"):
        model(torch.zeros(1, 3, 2 * s + 1, s))
    with pytest.raises(ValueError, match=f"width 3 is no multiple of {s}; use {s}"):
        model(torch.zeros(1, 3, s, 3))
    with pytest.raises(ValueError, match="images must be float"):
        model(torch.zeros(1, 3, s, s, dtype=torch.uint8))
    for mask in (torch.zeros(1, 5, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool), torch.zeros(1, 4)):
        with pytest.raises(ValueError, match=r"mask must be bool \[1, 4\]"):
            model(torch.zeros(1, 3, 2 * s, 2 * s), mask)
    with pytest.raises(ValueError, match="1 groups of images but 2 masks"):
        model([torch.zeros(1, 3, s, s)], [None, None])
    with pytest.raises(ValueError, match="no images"):
        model([])


def test_bad_arguments_are_explained(name: str) -> None:
    good = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    with pytest.raises(ValueError, match="nearest: num_registers"):
        make_backbone(name, **good, num_register=4)
    with pytest.raises(ValueError, match=f"unknown backbone '{name}x'; nearest: {name}"):
        make_backbone(name + "x")
    with pytest.raises(ValueError, match=f"unknown size of {name}"):
        make_backbone(name, size="smal")
    with pytest.raises(ValueError, match="needs embed_dim, depth, num_heads"):
        make_backbone(name)
    for key, value in (
        ("num_heads", 3),
        ("ffn", "swiglue"),
        ("attention", "flash"),
        ("pos_interpolation", "scale"),
        ("init", "kaiming"),
        ("num_registers", -1),
        ("drop_path", 1.0),
        ("image_size", 225),
    ):
        with pytest.raises(ValueError, match=str(value)):
            make_backbone(name, **{**good, key: value})


def test_sizes_can_be_built_and_overridden(name: str) -> None:
    for size in BACKBONES[name].SIZES:
        with torch.device("meta"):
            model = make_backbone(name, size=size, depth=1)
        assert model.num_blocks == 1
        assert model.embed_dim == BACKBONES[name].SIZES[size]["embed_dim"]
