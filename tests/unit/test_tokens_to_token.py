"""The tokens-to-token stem: grids, fields of view, and masks that do not leak."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quietvit.backbones import Trunk, make_backbone
from quietvit.contracts import Features
from quietvit.nn.tokens_to_token import SOFT_SPLITS, STEM_ATTENTION, TokensToToken, TokenTransformer

Grid = tuple[int, int]
UNDER_THE_MASK = ("random", 1e4, float("nan"), float("inf"))

every_attention = pytest.mark.parametrize("attention", STEM_ATTENTION)
every_patch_size = pytest.mark.parametrize("patch_size", SOFT_SPLITS)


@lru_cache(maxsize=32)
def backbone(attention: str, patch_size: int = 16) -> Trunk:
    """A tiny one with lively weights, so that attention is far from uniform."""
    torch.manual_seed(0)
    model = make_backbone(
        "t2t_vit",
        embed_dim=16,
        depth=1,
        num_heads=2,
        num_registers=2,
        layer_scale=0.5,
        image_size=32,
        token_dim=8,
        patch_size=patch_size,
        stem_attention=attention,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def stem(attention: str, patch_size: int = 16) -> TokensToToken:
    module = backbone(attention, patch_size).get_submodule("tokens_to_token")
    assert isinstance(module, TokensToToken)
    return module


def images(grid: Grid, patch_size: int = 16, batch: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, grid[0] * patch_size, grid[1] * patch_size, generator=generator)


def pixels(mask: Tensor, grid: Grid, patch_size: int = 16) -> Tensor:
    """A mask of tokens [b N] as one of pixels [b 1 H W]."""
    mask = mask.unflatten(1, grid)[:, None]
    return mask.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)


def masks_of(grid: Grid) -> dict[str, Tensor]:
    """Two images each: a block and a single token; scattered tokens; all but one token and none."""
    rows, columns = grid
    block = torch.zeros(2, rows, columns, dtype=torch.bool)
    block[0, rows // 2 :, : columns // 2 + 1] = True
    block[1, 0, -1] = True
    scattered = torch.rand(2, rows * columns, generator=torch.Generator().manual_seed(2)) < 0.5
    scattered[:, 0], scattered[:, -1] = True, False
    nearly_all = torch.ones(2, rows * columns, dtype=torch.bool)
    nearly_all[0, 1], nearly_all[1] = False, False
    return {"block": block.flatten(1), "scattered": scattered, "nearly all": nearly_all}


def tensors(features: Features) -> list[Tensor]:
    return [features.cls, features.registers, features.patches]


def bfloat16(on: bool) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if on else nullcontext()


# ---- grid


@every_patch_size
def test_grid_is_side_over_patch_size(patch_size: int) -> None:
    """Every multiple of 16 from 16 to 768, squares and one column: the real forward pass, on the meta device.

    (There autocast, and so the Performer's shelter from it, does not exist: hence the transformer.)
    """
    with torch.device("meta"):
        module = TokensToToken(4, splits=SOFT_SPLITS[patch_size], token_dim=2, attention="transformer", norm_eps=1e-6)
        for side in range(16, 769, 16):
            for shape in ((side, side), (side, 16)):
                tokens, grid = module(torch.empty(1, 3, *shape))
                assert grid == (shape[0] // patch_size, shape[1] // patch_size)
                assert tokens.shape == (1, grid[0] * grid[1], 4)


@every_attention
@every_patch_size
@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (1, 5), (6, 3), (7, 7)])
def test_grid_of_real_images(attention: str, patch_size: int, grid: Grid) -> None:
    tokens, got = stem(attention, patch_size)(images(grid, patch_size))
    assert got == grid
    assert tokens.shape == (2, grid[0] * grid[1], 16)
    assert torch.isfinite(tokens).all()


@pytest.mark.parametrize(
    ("side", "tokens", "below", "above"),
    [(168, 11, 160, 176), (392, 25, 384, 400), (518, 33, 512, 528), (98, 6, 96, 112)],
)
def test_other_sizes_are_refused(side: int, tokens: int, below: int, above: int) -> None:
    """Left alone the stem would give `tokens` a side: often one more than whole cells, and never as many cells."""
    with torch.device("meta"):
        module = TokensToToken(4, splits=SOFT_SPLITS[16], token_dim=2, attention="transformer", norm_eps=1e-6)
        assert module(torch.empty(1, 3, side, side))[1] == (tokens, tokens)
    assert tokens * 16 != side
    model = backbone("performer")
    with pytest.raises(ValueError, match=f"height {side} is no multiple of 16; use {below} or {above}"):
        model(torch.zeros(1, 3, side, 32))
    with pytest.raises(ValueError, match=f"width {side} is no multiple of 16; use {below} or {above}"):
        model(torch.zeros(1, 3, 32, side))


# ---- what a token sees


def field_of(index: int, patch_size: int) -> tuple[int, int]:
    """First and last pixel, along one axis, that soft splits alone show to a token: from the last split back."""
    first = last = index
    for split in reversed(SOFT_SPLITS[patch_size]):
        first = first * split.stride - split.padding
        last = last * split.stride - split.padding + split.kernel - 1
    return first, last


def test_field_of_the_papers_splits() -> None:
    assert [field_of(k, 16) for k in range(4)] == [(16 * k - 14, 16 * k + 16) for k in range(4)]


@every_attention
@every_patch_size
def test_token_sees_its_field_in_reading_order(attention: str, patch_size: int) -> None:
    """With attention switched off, the gradient of token (row, column) is nonzero on its field and nowhere else."""
    torch.manual_seed(0)
    module = TokensToToken(16, splits=SOFT_SPLITS[patch_size], token_dim=8, attention=attention, norm_eps=1e-6)
    module.init_weights(lambda linear, _: nn.init.normal_(linear.weight, std=0.2), None)  # type: ignore[arg-type]
    for name, parameter in module.named_parameters():
        if name.endswith("proj.weight"):
            nn.init.zeros_(parameter)
    grid = (3, 4)
    x = images(grid, patch_size, batch=1).requires_grad_()
    tokens = module(x)[0].unflatten(1, grid)
    for row in range(grid[0]):
        for column in range(grid[1]):
            token = tokens[0, row, column]
            (gradient,) = torch.autograd.grad((token * torch.randn(16)).sum(), x, retain_graph=True)
            expected = torch.zeros(x.shape[2:], dtype=torch.bool)
            (top, bottom), (left, right) = field_of(row, patch_size), field_of(column, patch_size)
            expected[max(top, 0) : bottom + 1, max(left, 0) : right + 1] = True
            assert torch.equal((gradient[0] != 0).any(0), expected)


@every_attention
def test_attention_sees_the_whole_image(attention: str) -> None:
    x = images((3, 4), batch=1).requires_grad_()
    stem(attention)(x)[0][0, 0].square().sum().backward()
    assert x.grad is not None
    assert (x.grad != 0).any(1).float().mean() > 0.99


# ---- masks


def check_no_leak(model: Trunk, x: Tensor, mask: Tensor, autocast: bool) -> None:
    """Stem and backbone: bit-identical whatever lies under the mask, and no gradient gets there."""
    grid = (x.shape[2] // model.stride, x.shape[3] // model.stride)
    hidden = pixels(mask, grid, model.stride).expand_as(x)
    with torch.no_grad(), bfloat16(autocast):
        stem_tokens = model.tokenize(x, mask)[0]
        features = tensors(model(x, mask))
        assert torch.equal(stem_tokens[mask], model.mask_token.to(stem_tokens.dtype).expand_as(stem_tokens[mask]))
        assert all(torch.isfinite(t).all() for t in (stem_tokens, *features))
        for value in UNDER_THE_MASK:
            changed = torch.where(hidden, torch.randn_like(x) if value == "random" else torch.tensor(value), x)
            assert torch.equal(model.tokenize(changed, mask)[0], stem_tokens)
            assert all(torch.equal(a, b) for a, b in zip(tensors(model(changed, mask)), features, strict=True))

    x = x.detach().requires_grad_()
    with bfloat16(autocast):
        outputs: list[list[Tensor]] = [[model.tokenize(x, mask)[0]], tensors(model(x, mask))]
    for parts in outputs:
        (gradient,) = torch.autograd.grad(sum(t.float().square().sum() for t in parts), x)  # type: ignore[arg-type]
        assert torch.isfinite(gradient).all()
        assert torch.count_nonzero(gradient[hidden]) == 0
        assert torch.count_nonzero(gradient[~hidden]) > 0


@every_attention
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("grid", [(4, 4), (2, 5), (6, 3), (7, 7)])
def test_masks_do_not_leak(attention: str, grid: Grid, autocast: bool) -> None:
    for mask in masks_of(grid).values():
        check_no_leak(backbone(attention), images(grid), mask, autocast)


@every_attention
@pytest.mark.parametrize("patch_size", [8, 4])
def test_masks_do_not_leak_from_small_patches(attention: str, patch_size: int) -> None:
    for grid in ((4, 4), (3, 6)):
        for mask in masks_of(grid).values():
            check_no_leak(backbone(attention, patch_size), images(grid, patch_size), mask, autocast=False)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_no_mask_leaks(data: st.DataObject) -> None:
    grid = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    count = grid[0] * grid[1]
    bits = data.draw(st.lists(st.booleans(), min_size=2 * count, max_size=2 * count))
    model = backbone(data.draw(st.sampled_from(STEM_ATTENTION)), data.draw(st.sampled_from([8, 16])))
    x, mask = images(grid, model.stride), torch.tensor(bits).view(2, count)
    value = data.draw(st.floats(width=32))
    hidden = pixels(mask, grid, model.stride)
    with torch.no_grad():
        before, after = model(x, mask), model(torch.where(hidden, value, x), mask)
    assert all(torch.equal(a, b) for a, b in zip(tensors(before), tensors(after), strict=True))


@every_attention
def test_mask_tokens_alone_would_leak(attention: str) -> None:
    """What the tests above would say of a stem that sees all pixels and whose tokens are replaced afterwards."""

    class Leaky(nn.Module):
        stride = 16

        def __init__(self) -> None:
            super().__init__()
            self.stem = stem(attention)
            self.mask_token = nn.Parameter(torch.zeros(1, 16))

        def tokenize(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Grid]:
            tokens, grid = self.stem(x)
            return torch.where(mask[..., None], self.mask_token, tokens), grid

        def forward(self, x: Tensor, mask: Tensor) -> Features:
            tokens, grid = self.tokenize(x, mask)
            return Features(tokens[:, 0], tokens[:, :0], tokens.unflatten(1, grid))

    grid = (4, 4)
    x, mask = images(grid), masks_of(grid)["block"]
    with pytest.raises(AssertionError):
        check_no_leak(Leaky(), x, mask, autocast=False)  # type: ignore[arg-type]
    x.requires_grad_()
    tokens = Leaky().tokenize(x, mask)[0]
    (gradient,) = torch.autograd.grad(tokens.square().sum(), x)
    assert torch.count_nonzero(gradient[pixels(mask, grid).expand_as(x)]) > 0


def stages_of(module: TokensToToken, x: Tensor, visible: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Windows, which of them count as visible, and tokens, of each stage."""
    stages: list[tuple[Tensor, Tensor, Tensor]] = []
    parts = [module.get_submodule(f"attention{i}") for i in range(1, len(module.splits))]
    hooks = [part.register_forward_hook(lambda _, given, out: stages.append((*given, out))) for part in parts]
    with torch.no_grad():
        module(x * visible[:, None], visible)
    for hook in hooks:
        hook.remove()
    return stages


@every_attention
@every_patch_size
def test_a_window_without_visible_pixels_is_no_key(attention: str, patch_size: int) -> None:
    """Every stage gives its visible windows what it would give them alone; visibility is recounted by loops."""
    module, grid = stem(attention, patch_size), (3, 5)
    for mask in masks_of(grid).values():
        visible = ~pixels(mask, grid, patch_size)[:, 0]
        for i, (windows, seen, out) in enumerate(stages_of(module, images(grid, patch_size), visible)):
            split = module.splits[i]
            rows, columns = visible.shape[1] // split.stride, visible.shape[2] // split.stride
            recounted = torch.zeros(2, rows, columns, dtype=torch.bool)
            for row in range(rows):
                for column in range(columns):
                    top, left = row * split.stride - split.padding, column * split.stride - split.padding
                    window = visible[:, max(top, 0) : top + split.kernel, max(left, 0) : left + split.kernel]
                    recounted[:, row, column] = window.any(2).any(1)
            assert torch.equal(seen, recounted.flatten(1))
            visible = recounted
            for image, keep in enumerate(seen):
                with torch.no_grad():
                    alone = module.get_submodule(f"attention{i + 1}")(windows[image : image + 1, keep])
                torch.testing.assert_close(out[image, keep], alone[0], rtol=1e-4, atol=1e-5)


def test_token_transformer_masked_is_visible_tokens_alone() -> None:
    torch.manual_seed(0)
    module = TokenTransformer(27, 8, norm_eps=1e-6)
    nn.init.normal_(module.attn["qkv"].weight)
    x, visible = torch.randn(2, 50, 27), torch.rand(2, 50) < 0.4
    masked = module(x, visible)
    for image, keep in enumerate(visible):
        torch.testing.assert_close(masked[image, keep], module(x[image : image + 1, keep])[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(masked[visible], module(x)[visible], atol=1e-2)


@every_attention
def test_a_mask_of_nothing_is_no_mask(attention: str) -> None:
    x = images((3, 4))
    without, with_one = backbone(attention)(x), backbone(attention)(x, torch.zeros(2, 12, dtype=torch.bool))
    for a, b in zip(tensors(without), tensors(with_one), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@every_attention
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_whole_image_masked(attention: str, autocast: bool) -> None:
    """Nothing to attend to is no reason for a NaN, neither forward nor backward, nor for the other image to notice."""
    grid, model = (3, 4), backbone(attention)
    mask = masks_of(grid)["scattered"]
    x = images(grid)
    with bfloat16(autocast):
        usual = model(x, mask)
        mask[1] = True
        check_no_leak(model, x, mask, autocast)
        features = model(x, mask)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(tensors(features), tensors(usual), strict=True))
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = sum(t.float().square().sum() for t in tensors(features))
    for gradient in torch.autograd.grad(loss, parameters):  # type: ignore[arg-type]
        assert torch.isfinite(gradient).all()


@every_attention
@pytest.mark.parametrize("masked", [False, True])
def test_images_never_mix(attention: str, masked: bool) -> None:
    grid, model = (3, 4), backbone(attention)
    mask = masks_of(grid)["scattered"] if masked else None
    x = images(grid)
    tokens, features = model.tokenize(x, mask)[0], tensors(model(x, mask))
    for value in (1.0, 1e4, float("nan")):
        x[1] = value
        assert torch.equal(model.tokenize(x, mask)[0][0], tokens[0])
        assert all(torch.equal(a[0], b[0]) for a, b in zip(tensors(model(x, mask)), features, strict=True))


@every_attention
@every_patch_size
def test_a_blank_image_is_finite(attention: str, patch_size: int) -> None:
    module = stem(attention, patch_size)
    x = torch.zeros(1, 3, 3 * patch_size, 3 * patch_size, requires_grad=True)
    tokens = module(x)[0]
    assert torch.isfinite(tokens).all()
    for gradient in torch.autograd.grad(tokens.square().sum(), (x, *module.parameters())):
        assert torch.isfinite(gradient).all()
