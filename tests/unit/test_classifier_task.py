"""Task `classifier`: the head's own answers counted, and models, data and controls that it cannot score."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torchvision.io import write_png

from quietvit.backbones import make_backbone
from quietvit.backbones.t2t_vit import OFFICIAL
from quietvit.data.decode import UnreadableImage
from quietvit.weights import BackboneExtractor, load
from quietvit_eval.cards import read_card
from quietvit_eval.evaluate import evaluate
from quietvit_eval.report import print_cards
from quietvit_launch import cli

TINTS = np.array([[r, g, b] for r in (40, 220) for g in (40, 220) for b in (40, 220)])  # eight classes
PER_CLASS = 6


class Tinted:
    """Noisy pictures of `num` colours, one for each class; one may be broken."""

    def __init__(self, split: str, num: int = 8, broken: int = -1) -> None:
        self.name, self.num, self.broken = f"tinted/{split}", num, broken
        self.offset = {"train": 0, "val": 1000}[split]
        self.labels = {"class": np.arange(len(self)) % num}
        self.classes = {"class": [f"tint{i}" for i in range(num)]}

    def __len__(self) -> int:
        return PER_CLASS * self.num

    def load(self, index: int, *, min_side: int | None = None) -> np.ndarray:
        if index == self.broken:
            raise UnreadableImage(str(index), "cut short")
        return picture(index % self.num, index + self.offset)

    def item_name(self, index: int) -> str:
        return f"{index}.png"

    def fingerprint(self) -> str:
        return f"{self.name}-{self.num}-{self.broken}"


def picture(label: int, seed: int, side: int = 16) -> np.ndarray:
    random = np.random.default_rng(seed)
    tint = TINTS[label] + random.normal(0, 70, 3)  # so far off that some are taken for another
    pixels: np.ndarray = np.clip(tint + random.normal(0, 20, (side, side, 3)), 0, 255).astype(np.uint8)
    return pixels


def extractor(num_classes: int = 8, seed: int = 0) -> BackboneExtractor:
    """A random backbone with a head that was given something to say: the mean feature of each class, nearest wins."""
    torch.manual_seed(seed)
    backbone = make_backbone(
        "vit", embed_dim=16, depth=2, num_heads=2, patch_size=4, image_size=16, layer_scale=0.5, init="xavier",
        num_classes=num_classes,
    )  # fmt: skip
    meta = {
        "backbone": {"name": "vit", "arguments": backbone.arguments},
        "normalisation": {"mean": (0.5,) * 3, "std": (0.25,) * 3},
        "image_size": 16,
        "provenance": {},
    }
    model = BackboneExtractor(backbone, meta, device=torch.device("cpu"))
    if num_classes:
        train = Tinted("train", num_classes)
        means = torch.stack([features(model, train, i).mean(0) for i in range(num_classes)])
        backbone.head.weight.copy_(means)
        backbone.head.bias.copy_(-means.square().sum(1) / 2)
    return model


def images(source: Tinted, label: int) -> torch.Tensor:
    """The readable images of a class as a model gets them."""
    chosen = [i for i in range(label, len(source), source.num) if i != source.broken]
    pixels = torch.tensor(np.stack([source.load(i) for i in chosen])).permute(0, 3, 1, 2)
    return (pixels.float() / 255 - 0.5) / 0.25


def features(model: BackboneExtractor, source: Tinted, label: int) -> torch.Tensor:
    return model(images(source, label)).cls


def test_scores_are_the_answers_of_the_head_counted(tmp_path: Path) -> None:
    model, test = extractor(), Tinted("val", broken=11)
    (card,) = evaluate(model, ["classifier"], (Tinted("train"), test), out_dir=tmp_path)
    ranks: list[list[int]] = []  # by class: of each image, how many other classes score higher
    for label in range(8):
        scores = model.logits(images(test, label))
        ranks.append([int((row > row[label]).sum()) for row in scores])
    every = [r for of_class in ranks for r in of_class]
    assert len(every) == 47
    assert card.scores["top1"] == pytest.approx(sum(r == 0 for r in every) / 47)
    assert card.scores["top5"] == pytest.approx(sum(r < 5 for r in every) / 47)
    assert card.scores["mean_per_class"] == pytest.approx(sum(sum(r == 0 for r in c) / len(c) for c in ranks) / 8)
    assert 0.5 < card.scores["top1"] < card.scores["top5"]  # neither chance nor perfect, so that counting matters
    assert (card.task, card.main, card.num_classes) == ("classifier", "top1", 8)
    assert card.data.keys() == {"test"}  # it reads no train image
    assert (card.data["test"]["images"], card.data["test"]["unreadable"]) == (48, 1)
    (path,) = tmp_path.glob("classifier_class_model_*.json")
    assert read_card(path) == card


def test_its_card_is_the_same_beside_other_tasks_and_a_control_is_at_chance() -> None:
    model, sources = extractor(), (Tinted("train"), Tinted("val"))
    (alone,) = evaluate(model, ["classifier"], sources)
    cards = evaluate(model, ["knn", "classifier"], sources, random_init=True)
    assert [(c.subject, c.task) for c in cards] == [
        (s, t) for s in ("model", "random-init") for t in ("knn", "classifier")
    ]
    beside, control = cards[1], cards[3]
    assert (beside.scores, beside.data, beside.protocol_key()) == (alone.scores, alone.data, alone.protocol_key())
    assert control.scores["top1"] < alone.scores["top1"] - 0.2
    console = Console(file=io.StringIO(), width=140)
    print_cards(cards, console)
    knn, classifier = console.file.getvalue().split("classifier, label")  # type: ignore[attr-defined]
    assert "trained on" in knn
    assert "trained on" not in classifier


def test_few_classes_have_no_top5() -> None:
    (card,) = evaluate(extractor(3), ["classifier"], (Tinted("train", 3), Tinted("val", 3)))
    assert card.scores.keys() == {"top1", "mean_per_class"}


def test_a_test_set_of_fewer_classes_is_answered_with_these_alone() -> None:
    model, test = extractor(), Tinted("val", 6)
    (card,) = evaluate(model, ["classifier"], (Tinted("train"), test))
    answers = [(label, row) for label in range(6) for row in model.logits(images(test, label))]
    right = [int(row[:6].argmax()) == label for label, row in answers]
    assert card.scores["top1"] == pytest.approx(sum(right) / 36)
    assert sum(right) > sum(int(row.argmax()) == label for label, row in answers)
    assert card.scores["top5"] == pytest.approx(
        sum(label in row[:6].topk(5).indices.tolist() for label, row in answers) / 36
    )
    assert card.protocol["candidates"] == "6 of 8 classes, those of the test set"


@pytest.mark.parametrize(
    ("num_classes", "arguments", "message"),
    [
        (8, {"data_spec": (Tinted("train", 5), Tinted("val", 5))}, "tells 8 classes apart, but the data have 5"),
        (0, {}, "head that came with a model's weights, and this model has none: knn and linear score its features"),
        (8, {"pixels": True}, "raw pixels are a control of discovery, knn, linear only"),
        (8, {"options": {"classifier": {"temp": 1}}}, "task classifier has no option 'temp'"),
    ],
)
def test_mistakes_are_explained_before_any_work(
    tmp_path: Path, num_classes: int, arguments: dict[str, Any], message: str
) -> None:
    given = {"data_spec": (Tinted("train"), Tinted("val")), **arguments}
    with pytest.raises(ValueError, match=message):
        evaluate(extractor(num_classes), ["knn", "classifier"], out_dir=tmp_path / "out", **given)
    assert not list(tmp_path.glob("out/*"))


def test_an_official_file_is_scored_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    backbone = make_backbone(
        "t2t_vit", **OFFICIAL, embed_dim=64, depth=1, num_heads=1, mlp_ratio=2.0, token_dim=16, image_size=32,
        stem_attention="performer_official", num_classes=3, init="xavier",
    )  # fmt: skip
    weights = {f"module.{k}": v for k, v in backbone.state_dict().items() if k != "mask_token"}
    file = tmp_path / "81.5_T2T_ViT_14.pth.tar"
    torch.save({"state_dict_ema": weights}, file)
    for split, kinds in {"train": ("a", "b", "c"), "val": ("a", "c")}.items():  # val lacks b: c must stay row 2
        for kind in kinds:
            folder = tmp_path / "data" / split / kind
            folder.mkdir(parents=True)
            for i in range(4):
                pixels = torch.tensor(picture("abc".index(kind), i, side=32)).permute(2, 0, 1)
                write_png(pixels, str(folder / f"{i}.png"))
    command = ["eval", "classifier", "--model", str(file), "--data", str(tmp_path / "data"), "--out", str(tmp_path)]
    assert cli.main([*command, "--device", "cpu"]) == 0
    assert "classifier, label 'class' (3 classes), 32 px" in " ".join(capsys.readouterr().out.split())
    (path,) = tmp_path.glob("classifier_*.json")
    card = json.loads(path.read_text())
    model = load(file, device="cpu")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.mean, model.std))
    right = 0
    for row, label in ((0, 0), (2, 2)):
        pixels = torch.tensor(np.stack([picture(label, i, side=32) for i in range(4)])).permute(0, 3, 1, 2)
        right += int((model.logits((pixels / 255 - mean) / std).argmax(1) == row).sum())
    assert card["scores"]["top1"] == right / 8
    assert card["model"]["provenance"]["source"] == "t2t_vit"
