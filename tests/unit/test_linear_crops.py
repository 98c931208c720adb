"""The linear grid on random crops: heads as torch trains them alone, the views, the choice, interruption, mistakes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from colours import Colours
from quietvit.backbones import make_backbone
from quietvit.weights import load, save_teacher
from quietvit_eval import label_views, linear_crops
from quietvit_eval.cards import Card
from quietvit_eval.data import EvalData, Split
from quietvit_eval.evaluate import evaluate
from quietvit_eval.extract import Reading
from quietvit_eval.head_grid import make_groups
from quietvit_eval.label_views import RandomView, label_batches
from quietvit_eval.linear import LinearOptions, LinearTask
from quietvit_eval.linear_crops import HeadGrid, token_rows, train_on_crops
from quietvit_eval.transform import EvalTransform

CPU = torch.device("cpu")
SIZE = 16


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("run")
    backbone = make_backbone(
        "vit", embed_dim=16, depth=4, num_heads=2, patch_size=4, image_size=SIZE, layer_scale=0.5, init="xavier"
    )
    save_teacher(folder, backbone, mean=(0.5,) * 3, std=(0.25,) * 3, image_size=SIZE, provenance={"seed": 5})
    return folder


SOURCES = (Colours("train", 90, broken=(7,)), Colours("val", 45, broken=(4,)))
QUICK: dict[str, Any] = {"views": "crops", "steps": 12, "batch_size": 16}


def card(run: Path, folder: Path | None = None, **options: Any) -> Card:
    return evaluate(run, ["linear"], SOURCES, options={"linear": {**QUICK, **options}}, out_dir=folder, device="cpu")[0]


def same(a: Card, b: Card) -> bool:
    return a == replace(b, seconds=a.seconds, created=a.created)


def eval_data(count: int = 30) -> EvalData:
    source = Colours("train", count)
    part = Split(source, np.arange(count), source.labels["class"])
    return EvalData(part, part, "class", source.classes["class"], EvalTransform(SIZE, SIZE, "x"), 4, Reading(), 3, CPU)


def test_every_head_is_what_torch_trains_alone(run: Path) -> None:
    data, model = eval_data(), load(run, device="cpu")
    groups = make_groups(4, 16, 3, lrs=(0.01, 1.0), generator=torch.Generator().manual_seed(0), device=CPU)
    starts = [g.weight.clone() for g in groups]
    train_on_crops(groups, model, data, data.train, num_blocks=4, batch_size=8, steps=10, facts={})
    batches = list(label_batches(data, data.train, RandomView(SIZE), batch_size=8, first=0, steps=10))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.mean, model.std))
    for group, start in zip(groups, starts, strict=True):
        for i, head in enumerate(group.heads):
            linear = nn.Linear(start.shape[0], 3).double()
            with torch.no_grad():
                linear.weight.copy_(start[:, i].T)
                linear.bias.zero_()
            sgd = torch.optim.SGD(linear.parameters(), lr=head.lr * 8 / 256, momentum=0.9)
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 10)
            for batch in batches:
                features = model.last_blocks((batch.images.float() / 255 - mean) / std, 4)[4 - head.blocks :]
                parts = [f.cls for f in features] + [features[-1].patches.mean(dim=(1, 2))] * head.avgpool
                loss = nn.functional.cross_entropy(linear(torch.cat(parts, dim=1).double()), batch.labels)
                sgd.zero_grad()
                loss.backward()
                sgd.step()
                cosine.step()
            torch.testing.assert_close(group.weight[:, i].T.double(), linear.weight.detach(), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(group.bias[i].double(), linear.bias.detach(), atol=1e-5, rtol=1e-4)
            assert not torch.equal(group.weight[:, i], start[:, i])


def test_rows_are_those_of_stored_features(run: Path) -> None:
    data, model = eval_data(5), load(run, device="cpu")
    images = torch.stack([data.transform(data.train.source.load(i)) for i in range(5)])
    stored = data.features(model, "train").tokens.values.flatten(1)
    torch.testing.assert_close(token_rows(model, images, 4), stored, atol=1e-5, rtol=1e-5)


def test_a_head_that_blew_up_leaves_the_others_alone() -> None:
    x, labels = torch.randn(8, 20), torch.randint(3, (8,))
    groups = make_groups(4, 4, 3, lrs=(0.1, 0.2), generator=torch.Generator(), device=CPU)
    grid = HeadGrid(groups)
    clean = grid.loss(x, labels)
    clean.backward()
    expected = [w.grad.clone() for w in grid.weights]  # type: ignore[union-attr]
    grid.zero_grad()
    with torch.no_grad():
        one = nn.functional.cross_entropy(groups[1].logits(x)[:, 1], labels)
        groups[1].weight[:, 1] = math.inf
    loss = grid.loss(x, labels)
    assert float(loss.detach()) == pytest.approx(float((clean - one).detach()), rel=1e-5)
    loss.backward()
    for i, (weight, was) in enumerate(zip(grid.weights, expected, strict=True)):
        torch.testing.assert_close(weight.grad[:, 0], was[:, 0])  # type: ignore[index]
        if i != 1:
            torch.testing.assert_close(weight.grad[:, 1], was[:, 1])  # type: ignore[index]


def test_scored_on_central_views_with_a_protocol_of_its_own(run: Path) -> None:
    crops = card(run, steps=40)
    assert crops.scores["top1"] > 0.9
    assert "crops" in crops.protocol["name"]
    assert crops.data["train"]["unreadable_names"] == ["0007.png"]
    assert crops.data["test"]["unreadable_names"] == ["0004.png"]
    assert (crops.details["trained_on"], len(crops.details["heads"])) == (81, 52)
    central = evaluate(run, ["linear"], SOURCES, options={"linear": {"steps": 40, "batch_size": 16}}, device="cpu")[0]
    assert crops.protocol_key() != central.protocol_key()
    assert same(crops, card(run, steps=40))
    optimistic = card(run, select="val")
    assert (optimistic.details["trained_on"], optimistic.details["chosen_on"]) == (90, 44)


def test_the_defaults_are_those_of_dinov2(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr("quietvit_eval.linear.train_on_crops", lambda *a, **k: seen.append(k))
    found = evaluate(run, ["linear"], SOURCES, options={"linear": {"views": "crops"}}, device="cpu")[0]
    assert (seen[0]["batch_size"], seen[0]["steps"]) == (128, 12_500)
    assert (found.protocol["batch_size"], found.protocol["steps"]) == (128, 12_500)
    monkeypatch.setattr("quietvit_eval.linear.dist", SimpleNamespace(world_size=lambda: 4))
    LinearTask().run(load(run, device="cpu"), eval_data(), LinearOptions(views="crops"))
    assert seen[1]["batch_size"] == 512


def test_interrupted_and_resumed_equals_uninterrupted(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = card(run, tmp_path / "whole")
    steps_seen: list[int] = []
    original = linear_crops.token_rows

    def interrupting(*args: Any) -> torch.Tensor:
        steps_seen.append(1)
        if len(steps_seen) == 6:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(linear_crops, "token_rows", interrupting)
    with pytest.raises(KeyboardInterrupt):
        card(run, tmp_path / "halves")
    assert list((tmp_path / "halves" / "heads").glob("linear-*.safetensors"))
    assert same(whole, card(run, tmp_path / "halves"))
    assert len(steps_seen) == 6 + 12 - 5  # 5 steps were kept
    card(run, tmp_path / "halves")
    assert len(steps_seen) == 13  # and the finished grid is taken as it is


def test_views_are_random_boxes_of_the_image_resized_and_mirrored() -> None:
    ramp = np.zeros((40, 60, 3), np.uint8)
    ramp[..., 0] = np.arange(60) * 4
    ramp[..., 1] = np.arange(40)[:, None] * 4
    view = RandomView(8)
    mirrored, shares = [], []
    for seed in range(400):
        out = view(ramp, np.random.default_rng(seed)).astype(float)
        assert out.shape == (8, 8, 3)
        mirrored.append(out[0, 0, 0] > out[0, -1, 0])
        # the ramps tell the box: its width and height in pixels of the image, of which 7/8 lie between pixel centres
        width, height = (
            abs(out[:, -1, 0] - out[:, 0, 0]).mean() / 4 * 8 / 7,
            (out[-1, :, 1] - out[0, :, 1]).mean() / 3.5,
        )
        shares.append(width * height / 2400)
    assert 0.42 < np.mean(mirrored) < 0.58
    assert 0.05 < min(shares) < 0.15
    assert 0.8 < max(shares) < 1.1
    assert 0.4 < np.mean(shares) < 0.6
    assert view.min_side == math.ceil(8 / math.sqrt(0.08))


def test_batches_depend_on_seed_and_step_alone_and_replace_unreadable_images() -> None:
    data = eval_data()
    data.train.source.broken = (3, 4)  # type: ignore[attr-defined]
    batches = list(label_batches(data, data.train, RandomView(SIZE), batch_size=7, first=0, steps=9))
    later = list(label_batches(data, data.train, RandomView(SIZE), batch_size=7, first=6, steps=9))
    assert [b.step for b in later] == [6, 7, 8]
    for a, b in zip(batches[6:], later, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
    assert not torch.equal(batches[0].images, batches[1].images)
    for batch in batches:  # a replacement brings its own label
        assert batch.images.float().mean(dim=(2, 3)).argmax(dim=1).tolist() == batch.labels.tolist()
    assert data.about(["train"])["train"]["unreadable_names"] == ["0003.png", "0004.png"]
    seen = torch.cat([b.labels for b in batches[:4]])
    assert seen.bincount().max() <= 11  # 28 images of a pass over 30: no image twice, save two replacements


def test_processes_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    data = eval_data()
    whole = next(iter(label_batches(data, data.train, RandomView(SIZE), batch_size=8, first=2, steps=3)))
    monkeypatch.setattr(label_views.dist, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(label_views.dist, "rank", lambda rank=rank: rank)
        own = next(iter(label_batches(data, data.train, RandomView(SIZE), batch_size=8, first=2, steps=3)))
        assert torch.equal(own.images, whole.images[rank::2])
    with pytest.raises(ValueError, match="9 images cannot be shared evenly by 2"):
        next(iter(label_batches(data, data.train, RandomView(SIZE), batch_size=9, first=0, steps=1)))


def test_next_to_no_readable_image_is_an_error() -> None:
    data = eval_data()
    data.train.source.broken = tuple(range(30))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="20 images in a row of colours/train cannot be read; the last"):
        next(iter(label_batches(data, data.train, RandomView(SIZE), batch_size=8, first=0, steps=1)))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"views": "random"}, "views must be one of central, crops"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"steps": -1}, "steps must be at least 1"),
        ({"blocks": (1, 6)}, "last 4 blocks, not of 6"),
        ({"lrs": (0.0, 0.1)}, "must be positive"),
    ],
)
def test_options_that_cannot_be(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearOptions(**bad)
