"""The linear grid against torch's own SGD, one head at a time; the choice of the head; the accuracies."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from quietvit_eval.accuracy import mean_per_class, per_class, top_k_hits
from quietvit_eval.linear import LRS, LinearOptions, Rows, accuracies, make_groups, train_heads

CPU = torch.device("cpu")


def features(count: int = 60, blocks: int = 4, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(3, (count,), generator=generator)
    centres = torch.randn(3, (blocks + 1) * width, generator=generator)
    return centres[labels] + torch.randn(count, (blocks + 1) * width, generator=generator), labels


def test_every_head_is_what_torch_trains_alone() -> None:
    rows, labels = features()
    generator = torch.Generator().manual_seed(0)
    groups = make_groups(4, 6, 3, lrs=(0.01, 0.1, 1.0), generator=generator, device=CPU)
    starts = [g.weight.clone() for g in groups]
    part = Rows(rows, labels, torch.arange(10, 60))
    state = generator.get_state()
    train_heads(groups, part, batch_size=16, steps=25, generator=generator)
    generator.set_state(state)
    order = [p for _ in range(9) for p in torch.randperm(50, generator=generator)[:48].split(16)][:25]
    assert [g.columns for g in groups] == [slice(18, 24), slice(18, 30), slice(0, 24), slice(0, 30)]
    for group, start in zip(groups, starts, strict=True):
        for i, head in enumerate(group.heads):
            linear = nn.Linear(start.shape[0], 3).double()
            with torch.no_grad():
                linear.weight.copy_(start[:, i].T)
                linear.bias.zero_()
            sgd = torch.optim.SGD(linear.parameters(), lr=head.lr * 16 / 256, momentum=0.9)
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 25)
            for positions in order:
                x = rows[10 + positions][:, group.columns].double()
                loss = nn.functional.cross_entropy(linear(x), labels[10 + positions])
                sgd.zero_grad()
                loss.backward()
                sgd.step()
                cosine.step()
            torch.testing.assert_close(group.weight[:, i].T.double(), linear.weight.detach(), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(group.bias[i].double(), linear.bias.detach(), atol=1e-5, rtol=1e-4)


def test_the_grid_has_52_heads_and_shrinks_with_shallow_models() -> None:
    generator = torch.Generator()
    assert len(LRS) == 13
    assert sum(len(g.heads) for g in make_groups(4, 8, 2, generator=generator, device=CPU)) == 52
    shallow = make_groups(1, 8, 2, generator=generator, device=CPU)  # 1 and 4 blocks are the same then
    assert [(g.heads[0].blocks, g.heads[0].avgpool) for g in shallow] == [(1, False), (1, True)]


def test_accuracies_are_those_of_each_head_in_order() -> None:
    rows, labels = features()
    generator = torch.Generator().manual_seed(1)
    groups = make_groups(4, 6, 3, lrs=(1e-5, 0.1), generator=generator, device=CPU)
    part = Rows(rows, labels, torch.arange(5, 55))
    train_heads(groups, part, batch_size=50, steps=30, generator=generator)
    expected = [
        float((g.logits(rows[5:55])[:, i].argmax(1) == labels[5:55]).double().mean()) for g in groups for i in (0, 1)
    ]
    assert accuracies(groups, part) == pytest.approx(expected)
    assert expected[-1] > 0.9 > expected[0]


@pytest.mark.parametrize("bad", [{"select": "test"}, {"held_out": 0.0}, {"held_out": 1.0}, {"blocks": ()}, {"lrs": ()}])
def test_options_that_cannot_be(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="linear:"):
        LinearOptions(**bad)  # type: ignore[arg-type]


def test_hits_rank_equal_scores_by_class_and_ignore_classes_ruled_out() -> None:
    scores = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [-math.inf, 2.0, -math.inf], [math.nan, 0.0, 0.0]])
    labels = torch.tensor([0, 1, 0, 0])
    assert top_k_hits(scores, labels, 1).tolist() == [True, False, False, False]
    assert top_k_hits(scores, labels, 2).tolist() == [True, True, False, False]
    assert top_k_hits(scores, labels, 3).tolist() == [True, True, False, False]


def test_mean_per_class_leaves_absent_classes_out() -> None:
    hits, labels = torch.tensor([True, False, True]), torch.tensor([0, 0, 2])
    assert per_class(hits, labels, 4).nan_to_num(-1).tolist() == [0.5, -1, 1, -1]
    assert mean_per_class(hits, labels, 4) == pytest.approx(0.75)
