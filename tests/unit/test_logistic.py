"""Logistic regression: the minimum it promises, the images held out, the choice of C, few-shot tries, its errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch.autograd.functional import hessian, jacobian

from labelled_pixels import Pictures, Pixels
from quietvit_eval.evaluate import evaluate
from quietvit_eval.logistic import Fitted, LogisticOptions, fit_path, hold_out

NAMES = "abcdefg"
TRAIN = Pictures("train", [i % 7 for i in range(140)], NAMES, noise=110)
TEST = Pictures("val", [i % 7 for i in range(70)], NAMES, noise=110)
QUICK = {"num_c": 6, "max_iter": 200}


def problem(classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Features far from the origin, of unlike scales, that no plane separates."""
    random = np.random.default_rng(1)
    labels = random.integers(0, classes, 90)
    x = random.normal(0, 1, (classes, 5))[labels] + random.normal(0, 1.5, (90, 5))
    return (x * [0.1, 1, 1, 3, 0.5] + [5, -3, 0, 20, 1]).astype(np.float32), labels


def objective(weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor, labels: torch.Tensor, c: float) -> Any:
    return weight.square().sum() / 2 + c * F.cross_entropy(x @ weight.T + bias, labels, reduction="sum")


def newton(x: torch.Tensor, labels: torch.Tensor, c: float, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The minimum by Newton's method with halved steps; the common shift of the biases, which is free, stays 0."""
    width = x.shape[1]

    def value(flat: torch.Tensor) -> torch.Tensor:
        return objective(flat[: classes * width].view(classes, width), flat[classes * width :], x, labels, c)

    flat = torch.zeros(classes * (width + 1), dtype=torch.float64)
    for _ in range(30):
        gradient = jacobian(value, flat)
        step = torch.linalg.pinv(hessian(value, flat), hermitian=True) @ gradient
        while value(flat - step) > value(flat) + 1e-12 * abs(value(flat)):
            step = step / 2
        flat = flat - step
    assert float(jacobian(value, flat).abs().max()) < 1e-8
    return flat[: classes * width].view(classes, width), flat[classes * width :]


@pytest.mark.parametrize("c", [1e-3, 0.3, 50.0])
def test_it_minimises_the_penalised_sum_of_losses(c: float) -> None:
    features, labels = problem(4)
    (fitted,) = fit_path(features, labels, [c], max_iter=5000, tol=1e-10)
    x, y = torch.from_numpy(features).double(), torch.from_numpy(labels)
    weight, bias = newton(x, y, c, 4)
    ours = torch.from_numpy(fitted.weight), torch.from_numpy(fitted.bias)
    assert float(objective(*ours, x, y, c)) == pytest.approx(float(objective(weight, bias, x, y, c)), rel=1e-9)
    torch.testing.assert_close(ours[0], weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        torch.softmax(fitted.logits(features, 4), dim=1), torch.softmax(x @ weight.T + bias, dim=1).float()
    )


def test_two_classes_are_one_logistic_function() -> None:
    features, labels = problem(2)
    (fitted,) = fit_path(features, labels, [0.5], max_iter=5000, tol=1e-10)
    x, sign = torch.from_numpy(features).double(), torch.from_numpy(2.0 * labels - 1)
    weight = torch.from_numpy(fitted.weight[1]).requires_grad_()
    bias = torch.from_numpy(fitted.bias[1:]).requires_grad_()
    loss = weight.square().sum() / 2 + 0.5 * F.softplus(-sign * (x @ weight + bias)).sum()
    loss.backward()
    assert weight.grad is not None
    assert float(weight.grad.abs().max()) < 1e-3  # at the start it is 20
    assert fitted.weight[0].tolist() == [0] * 5


def test_a_path_reaches_what_each_c_reaches_alone_and_says_if_it_does_not() -> None:
    features, labels = problem(3)
    cs = [1e-3, 1e-1, 10.0]
    for c, along in zip(cs, fit_path(features, labels, cs, max_iter=5000, tol=1e-9), strict=True):
        (alone,) = fit_path(features, labels, [c], max_iter=5000, tol=1e-9)
        np.testing.assert_allclose(along.weight, alone.weight, atol=1e-4)
        assert along.converged
    (short,) = fit_path(features, labels, [10.0], max_iter=2, tol=1e-9)
    assert (short.iterations, short.converged) == (2, False)


def test_classes_without_train_images_are_ruled_out() -> None:
    features, labels = problem(3)
    (fitted,) = fit_path(features, labels * 2, [1.0], max_iter=100, tol=1e-4)
    logits = fitted.logits(features, 6)
    assert logits.isneginf().all(dim=0).tolist() == [False, True, False, True, False, True]
    assert isinstance(fitted, Fitted)
    with pytest.raises(ValueError, match="at least 2 classes"):
        next(fit_path(features, 0 * labels, [1.0], max_iter=1, tol=1.0))


@pytest.mark.parametrize(("counts", "share"), [([50, 30, 8, 1, 0, 2], 0.1), ([5] * 20, 0.1), ([3, 4], 0.9)])
def test_a_share_of_every_class_is_held_out(counts: list[int], share: float) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))]
    kept, held = hold_out(labels, share, torch.Generator().manual_seed(0))
    assert sorted(kept.tolist() + held.tolist()) == list(range(len(labels)))
    assert held.tolist() == sorted(held.tolist())
    found = torch.bincount(labels[held], minlength=len(counts)).tolist()
    for have, out in zip(counts, found, strict=True):
        assert abs(out - share * have) < 1 + (have == 1)
        assert out < have or have == 0
    assert sum(found) == min(round(share * sum(counts)), sum(max(0, n - 1) for n in counts))


