"""What counts as a hit, against scikit-learn, torchmetrics and loops: candidates, several right classes, averages."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
from torchmetrics.classification import MulticlassAccuracy

from quietvit_eval.accuracy import Answers, hits_of, scores_of_logits

CLASSES = 12


def answers_of(kind: str) -> tuple[torch.Tensor, Answers]:
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(300, CLASSES, generator=generator)
    candidates = torch.tensor([0, 2, 3, 5, 7, 8, 11]) if "candidates" in kind else None
    pool = candidates if candidates is not None else torch.arange(CLASSES)
    labels = pool[torch.randint(len(pool), (300,), generator=generator)]
    logits[torch.arange(300), labels] += 1.0
    accepted = None
    if "real" in kind:
        accepted = torch.full((300, 3), -1)
        for i in range(300):
            count = 1 + i % 3
            accepted[i, :count] = pool[torch.randperm(len(pool), generator=generator)[:count]]
    return logits, Answers(labels, CLASSES, candidates, accepted)


def loop_hits(logits: torch.Tensor, answers: Answers, k: int) -> list[bool]:
    """The definition, one image at a time."""
    out = []
    for i, row in enumerate(logits.tolist()):
        allowed = range(CLASSES) if answers.candidates is None else answers.candidates.tolist()
        best = sorted(allowed, key=lambda c: (-row[c], c))[:k]
        right = [int(answers.labels[i])] if answers.accepted is None else answers.accepted[i].tolist()
        out.append(any(c in right for c in best))
    return out


@pytest.mark.parametrize("kind", ["plain", "candidates", "real", "real candidates"])
def test_hits_are_the_definition(kind: str) -> None:
    logits, answers = answers_of(kind)
    before = logits.clone()
    for k in (1, 2, 5):
        expected = loop_hits(logits, answers, k)
        assert hits_of(logits, answers, k).tolist() == expected
        assert 0.1 < np.mean(expected) < 1
    assert torch.equal(logits, before)
    scores, hits = scores_of_logits(logits, answers)
    assert scores["top1"] == pytest.approx(np.mean(loop_hits(logits, answers, 1)))
    assert scores["top5"] == pytest.approx(np.mean(hits["top5"]))
    assert ("mean_per_class" in scores) == (answers.accepted is None)
    part = answers.part(slice(100, 150), torch.device("cpu"))
    assert hits_of(logits[100:150], part, 1).tolist() == hits["top1"][100:150].tolist()


def test_plain_scores_are_those_of_scikit_learn_and_torchmetrics() -> None:
    logits, answers = answers_of("plain")
    scores, _ = scores_of_logits(logits, answers)
    y, names = answers.labels.numpy(), np.arange(CLASSES)
    for k in (1, 5):
        assert scores[f"top{k}"] == pytest.approx(top_k_accuracy_score(y, logits.numpy(), k=k, labels=names))
        micro = MulticlassAccuracy(CLASSES, top_k=k, average="micro")
        assert scores[f"top{k}"] == pytest.approx(float(micro(logits, answers.labels)))
    macro = MulticlassAccuracy(CLASSES, average="macro")
    assert scores["mean_per_class"] == pytest.approx(float(macro(logits, answers.labels)))
    assert scores["mean_per_class"] == pytest.approx(balanced_accuracy_score(y, logits.argmax(1).numpy()))
    assert scores["mean_per_class"] != pytest.approx(scores["top1"])


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_a_class_without_images_has_no_part_in_the_mean() -> None:
    logits, answers = answers_of("plain")
    keep = answers.labels != 4
    scores, _ = scores_of_logits(logits[keep], Answers(answers.labels[keep], CLASSES))
    expected = balanced_accuracy_score(answers.labels[keep].numpy(), logits[keep].argmax(1).numpy())
    assert scores["mean_per_class"] == pytest.approx(expected)


def test_candidates_are_what_scikit_learn_scores_on_their_columns_alone() -> None:
    logits, answers = answers_of("candidates")
    assert answers.candidates is not None
    scores, _ = scores_of_logits(logits, answers)
    columns = answers.candidates.numpy()
    y = np.searchsorted(columns, answers.labels.numpy())
    for k in (1, 5):
        expected = top_k_accuracy_score(y, logits.numpy()[:, columns], k=k, labels=np.arange(len(columns)))
        assert scores[f"top{k}"] == pytest.approx(expected)
    free, _ = scores_of_logits(logits, Answers(answers.labels, CLASSES))
    assert scores["top1"] > free["top1"]


def test_top5_needs_more_than_5_candidates() -> None:
    labels = torch.zeros(4, dtype=torch.int64)
    assert Answers(labels, 5).tops == (1,)
    assert Answers(labels, 6).tops == (1, 5)
    assert Answers(labels, 1000, torch.arange(5)).tops == (1,)
    assert scores_of_logits(torch.randn(4, 9), Answers(labels, 9, torch.arange(4)))[0].keys() == {
        "top1",
        "mean_per_class",
    }


def test_classes_ruled_out_by_a_task_never_count_and_padding_is_no_class() -> None:
    logits = torch.tensor([[-math.inf, 1.0, -math.inf], [3.0, 1.0, 2.0]])
    accepted = torch.tensor([[0, 2], [1, -1]])
    answers = Answers(torch.tensor([0, 1]), 3, accepted=accepted)
    assert hits_of(logits, answers, 2).tolist() == [False, False]  # -1 is not class 2, and not class 0
    assert hits_of(logits, answers, 3).tolist() == [False, True]
