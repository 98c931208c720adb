"""k-NN against loops in float64, its tie rule, and its independence of the chunk size."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quietvit.features.knn import knn_accuracy, knn_scores


def loop_scores(bank: Tensor, labels: Tensor, queries: Tensor, k: int, kmax: int, temp: float, classes: int) -> Tensor:
    """The definition, one number at a time."""
    out = torch.zeros(len(queries), classes, dtype=torch.float64)
    rows = [r.double() / r.double().norm() for r in bank]
    for i, query in enumerate(queries):
        q = query.double() / query.double().norm()
        near = sorted(((float(q @ r), -j) for j, r in enumerate(rows)), reverse=True)[:kmax]
        weights = [math.exp(s / temp) for s, _ in near]
        for weight, (_, minus_j) in list(zip(weights, near, strict=True))[:k]:
            out[i, labels[-minus_j]] += weight / sum(weights)
    return out


@pytest.mark.parametrize("chunk", [3, 17, 2048])
def test_scores_are_the_definition_for_any_chunk(chunk: int) -> None:
    torch.manual_seed(0)
    bank, queries, labels = torch.randn(60, 5), torch.randn(11, 5) * 7, torch.randint(4, (60,))
    scores = knn_scores(bank, labels, queries, ks=(1, 5, 20), num_classes=4, chunk=chunk)
    for k, got in scores.items():
        torch.testing.assert_close(
            got.double(), loop_scores(bank, labels, queries, k, 20, 0.07, 4), atol=2e-6, rtol=1e-5
        )


def test_equal_similarities_rank_by_bank_index() -> None:
    bank = torch.ones(50, 3)
    labels = torch.arange(50)
    queries = torch.ones(2, 3)
    for chunk in (1, 7, 64):
        scores = knn_scores(bank, labels, queries, ks=(1, 4), num_classes=50, chunk=chunk)
        assert scores[1].nonzero()[:, 1].tolist() == [0, 0]
        assert scores[4].nonzero()[:, 1].tolist() == [0, 1, 2, 3] * 2


def test_negative_and_zero_similarities_keep_their_order() -> None:
    bank = torch.tensor([[-1.0, 0.0], [-1.0, 1.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, -1.0]])
    query = torch.tensor([[1.0, 0.0]])
    order = []
    for k in range(1, 7):
        now = knn_scores(bank, torch.arange(6), query, ks=(k,), num_classes=6, chunk=4)[k]
        order += [i for i in now.nonzero()[:, 1].tolist() if i not in order]
    assert order == [4, 3, 2, 5, 1, 0]  # cosines 1, .71, 0 and 0 (lower index first), -.71, -1


def test_k_beyond_the_bank_counts_the_whole_bank() -> None:
    torch.manual_seed(1)
    bank, labels, queries = torch.randn(9, 4), torch.randint(3, (9,)), torch.randn(5, 4)
    scores = knn_scores(bank, labels, queries, ks=(9, 200), num_classes=3)
    assert torch.equal(scores[9], scores[200])
    torch.testing.assert_close(scores[200].sum(dim=1), torch.ones(5))


def test_accuracy_counts_right_answers_across_chunks() -> None:
    torch.manual_seed(2)
    bank, labels = torch.randn(80, 6), torch.randint(5, (80,))
    queries, truth = torch.randn(31, 6), torch.randint(5, (31,))
    scores = knn_scores(bank, labels, queries, ks=(1, 10), num_classes=5)
    got = knn_accuracy(bank, labels, queries, truth, ks=(1, 10), chunk=8)
    for k in (1, 10):
        assert got[k] == pytest.approx(float((scores[k].argmax(1) == truth).double().mean()))
    assert knn_accuracy(bank, labels, bank, labels, ks=(1,))[1] == 1.0


def test_no_queries_give_empty_scores_and_no_accuracy() -> None:
    bank, labels = torch.randn(4, 2), torch.zeros(4, dtype=torch.int64)
    assert knn_scores(bank, labels, torch.empty(0, 2), ks=(1,), num_classes=3)[1].shape == (0, 3)
    with pytest.raises(ValueError, match="at least one query"):
        knn_accuracy(bank, labels, torch.empty(0, 2), torch.empty(0, dtype=torch.int64), ks=(1,))


@pytest.mark.parametrize(
    ("labels", "ks", "message"),
    [
        ([0, -1, 1], (1,), "unlabelled"),
        ([0, 1, 5], (1,), "0 to 5"),
        ([0, 1, 2], (0,), "at least 1"),
        ([], (1,), "bank"),
    ],
)
def test_unusable_input_is_explained(labels: list[int], ks: tuple[int, ...], message: str) -> None:
    bank = torch.randn(len(labels), 2)
    with pytest.raises(ValueError, match=message):
        knn_scores(bank, torch.tensor(labels, dtype=torch.int64), torch.randn(2, 2), ks=ks, num_classes=3)
