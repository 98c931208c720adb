"""An export is the whole model or nothing, and never takes the place of something else."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch

from quietvit.backbones import make_backbone
from quietvit.weights import export
from quietvit.weights.export import export_teacher, greatest_difference
from quietvit.weights.extractor import load
from quietvit.weights.native import save_teacher


def teacher(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    backbone = make_backbone("vit", embed_dim=24, depth=2, num_heads=2, patch_size=4, image_size=16, num_registers=3)
    with torch.no_grad():
        for p in backbone.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    provenance = {"seed": seed, "data": "pictures"}
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.3)
    return save_teacher(folder, backbone, mean=mean, std=std, image_size=16, provenance=provenance)


def inside(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_what_is_exported_is_the_model(tmp_path: Path) -> None:
    model = teacher(tmp_path / "run")
    report = export_teacher(tmp_path / "run", tmp_path / "deep" / "out")
    out = tmp_path / "deep" / "out"
    assert inside(out) == ["README.md", "teacher.json", "teacher.safetensors"]
    a, b = load(model, device="cpu"), load(out, device="cpu")
    images = torch.randn(3, 3, 24, 32)
    for x, y in zip(a.last_blocks(images, 2), b.last_blocks(images, 2), strict=True):
        for name in ("cls", "registers", "patches"):
            assert torch.equal(getattr(x, name), getattr(y, name)), name
    assert (b.mean, b.std, b.image_size) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.3), 16)
    assert b.meta["provenance"] == {"seed": 0, "data": "pictures"}
    assert json.loads((out / "teacher.json").read_text())["provenance"]["data"] == "pictures"
    assert report["max_difference"] == 0.0
    card = (out / "README.md").read_text()
    assert "| embed_dim | 24 |" in card
    assert '"data": "pictures"' in card
    assert stat.S_IMODE(out.stat().st_mode) == 0o755
    assert inside(out.parent) == ["out"]


def test_an_empty_folder_may_be_there_already(tmp_path: Path) -> None:
    teacher(tmp_path / "run")
    (tmp_path / "out").mkdir()
    export_teacher(tmp_path / "run", tmp_path / "out")
    assert "teacher.safetensors" in inside(tmp_path / "out")


def test_a_target_that_is_in_use_is_refused(tmp_path: Path) -> None:
    teacher(tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty: choose a new folder"):
        export_teacher(tmp_path / "run", tmp_path / "out")
    with pytest.raises(FileExistsError, match="is a file: choose a new folder"):
        export_teacher(tmp_path / "run", tmp_path / "out" / "notes.txt")
    assert inside(tmp_path / "out") == ["notes.txt"]
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_failed_export_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher(tmp_path / "run")

    def corrupting(folder: Path, *args: object, **options: object) -> None:
        teacher(folder, seed=1)  # a valid file of other weights

    monkeypatch.setattr(export, "save_teacher", corrupting)
    with pytest.raises(ValueError, match=r"reloaded export differs from .*run by [0-9.]+: nothing was exported"):
        export_teacher(tmp_path / "run", tmp_path / "out")
    assert inside(tmp_path) == ["run"]

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_teacher", full)
    with pytest.raises(OSError, match="No space left"):
        export_teacher(tmp_path / "run", tmp_path / "out")
    assert inside(tmp_path) == ["run"]


def test_a_missing_model_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model at"):
        export_teacher(tmp_path / "nowhere", tmp_path / "deep" / "out")
    assert inside(tmp_path) == []


@pytest.mark.parametrize("part", ["cls", "registers", "patches"])
def test_the_comparison_looks_at_every_kind_of_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    model = teacher(tmp_path / "run")
    a, b = load(model, device="cpu"), load(model, device="cpu")
    assert greatest_difference(a, b) == 0.0
    forward = b.backbone.forward

    def shifted(images: torch.Tensor) -> object:
        features = forward(images)
        getattr(features, part)[-1, ..., -1] += 0.5
        return features

    monkeypatch.setattr(b.backbone, "forward", shifted)
    assert greatest_difference(a, b) == pytest.approx(0.5, abs=1e-5)
