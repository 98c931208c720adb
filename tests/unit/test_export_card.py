"""A model card says what is known, claims nothing that is not, and hubs can read its head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from quietvit.backbones import make_backbone
from quietvit.backbones.cost import count_macs
from quietvit.weights.export import TARGETS, ExportOptions, Parity, Run, ScoreRow, read_run
from quietvit.weights.export.card import model_card
from quietvit.weights.extractor import BackboneExtractor, random_like

OURS = {
    "step": 480, "seed": 3, "config_hash": "d33c97c8252c", "data": "photos|mine",
    "data_fingerprint": "0b90e6c4b950183c", "num_images": 1234, "objective": "dinov2",
}  # fmt: skip
DINOV2 = {"source": "dinov2", "file": "dinov2_vits14_reg4_pretrain.pth", "notes": ["mask token: zeros"]}
PARITIES = (
    Parity("safetensors", "cls", (16, 16), 0.0, 0.0),
    Parity("safetensors", "cls", (24, 8), 2.5e-7, 1e-5),
)


def extractor(provenance: dict[str, Any], **arguments: Any) -> BackboneExtractor:
    shape = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4, "image_size": 16, "num_registers": 3}
    torch.manual_seed(0)
    backbone = make_backbone("vit", **{**shape, **arguments})
    meta = {
        "backbone": {"name": "vit", "arguments": backbone.arguments},
        "normalisation": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.3]},
        "image_size": 16,
        "provenance": provenance,
    }
    return BackboneExtractor(backbone, meta, device=torch.device("cpu"))


def card(model: BackboneExtractor, license_name: str | None = None, **known: Any) -> str:
    return model_card(model, TARGETS["safetensors"], ExportOptions(license=license_name), PARITIES, **known)


def head(text: str) -> dict[str, Any]:
    _, front, _ = text.split("---\n", 2)
    found = OmegaConf.to_container(OmegaConf.create(front))
    assert isinstance(found, dict)
    return found


def test_a_run_of_ours_is_told_in_full() -> None:
    model = extractor(OURS)
    run = Run(
        "model:\n  size: nano\n# ``` fences\n", {"packages": {"quietvit": "0.1.0", "torch": "2.11"}, "git": "abc"}
    )
    text = card(model, run=run)
    assert "# vit backbone, pretrained without labels by quietvit\n" in text
    for row in (
        "| data | photos\\|mine |", "| images | 1234 |", "| fingerprint of the data | 0b90e6c4b950183c |",
        "| steps | 480 |", "| seed | 3 |", "| code | quietvit 0.1.0, git abc, torch 2.11 |", "| num_registers | 3 |",
    ):  # fmt: skip
        assert row in text, row
    numbers = sum(v.numel() for v in model.backbone.state_dict().values())
    macs = count_macs("vit", **model.backbone.arguments)  # type: ignore[arg-type]
    assert f"| parameters (all numbers in the file of quietvit) | {numbers:,} |" in text
    assert f"| multiply-adds of one image of 16 x 16 px | {macs / 1e9:.3g} G |" in text
    assert "minus [0.5, 0.4, 0.3], divided by [0.2, 0.2, 0.3]. Trained at 16 px; sides are multiples of 4 px." in text
    assert "````yaml\nmodel:\n  size: nano\n# ``` fences\n````" in text
    assert "| safetensors | cls | 24 x 8 | 2.5e-07 | 1e-05 |" in text
    assert "greatest difference 2.5e-07" in text
    assert json.dumps(OURS, indent=2) in text
    assert head(text) == {
        "license": "unknown",
        "library_name": "quietvit",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["quietvit", "vision-transformer", "vit", "registers", "self-supervised"],
    }


def test_weights_of_others_are_not_ours() -> None:
    text = card(extractor(DINOV2, num_registers=0, num_classes=5), run=Run("model: {}\n", {"git": "abc"}))
    assert "# vit backbone, pretrained without labels by DINOv2, converted by quietvit\n" in text
    assert "by quietvit\n" not in text.replace("converted by quietvit\n", "")
    assert "| trained by | others: see the card or the paper of the original |" in text
    assert "Of the conversion: mask token: zeros." in text
    assert "their licence holds, and the conversion does not change it" in text
    assert "Nobody has chosen" not in text
    assert "abc" not in text  # a recipe that lies beside somebody's file is not its recipe
    assert "model: {}" not in text
    assert "registers," not in text.split("## Use")[0]
    assert "With a head of 5 classes" in text
    assert "registers" not in head(text)["tags"]
    for source in ("open_clip", "timm", "transformers", "something new"):
        said = card(extractor({"source": source, "file": "x"}))
        assert "converted by quietvit\n" in said
        assert "pretrained without labels" not in said
        assert "self-supervised" not in head(said)["tags"]


def test_a_run_that_began_from_weights_of_others_says_so() -> None:
    begun = {"file": "mine.safetensors", "hash": "1", "changes": ["registers: 0 -> 4"], "provenance": OURS}
    text = card(extractor({**OURS, "init": begun}))
    assert "| started from | mine.safetensors; registers: 0 -> 4 |" in text
    assert "weights of others" not in text
    further = {"file": "run/teacher.safetensors", "provenance": {**OURS, "init": {**begun, "provenance": DINOV2}}}
    text = card(extractor({**OURS, "init": further}), "MIT")
    assert "# vit backbone, pretrained without labels by quietvit, from weights of others\n" in text
    assert "weights of others (dinov2_vits14_reg4_pretrain.pth): their licence may bind these too" in text


def test_nothing_is_claimed_of_weights_that_tell_nothing() -> None:
    assert "# vit backbone, of an origin that was not recorded\n" in card(extractor({}))
    control = card(random_like(extractor(OURS)), run=Run("model: {}\n"))
    assert "# vit backbone, random weights, not trained\n" in control
    assert "self-supervised" not in head(control)["tags"]
    assert "model: {}" not in control


def test_the_licence_is_the_one_that_was_chosen() -> None:
    model = extractor(OURS)
    assert "Nobody has chosen a licence" in card(model)
    assert head(card(model, "Apache-2.0"))["license"] == "apache-2.0"
    assert "Stated at the export: Apache-2.0." in card(model, "Apache-2.0")
    assert "Nobody has chosen" not in card(model, "Apache-2.0")
    mixed = head(card(model, "MIT OR Apache-2.0"))
    assert (mixed["license"], mixed["license_name"]) == ("other", "MIT OR Apache-2.0")
    assert head(card(model, "LicenseRef-house"))["license_name"] == "LicenseRef-house"
    stated = card(extractor(DINOV2), "CC-BY-NC-4.0")
    assert "Stated at the export: CC-BY-NC-4.0. These are weights of others: their licence holds" in stated


def test_scores_are_those_of_these_weights() -> None:
    model = extractor(OURS)
    own = ScoreRow(
        model.identity()["hash"], "knn, class", "top1@20 44.6 ± 1.1 %", "top1@20 40.2 ± 1.1 %", "k-NN (1a2b)", "64 px",
        "2,000 images of scenes",
    )  # fmt: skip
    other = ScoreRow("another hash", "knn, class", "top1@20 99.9 ± 0.1 %", "", "k-NN (1a2b)", "64 px", "2,000 images")
    text = card(model, scores=[own, other])
    assert (
        "| knn, class | top1@20 44.6 ± 1.1 % | top1@20 40.2 ± 1.1 % | k-NN (1a2b) | 64 px | 2,000 images of scenes |"
        in text
    )
    assert "99.9" not in text
    assert "No result card of these weights" in card(model, scores=[other])


@pytest.mark.parametrize("inside", ["", "teacher.safetensors", "checkpoints/step_00000003"])
def test_what_a_run_folder_tells_is_found_from_wherever_its_weights_are(tmp_path: Path, inside: str) -> None:
    (tmp_path / "checkpoints" / "step_00000003").mkdir(parents=True)
    for place in (tmp_path, tmp_path / "checkpoints" / "step_00000003"):
        (place / "teacher.safetensors").touch()
    assert read_run(tmp_path / inside) == Run()
    (tmp_path / "config.yaml").write_text("train: {}\n")
    (tmp_path / "environment.json").write_text('{"git": "abc"}')
    assert read_run(tmp_path / inside) == Run("train: {}\n", {"git": "abc"})
    (tmp_path / "environment.json").write_text("{")
    assert read_run(tmp_path / inside) == Run("train: {}\n")
