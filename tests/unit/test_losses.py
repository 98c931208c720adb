"""Losses against their sums as loops in float64, and what they must survive: large logits, equal rows, nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quietvit.losses.centering import SoftmaxCentering, sinkhorn_knopp
from quietvit.losses.cross_entropy import soft_cross_entropy
from quietvit.losses.dino import dino_losses, view_cross_entropy
from quietvit.losses.gram import gram_loss
from quietvit.losses.ibot import ibot_loss
from quietvit.losses.koleo import koleo_loss, koleo_over_views


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def probabilities(*shape: int, seed: int = 0) -> Tensor:
    return draw(*shape, seed=seed, scale=3.0).softmax(-1)


def entropy_by_loop(logits: Tensor, targets: Tensor, temp: float) -> float:
    """-sum_k q_k log softmax(s / temp)_k for one row."""
    s = [x / temp for x in logits.double().tolist()]
    largest = max(s)
    log_sum = largest + math.log(sum(math.exp(x - largest) for x in s))
    return -sum(q * (x - log_sum) for q, x in zip(targets.double().tolist(), s, strict=True))


def test_cross_entropy_by_loop() -> None:
    logits, targets = draw(3, 4, 7), probabilities(3, 4, 7, seed=1)
    rows = soft_cross_entropy(logits, targets, temp=0.1)
    assert rows.shape == (3, 4)
    for i in range(3):
        for j in range(4):
            assert rows[i, j].item() == pytest.approx(entropy_by_loop(logits[i, j], targets[i, j], 0.1), rel=1e-5)


def test_cross_entropy_is_float32_under_autocast() -> None:
    logits, targets = draw(4, 50), probabilities(4, 50, seed=1)
    exact = soft_cross_entropy(logits, targets, temp=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = soft_cross_entropy(logits, targets, temp=0.1)
    assert inside.dtype is torch.float32
    assert torch.equal(inside, exact)


def test_cross_entropy_of_huge_logits() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    row = soft_cross_entropy(logits, torch.tensor([[0.0, 1.0, 0.0]]), temp=0.1)
    assert row.item() == pytest.approx(2e5)
    row.sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[10.0, -10.0, 0.0]]))


@pytest.mark.parametrize("num_local", [0, 1, 8])
def test_dino_is_the_mean_over_pairs_of_distinct_views(num_local: int) -> None:
    images, k = 3, 5
    local, globals_ = draw(num_local, images, k), draw(2, images, k, seed=1)
    teacher = probabilities(2, images, k, seed=2)  # view v of the teacher
    students = [*globals_, *local]  # views 0 and 1 are the global ones
    pairs = [(s, t) for s in range(len(students)) for t in range(2) if s != t]
    expected = sum(
        entropy_by_loop(students[s][b], teacher[t][b], 0.1) / images for s, t in pairs for b in range(images)
    )
    ours = dino_losses(local, globals_, teacher.flip(0), temp=0.1)
    assert (ours[0] + ours[1]).item() == pytest.approx(expected / len(pairs), rel=1e-5)
    assert len(pairs) == 2 * num_local + 2
    assert (ours[0].item() == 0) == (num_local == 0)


@pytest.mark.parametrize(("students", "teachers"), [(2, 2), (3, 2), (2, 3), (1, 2)])
def test_distinct_pairs_by_loop(students: int, teachers: int) -> None:
    logits, targets = draw(students, 3, 5), probabilities(teachers, 3, 5, seed=1)
    pairs = [(s, t) for s in range(students) for t in range(teachers) if s != t]
    expected = sum(entropy_by_loop(logits[s][b], targets[t][b], 0.1) / 3 for s, t in pairs for b in range(3))
    ours = view_cross_entropy(logits, targets, temp=0.1, pairs="distinct")
    assert ours.item() == pytest.approx(expected / len(pairs), rel=1e-5)


def test_unknown_pairs() -> None:
    with pytest.raises(ValueError, match="pairs must be"):
        view_cross_entropy(draw(2, 1, 3), probabilities(2, 1, 3), temp=0.1, pairs="some")


def test_uniform_logits_cost_ln_k() -> None:
    k = 32
    local, global_ = dino_losses(torch.zeros(8, 4, k), torch.zeros(2, 4, k), probabilities(2, 4, k), temp=0.1)
    assert (local + global_).item() == pytest.approx(math.log(k), rel=1e-6)
    assert (local / global_).item() == pytest.approx(8.0, rel=1e-5)  # 16 of 18 pairs against 2
    # half of the crops masked, every crop counted: half of ln K
    weights = torch.tensor([1 / 3] * 3 + [1.0])
    patch = ibot_loss(torch.zeros(4, k), probabilities(4, k), weights, num_crops=4, temp=0.1)
    assert patch.item() == pytest.approx(0.5 * math.log(k), rel=1e-6)


def test_ibot_by_loop() -> None:
    counts = [0, 3, 1, 0]
    logits, targets = draw(4, 6), probabilities(4, 6, seed=1)
    expected, row = 0.0, 0
    for count in counts:
        for _ in range(count):
            expected += entropy_by_loop(logits[row], targets[row], 0.1) / count
            row += 1
    weights = torch.tensor([1 / c for c in counts for _ in range(c)])
    ours = ibot_loss(logits, targets, weights, num_crops=len(counts), temp=0.1)
    assert ours.item() == pytest.approx(expected / 4, rel=1e-5)


def test_ibot_without_masked_patches() -> None:
    logits = torch.zeros(0, 6, requires_grad=True)
    loss = ibot_loss(logits, torch.zeros(0, 6), torch.zeros(0), num_crops=4, temp=0.1)
    assert loss.item() == 0.0
    loss.backward()  # part of a total whose other terms have gradients


# ---- KoLeo


def koleo_by_loop(x: Tensor, k: int) -> float:
    unit = [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in x.double().tolist()]
    total = 0.0
    for i, a in enumerate(unit):
        dots = [(sum(p * q for p, q in zip(a, b, strict=True)), j) for j, b in enumerate(unit) if j != i]
        for _, j in sorted(dots, reverse=True)[:k]:
            distance = math.sqrt(sum((p - q + 1e-8) ** 2 for p, q in zip(a, unit[j], strict=True)))
            total -= math.log(distance + 1e-8)
    return total / (len(unit) * k)


@pytest.mark.parametrize("k", [1, 3])
def test_koleo_by_loop(k: int) -> None:
    x = draw(9, 4)
    assert koleo_loss(x, num_neighbours=k).item() == pytest.approx(koleo_by_loop(x, k), rel=1e-5)


def test_koleo_by_hand() -> None:
    """Three points at right angles: every nearest neighbour is sqrt(2) away."""
    assert koleo_loss(torch.eye(3) * 7).item() == pytest.approx(-0.5 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_koleo_of_equal_rows(dtype: torch.dtype) -> None:
    x = draw(6, 16).to(dtype)
    x[3] = x[0]
    x[5] = 0.0
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = koleo_loss(x)
    loss.backward()
    assert loss.dtype is torch.float32
    assert loss.isfinite()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad[1:3].abs().max() > 0
    # an equal pair does not take over the gradient of the others
    assert x.grad[:5].norm(dim=-1).max() < 10


def test_koleo_of_one_row() -> None:
    loss = koleo_loss(draw(1, 8).requires_grad_())
    assert loss.item() == 0.0
    assert not loss.requires_grad


def test_koleo_of_fewer_rows_than_neighbours() -> None:
    x = draw(3, 8)
    assert koleo_loss(x, num_neighbours=5).item() == pytest.approx(koleo_by_loop(x, 2), rel=1e-5)


def test_koleo_spreads() -> None:
    x = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.0]], requires_grad=True)
    koleo_loss(x).backward()
    assert x.grad is not None
    assert x.grad[0, 1] < 0 < x.grad[1, 1]  # descent moves the close pair apart


def test_koleo_over_views() -> None:
    cls = draw(2, 5, 8)
    first, second = koleo_loss(cls[0]), koleo_loss(cls[1])
    torch.testing.assert_close(koleo_over_views(cls), first + second)
    torch.testing.assert_close(koleo_over_views(cls, crops="first"), first)
    with pytest.raises(ValueError, match="koleo_crops"):
        koleo_over_views(cls, crops="second")


# ---- Gram


@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("negatives", ["keep", "drop", "drop_anchor"])
def test_gram_by_loop(per_image: bool, negatives: str) -> None:
    x, y = draw(2, 3, 4), draw(2, 3, 4, seed=1)

    def similarity(rows: list[list[float]], i: int, j: int) -> float:
        a, b = rows[i], rows[j]
        norms = math.sqrt(sum(v * v for v in a)) * math.sqrt(sum(v * v for v in b))
        return sum(v * w for v, w in zip(a, b, strict=True)) / norms

    groups = [(x[i], y[i]) for i in range(2)] if per_image else [(x.flatten(0, 1), y.flatten(0, 1))]
    total, num = 0.0, 0
    for student, anchor in groups:
        p, q = student.double().tolist(), anchor.double().tolist()
        for i in range(len(p)):
            for j in range(len(p)):
                a, b = similarity(p, i, j), similarity(q, i, j)
                a = max(a, 0.0) if negatives == "drop" else a
                b = max(b, 0.0) if negatives != "keep" else b
                total, num = total + (a - b) ** 2, num + 1
    assert gram_loss(x, y, per_image=per_image, negatives=negatives).item() == pytest.approx(total / num, rel=1e-5)


def test_gram_unknown_option() -> None:
    with pytest.raises(ValueError, match="negatives"):
        gram_loss(draw(1, 2, 3), draw(1, 2, 3), negatives="flip")


# ---- Sinkhorn-Knopp and centering


def sinkhorn_by_loop(logits: Tensor, temp: float, iterations: int) -> Tensor:
    """The usual statement in float64: rows of Q are prototypes, columns samples."""
    q = (logits.double() / temp).exp().T
    k, b = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        for i in range(k):
            q[i] = q[i] / q[i].sum() / k
        for j in range(b):
            q[:, j] = q[:, j] / q[:, j].sum() / b
    return (q * b).T


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn_by_loop(iterations: int) -> None:
    logits = draw(12, 5, scale=0.3)
    q = sinkhorn_knopp(logits, 0.05, iterations=iterations)
    torch.testing.assert_close(q.double(), sinkhorn_by_loop(logits, 0.05, iterations), atol=1e-6, rtol=1e-4)


def test_sinkhorn_balances() -> None:
    q = sinkhorn_knopp(draw(64, 8, scale=0.2), 0.05, iterations=50)
    torch.testing.assert_close(q.sum(1), torch.ones(64))
    torch.testing.assert_close(q.sum(0), torch.full((8,), 8.0), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_sinkhorn_of_logits_that_overflow(scale: float) -> None:
    """exp(logits / temp) is inf in float32 and in float64; the assignment still is one, and does not mind an offset."""
    logits = draw(16, 6, scale=scale)
    logits[:, 2] -= 100 * scale  # a prototype that nobody would have
    q = sinkhorn_knopp(logits, 0.04)
    assert q.isfinite().all()
    torch.testing.assert_close(q.sum(1), torch.ones(16))


def test_sinkhorn_ignores_a_common_offset_and_order() -> None:
    logits = draw(10, 6, scale=0.2)
    q = sinkhorn_knopp(logits, 0.05)
    torch.testing.assert_close(sinkhorn_knopp(logits + 30.0, 0.05), q, atol=1e-4, rtol=1e-3)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sinkhorn_knopp(logits[order], 0.05), q[order])


def test_sinkhorn_leaves_its_input_alone() -> None:
    logits = draw(4, 3)
    before = logits.clone()
    sinkhorn_knopp(logits, 1.0)
    assert torch.equal(logits, before)


def test_targets_have_no_gradient_and_are_float32() -> None:
    logits = draw(4, 6).bfloat16().requires_grad_()
    for targets in (sinkhorn_knopp(logits, 0.05), SoftmaxCentering(6)(logits, 0.05)):
        assert targets.dtype is torch.float32
        assert not targets.requires_grad


def test_no_rows() -> None:
    assert sinkhorn_knopp(torch.zeros(0, 5), 0.05).shape == (0, 5)
    centering = SoftmaxCentering(5)
    centering.center.fill_(2.0)
    assert centering(torch.zeros(0, 5), 0.05).shape == (0, 5)
    assert (centering.center == 2).all()


def test_center_lags_by_one_batch() -> None:
    centering = SoftmaxCentering(4)
    first, second = draw(6, 4), draw(6, 4, seed=1)
    torch.testing.assert_close(centering(first, 0.1), (first / 0.1).softmax(-1))
    center = 0.1 * first.mean(0)
    torch.testing.assert_close(centering.center[0], center)
    torch.testing.assert_close(centering(second, 0.1), ((second - center) / 0.1).softmax(-1))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_center_survives_a_broken_batch(broken: float) -> None:
    centering = SoftmaxCentering(4)
    centering(draw(6, 4), 0.1)
    before = centering.center.clone()
    logits = draw(6, 4)
    logits[2, 1] = broken
    centering(logits, 0.1)
    assert torch.equal(centering.center, before)


def test_center_travels_with_the_state() -> None:
    one, other = SoftmaxCentering(4), SoftmaxCentering(4)
    one(draw(6, 4), 0.1)
    other.load_state_dict(one.state_dict(), strict=True)
    assert torch.equal(one(draw(6, 4), 0.1), other(draw(6, 4), 0.1))
