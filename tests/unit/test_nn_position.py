"""Resizing of position tables: against torch's own bicubic resizing, and at its edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quietvit.nn.position import resize_matrix, resize_positions


def table(side: int, dim: int = 3) -> Tensor:
    return torch.randn(1, 1 + side * side, dim, generator=torch.Generator().manual_seed(0)).double()


def by_torch(value: Tensor, side: int, grid: tuple[int, int], antialias: bool) -> Tensor:
    square = value[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bicubic", antialias=antialias)
    return torch.cat((value[:, :1], resized.flatten(2).transpose(1, 2)), dim=1)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("grid", [(3, 3), (1, 9), (12, 7), (6, 3)])
def test_value_and_gradient_are_those_of_torch(grid: tuple[int, int], antialias: bool) -> None:
    ours, theirs = table(6).requires_grad_(), table(6).requires_grad_()
    a = resize_positions(ours, (6, 6), grid, antialias=antialias)
    b = by_torch(theirs, 6, grid, antialias)
    torch.testing.assert_close(a, b)
    weights = torch.randn(a.shape, dtype=a.dtype)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("mode", ["size", "offset"])
def test_native_grid_is_the_table_itself(mode: str) -> None:
    value = table(4)
    assert resize_positions(value, (4, 4), (4, 4), mode=mode) is value
    assert not torch.equal(resize_positions(value, (4, 4), (2, 8), mode=mode), value)  # as many, in another shape


@pytest.mark.parametrize("mode", ["size", "offset"])
def test_class_token_row_is_kept(mode: str) -> None:
    value = table(4)
    assert torch.equal(resize_positions(value, (4, 4), (6, 3), mode=mode)[:, 0], value[:, 0])


# DINOv2 PR 378: grids that rounding misses without an offset, for 224 px at patch 16 and 518 px at patch 14
@pytest.mark.parametrize(("native", "side"), [(14, 61), (14, 115), (14, 122), (37, 39), (37, 43), (37, 78)])
def test_offset_mode_never_returns_a_wrong_count(native: int, side: int) -> None:
    def count(**arguments: Any) -> int:
        return resize_positions(table(native, 1), (native, native), (side, side), **arguments).shape[1]

    with pytest.raises(ValueError, match=f"turns {side} patches into {side - 1}; use pos_offset: 0.1, or"):
        count(mode="offset", offset=0.0)
    assert count(mode="offset", offset=0.1) == 1 + side * side
    assert count(mode="size") == 1 + side * side


def test_low_precision_tables_are_resized_in_fp32() -> None:
    value = table(6)
    low = value.bfloat16()
    expected = resize_positions(low.float(), (6, 6), (4, 4)).bfloat16()
    assert torch.equal(resize_positions(low, (6, 6), (4, 4)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resize_positions(low.float(), (6, 6), (4, 4)).bfloat16(), expected)


def test_a_trained_table_is_not_served_from_memory() -> None:
    value = table(6)
    with torch.no_grad():
        before = resize_positions(value, (6, 6), (3, 3))
        value.data.mul_(2)
        torch.testing.assert_close(resize_positions(value, (6, 6), (3, 3)), 2 * before)


def test_matrix_made_in_inference_mode_serves_a_backward() -> None:
    resize_matrix.cache_clear()
    value = table(6).requires_grad_()
    with torch.inference_mode():
        resize_positions(value, (6, 6), (5, 4))
    resize_positions(value, (6, 6), (5, 4)).sum().backward()
    assert value.grad is not None


def test_antialias_shrinks_without_stripes() -> None:
    """Registers paper, appendix A: the gradient on the table is even with antialias and striped without."""

    def column_gradient(antialias: bool) -> Tensor:
        value = table(16, 1).requires_grad_()
        resize_positions(value, (16, 16), (7, 7), antialias=antialias)[:, 1:].sum().backward()
        assert value.grad is not None
        return value.grad[0, 1:, 0].view(16, 16).mean(0)[3:-3]

    smooth, striped = column_gradient(True), column_gradient(False)
    assert smooth.std() / smooth.mean() < 0.1
    assert striped.std() / striped.mean() > 0.5
