"""Fine-tuning: what is trained and what is not, the recipe's parts by their definitions, interruption, mistakes."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from colours import Colours
from quietvit.backbones import make_backbone
from quietvit.contracts import Features
from quietvit.weights import load, save_teacher
from quietvit.weights.native import weights_hash
from quietvit_eval import finetune
from quietvit_eval.cards import Card
from quietvit_eval.evaluate import evaluate
from quietvit_eval.finetune import Finetuned, FinetuneOptions, FinetuneTask, make_optimizer, mixed_cross_entropy
from quietvit_eval.label_views import RandomView
from quietvit_eval.mixing import Mixed, mix

SIZE = 16


def tiny() -> Any:
    torch.manual_seed(5)
    return make_backbone(
        "vit", embed_dim=16, depth=4, num_heads=2, patch_size=4, image_size=SIZE, layer_scale=0.5, init="xavier"
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_teacher(folder, tiny(), mean=(0.5,) * 3, std=(0.25,) * 3, image_size=SIZE, provenance={"seed": 5})
    return folder


SOURCES = (Colours("train", 90, broken=(7,)), Colours("val", 45, broken=(4,)))
QUICK: dict[str, Any] = {"steps": 10, "batch_size": 8, "drop_path": 0.2}


def card(model: Any, folder: Path | None = None, **options: Any) -> Card:
    settings = {"finetune": {**QUICK, **options}}
    return evaluate(model, ["finetune"], SOURCES, options=settings, out_dir=folder, device="cpu")[0]


def same(a: Card, b: Card) -> bool:
    return a == replace(b, seconds=a.seconds, created=a.created)


@pytest.mark.parametrize("blocks", ["all", 2, 0])
def test_exactly_the_blocks_asked_for_change(blocks: int | str) -> None:
    backbone = tiny()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    model = Finetuned(backbone, 3, blocks, 0.1)
    options = FinetuneOptions(blocks=blocks, lr=1e-2, weight_decay=0.0)
    optimizer = make_optimizer(model, options, 1.0)
    model.backbone.train()
    for seed in range(3):
        torch.manual_seed(seed)
        nn.functional.cross_entropy(model(torch.randn(6, 3, SIZE, SIZE)), torch.arange(6) % 3).backward()
        optimizer.step()
    changed = {k for k, v in model.backbone.state_dict().items() if not torch.equal(v, before[k])}
    expected = {
        "all": set(before) - {"mask_token"},
        2: {k for k in before if k.startswith(("blocks.2.", "blocks.3.", "norm."))},
        0: set(),
    }[blocks]
    assert changed == expected
    assert model.head.weight.abs().min() > 0
    kept = set(model.trained.state_dict())  # all that a state file holds
    assert any(k.startswith("backbone.patch_embed") for k in kept) == (blocks == "all")
    assert len(kept) == {"all": len(before), 2: len(expected), 0: 0}[blocks] + 2


def test_the_extractor_stays_as_it_was_bit_for_bit(run: Path) -> None:
    model = load(run, device="cpu")
    before = weights_hash(model.backbone)
    images = torch.randn(2, 3, SIZE, SIZE)
    was = model(images).cls
    found = card(model, lr=1e-2)
    assert weights_hash(model.backbone) == before == found.model["hash"]
    assert torch.equal(model(images).cls, was)
    assert not model.backbone.training
    assert not any(p.requires_grad for p in model.backbone.parameters())


def test_other_tasks_of_the_same_call_see_the_frozen_model(run: Path) -> None:
    settings = {"finetune": {**QUICK, "lr": 0.1}}
    together = evaluate(run, ["finetune", "knn"], SOURCES, options=settings, device="cpu")
    alone = evaluate(run, ["knn"], SOURCES, device="cpu")
    assert together[1].scores == alone[0].scores


def test_training_raises_the_score_and_says_what_was_done(run: Path) -> None:
    found = card(run, steps=60, batch_size=16, head_lr=1e-2, mixup=0.0, cutmix=0.0, augment="crops")
    assert found.scores["top1"] > 0.9
    assert found.data["train"]["unreadable_names"] == ["0007.png"]
    assert found.data["test"]["unreadable_names"] == ["0004.png"]
    assert found.details["parameters_trained"] == found.details["parameters"] - 16  # the mask token
    assert found.protocol["blocks"] == "all"
    head_only = card(run, blocks=0)
    assert head_only.details["parameters_trained"] == 2 * 16 * 3 + 3
    assert head_only.protocol_key() != card(run).protocol_key()


def test_the_same_again_and_interrupted_equals_uninterrupted(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = card(run, tmp_path / "whole", lr=1e-3)
    assert same(whole, card(run, tmp_path / "again", lr=1e-3))
    calls: list[int] = []
    original = finetune.mix

    def interrupting(*args: Any, **kwargs: Any) -> Mixed:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(finetune, "mix", interrupting)
    with pytest.raises(KeyboardInterrupt):
        card(run, tmp_path / "halves", lr=1e-3)
    assert same(whole, card(run, tmp_path / "halves", lr=1e-3))
    assert len(calls) == 5 + 10 - 4
    tensors = [next((tmp_path / name / "heads").glob("finetune-*")).read_bytes() for name in ("whole", "halves")]
    assert tensors[0] == tensors[1]
    card(run, tmp_path / "halves", lr=1e-3)
    assert len(calls) == 11  # a finished one is taken as it is
    card(run, tmp_path / "halves", lr=2e-3)
    assert len(calls) == 21


def test_parts_of_a_batch_give_the_gradient_of_the_whole(run: Path) -> None:
    own = load(run, device="cpu")
    images = torch.randint(256, (7, 3, SIZE, SIZE), dtype=torch.uint8)
    mixed = Mixed(images, torch.arange(7) % 3, torch.arange(7).flip(0) % 3, 0.3)
    gradients = []
    for parts in (7, 3):
        model = Finetuned(copy.deepcopy(own.backbone), 3, "all", 0.0)  # type: ignore[arg-type]
        nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
        model.backbone.train()
        finetune._loss(model, own, mixed, FinetuneOptions(images_at_once=parts), seed=3).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-3)


def test_stochastic_depth_is_drawn_from_the_seed_and_leaves_the_global_state(run: Path) -> None:
    own = load(run, device="cpu")
    mixed = Mixed(
        torch.randint(256, (8, 3, SIZE, SIZE), dtype=torch.uint8), torch.zeros(8).long(), torch.ones(8).long(), 1.0
    )
    model = Finetuned(copy.deepcopy(own.backbone), 3, 3, 0.5)  # type: ignore[arg-type]
    nn.init.normal_(model.head.weight)
    model.backbone.train()
    assert model.backbone.drop_rates == [0.0, 0.5, 0.5, 0.5]
    state = torch.get_rng_state()
    losses = [float(finetune._loss(model, own, mixed, FinetuneOptions(), seed=s).detach()) for s in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_rates_decay_by_layer_and_spare_what_does_not_decay() -> None:
    model = Finetuned(tiny(), 3, "all", 0.0)
    optimizer = make_optimizer(model, FinetuneOptions(lr=1.0, head_lr=7.0, layer_decay=0.5, weight_decay=0.1), 2.0)
    names = {id(p): n for n, p in model.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found["head.weight"] == (7.0, 0.1)
    assert found["head.bias"] == (7.0, 0.0)
    assert found["backbone.norm.weight"] == (2.0, 0.0)
    assert found["backbone.blocks.3.attn.qkv.weight"] == (1.0, 0.1)
    assert found["backbone.blocks.0.attn.qkv.bias"] == (0.125, 0.0)
    assert found["backbone.patch_embed.proj.weight"] == (0.0625, 0.1)
    assert found["backbone.pos_embed"] == (0.0625, 0.0)
    assert len(found) == len(list(model.parameters())) - 1  # the mask token


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_mixed_and_smoothed_targets(smoothing: float) -> None:
    logits = torch.randn(4, 3, dtype=torch.float64)
    first, second, share = torch.tensor([0, 1, 2, 2]), torch.tensor([1, 1, 0, 2]), 0.3
    total = 0.0
    for row, a, b in zip(logits.tolist(), first.tolist(), second.tolist(), strict=True):
        norm = math.log(sum(math.exp(v) for v in row))
        for c, value in enumerate(row):
            target = share * (c == a) + (1 - share) * (c == b)
            total -= ((1 - smoothing) * target + smoothing / 3) * (value - norm) / 4
    found = mixed_cross_entropy(logits, Mixed(torch.empty(0), first, second, share), smoothing)
    assert float(found) == pytest.approx(total, abs=1e-12)


def test_mixup_blends_pairs_by_the_share_of_their_labels() -> None:
    images, labels = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8), torch.arange(5)
    shares = []
    for seed in range(300):
        out = mix(images, labels, np.random.default_rng(seed), mixup=0.8, cutmix=0.0)
        blend = out.share * images.double() + (1 - out.share) * images.flip(0).double()
        assert (out.images.double() - blend).abs().max() <= 0.5001
        assert out.second.tolist() == [4, 3, 2, 1, 0]
        shares.append(out.share)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.06)
    assert np.var(shares) == pytest.approx(1 / (4 * 2.6), abs=0.02)  # Beta(0.8, 0.8)


def test_cutmix_replaces_a_box_and_counts_its_pixels() -> None:
    images = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 10, 12) + 1
    boxes = 0
    for seed in range(100):
        out = mix(images, torch.arange(4), np.random.default_rng(seed), mixup=0.0, cutmix=1.0)
        other = out.images != images
        assert (out.images[other] == images.flip(0)[other]).all()
        assert other.double().mean().item() == pytest.approx(1 - out.share)
        area = other[0, 0]
        rows, columns = area.any(dim=1).sum(), area.any(dim=0).sum()
        assert area.sum() == rows * columns  # one rectangle
        assert torch.equal(other, area.expand_as(other))
        boxes += int(area.any())
    assert boxes > 90


def test_both_kinds_take_turns_and_none_is_none() -> None:
    images, labels = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8), torch.arange(4)
    cut = 0
    for seed in range(200):
        out = mix(images, labels, np.random.default_rng(seed), mixup=0.8, cutmix=1.0)
        pure = (out.images == images) | (out.images == images.flip(0))
        cut += bool(pure.all())
    assert 70 < cut < 130
    plain = mix(images, labels, np.random.default_rng(0), mixup=0.0, cutmix=0.0)
    assert plain.share == 1.0
    assert torch.equal(plain.images, images)


def test_three_augment_makes_grey_solarized_and_blurred_views_equally_often() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
    plain, coloured = RandomView(16, jitter=0.0), RandomView(16, three_augment=True, jitter=0.0)
    kinds = {"grey": 0, "solarized": 0, "blurred": 0}
    for seed in range(300):
        out = coloured(image, np.random.default_rng(seed)).astype(int)
        base = plain(image, np.random.default_rng(seed)).astype(int)
        if (np.ptp(out, axis=2) <= 1).all():
            kinds["grey"] += 1
        elif np.abs(np.where(base < 128, base, 255 - base) - out).max() <= 1:
            kinds["solarized"] += 1
        else:
            kinds["blurred"] += 1
            assert np.abs(np.diff(out, axis=0)).mean() <= np.abs(np.diff(base, axis=0)).mean()
    assert min(kinds.values()) > 75
    jittered = RandomView(16, three_augment=True)
    assert not np.array_equal(jittered(image, np.random.default_rng(1)), coloured(image, np.random.default_rng(1)))


def test_defaults_follow_the_recipe(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(finetune, "fit", lambda *a, **k: seen.append(a))
    found = evaluate(run, ["finetune"], SOURCES, device="cpu")[0]
    assert found.protocol["batch_size"] == 11  # an eighth of 90 images
    assert found.protocol["steps"] == math.ceil(20 * 90 / 11)
    schedule = seen[0][4]
    assert (schedule.warmup_steps, schedule.decay) == (round(0.25 * found.protocol["steps"]), "cosine")
    assert found.protocol["drop_path"] == 0.0  # narrower than the base model
    assert [finetune._drop_path(w) for w in (384, 768, 1024, 1280, 1536)] == [0.0, 0.2, 0.45, 0.55, 0.55]
    assert seen[0][3].param_groups[0]["lr"] == pytest.approx(1e-5 * 11 / 512)


class Foreign:
    embed_dim, num_blocks, stride, image_size = 8, 2, 4, SIZE
    mean = std = (0.5, 0.5, 0.5)

    def __call__(self, images: torch.Tensor) -> Features:
        return Features(torch.zeros(len(images), 8), torch.zeros(len(images), 0, 8), torch.zeros(len(images), 4, 4, 8))

    def last_blocks(self, images: torch.Tensor, num: int) -> list[Features]:
        return [self(images)] * num


def test_models_that_cannot_be_trained_are_refused_before_any_work(run: Path) -> None:
    with pytest.raises(ValueError, match=r"needs a model that quietvit loads.*not Foreign"):
        card(Foreign())
    with pytest.raises(ValueError, match="blocks=5, but the model has 4"):
        card(run, blocks=5)
    FinetuneTask().check(load(run, device="cpu"), 3, FinetuneOptions(blocks=4))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"blocks": "some"}, 'a number from 0 or "all"'),
        ({"blocks": -1}, "a number from 0"),
        ({"augment": "rand"}, "augment must be one of three, crops"),
        ({"lr": 0.0}, "lr must be greater than 0"),
        ({"steps": 0}, "steps must be greater than 0"),
        ({"images_at_once": 0}, "images_at_once must be"),
        ({"head_lr": math.nan}, "head_lr must be"),
        ({"mixup": -0.1}, "mixup must be at least 0"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\)"),
        ({"drop_path": 1.5}, "drop_path must be in"),
        ({"epochs": 2}, "more than all 2 epochs"),
    ],
)
def test_options_that_cannot_be(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneOptions(**bad)
