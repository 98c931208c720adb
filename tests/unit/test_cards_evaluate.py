"""From a model and labelled images to result cards: scores, controls, honesty about the choice of the head, errors."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from colours import Colours
from quietvit.backbones import make_backbone
from quietvit.build import build_method
from quietvit.config.schema import ModelConfig, RunConfig
from quietvit.weights import load, random_like, save_teacher
from quietvit.weights.native import weights_hash
from quietvit_eval.cards import Card, card_name, find_cards, read_card, write_card
from quietvit_eval.evaluate import DataSpec, evaluate
from quietvit_eval.pixels import PixelExtractor
from quietvit_eval.report import print_cards


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("run")
    backbone = make_backbone(
        "vit", embed_dim=16, depth=4, num_heads=2, patch_size=4, image_size=16, layer_scale=0.5, init="xavier"
    )
    save_teacher(folder, backbone, mean=(0.5,) * 3, std=(0.25,) * 3, image_size=16, provenance={"seed": 5})
    return folder


SOURCES = (Colours("train", 90), Colours("val", 45, broken=(4,)))
QUICK = {"linear": {"steps": 60, "batch_size": 32}}


def test_cards_hold_the_scores_and_what_they_rest_on(run: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=140)
    cards = evaluate(
        run, ["knn", "linear"], SOURCES, random_init=True, pixels=True, options=QUICK, out_dir=tmp_path,
        device="cpu", console=console,
    )  # fmt: skip
    assert [(c.subject, c.task) for c in cards] == [
        (s, t) for s in ("model", "random-init", "pixels") for t in ("knn", "linear")
    ]
    model = load(run, device="cpu")
    for card in cards:
        assert card.scores[card.main] > 0.9
        assert card.data["test"] == {
            "name": "colours/val", "fingerprint": "colours/val-45", "images": 45, "unreadable": 1,
            "unreadable_names": ["0004.png"],
        }  # fmt: skip
        assert card.protocol["image_size"] == 16
        assert card.protocol["view"]["resize"] == 18  # 256/224
    assert cards[0].model["hash"] == weights_hash(model.backbone)
    assert (
        cards[2].model["hash"] == weights_hash(random_like(model).backbone) == cards[0].model["hash"]
    )  # untrained run
    assert cards[4].model["hash"] == "pixels-16"
    assert {"top1@10", "top1@20", "top1@90"} <= set(cards[0].scores)  # k never beyond the bank of 90
    assert "top1@200" not in cards[0].scores
    assert cards[0].main == "top1@20"
    assert [read_card(p) for p in sorted(tmp_path.glob("*.json"))] == sorted(
        cards, key=lambda c: write_card(c, tmp_path).name
    )
    printed = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]  # whatever the lines
    assert "random-init" in printed
    assert "held out" in printed


def test_the_head_is_chosen_on_held_out_train_images_unless_asked_otherwise(run: Path) -> None:
    def card(**options: Any) -> Card:
        return evaluate(run, ["linear"], SOURCES, label="coin", options={"linear": {"steps": 40, **options}})[0]

    honest, oracle = card(), card(select="val")
    assert (honest.details["trained_on"], honest.details["chosen_on"]) == (81, 9)
    assert "held out" in honest.protocol["choice"]
    assert (oracle.details["trained_on"], oracle.details["chosen_on"]) == (90, 44)
    assert "optimistic" in oracle.protocol["choice"]
    assert len(oracle.details["heads"]) == 52
    # Labels are coin tosses: the best of 52 heads on the test images looks better than chance, and is what is reported.
    best = max(h["chosen_by"] for h in oracle.details["heads"])
    assert oracle.scores["top1"] == pytest.approx(best)
    assert oracle.details["head"]["chosen_by"] == best
    assert honest.protocol_key() != oracle.protocol_key()
    assert honest == replace(card(), seconds=honest.seconds, created=honest.created)  # the same again


def test_only_like_protocols_share_a_table(run: Path) -> None:
    cards = [
        *evaluate(run, ["knn"], SOURCES, random_init=True),
        *evaluate(run, ["knn"], SOURCES, limit_train=30),
        *evaluate(run, ["knn"], SOURCES, label="coin"),
    ]
    keys = [c.protocol_key() for c in cards]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    console = Console(file=io.StringIO(), width=140)
    print_cards(cards, console)
    assert console.file.getvalue().count("knn, label") == 3  # type: ignore[attr-defined]


def test_a_spec_opens_both_splits() -> None:
    train, test = DataSpec("scenes", options={"image_size": 16}).open()
    assert train.fingerprint() != test.fingerprint()
    assert test.load(0).shape == (16, 16, 3)


def test_pixels_have_no_patches_to_average(run: Path) -> None:
    cards = evaluate(run, ["linear"], SOURCES, pixels=True, options=QUICK)
    assert [(c.subject, c.task) for c in cards] == [("model", "linear"), ("pixels", "linear")]
    heads = [{(h["blocks"], h["avgpool"]) for h in card.details["heads"]} for card in cards]
    assert heads == [{(1, False), (1, True), (4, False), (4, True)}, {(1, False)}]
    assert cards[0].protocol_key() == cards[1].protocol_key()  # so they may be compared


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ["knnn"]}, "unknown task 'knnn'; nearest: knn"),
        ({"tasks": []}, "no task"),
        ({"options": {"knn": {"temperature": 1}}}, "task knn has no option 'temperature'; nearest: temp"),
        ({"options": {"linear": {}}}, "not among those to run"),
        ({"label": "colour"}, "no label set 'colour'; its label sets: class, coin"),
        ({"image_size": 17}, "use 16 or 20"),
    ],
)
def test_mistakes_are_explained_before_any_work(run: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(run, **{"tasks": ["knn"], "data_spec": SOURCES, **arguments})


def test_cards_are_json_and_foreign_files_are_refused(run: Path, tmp_path: Path) -> None:
    card = evaluate(run, ["knn"], SOURCES)[0]
    path = write_card(card, tmp_path)
    assert json.loads(path.read_text())["scores"] == card.scores
    assert write_card(replace(card, seconds=1.0), tmp_path) == path  # the same model and protocol: its own card
    assert write_card(replace(card, seed=9), tmp_path) != path
    for text in ("{", "[]", '{"format": "other"}'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match="not a result card"):
            read_card(tmp_path / "x.json")


def test_pixels_are_the_flattened_image_and_large_ones_are_averaged(run: Path) -> None:
    model = load(run, device="cpu")
    images = torch.randn(2, 3, 16, 16)
    pixels = PixelExtractor(model, 16)
    assert torch.equal(pixels(images).cls, images.flatten(1))
    large = torch.randn(1, 3, 128, 128)
    averaged = PixelExtractor(model, 128)(large).cls.view(3, 64, 64)
    assert float(averaged[1, 2, 3]) == pytest.approx(float(large[0, 1, 4:6, 6:8].mean()), abs=1e-6)


def test_the_random_control_of_a_real_run_is_the_start_of_that_run(tmp_path: Path) -> None:
    config = RunConfig(model=ModelConfig(size="nano", patch_size=8, image_size=32))
    torch.manual_seed(4)  # as quietvit.build does before it makes the method
    start = build_method(config).student["backbone"]
    save_teacher(tmp_path, start, mean=(0.5,) * 3, std=(0.2,) * 3, image_size=32, provenance={"seed": 4})
    assert weights_hash(random_like(load(tmp_path, device="cpu")).backbone) == weights_hash(start)


# ---- tables


def told_of(*cards: Card, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_cards(cards, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_errors_are_in_their_units_and_the_lowest_comes_first(run: Path) -> None:
    (card,) = evaluate(run, ["knn"], SOURCES)
    scores = {"rmse": 0.3456, "abs_rel": 0.1234, "d1": 0.875, "log10": 0.04321}
    far = replace(
        card, task="depth", main="rmse", higher_is_better=False, scores=scores, standard_error=0.0123, num_classes=0,
        label="metres", protocol={"name": "head"}, model={"hash": "f" * 12, "path": "far"},
    )  # fmt: skip
    near = replace(far, scores=scores | {"rmse": 0.25}, model={"hash": "e" * 12, "path": "near"})
    unknown = replace(far, scores=scores | {"rmse": float("nan")}, model={"hash": None, "class": "Own"})
    text = told_of(unknown, far, near)
    lines = [line for line in text.splitlines() if "│" in line]
    assert [next(n for n in ("near", "far", "Own") if n in line) for line in lines] == ["near", "far", "Own"]
    for part in ("rmse, m (headline)", "abs_rel", "d1, %", "0.346 ± 0.012", "0.123", "87.5", "0.0432", "lower is bett"):
        assert part in text
    assert "classes)" not in text.splitlines()[0]


def test_many_scores_are_lines_not_columns(run: Path) -> None:
    (card,) = evaluate(run, ["knn"], SOURCES)
    many = replace(card, scores={**card.scores, **{f"top1@{k}/few": 0.5 for k in range(8)}})
    text = told_of(many, width=80)
    assert all(f"top1@{k}/few, %" in text for k in range(8))
    assert "…" not in text


def test_a_folder_s_cards_are_found_and_broken_ones_told(run: Path, tmp_path: Path) -> None:
    (card,) = evaluate(run, ["knn"], SOURCES)
    in_run, beside = write_card(card, tmp_path / "eval"), write_card(replace(card, seed=3), tmp_path)
    (tmp_path / "summary.json").write_text('{"format": 3}')
    assert find_cards(tmp_path) == {beside: read_card(beside), in_run: read_card(in_run)}
    assert find_cards(in_run) == {in_run: card}
    old = json.loads(in_run.read_text())
    in_run.write_text(json.dumps(old | {"format": "quietvit-card-1"}))
    with pytest.raises(ValueError, match="it is of the format 'quietvit-card-1'; evaluate the model again"):
        find_cards(tmp_path)
    del old["main"]
    in_run.write_text(json.dumps(old | {"more": 1}))
    with pytest.raises(ValueError, match=r"broken result card: main \(missing\), more \(unknown\)"):
        find_cards(tmp_path)


def test_cards_of_another_precision_or_own_model_have_their_own_file(run: Path) -> None:
    (card,) = evaluate(run, ["knn"], SOURCES)
    others = [card.model | {"precision": "bf16"}, {"hash": None, "class": "A"}, {"hash": None, "class": "B"}]
    assert len({card_name(c) for c in (card, *(replace(card, model=m) for m in others))}) == 4
