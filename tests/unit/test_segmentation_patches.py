"""Patches: their classes, scaling, neighbours and regression against naive loops and scikit-learn."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from quietvit_eval.dense_data.pairs import IGNORE
from quietvit_eval.segmentation import patch_models
from quietvit_eval.segmentation.patch_models import Neighbours, Scaling, fit_logistic, knn_predictions
from quietvit_eval.segmentation.patches import Bank, SegmentationPatchesOptions, choose, patch_classes

CLASSES = 4


def samples(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clouds, with channels of very different scales, one of them constant."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    centres = torch.randn(CLASSES, 6, generator=torch.Generator().manual_seed(99))
    x = centres[labels] + torch.randn(count, 6, generator=generator)
    return torch.cat([x * torch.logspace(-2, 3, 6) + 7, torch.full((count, 1), 3.0)], dim=1), labels


def test_a_patch_has_the_class_of_most_of_its_pixels_that_count() -> None:
    rng = np.random.default_rng(1)
    target = rng.integers(-1, 3, (12, 12)).astype(np.int16)
    target[:4, :4] = IGNORE
    target[4:8, :4] = np.repeat([[0, 2, 2, 0]], 4, axis=0)  # as many of 0 as of 2
    target[8:, :4] = IGNORE
    target[8, 0] = 1
    found = patch_classes(target, 4)
    for i in range(3):
        for j in range(3):
            counts = Counter(int(v) for v in target[4 * i : 4 * i + 4, 4 * j : 4 * j + 4].ravel() if v != IGNORE)
            most = max(counts.values(), default=0)
            assert found[i, j] == min((c for c, n in counts.items() if n == most), default=IGNORE)
    assert found[:, 0].tolist() == [IGNORE, 0, 1]
    assert (patch_classes(np.full((8, 8), IGNORE, np.int16), 4) == IGNORE).all()


def test_scaling_is_scikit_learns() -> None:
    x, _ = samples(300, 0)
    theirs = StandardScaler().fit(x.double().numpy())
    np.testing.assert_allclose(Scaling.of(x)(x).numpy(), theirs.transform(x.double().numpy()), atol=1e-4)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("chunk", [8192, 50])
def test_neighbours_are_scikit_learns(metric: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_models, "CHUNK", chunk)
    x, labels = samples(220, 1)
    queries, _ = samples(130, 2)
    scaler = StandardScaler().fit(x.double().numpy())
    bank, asked = (scaler.transform(v.double().numpy()) for v in (x, queries))
    found = knn_predictions(Neighbours(x, labels, metric, CLASSES), queries, (1, 3, 10, 500))
    for k, classes in found.items():
        theirs = KNeighborsClassifier(min(k, 220), metric="cosine" if metric == "cosine" else "euclidean")
        assert (classes == theirs.fit(bank, labels.numpy()).predict(asked)).mean() > 0.99
    model = Neighbours(x, labels, metric, CLASSES).model(3)
    assert np.array_equal(model(queries), found[3])
    rows = Neighbours(x, labels, metric, CLASSES).nearest(x[:40], 5)
    assert rows[:, 0].tolist() == list(range(40))


def test_the_two_metrics_differ() -> None:
    x, labels = samples(50, 6)
    queries, _ = samples(100, 7)
    one, two = (Neighbours(x, labels, metric, CLASSES).nearest(queries, 1) for metric in ("cosine", "l2"))
    assert 0.2 < (one == two).float().mean() < 0.8


def test_of_equally_many_votes_the_lowest_class_wins() -> None:
    bank = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    neighbours = Neighbours(bank, torch.tensor([3, 1, 1, 3]), "l2", 4)
    assert neighbours.vote(torch.tensor([[0, 1, 2, 3], [0, 3, 1, 2]]), 4).tolist() == [1, 1]
    assert neighbours.vote(torch.tensor([[0, 1, 2, 3], [0, 3, 1, 2]]), 2).tolist() == [1, 3]


@pytest.mark.parametrize("num", [2, CLASSES])
def test_the_regression_is_scikit_learns(num: int) -> None:
    x, labels = samples(300, 3)
    queries, _ = samples(100, 4)
    labels = labels % num + 5  # classes need not begin with 0
    model = fit_logistic(x, labels, 0.5, 1000)
    scaler = StandardScaler().fit(x.double().numpy())
    theirs = LogisticRegression(C=0.5, max_iter=1000).fit(scaler.transform(x.double().numpy()), labels.numpy())
    assert (model(queries) == theirs.predict(scaler.transform(queries.double().numpy()))).mean() > 0.98
    assert model.converged
    assert not fit_logistic(x, labels, 1e5, 1).converged
    with pytest.raises(ValueError, match="all 300 train patches are of class 5"):
        fit_logistic(x, torch.full_like(labels, 5), 0.5, 10)


def bank(images: int = 20) -> Bank:
    x, labels = samples(images * 15, 5)
    return Bank(x, labels, torch.arange(images * 15) // 15)


@pytest.mark.parametrize("method", ["knn", "logistic"])
def test_a_setting_is_judged_on_images_it_was_not_fitted_to(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bank()
    # The features of an image's patches are the number of the image: its own patches would give everything away.
    told = Bank(torch.nn.functional.one_hot(torch.arange(300)).float(), torch.randint(0, CLASSES, (300,)), whole.rows)
    options = SegmentationPatchesOptions(method=method, ks=(1,), cs=(1e5,))
    assert all(row["chosen_by"] < 0.45 for row in choose(told, options, CLASSES, 0))
    table = choose(whole, SegmentationPatchesOptions(method=method), CLASSES, 0)
    assert len(table) == 8
    assert max(row["chosen_by"] for row in table) > 0.4
    assert table == choose(whole, SegmentationPatchesOptions(method=method), CLASSES, 0)
    assert table != choose(whole, SegmentationPatchesOptions(method=method), CLASSES, 1)


def test_of_two_images_one_is_held_out() -> None:
    options = SegmentationPatchesOptions(ks=(1,), metrics=("l2",))
    assert len(choose(bank(2), options, CLASSES, 0)) == 1
    with pytest.raises(ValueError, match="at least 2 train images"):
        choose(bank(1), options, CLASSES, 0)
