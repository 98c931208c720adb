"""Task `knn` on pixels as features, against loops: few-shot tries, candidates, and its options."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from labelled_pixels import Pictures, Pixels
from quietvit_eval.cards import read_per_image
from quietvit_eval.evaluate import evaluate
from quietvit_eval.few_shot import draw_per_class
from quietvit_eval.knn import KnnOptions

NAMES = "abcdefg"
TRAIN = Pictures("train", [i % 7 for i in range(91)], NAMES)
TEST = Pictures("val", [i % 7 for i in range(60)], NAMES)


def loop_hits(train: Pictures, test: Pictures, rows: list[int], k: int, kmax: int, allowed: str = NAMES) -> list[bool]:
    """Weighted k-NN by its definition, one image at a time."""
    bank, labels = train.features()[rows], train.labels["class"][rows]
    bank = bank / bank.norm(dim=1, keepdim=True)
    out = []
    for query, label in zip(test.features(), test.labels["class"], strict=True):
        similarities = (bank @ (query / query.norm())).tolist()
        near = sorted(range(len(rows)), key=lambda j: -similarities[j])[:kmax][:k]
        votes = dict.fromkeys(allowed, 0.0)
        for j in near:
            name = train.classes["class"][labels[j]]
            if name in votes:
                votes[name] += math.exp(similarities[j] / 0.07)
        best = max(votes, key=votes.__getitem__)
        out.append(votes[best] > 0 and best == test.classes["class"][label])
    return out


def test_few_shot_scores_are_means_over_tries(tmp_path: Path) -> None:
    (card,) = evaluate(
        Pixels(), ["knn"], (TRAIN, TEST), options={"knn": {"ks": [1, 5, 20], "per_class": [3, 5], "tries": 2}},
        out_dir=tmp_path,
    )  # fmt: skip
    (path,) = tmp_path.glob("knn*.json")
    by_image = read_per_image(path)
    few = {(3, 1), (3, 3), (5, 1), (5, 5)}
    assert {name for name in card.scores if "/" in name} == {f"top1@{k}/{n}per" for n, k in few}
    labels = torch.from_numpy(TRAIN.labels["class"])
    for n, k in few:
        name = f"top1@{k}/{n}per"
        tries = [loop_hits(TRAIN, TEST, draw_per_class(labels, n, t).tolist(), k, n) for t in range(2)]
        shares = [np.mean(hits) for hits in tries]
        assert card.scores[name] == pytest.approx(np.mean(shares))
        assert card.details["std"][name] == pytest.approx(np.std(shares))
        assert by_image.values[name].tolist() == np.mean(tries, axis=0).tolist()
    whole = list(range(91))
    for k in (1, 5, 20):
        assert card.scores[f"top1@{k}"] == pytest.approx(np.mean(loop_hits(TRAIN, TEST, whole, k, 20)))
    assert 0.3 < card.scores["top1@1/3per"] < card.scores["top1@20"] < 1
    (plain,) = evaluate(Pixels(), ["knn"], (TRAIN, TEST), options={"knn": {"ks": [1, 5, 20]}})
    assert plain.scores == {name: score for name, score in card.scores.items() if "/" not in name}
    assert plain.protocol_key() != card.protocol_key()


def test_draws_differ_between_tries_and_take_all_of_a_small_class() -> None:
    labels = torch.tensor([0] * 9 + [2] * 3 + [5] * 20)
    draws = [draw_per_class(labels, 6, seed) for seed in (0, 1, 0)]
    for rows in draws:
        assert torch.bincount(labels[rows]).tolist() == [6, 0, 3, 0, 0, 6]
        assert len(rows.unique()) == 15
    assert draws[0].tolist() == draws[2].tolist() != draws[1].tolist()


def test_classes_that_the_test_set_lacks_are_no_candidates() -> None:
    test = Pictures("val", [i % 3 for i in range(60)], ("b", "d", "g"), noise=75)
    (card,) = evaluate(Pixels(), ["knn"], (TRAIN, test), options={"knn": {"ks": [10], "per_class": [2], "tries": 1}})
    whole = list(range(91))
    assert card.scores["top1@10"] == pytest.approx(np.mean(loop_hits(TRAIN, test, whole, 10, 10, "bdg")))
    rows = draw_per_class(torch.from_numpy(TRAIN.labels["class"]), 2, 0).tolist()
    assert card.scores["top1@2/2per"] == pytest.approx(np.mean(loop_hits(TRAIN, test, rows, 2, 2, "bdg")))
    assert card.scores["top1@10"] > np.mean(loop_hits(TRAIN, test, whole, 10, 10))
    assert card.protocol["candidates"] == "3 of 7 classes, those of the test set"
    assert not any(name.startswith("top5") for name in card.scores)


@pytest.mark.parametrize(
    "bad", [{"ks": ()}, {"ks": (0,)}, {"temp": 0.0}, {"per_class": (0,)}, {"per_class": (5, -1)}, {"tries": 0}]
)
def test_options_that_cannot_be(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="knn:"):
        KnnOptions(**bad)
