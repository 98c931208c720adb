"""The health figures against loops, the live k-NN against the offline one, and what the sentences are said about."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from quietvit.backbones import make_backbone
from quietvit.contracts import Targets
from quietvit.features.knn import knn_accuracy
from quietvit.features.norms import outlier_share
from quietvit.features.rank import rankme
from quietvit.train import health
from quietvit.train.health import Probe, TargetGauge, verdicts
from quietvit.train.held_out import HeldOut

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def targets_of(cls: Tensor) -> Targets:
    return Targets(cls=cls, patches=torch.zeros(0, cls.shape[-1]))


def test_gauge_against_loops() -> None:
    torch.manual_seed(0)
    steps = [[(3 * torch.randn(2, 4, 9)).softmax(-1) for _ in range(2)] for _ in range(3)]  # steps of 2 micro-batches
    gauge = TargetGauge()
    for step in steps:
        gauge.add([targets_of(cls) for cls in step])
    rows = [row.tolist() for step in steps for cls in step for row in cls.flatten(0, 1)]
    mean = [math.fsum(row[k] for row in rows) / len(rows) for k in range(9)]
    expected = {
        "teacher/entropy": math.fsum(-q * math.log(q) for row in rows for q in row) / len(rows),
        "teacher/mean_entropy": math.fsum(-q * math.log(q) for q in mean),
        "teacher/prototypes_used": len({row.index(max(row)) for row in rows}),
    }
    assert gauge.read() == pytest.approx(expected, rel=1e-5)
    assert gauge.read() == {}  # every look starts anew
    gauge.add([targets_of(steps[0][0])])
    assert gauge.read()["teacher/prototypes_used"] == len(set(steps[0][0].flatten(0, 1).argmax(1).tolist()))


def test_gauge_takes_hard_targets() -> None:
    gauge = TargetGauge()
    gauge.add([targets_of(torch.eye(8)[torch.tensor([[3, 3], [3, 5]])])])
    values = gauge.read()
    assert values["teacher/entropy"] == 0.0  # 0 log 0 is 0
    assert values["teacher/mean_entropy"] == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert values["teacher/prototypes_used"] == 2


def probe_of(held_out: HeldOut, *, neighbours: int = 5) -> Probe:
    return Probe(held_out, MEAN, STD, torch.device("cpu"), torch.float32, neighbours)


def pictures(num: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (num, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def backbone_of(**options: Any) -> Any:
    """Far enough from its start that it tells pictures apart: fresh models give all of them about the same features."""
    torch.manual_seed(0)
    backbone = make_backbone("vit", num_heads=2, patch_size=4, image_size=16, **options).eval()
    with torch.no_grad():
        for p in backbone.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return backbone


def test_probe_says_what_evaluation_says_of_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "CHUNK", 8)  # several forwards, the last one shorter
    backbone = backbone_of(embed_dim=24, depth=2, num_registers=3)
    images, bank = pictures(21, 1), pictures(30, 2)
    labels, bank_labels = torch.arange(21) % 3, torch.arange(30) % 3
    values = probe_of(HeldOut(images, labels, bank, bank_labels, 3)).look(backbone)

    def normalised(x: Tensor) -> Tensor:
        return (x / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)

    with torch.no_grad():
        features, bank_features = backbone(normalised(images)), backbone(normalised(bank))
        last = backbone.last_blocks(normalised(images), 1, norm=False)[0]
    score = knn_accuracy(bank_features.cls, bank_labels, features.cls, labels, ks=(5,), num_classes=3)[5]
    assert values["knn"] == pytest.approx(100 * score)
    assert 0 < values["knn"] < 100  # or the comparison would say little
    assert values["rank"] == pytest.approx(rankme(features.cls), rel=1e-4)
    assert values["outlier_share"] == outlier_share(last.patches.flatten(1, 2).norm(dim=-1))


def test_probe_counts_outliers_before_the_final_norm() -> None:
    """A token far too long is seen, registers are not looked at."""
    backbone = make_backbone("vit", embed_dim=24, depth=1, num_heads=2, patch_size=4, image_size=16, num_registers=3)
    backbone.eval()
    with torch.no_grad():
        backbone.pos_embed[0, 1 + 5] = 1000.0  # patch 5 of 16; the first entry is [CLS]'s
        backbone.register_tokens.fill_(1000.0)
    values = probe_of(HeldOut(pictures(6, 1))).look(backbone)
    assert values["outlier_share"] == pytest.approx(1 / 16)
    assert "knn" not in values  # no labels


def test_probe_with_a_bank_smaller_than_its_neighbours() -> None:
    backbone = backbone_of(embed_dim=24, depth=1)
    labels = torch.tensor([0, 1])
    values = probe_of(HeldOut(pictures(2, 1), labels, pictures(2, 1), labels, 2), neighbours=20).look(backbone)
    assert values["knn"] == 100.0  # each picture's nearest is itself


HEALTHY = {"rank": 40.0, "teacher/entropy": 3.0, "teacher/mean_entropy": 5.0}
UNIFORM = math.log(256)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"rank": 1.2}, "collapsing, or not started yet: the features fill 1.2 of 96 dimensions"),
        ({"teacher/mean_entropy": 0.0}, "uses few prototypes"),
        ({"teacher/entropy": UNIFORM}, "still uniform"),
    ],
)
def test_each_trouble_has_its_sentence(change: dict[str, float], word: str) -> None:
    said = verdicts(HEALTHY | change, embed_dim=96, prototypes=256, progress=0.5)
    assert len(said) == 1
    assert word in said[0]
    assert re.search(r"(objective|optim)\.\w+", said[0])  # it names a setting to change
    assert verdicts(HEALTHY | change, embed_dim=96, prototypes=256, progress=0.05) == []


def test_no_sentence_without_trouble() -> None:
    assert verdicts(HEALTHY, embed_dim=96, prototypes=256, progress=1.0) == []
    assert verdicts({}, embed_dim=96, prototypes=256, progress=1.0) == []


def test_a_collapsed_model_is_found_from_its_images() -> None:
    """From pixels to the sentence: features that are the same for all images."""
    backbone = backbone_of(embed_dim=96, depth=1)
    images = pictures(40, 3)
    before = probe_of(HeldOut(images)).look(backbone)
    with torch.no_grad():
        backbone.norm.weight.zero_()
        backbone.norm.bias.normal_()
    collapsed = probe_of(HeldOut(images)).look(backbone)
    assert collapsed["rank"] == pytest.approx(1.0, abs=1e-3)
    assert "collapsing" in verdicts(collapsed, embed_dim=96, prototypes=256, progress=0.5)[0]
    assert verdicts(before, embed_dim=96, prototypes=256, progress=0.5) == []


def test_one_prototype_and_uniform_targets_are_found_from_targets() -> None:
    def read(cls: Tensor) -> list[str]:
        gauge = TargetGauge()
        gauge.add([targets_of(cls)])
        return verdicts(gauge.read(), embed_dim=96, prototypes=64, progress=0.5)

    one = torch.eye(64)[torch.full((2, 8), 5)]
    assert "few prototypes" in read(one)[0]
    assert "uniform" in read(torch.full((2, 8, 64), 1 / 64))[0]
    assert read(torch.eye(64)[torch.arange(16).view(2, 8)]) == []
