"""Depth losses against loops over pixels in float64, and where they have no gradient by nature."""

from __future__ import annotations

import math

import pytest
import torch

from quietvit_eval.depth.losses import gradient_loss, sig_loss


def maps(seed: int = 0, shape: tuple[int, ...] = (3, 15, 13)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    predicted = torch.rand(shape, generator=g, dtype=torch.float64) * 9 + 0.1
    target = torch.rand(shape, generator=g, dtype=torch.float64) * 12
    target[torch.rand(shape, generator=g) < 0.3] = 0
    return predicted, target, (target > 0) & (target <= 10)


def naive_logs(predicted: torch.Tensor, target: torch.Tensor) -> list[list[list[float]]]:
    def logs(ps: list[float], ts: list[float]) -> list[float]:
        return [math.log(p + 1e-3) - math.log(t + 1e-3) for p, t in zip(ps, ts, strict=True)]

    both = zip(predicted.tolist(), target.tolist(), strict=True)
    return [[logs(ps, ts) for ps, ts in zip(a, b, strict=True)] for a, b in both]


def test_sig_loss_by_loops() -> None:
    predicted, target, valid = maps()
    logs = naive_logs(predicted, target)
    g = [logs[b][y][x] for b, y, x in valid.nonzero().tolist()]
    mean = sum(g) / len(g)
    variance = sum((v - mean) ** 2 for v in g) / (len(g) - 1)
    assert float(sig_loss(predicted, target, valid)) == pytest.approx(math.sqrt(variance + 0.15 * mean**2))
    assert float(sig_loss(predicted, target, valid, warm_up=True)) == pytest.approx(math.sqrt(0.15) * abs(mean))


def test_sig_loss_of_twice_the_depth() -> None:
    _, target, valid = maps()
    for warm_up in (False, True):
        assert float(sig_loss(2 * target, target, valid, warm_up=warm_up)) == pytest.approx(0.2685, abs=1e-3)


def test_gradient_loss_by_loops() -> None:
    predicted, target, valid = maps(1)
    logs, v = naive_logs(predicted, target), valid.tolist()
    expected = 0.0
    for stride in (1, 2, 4, 6):
        total, count = 0.0, 0
        for b in range(3):
            d = [row[::stride] for row in logs[b][::stride]]
            m = [row[::stride] for row in v[b][::stride]]
            for y in range(len(d)):
                for x in range(len(d[0])):
                    count += m[y][x]
                    if y + 2 < len(d) and m[y][x] and m[y + 2][x]:
                        total += abs(d[y + 2][x] - d[y][x])
                    if x + 2 < len(d[0]) and m[y][x] and m[y][x + 2]:
                        total += abs(d[y][x + 2] - d[y][x])
        expected += total / count
    assert float(gradient_loss(predicted, target, valid)) == pytest.approx(expected)


def test_pixels_that_are_not_valid_change_nothing() -> None:
    predicted, target, valid = maps(2)
    predicted.requires_grad_()
    loss = sig_loss(predicted, target, valid) + gradient_loss(predicted, target, valid)
    (gradient,) = torch.autograd.grad(loss, predicted)
    assert gradient[~valid].abs().max() == 0
    assert gradient[valid].abs().min() > 0
    other = torch.where(valid, predicted.detach(), 7.0)
    assert float(sig_loss(other, target, valid) + gradient_loss(other, target, valid)) == pytest.approx(loss.item())


@pytest.mark.parametrize("warm_up", [False, True])
def test_a_perfect_prediction_has_a_finite_gradient(warm_up: bool) -> None:
    _, target, valid = maps(3)
    predicted = target.clone().requires_grad_()
    loss = sig_loss(predicted, target, valid, warm_up=warm_up) + gradient_loss(predicted, target, valid)
    assert loss.item() < 1e-5
    (gradient,) = torch.autograd.grad(loss, predicted)
    assert gradient.isfinite().all()


def test_batches_without_or_with_one_valid_pixel() -> None:
    predicted, target, valid = maps(4)
    predicted.requires_grad_()
    none = torch.zeros_like(valid)
    loss = sig_loss(predicted, target, none) + gradient_loss(predicted, target, none)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, predicted)[0].abs().max() == 0
    one = none.clone()
    one[1, 2, 3], target[1, 2, 3] = True, 4.0
    g = math.log(predicted[1, 2, 3].item() + 1e-3) - math.log(4.001)
    assert sig_loss(predicted, target, one).item() == pytest.approx(math.sqrt(0.15) * abs(g))