def test_chance_decides_which_of_equal_classes_give_one_and_which_image() -> None:
    labels = torch.arange(20).repeat_interleave(5)
    draws = [hold_out(labels, 0.1, torch.Generator().manual_seed(seed))[1] for seed in range(40)]
    assert torch.bincount(labels[torch.cat(draws)], minlength=20).min() > 8  # 20 each on average
    assert len(torch.cat(draws).unique()) > 90
    again = hold_out(labels, 0.1, torch.Generator().manual_seed(7))[1]
    assert again.tolist() == draws[7].tolist()
    with pytest.raises(ValueError, match="no class has 2"):
        hold_out(torch.arange(4), 0.5, torch.Generator())


def test_the_task_chooses_c_on_held_out_images_and_refits_on_all() -> None:
    (card,) = evaluate(Pixels(), ["logistic"], (TRAIN, TEST), options={"logistic": QUICK})
    curve = card.details["curve"]
    assert [point["c"] for point in curve] == pytest.approx(np.logspace(-6, 5, 6))
    shares = [point["chosen_by"] for point in curve]
    best = shares.index(max(shares))
    assert card.details["c"] == curve[best]["c"]
    assert (card.details["trained_on"], card.details["chosen_on"]) == (140, 14)
    assert "refit on all" in card.protocol["choice"]
    model = LogisticRegression(C=card.details["c"], solver="newton-cholesky", tol=1e-12)
    x, y = TRAIN.features().float().double().numpy(), TRAIN.labels["class"]
    expected = model.fit(x, y).predict(TEST.features().numpy()) == TEST.labels["class"]
    assert card.scores["top1"] == pytest.approx(expected.mean(), abs=1.5 / 70)
    assert 0.3 < card.scores["top1"] < card.scores["top5"]
    (again,) = evaluate(Pixels(), ["logistic"], (TRAIN, TEST), options={"logistic": QUICK})
    assert (again.scores, again.details) == (card.scores, card.details)
    (other,) = evaluate(Pixels(), ["logistic"], (TRAIN, TEST), options={"logistic": {**QUICK, "tol": 1e-3}})
    assert other.protocol_key() != card.protocol_key()


def test_a_choice_on_the_test_images_reports_the_best_of_them() -> None:
    (card,) = evaluate(Pixels(), ["logistic"], (TRAIN, TEST), options={"logistic": {**QUICK, "select": "val"}})
    best = max(point["chosen_by"] for point in card.details["curve"])
    assert card.scores["top1"] == pytest.approx(best, abs=1.5 / 70)
    assert card.details["chosen_on"] == 70
    assert "optimistic" in card.protocol["choice"]


def test_few_shot_tries_are_averaged() -> None:
    options = {**QUICK, "per_class": 4, "tries": 3, "held_out": 0.25}
    (card,) = evaluate(Pixels(), ["logistic"], (TRAIN, TEST), options={"logistic": options})
    tries = card.details["tries"]
    assert [t["trained_on"] for t in tries] == [28] * 3
    assert [t["chosen_on"] for t in tries] == [7] * 3
    for name, score in card.scores.items():
        each = [t["scores"][name] for t in tries]
        assert score == pytest.approx(np.mean(each))
        assert card.details["std"][name] == pytest.approx(np.std(each))
    assert len({t["scores"]["top1"] for t in tries}) > 1
    (whole,) = evaluate(Pixels(), ["logistic"], (TRAIN, TEST), options={"logistic": QUICK})
    assert whole.scores["top1"] > card.scores["top1"] > 1 / 7


def test_a_search_cut_short_is_told_on_the_card() -> None:
    options = {"num_c": 2, "max_iter": 1, "select": "val"}
    (card,) = evaluate(Pixels(), ["logistic"], (TRAIN, TEST), options={"logistic": options})
    assert not card.details["curve"][-1]["converged"]


def test_the_grid_is_that_of_dinov2() -> None:
    cs = LogisticOptions().cs
    assert len(cs) == 45
    assert [math.log10(c) for c in (cs[0], cs[22], cs[44])] == pytest.approx([-6, -0.5, 5])


@pytest.mark.parametrize(
    "bad",
    [
        {"select": "test"}, {"held_out": 0.0}, {"held_out": 1.0}, {"num_c": 1}, {"tries": 0}, {"max_iter": 0},
        {"per_class": 0}, {"tol": 0.0}, {"tol": math.nan},
    ],
)  # fmt: skip
def test_options_that_cannot_be(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="logistic:"):
        LogisticOptions(**bad)


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0] * 20, "at least 2 classes"), (list(range(7)), "no class has 2 train images")],
)
def test_data_that_cannot_be_scored(labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(Pixels(), ["logistic"], (Pictures("train", labels, NAMES), TEST), options={"logistic": QUICK})
