"""Comparing cards: intervals that cover, differences by hand, refusals that say why, folders and controls."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quietvit_eval.cards import Card, write_card
from quietvit_eval.compare import compare_cards, couples_of, couples_within, fact_differences, paired_differences
from quietvit_eval.resampling import PerImage, draws
from quietvit_eval.segmentation.metrics import scores_of_counts
from quietvit_launch import cli


def make_card(score: float, *, main: str = "top1", **changes: Any) -> Card:
    splits = {
        name: {"name": f"s/{name}", "fingerprint": name, "images": 4, "unreadable": 0} for name in ("train", "test")
    }
    card = Card(
        task="knn", subject="model", scores={main: score}, main=main, higher_is_better=True, standard_error=0.0,
        model={"hash": "aaaaaaaaaaaa", "precision": "fp32"}, data=splits, label="class", num_classes=2,
        protocol={"name": "k-NN", "temp": 0.07, "view": {"resize": 16}}, details={}, seed=0, environment={},
        seconds=0.0, created="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    return replace(card, **changes)


def mean_images(values: np.ndarray, main: str = "top1") -> PerImage:
    return PerImage([f"{i}.png" for i in range(len(values))], {main: values})


def put(folder: Path, values: np.ndarray, main: str = "top1", **changes: Any) -> Path:
    return write_card(make_card(float(values.mean()), main=main, **changes), folder, mean_images(values, main))


HITS_A = np.array([1, 0, 0, 1, 0, 1, 0, 0], dtype=bool)
HITS_B = np.array([1, 1, 0, 1, 0, 1, 1, 0], dtype=bool)


# ---- numbers


def test_the_interval_covers_the_true_difference_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    p, shared, count, trials = (0.5, 0.6), 0.6, 150, 300  # a share of the images is equally hard for both
    covered = 0
    for trial in range(trials):
        both = rng.random(count)
        a, b = (np.where(rng.random(count) < shared, both, rng.random(count)) < q for q in p)
        found = paired_differences(mean_images(a), mean_images(b), "top1", seed=trial, num=200)
        low, high = np.quantile(found, [0.025, 0.975])
        covered += low <= p[1] - p[0] <= high
    assert 0.90 <= covered / trials <= 0.985  # 95 % within 4 standard errors, and the loss of 200 draws


def test_paired_differences_are_those_of_a_loop_over_drawn_images() -> None:
    values_a, values_b = np.random.default_rng(0).random((2, 9))
    found = paired_differences(mean_images(values_a), mean_images(values_b), "top1", seed=5, num=20)
    for weights, difference in zip(draws(9, 5, 20), found, strict=True):
        total = 0.0
        for image, times in enumerate(weights):
            for _ in range(times):
                total += values_b[image] - values_a[image]
        assert difference == pytest.approx(total / 9, abs=1e-12)
    assert np.std(found) > 0


def test_pairing_takes_out_what_is_hard_for_both() -> None:
    hard = np.random.default_rng(1).random(200)
    a, b = mean_images(hard), mean_images(hard + 0.01)
    found = paired_differences(a, b, "top1", num=100)
    np.testing.assert_allclose(found, 0.01, atol=1e-12)


def test_miou_is_drawn_by_counts_of_pixels(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    names = [f"{i}.png" for i in range(6)]
    target = rng.integers(50, 90, (6, 3))
    paths, per_image = [], []
    for model, share in (("a", 0.5), ("b", 0.8)):
        right = (target * share).astype(int)
        counts = {"intersection": right, "predicted": right + 10, "target": target}
        images = PerImage(names, counts, "iou")
        score = scores_of_counts(*(counts[k].sum(axis=0) for k in ("intersection", "predicted", "target")))["mIoU"]
        card = make_card(score, main="mIoU", task="segmentation", model={"hash": model * 12})
        paths.append(write_card(card, tmp_path / model, images))
        per_image.append(images)
    found = compare_cards(*paths, couples_of(*paths)[0], num=50)
    assert found.difference > 0.2
    assert found.low > 0.1
    assert found.share_better == 1
    weights = next(draws(6, 0, 1))
    sums = [
        scores_of_counts(
            *(sum(w * p.values[k][i] for i, w in enumerate(weights)) for k in ("intersection", "predicted", "target"))
        )["mIoU"]
        for p in per_image
    ]
    assert paired_differences(*per_image, "mIoU", num=1)[0] == pytest.approx(sums[1] - sums[0])


def test_better_means_lower_for_errors_and_ties_are_shared(tmp_path: Path) -> None:
    errors = np.array([0.3, 0.5, 0.2, 0.9])
    changes: dict[str, Any] = {"main": "rmse", "task": "depth", "higher_is_better": False}
    worse = put(tmp_path / "a", errors + 0.1, **changes)
    better = put(tmp_path / "b", errors, **changes)
    cards, _ = couples_of(worse, better)
    assert compare_cards(worse, better, cards).share_better == 1
    assert compare_cards(worse, better, cards).difference == pytest.approx(-0.1)
    assert compare_cards(better, worse, cards).share_better == 0
    same = compare_cards(better, better, cards)
    assert (same.difference, same.low, same.high, same.share_better) == (0, 0, 0, 0.5)


# ---- refusals


def test_unlike_protocols_are_refused_with_every_fact_that_differs(tmp_path: Path) -> None:
    a = put(tmp_path / "a", HITS_A)
    other = make_card(0).protocol | {"temp": 0.1, "view": {"resize": 18}, "ks": [20]}
    b = put(tmp_path / "b", HITS_B, protocol=other, seed=1)
    cards, couples = couples_of(a, b)
    assert couples.alike == [(a, b)]
    with pytest.raises(ValueError, match="unlike protocols") as told:
        compare_cards(a, b, cards)
    assert told.value.args[0].splitlines()[1:] == [
        "  seed: 0 | 1", "  protocol.temp: 0.07 | 0.1", "  protocol.view.resize: 16 | 18",
        "  protocol.ks: (absent) | [20]",
    ]  # fmt: skip
    data = make_card(0).data | {"test": {**make_card(0).data["test"], "fingerprint": "else", "images": 9}}
    found = fact_differences(make_card(0), make_card(0, data=data))
    assert found == {"data.test.fingerprint": ("test", "else"), "data.test.images": (4, 9)}


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "linear"}, {"label": "x"}, {"seed": 2}, {"protocol": {}}, {"protocol": {"temp": 0.07}},
        {"data": {}}, {"data": {"test": make_card(0).data["test"]}},
    ],
)  # fmt: skip
def test_keys_differ_exactly_when_facts_do(changes: dict[str, Any]) -> None:
    card, other = make_card(0.5), make_card(0.5, **changes)
    assert card.protocol_key() != other.protocol_key()
    assert fact_differences(card, other)
    same = make_card(0.9, subject="pixels", model={"hash": "b"}, seconds=7.0, details={"x": 1})
    assert card.protocol_key() == same.protocol_key()
    assert fact_differences(card, same) == {}


def test_other_images_or_broken_ones_are_refused(tmp_path: Path) -> None:
    a = put(tmp_path / "a", HITS_A)
    b = put(tmp_path / "b", HITS_B[:-1])
    with pytest.raises(ValueError, match="different test images") as told:
        compare_cards(a, b, couples_of(a, b)[0])
    assert told.value.args[0].endswith(f"only {a.name} has 7.png")
    turned = PerImage([f"{i}.png" for i in reversed(range(8))], {"top1": HITS_B})
    c = write_card(make_card(float(HITS_B.mean())), tmp_path / "c", turned)
    with pytest.raises(ValueError, match="another order"):
        compare_cards(a, c, couples_of(a, c)[0])
    strange = write_card(make_card(0.9), tmp_path / "d", mean_images(HITS_B))
    with pytest.raises(ValueError, match=r"0\.625, the card 0\.9: they are of different evaluations"):
        compare_cards(a, strange, couples_of(a, strange)[0])
    nameless = write_card(make_card(0.5), tmp_path / "e", mean_images(HITS_B, "top5"))
    with pytest.raises(ValueError, match="no top1 of the images"):
        compare_cards(a, nameless, couples_of(a, nameless)[0])
    images = b.with_suffix(".images.safetensors")
    images.write_bytes(images.read_bytes()[:40])
    with pytest.raises(ValueError, match="cannot be read"):
        compare_cards(b, b, couples_of(b, b)[0])
    images.unlink()
    with pytest.raises(ValueError, match="is missing"):
        compare_cards(b, b, couples_of(b, b)[0])
    with pytest.raises(ValueError, match="0 draws"):
        compare_cards(a, a, couples_of(a, a)[0], num=0)


# ---- folders


def test_cards_of_folders_find_their_counterparts(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    knn = [put(folder / "eval", hits) for folder, hits in ((a, HITS_A), (b, HITS_B))]
    controls = [put(folder / "eval", HITS_A, subject="random-init") for folder in (a, b)]
    linear = [put(f / "eval", HITS_A, task="linear", protocol={"steps": n}) for f, n in ((a, 10), (b, 20))]
    lonely = put(a / "eval", HITS_A, task="depth")
    (a / "environment.json").write_text("{}")
    _, couples = couples_of(a, b)
    assert sorted(couples.alike) == sorted([(knn[0], knn[1]), (controls[0], controls[1])])
    refused = "\n".join(couples.refused)
    assert f"{linear[0]} | {linear[1]}\n  protocol.steps: 10 | 20" in refused
    assert f"{lonely} has no counterpart: no card of task depth and subject 'model'" in refused
    put(b / "eval", HITS_B, model={"hash": "other"})
    with pytest.raises(ValueError, match="could be compared with each of"):
        couples_of(a, b)


def test_nothing_to_compare_is_an_error(tmp_path: Path) -> None:
    for folder, temp in (("a", 0.1), ("b", 0.2)):
        put(tmp_path / folder, HITS_A, protocol={"temp": temp})
    with pytest.raises(ValueError, match=r"nothing to compare(.|\n)*protocol.temp: 0.1 | 0.2"):
        couples_of(tmp_path / "a", tmp_path / "b")
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match="no result cards in"):
        couples_of(tmp_path / "a", tmp_path / "c")
    with pytest.raises(ValueError, match="no card and no folder at nowhere"):
        couples_of(tmp_path / "a", Path("nowhere"))


def test_a_model_against_its_own_control(tmp_path: Path) -> None:
    model = put(tmp_path, HITS_B)
    with pytest.raises(ValueError, match="no card of a control 'random-init'; its controls: none"):
        couples_within(tmp_path, "random-init")
    control = put(tmp_path, HITS_A, subject="random-init")
    cards, couples = couples_within(tmp_path, "random-init")
    assert couples.alike == [(control, model)]
    found = compare_cards(control, model, cards)
    assert (found.a, found.difference) == ("random-init", pytest.approx(0.25))
    with pytest.raises(ValueError, match="control 'pixels'; its controls: random-init"):
        couples_within(tmp_path, "pixels")
    # Cards may also be named, whatever their subjects.
    assert couples_of(control, model)[1].alike == [(control, model)]


# ---- the command


def test_the_command_prints_tables_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = put(tmp_path / "a", HITS_A), put(tmp_path / "b", HITS_B, model={"hash": "bbbbbbbbbbbb", "path": "runs/b"})
    put(tmp_path / "a", HITS_A, task="linear", protocol={"steps": 10})
    put(tmp_path / "b", HITS_A, task="linear", protocol={"steps": 20})
    assert cli.main(["report", "compare", str(tmp_path / "a"), str(tmp_path / "b"), "--draws", "100"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for part in ("knn, top1, %", "runs/b", "+25.0", "95 % interval", "100 paired bootstrap draws", "steps: 10 | 20"):
        assert part in told
    assert cli.main(["report", "compare", str(a), str(b), "--format", "json", "--seed", "3"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["refused"] == []
    (found,) = tree["comparisons"]
    assert (found["score_a"], found["score_b"], found["seed"], found["images"]) == (0.375, 0.625, 3, 8)
    assert found["low"] <= 0.25 <= found["high"]
    assert cli.main(["report", "compare", str(a)]) == 2
    assert "--against" in capsys.readouterr().err
    unlike = put(tmp_path / "c", HITS_B, protocol={"temp": 1})
    assert cli.main(["report", "compare", str(a), str(unlike)]) == 2
    assert "protocol.temp: 0.07 | 1" in capsys.readouterr().err
