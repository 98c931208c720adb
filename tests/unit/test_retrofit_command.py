"""`quietvit retrofit`: how many neurons are moved, what is written, and the comparison of before and after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from planted import planted_vit
from quietvit.backbones import make_backbone
from quietvit.data.sources import open_source
from quietvit.weights import BackboneExtractor, load, save_teacher
from quietvit.weights.adapt import adapt
from quietvit_eval.cards import Card
from quietvit_eval.inspect.artifacts import Subject
from quietvit_eval.inspect.tokens import choose_images
from quietvit_eval.retrofit.choose import RetrofitOptions, retrofit
from quietvit_eval.retrofit.compare import comparison
from quietvit_launch.cli import EXIT_USER_ERROR, main

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
MARKED = (5, 11)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(24):
        noise = np.random.default_rng(i).normal(127, 64, (32, 32, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def extractor_of(backbone: torch.nn.Module) -> BackboneExtractor:
    meta = {
        "backbone": {"name": "vit", "arguments": backbone.arguments},
        "normalisation": {"mean": MEAN, "std": STD},
        "image_size": 32,
        "provenance": {},
    }
    return BackboneExtractor(backbone, meta, device=torch.device("cpu"))


def saved(folder: Path, backbone: torch.nn.Module) -> Path:
    save_teacher(folder, backbone, mean=MEAN, std=STD, image_size=32, provenance={"seed": 1})
    return folder


def marked_by_position() -> torch.nn.Module:
    """Outliers that no hidden unit makes: two positions are twenty times as large."""
    backbone = planted_vit(positions=MARKED, amount=0.0)
    with torch.no_grad():
        backbone.pos_embed[:, 1 + torch.tensor(MARKED), 3:] *= 20
    return backbone


def test_the_command(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = saved(tmp_path / "model", planted_vit(positions=MARKED)), tmp_path / "new" / "retrofitted"
    words = ["retrofit", str(model), "--data", str(pictures), "--out", str(out), "--device", "cpu"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "Outliers begin after block 2" in said
    assert "2 of block 2" in said
    assert sorted(p.name for p in out.iterdir()) == ["retrofit.json", "teacher.json", "teacher.safetensors"]
    about = json.loads((out / "retrofit.json").read_text())
    assert [(n["block"], n["unit"]) for n in about["neurons"]] == [(2, 0), (2, 1)]
    assert about["data"]["images"] == 24
    assert about["outliers"]["patches"] == 24 * len(MARKED)
    one, two = about["trials"]
    assert (one["neurons"], one["left"]) == (1, 1.0)  # one unit is half of a difference: without it there is more
    assert (two["neurons"], two["kind"], two["share"], two["left"]) == (2, "none", 0.0, 0.0)
    before, after = about["rows"]
    assert (before["kind"], before["registers"], before["added"]) == ("outliers", 0, 0)
    assert before["share"] == before["above"] == pytest.approx(len(MARKED) / 64)
    assert (after["kind"], after["registers"], after["added"], after["above"]) == ("none", 1, 1, 0.0)
    assert after["register_norms"][0]["median"] == pytest.approx(60, rel=0.02)
    assert (after["same_cls"], after["same_patches"]) == (pytest.approx(1), pytest.approx(1))
    assert before["weights"] != after["weights"] == load(out, "cpu").identity()["hash"]

    assert main(words) == EXIT_USER_ERROR
    assert "is not empty: choose a new folder for the retrofit" in capsys.readouterr().err
    again = [*words[:1], str(out), *words[2:5], str(tmp_path / "twice"), *words[6:]]
    assert main(again) == EXIT_USER_ERROR
    assert "has test-time registers already" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()


def test_a_model_without_outliers_is_left_alone(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    clean = make_backbone("vit", embed_dim=48, depth=3, num_heads=4, patch_size=4, image_size=32, init="xavier")
    model, out = saved(tmp_path / "model", clean), tmp_path / "out"
    words = ["retrofit", str(model), "--data", str(pictures), "--out", str(out), "--device", "cpu"]
    assert main(words) == EXIT_USER_ERROR
    assert "nothing to move after block 2" in capsys.readouterr().err
    assert not out.exists()


def test_outliers_of_another_origin_are_refused(pictures: Path) -> None:
    source = open_source("auto", str(pictures))
    with pytest.raises(ValueError, match="it is not a few units that make them"):
        retrofit(extractor_of(marked_by_position()), source, RetrofitOptions())


@pytest.mark.parametrize(("neurons", "registers"), [(2, 3), (40, 1)])
def test_a_given_number_of_neurons(pictures: Path, neurons: int, registers: int) -> None:
    source = open_source("auto", str(pictures))
    made = retrofit(
        extractor_of(planted_vit(positions=MARKED)), source, RetrofitOptions(neurons=neurons, registers=registers)
    )
    assert [trial.neurons for trial in made.trials] == [neurons]
    assert sum(map(len, made.found.top(neurons).values())) == neurons
    features = made.model.blocks(torch.randn(2, 3, 32, 32), [3], norm=False)[0]
    # Two patches are marked, so that the first two added tokens get all that was there, and a third one what is normal.
    assert features.registers.norm(dim=-1)[0].tolist() == pytest.approx([60, 60, 0][:registers], abs=0.1)
    with pytest.raises(ValueError, match="neurons must be 1 or more"):
        RetrofitOptions(neurons=0)


def card(weights: str | None, score: float, subject: str = "model") -> Card:
    return Card(
        task="knn", subject=subject, scores={"top1@10": score}, main="top1@10", higher_is_better=True,
        standard_error=0.01, model={"hash": weights},
        data={"test": {"name": "pictures", "fingerprint": "f", "images": 9}}, label="class", num_classes=2,
        protocol={"name": "knn"}, details={}, seed=0, environment={}, seconds=1.0, created="",
    )  # fmt: skip


def test_comparison_against_direct_figures(pictures: Path) -> None:
    source = open_source("auto", str(pictures))
    before = extractor_of(planted_vit(positions=MARKED))
    made = retrofit(before, source, RetrofitOptions())
    torch.manual_seed(1)
    more, _ = adapt(before.backbone, "vit", {**before.backbone.arguments, "num_registers": 4})
    with torch.no_grad():
        more.norm.bias[5] += 1.5
    continued = extractor_of(more.eval())
    narrow = extractor_of(planted_vit(positions=MARKED, embed_dim=32))
    models: dict[str, Any] = {"before": before, "test-time": made.model, "continued": continued, "narrow": narrow}
    hashes = [m.identity()["hash"] for m in models.values()]
    cards = [card(hashes[0], 0.5), card(hashes[2], 0.75), card(hashes[2], 0.1, "random-init"), card(None, 0.2)]
    images = choose_images(source, before, limit=100, seed=0)
    rows = comparison([Subject(name, lambda m=m: m) for name, m in models.items()], images, cards)
    assert [row.name for row in rows] == list(models)
    assert [row.kind for row in rows] == ["outliers", "none", "outliers", "outliers"]
    assert [(row.registers, row.added) for row in rows] == [(0, 0), (1, 1), (4, 0), (0, 0)]
    assert [[s["score"] for s in row.scores.values()] for row in rows] == [[0.5], [], [0.75], []]
    assert (rows[3].same_cls, rows[3].same_patches) == (None, None)

    pixels = [np.asarray(Image.open(f), np.float32) for f in sorted(pictures.glob("[0-9]*.png"))]
    batch = (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    a, b = before(batch), continued(batch)
    normal = [i for i in range(64) if i not in MARKED]
    patches = F.cosine_similarity(a.patches.flatten(1, 2)[:, normal], b.patches.flatten(1, 2)[:, normal], dim=-1)
    assert rows[2].same_patches == pytest.approx(float(patches.mean()), abs=1e-5)
    assert rows[2].same_patches < 0.99
    assert rows[2].same_cls == pytest.approx(float(F.cosine_similarity(a.cls, b.cls, dim=-1).mean()), abs=1e-5)
    with pytest.raises(ValueError, match="no models to compare"):
        comparison([], images)
