"""Stochastic depth: which form when, the factors, the expectation, and what is left untouched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quietvit.nn.drop_path import add_residual, branch_drop, draw_drop, drop_rates, subset_is_faithful, subset_size
from quietvit.nn.packing import Groups, unpack

CPU = torch.device("cpu")
DOUBLE = torch.double


def branch(x: Tensor, groups: Groups) -> Tensor:
    return 3 * x + 1


@pytest.mark.parametrize(
    ("batch", "rate", "kept"), [(64, 0.3, 44), (24, 0.4, 14), (8, 0.4, 4), (2, 0.3, 1), (1, 0.3, 1), (3, 0.9, 1)]
)
def test_subset_size(batch: int, rate: float, kept: int) -> None:
    assert subset_size(batch, rate) == kept


def test_subset_form_needs_a_batch_that_can_show_the_rate() -> None:
    unfaithful = [batch for batch in range(1, 200) if not subset_is_faithful(batch, 0.3)]
    assert unfaithful == [*range(1, 10), 11, 12, 14, 15, 17, 18, 21, 24, 27]
    assert subset_is_faithful(64, 0.3)
    assert subset_is_faithful(24, 0.4)
    assert not subset_is_faithful(8, 0.4)
    assert not subset_is_faithful(1, 0.3)


def test_form_follows_the_rule() -> None:
    assert draw_drop(((64, 2),), 0.3, device=CPU, dtype=DOUBLE).groups == ((44, 2),)
    alone = draw_drop(((1, 2),), 0.3, device=CPU, dtype=DOUBLE)
    assert alone.rows is None
    assert alone.groups == ((1, 2),)


@pytest.mark.parametrize("groups", [((1, 2),), ((2, 3),), ((10, 2),), ((10, 2), (13, 1)), ((10, 1), (2, 2))], ids=str)
def test_expectation_is_the_full_residual(groups: Groups) -> None:
    """One image, too few, a subset, two subsets with unlike factors, a subset beside a per-sample group."""
    torch.manual_seed(0)
    x = torch.randn(sum(b * n for b, n in groups), 4, dtype=DOUBLE)
    draws = 4000
    total = torch.zeros_like(x)
    for _ in range(draws):
        total += add_residual(x, branch, groups, draw_drop(groups, 0.3, device=CPU, dtype=DOUBLE))
    residual = branch(x, groups)
    error = (total / draws - x - residual).abs() / residual.abs()
    assert error.max() < 0.06  # about 6 standard errors: sqrt(.3 / .7 / 4000) = .01


def test_rows_share_the_fate_of_their_image() -> None:
    """Tokens of an image are kept or dropped together; dropped ones pass bit for bit, kept ones get b / kept."""
    groups: Groups = ((10, 3), (13, 2))
    x = torch.randn(56, 4, dtype=DOUBLE)
    draws = [torch.tensor([7, 0, 2, 9, 4, 5, 1]), torch.tensor([12, 3, 4, 0, 1, 2, 9, 8, 7])]
    y = add_residual(x, branch, groups, branch_drop(groups, draws, 0.3, dtype=DOUBLE))
    for before, after, draw, (batch, _) in zip(unpack(x, groups), unpack(y, groups), draws, groups, strict=True):
        for image in range(batch):
            if image in draw.tolist():
                expected = before[image] + (3 * before[image] + 1) * batch / len(draw)
                torch.testing.assert_close(after[image], expected)
            else:
                assert torch.equal(after[image], before[image])


def test_per_sample_form_beside_a_subset() -> None:
    groups: Groups = ((4, 2), (2, 3))
    x = torch.randn(14, 4, dtype=DOUBLE)
    drop = branch_drop(groups, [torch.tensor([2, 1, 3]), torch.tensor([False, True])], 0.25, dtype=DOUBLE)
    first, second = unpack(add_residual(x, branch, groups, drop), groups)
    a, b = unpack(x, groups)
    assert torch.equal(first[0], a[0])
    torch.testing.assert_close(first[1:], a[1:] + (3 * a[1:] + 1) * 4 / 3)
    assert torch.equal(second[0], b[0])
    torch.testing.assert_close(second[1], b[1] + (3 * b[1] + 1) / 0.75)


def test_subset_form_computes_kept_rows_only() -> None:
    seen: list[tuple[int, Groups]] = []

    def spy(x: Tensor, groups: Groups) -> Tensor:
        seen.append((x.shape[0], groups))
        return x

    groups: Groups = ((10, 3), (20, 2))
    add_residual(torch.randn(70, 4), spy, groups, draw_drop(groups, 0.5, device=CPU, dtype=torch.float32))
    assert seen == [(5 * 3 + 10 * 2, ((5, 3), (10, 2)))]


def test_low_precision_branch_joins_a_wide_residual() -> None:
    """Under autocast the branch comes in bf16 while the stream stays fp32."""
    groups: Groups = ((10, 2), (13, 1))
    drop = draw_drop(groups, 0.3, device=CPU, dtype=torch.float32)
    y = add_residual(torch.randn(33, 4), lambda x, g: x.bfloat16(), groups, drop)
    assert y.dtype == torch.float32


def test_draws_are_reproducible_and_differ_between_calls() -> None:
    def rows() -> Tensor:
        value = draw_drop(((64, 1),), 0.3, device=CPU, dtype=DOUBLE).rows
        assert value is not None
        return value

    torch.manual_seed(3)
    first, second = rows(), rows()
    torch.manual_seed(3)
    assert torch.equal(first, rows())
    assert not torch.equal(first, second)
    assert len(set(first.tolist())) == 44


def test_rates_of_blocks() -> None:
    assert drop_rates(0.3, 3, uniform=True) == [0.3, 0.3, 0.3]
    assert drop_rates(0.3, 3, uniform=False) == pytest.approx([0.0, 0.15, 0.3])
    assert drop_rates(0.3, 1, uniform=False) == [0.3]
    assert drop_rates(0.3, 0, uniform=False) == []
