"""Depth heads: what they compute, at which sizes, and that all of them learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quietvit_eval.depth.dpt import DptHead
from quietvit_eval.depth.heads import LinearHead, expected_depth
from quietvit_eval.depth.options import DepthOptions


def test_expected_depth_by_loops() -> None:
    logits = torch.randn(2, 5, 2, 3, dtype=torch.float64) * 3
    depth = expected_depth(logits, min_depth=0.5, max_depth=4.5)
    for b in range(2):
        for y in range(2):
            for x in range(3):
                mass = [max(float(z), 0) + 0.1 for z in logits[b, :, y, x]]
                mean = sum(m * (0.5 + i) for i, m in enumerate(mass)) / sum(mass)
                assert float(depth[b, y, x]) == pytest.approx(mean)
    assert 0.5 < float(depth.min()) < float(depth.max()) < 4.5


def test_the_linear_head_is_that_on_features_interpolated_first() -> None:
    options = DepthOptions(bins=7, upsample=4)
    head = LinearHead(6, options)
    nn.init.normal_(head.conv.weight)
    nn.init.normal_(head.conv.bias)  # type: ignore[arg-type]
    maps = torch.randn(2, 6, 3, 5)
    finer = F.interpolate(maps, scale_factor=4, mode="bilinear", align_corners=False)
    expected = expected_depth(head.conv(finer), min_depth=1e-3, max_depth=10.0)
    torch.testing.assert_close(head(maps), expected, atol=1e-5, rtol=1e-5)
    assert head(maps).shape == (2, 12, 20)
    assert LinearHead(6, DepthOptions(upsample=1))(maps).shape == (2, 3, 5)


@pytest.mark.parametrize("bins", [0, 16])
def test_heads_start_in_the_middle_of_the_range(bins: int) -> None:
    torch.manual_seed(0)
    linear = LinearHead(6, DepthOptions(bins=bins))
    dpt = DptHead(16, DepthOptions(head="dpt", layers=4, bins=bins))
    for depth in (linear(torch.randn(1, 6, 2, 2)), dpt(torch.randn(1, 128, 2, 2))):
        assert 4 < depth.min().item() <= depth.max().item() < 6


@pytest.mark.parametrize(("bins", "finer"), [(0, 16), (16, 8)])
@pytest.mark.parametrize("grid", [(3, 2), (1, 4)])
def test_dpt_sizes_and_that_every_parameter_learns(bins: int, finer: int, grid: tuple[int, int]) -> None:
    torch.manual_seed(1)
    head = DptHead(16, DepthOptions(head="dpt", layers=4, bins=bins))
    depth = head(torch.randn(2, 8 * 16, *grid))
    if grid == (3, 2):
        assert depth.shape == (2, 3 * finer, 2 * finer)
    assert depth.shape == (2, grid[0] * finer, grid[1] * finer)
    depth.square().sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("bins", [0, 256])
def test_dpt_parameters_are_those_of_the_docstring(bins: int) -> None:
    D, W = 64, 256
    s = 15 * D // 8
    expected = 4 * (2 * D * D + D) + D * s + s
    expected += 16 * (D // 8) ** 2 + 4 * (D // 4) ** 2 + 9 * D * D + D // 8 + D // 4 + D
    expected += 9 * W * s + 14 * 9 * W * W + 4 * (W * W + W) + 9 * W * W + W
    expected += 9 * W * bins + bins if bins else 9 * W * W // 2 + W // 2 + 9 * (W // 2) * 32 + 32 + 33
    head = DptHead(D, DepthOptions(head="dpt", layers=4, bins=bins))
    assert sum(p.numel() for p in head.parameters()) == expected


def test_dpt_blocks_and_class_tokens_all_matter() -> None:
    torch.manual_seed(2)
    head = DptHead(16, DepthOptions(head="dpt", layers=4, bins=8)).eval()
    maps = torch.randn(1, 128, 2, 2)
    before = head(maps)
    for start in range(0, 128, 16):
        changed = maps.clone()
        changed[:, start : start + 16] += 1
        assert (head(changed) - before).abs().max() > 1e-5


def test_dpt_refuses_widths_it_cannot_divide() -> None:
    with pytest.raises(ValueError, match="multiple of 8, not 12"):
        DptHead(12, DepthOptions(head="dpt", layers=4))


def test_batch_norm_comes_before_the_map_and_learns() -> None:
    torch.manual_seed(3)
    head = LinearHead(6, DepthOptions(bins=8, upsample=1, batch_norm=True))
    maps = torch.randn(4, 6, 3, 3) * 50 + 20
    depth = head(maps)
    normed = nn.BatchNorm2d(6)(maps)
    torch.testing.assert_close(depth, expected_depth(head.conv(normed), min_depth=1e-3, max_depth=10.0))
    depth.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in head.parameters())
    assert not torch.equal(head.eval()(maps), depth)  # running statistics from here on
