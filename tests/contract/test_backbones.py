"""What every row of BACKBONES must do, whatever its stem and its trunk's blocks."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quietvit.backbones import BACKBONES, Trunk, make_backbone
from quietvit.backbones.trunk import POSITIONS
from quietvit.contracts import Features
from quietvit.nn.attention import Attention
from quietvit.nn.block import ATTENTION_LAYERS, FEED_FORWARD, LayerScale
from quietvit.nn.feed_forward import ACTIVATIONS
from quietvit.nn.ghost import ChannelScale
from quietvit.nn.tokens_to_token import SOFT_SPLITS, STEM_ATTENTION, TokenPerformer, TokenTransformer

# Every row of BACKBONES gets every trunk; a row's own arguments and further stems are optional.
TRUNKS: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "swiglu": {"ffn": "swiglu"},
    "clip": {"pre_norm": True, "activation": "quick_gelu", "norm_eps": 1e-5},
    "sinusoid": {"positions": "sinusoid"},
    "se": {"attention_layer": "se"},
    "ghost": {"attention_layer": "ghost", "ffn": "ghost", "mlp_ratio": 3.0},
    "resnext": {"num_heads": 16},
    "dense": {"dense_groups": "1-2", "growth": 16, "depth": 4},
}
ROWS: Mapping[str, dict[str, Any]] = {"t2t_vit": {"token_dim": 8}}
STEMS: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "t2t_vit": {
        "transformer": {"stem_attention": "transformer"},
        "performer_official": {"stem_attention": "performer_official"},
        "recompute": {"recompute": True},
        "transformer-recompute": {"stem_attention": "transformer", "recompute": True},
        "patch8": {"patch_size": 8},
        "patch4": {"patch_size": 4},
        "patch4-transformer": {"patch_size": 4, "stem_attention": "transformer"},
    }
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    f"{name}-{variant}": (name, {**ROWS.get(name, {}), **arguments})
    for name in BACKBONES
    for variant, arguments in {**TRUNKS, **STEMS.get(name, {})}.items()
}
# Pixels above and to the left of a patch, and from its first to its last one, that its token sees without attention.
REACH = {("t2t_vit", 16): (14, 16), ("t2t_vit", 8): (6, 8), ("t2t_vit", 4): (3, 3)}

each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_backbone = pytest.mark.parametrize("name", BACKBONES)


def plain_small(variant: str, **arguments: Any) -> Trunk:
    """A tiny backbone as it is made."""
    torch.manual_seed(0)
    name, given = VARIANTS[variant]
    tiny = {"embed_dim": 32, "depth": 2, "num_heads": 2, "layer_scale": 0.5, "num_registers": 3}
    return make_backbone(name, **{**tiny, **given, **arguments}).eval()


def small(variant: str, **arguments: Any) -> Trunk:
    """A tiny backbone with lively weights, so that every part of it shows in the output."""
    model = plain_small(variant, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def without_attention(model: Trunk) -> Trunk:
    """Attention of blocks and stem yields a constant: nothing passes from token to token but by windows."""
    for module in model.modules():
        if isinstance(module, (Attention, TokenPerformer)):
            module.proj.weight.data.zero_()
        elif isinstance(module, TokenTransformer):
            module.attn["proj"].weight.data.zero_()
    return model


def images(model: Trunk, batch: int, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, rows * model.stride, columns * model.stride, dtype=dtype)


def pixels_under(mask: Tensor, stride: int) -> Tensor:
    """A mask of patches [b h w] as one of pixels [b 1 H W]."""
    return mask.repeat_interleave(stride, 1).repeat_interleave(stride, 2)[:, None]


def assert_same(a: Features, b: Features, tolerance: float = 0.0) -> None:
    for x, y in zip((a.cls, a.registers, a.patches), (b.cls, b.registers, b.patches), strict=True):
        torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance)


def test_every_choice_has_a_variant() -> None:
    """A new row of a table that blocks or stems are chosen from needs a line in TRUNKS or STEMS above."""
    models = [make_backbone(name, **{"embed_dim": 32, "depth": 1, "num_heads": 2, **given}).arguments
              for name, given in VARIANTS.values()]  # fmt: skip
    for key, table in (
        ("activation", ACTIVATIONS),
        ("pre_norm", (False, True)),
        ("attention_layer", ATTENTION_LAYERS),
        ("ffn", FEED_FORWARD),
        ("positions", POSITIONS),
        ("stem_attention", STEM_ATTENTION),
        ("patch_size", SOFT_SPLITS),
    ):
        assert set(table) <= {arguments.get(key) for arguments in models}, key


@each_variant
@pytest.mark.parametrize(("registers", "grid"), [(0, (4, 4)), (1, (7, 1)), (5, (2, 5))])
def test_shapes(variant: str, registers: int, grid: tuple[int, int]) -> None:
    model = small(variant, num_registers=registers)
    width = model.embed_dim
    features = model(images(model, 2, *grid))
    assert features.cls.shape == (2, width)
    assert features.registers.shape == (2, registers, width)
    assert features.patches.shape == (2, *grid, width)
    assert ("register_tokens" in model.state_dict()) == (registers > 0)


@each_variant
def test_attributes(variant: str) -> None:
    model = small(variant)
    dense = "dense_groups" in VARIANTS[variant][1]  # 32, 48 | 24, 40, 56
    assert (model.embed_dim, model.num_blocks, model.num_registers) == ((56, 4, 3) if dense else (32, 2, 3))
    assert len(model.blocks) == len(model.drop_rates) == model.num_blocks
    assert model.image_size == model.native_grid[0] * model.stride


@each_variant
def test_patches_are_in_reading_order(variant: str) -> None:
    """Without attention a patch token sees one square of pixels, cut off at the border, and all of that."""
    model = without_attention(small(variant)).double()
    before, after = REACH.get((VARIANTS[variant][0], model.stride), (0, model.stride - 1))
    x = images(model, 1, 2, 3, torch.double).requires_grad_()
    patches = model(x).patches
    for row in range(2):
        for column in range(3):
            (gradient,) = torch.autograd.grad(patches[0, row, column].pow(3).sum(), x, retain_graph=True)
            top, left = row * model.stride, column * model.stride
            square = torch.zeros(x.shape[2:], dtype=torch.bool)
            square[max(top - before, 0) : top + after + 1, max(left - before, 0) : left + after + 1] = True
            assert torch.equal(gradient.abs().sum((0, 1)) > 0, square)


@each_variant
def test_grouped_equals_separate_with_gradients(variant: str) -> None:
    model = small(variant).double()
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


@each_variant
def test_masked_pixels_change_nothing(variant: str) -> None:
    """Bit for bit, for any value under the mask; and the gradient there is exactly zero."""
    model = small(variant)
    x = images(model, 3, 4, 5)
    mask = torch.zeros(3, 4, 5, dtype=torch.bool)
    mask[0, 1:3, 1:4] = True
    mask[1, 3, 0] = True
    mask[2] = True  # nothing is left to see
    hidden = pixels_under(mask, model.stride).expand_as(x)

    def features_and_gradient(value: float) -> tuple[Features, Tensor]:
        pixels = torch.where(hidden, value, x).requires_grad_()
        out = model(pixels, mask.flatten(1))
        energy = torch.stack([t.pow(3).sum() for t in (out.cls, out.registers, out.patches)]).sum()
        return out, torch.autograd.grad(energy, pixels)[0]

    reference, gradient = features_and_gradient(0.0)
    assert all(torch.isfinite(t).all() for t in (reference.cls, reference.registers, reference.patches, gradient))
    assert torch.count_nonzero(gradient[hidden]) == 0
    assert torch.count_nonzero(gradient[~hidden]) > 0
    for value in (1.0, 1e4, float("nan"), float("inf")):
        features, again = features_and_gradient(value)
        assert_same(reference, features)
        assert torch.equal(gradient, again)
    together = model([torch.where(hidden, float("nan"), x), x[:1]], [mask.flatten(1), None])
    assert_same(together[0], model([x, x[:1]], [mask.flatten(1), None])[0])


@each_variant
def test_a_mask_of_nothing_is_no_mask(variant: str) -> None:
    model = small(variant)
    x = images(model, 2, 3, 4)
    assert_same(model(x, torch.zeros(2, 12, dtype=torch.bool)), model(x), 1e-5)


@each_variant
def test_mask_matters_and_keeps_position(variant: str) -> None:
    model = small(variant)
    x = images(model, 1, 4, 4)
    everything = torch.ones(1, 16, dtype=torch.bool)
    features = model(x, everything)
    assert not torch.equal(features.patches, model(x).patches)
    assert not torch.allclose(features.patches[0, 0, 0], features.patches[0, 2, 1])  # same token, another position


@each_variant
def test_registers_never_leak_into_patches(variant: str) -> None:
    """Without attention nothing can carry a register to another token: patches and cls stay bit for bit.

    That goes for gated attention too: what it takes the mean of is the output of attention, here a constant.
    """
    model = without_attention(small(variant))
    x = images(model, 2, 3, 4)
    before = model(x)
    model.register_tokens.data.copy_(1e3 * torch.randn_like(model.register_tokens))
    after = model(x)
    assert torch.equal(before.patches, after.patches)
    assert torch.equal(before.cls, after.cls)
    assert not torch.equal(before.registers, after.registers)


@each_variant
def test_registers_take_part_in_attention_without_a_position(variant: str) -> None:
    model = small(variant)
    x = images(model, 2, 3, 4)
    before = model(x)
    model.register_tokens.data = model.register_tokens.data.flip(1)  # no position: only the order of outputs changes
    after = model(x)
    torch.testing.assert_close(before.registers.flip(1), after.registers)
    torch.testing.assert_close(before.patches, after.patches)
    model.register_tokens.data += torch.randn_like(model.register_tokens)
    assert not torch.allclose(before.patches, model(x).patches, atol=1e-4)


@each_variant
def test_tokens_and_split_give_the_forward(variant: str) -> None:
    model = small(variant)
    x, y = images(model, 2, 4, 4), images(model, 3, 2, 2)
    tokens = model.tokens([x, y])
    width = model.embed_dim
    assert [tuple(t.shape) for t in tokens] == [(2, 1 + 3 + 16, width), (3, 1 + 3 + 4, width)]
    for part, grid, features in zip(tokens, ((4, 4), (2, 2)), model([x, y]), strict=True):
        assert_same(model.split(part, grid), features, 1e-6)


@each_variant
def test_last_blocks(variant: str) -> None:
    model = small(variant, depth=4)
    x = images(model, 2, 2, 3)
    readable = model.num_blocks - model.first_readable_block
    layers = model.last_blocks(x, readable)
    assert len(layers) == readable == (2 if "dense_groups" in VARIANTS[variant][1] else 4)
    assert {layer.patches.shape for layer in layers} == {(2, 2, 3, model.embed_dim)}
    assert_same(layers[-1], model(x), 1e-6)
    for picked, layer in zip(model.last_blocks(x, [3, 2]), layers[-2:], strict=True):
        assert_same(picked, layer)
    assert_same(model.last_blocks(x, 2)[0], layers[-2])
    raw = model.last_blocks(x, 1, norm=False)[0]
    torch.testing.assert_close(model.norm(raw.patches), layers[-1].patches)
    for bad in (0, 5, [4], [-1], []):
        with pytest.raises(ValueError, match="this model has 4"):
            model.last_blocks(x, bad)


@each_variant
def test_arguments_rebuild_it(variant: str) -> None:
    model = small(variant, drop_path=0.2, qkv_bias=False, pos_interpolation="offset")
    again = make_backbone(VARIANTS[variant][0], **json.loads(json.dumps(model.arguments))).eval()
    assert again.arguments == model.arguments
    again.load_state_dict(model.state_dict(), strict=True)
    x = images(model, 1, 3, 3)
    assert_same(model(x), again(x))
    assert_same(model(x), copy.deepcopy(model)(x))


@each_variant
@pytest.mark.parametrize("init", ["trunc_normal", "xavier"])
def test_initialisation_forgets_nothing(variant: str, init: str) -> None:
    model = small(variant, init=init)
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan"))
    model.init_weights(torch.Generator().manual_seed(1))
    assert [k for k, v in model.state_dict().items() if not torch.isfinite(v).all()] == []
    weights = copy.deepcopy(model.state_dict())
    torch.manual_seed(99)  # all draws come from the generator given
    model.init_weights(torch.Generator().manual_seed(1))
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


@each_variant
def test_initial_values(variant: str) -> None:
    model = plain_small(variant, embed_dim=128, layer_scale=1e-5, init_std=0.05, norm_eps=1e-5)
    assert 0 < model.cls_token.std() < 2e-6
    assert 0 < model.register_tokens.std() < 2e-6
    assert torch.count_nonzero(model.mask_token) == 0
    assert isinstance(model.pos_embed, nn.Parameter) == (model.options.positions == "learned")
    if model.options.positions == "learned":
        assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            assert layer.weight.std().item() == pytest.approx(0.05, rel=max(0.05, 3 * layer.weight.numel() ** -0.5))
            assert layer.bias is None or torch.count_nonzero(layer.bias) == 0
        elif isinstance(layer, LayerScale):
            assert torch.all(layer.gamma == 1e-5)
        elif isinstance(layer, ChannelScale):
            assert layer.weight.abs().max() <= 1
            assert layer.weight.std().item() == pytest.approx(3**-0.5, rel=0.2)
        elif isinstance(layer, nn.LayerNorm):
            assert layer.eps == 1e-5
            assert torch.all(layer.weight == 1)
            assert torch.all(layer.bias == 0)


@each_backbone
def test_defaults_are_those_of_dinov2(name: str) -> None:
    options = make_backbone(name, embed_dim=32, depth=1, num_heads=2).options
    assert (options.norm_eps, options.layer_scale, options.mlp_ratio, options.init_std) == (1e-6, 1e-5, 4.0, 0.02)


@each_variant
def test_every_parameter_learns(variant: str) -> None:
    """What does not learn (random features, sinusoids) is a buffer: no optimiser sees it."""
    model = small(variant, drop_path=0.3).train()
    kept = {k: v.clone() for k, v in model.named_buffers()}
    assert all(p.requires_grad for p in model.parameters())
    out = model([images(model, 4, 4, 4), images(model, 8, 2, 2)], [torch.rand(4, 16) < 0.4, None])
    sum(f.cls.pow(2).sum() + f.patches.pow(3).sum() for f in out).backward()
    assert [k for k, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert all(torch.equal(v, kept[k]) for k, v in model.named_buffers())
    assert set(kept) <= set(model.state_dict())


@each_variant
def test_double_precision_is_kept_and_gradients_are_right(variant: str) -> None:
    """Along one direction of pixels: a part computed in single precision would miss the slope by percents."""
    model = small(variant).double()
    x, step = images(model, 1, 3, 4, torch.double), 1e-5 * images(model, 1, 3, 4, torch.double)
    mask = torch.rand(1, 12) < 0.3

    def energy(pixels: Tensor) -> Tensor:
        features = model(pixels, mask)
        return features.cls.pow(3).sum() + features.patches.pow(3).sum()

    slope = (energy(x + step) - energy(x - step)).item() / 2
    (gradient,) = torch.autograd.grad(energy(x.requires_grad_()), x)
    assert (gradient * step).sum().item() == pytest.approx(slope, rel=1e-4)


@each_variant
def test_training_after_inference_mode(variant: str) -> None:
    """What a teacher's pass keeps for later (resized positions, row numbers) must serve a student's backward."""
    model = small(variant, drop_path=0.5).train()
    crops = [images(model, 8, 3, 3), images(model, 12, 2, 2)]
    with torch.inference_mode():
        model(crops)
    sum(f.cls.sum() for f in model(crops)).backward()


@each_variant
def test_stochastic_depth_computes_kept_rows_only(variant: str) -> None:
    model = small(variant, drop_path=0.5).train()
    rows: list[int] = []
    model.blocks[0].attn.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    crops = [images(model, 8, 2, 2), images(model, 16, 1, 2)]
    model(crops)
    model.eval()(crops)
    sequence = 1 + 3 + 4, 1 + 3 + 2
    assert rows == [4 * sequence[0] + 8 * sequence[1], 8 * sequence[0] + 16 * sequence[1]]


@each_variant
def test_stochastic_depth_sleeps_in_eval(variant: str) -> None:
    model = small(variant, drop_path=0.5)
    x = images(model, 4, 2, 2)
    assert_same(model(x), model(x))
    model.train()
    assert not torch.equal(model(x).cls, model(x).cls)


@each_variant
def test_bfloat16_autocast(variant: str) -> None:
    model = small(variant, drop_path=0.25).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model([images(model, 4, 4, 4), images(model, 8, 2, 2)])
    assert all(torch.isfinite(f.patches).all() for f in out)
    model.eval()
    x = images(model, 2, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x)
    exact = model(x).patches
    assert (rough.patches.float() - exact).norm() < 0.02 * exact.norm()


@each_variant
def test_tracing_leaves_nothing_behind(variant: str) -> None:
    """An exported program equals the model, and nothing the tracer made is kept for later passes."""
    model = small(variant)
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
    assert_same(model(x), small(variant)(x))


@each_variant
def test_bad_input_is_explained(variant: str) -> None:
    model = small(variant)
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


@each_backbone
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


@each_backbone
def test_sizes_can_be_built_and_overridden(name: str) -> None:
    for size, given in BACKBONES[name].SIZES.items():
        with torch.device("meta"):
            shorter = {"depth": 1, **({"dense_groups": "1"} if "dense_groups" in given else {})}
            model = make_backbone(name, size=size, **shorter)
        assert model.num_blocks == 1
        assert {key: model.arguments[key] for key in given} == {**given, **shorter}


def test_new_registers_are_as_large_as_asked_for() -> None:
    drawn = {}
    for std in (1e-6, 0.02):
        torch.manual_seed(0)
        backbone = make_backbone("vit", size="nano", patch_size=8, image_size=32, num_registers=16, register_std=std)
        drawn[std] = backbone.state_dict()
    assert drawn[0.02]["register_tokens"].std() == pytest.approx(0.02, rel=0.1)
    others = [k for k in drawn[0.02] if k != "register_tokens"]
    assert all(torch.equal(drawn[1e-6][k], drawn[0.02][k]) for k in others)
