"""An export is the whole model or nothing, and never takes the place of something else."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from quietvit.backbones import make_backbone
from quietvit.contracts import Features
from quietvit.weights.export import TARGETS, ExportOptions, Opened, Parity, Target, all_targets, export_model
from quietvit.weights.export.compare import check_batches, check_parities, compare
from quietvit.weights.extractor import BackboneExtractor, load
from quietvit.weights.native import save_teacher, weights_hash


def teacher(folder: Path, seed: int = 0, **arguments: Any) -> Path:
    shape = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4, "image_size": 16, "num_registers": 3}
    torch.manual_seed(seed)
    backbone = make_backbone("vit", **{**shape, **arguments})
    with torch.no_grad():
        for p in backbone.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    provenance = {"seed": seed, "data": "pictures", "step": 7}
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.3)
    return save_teacher(folder, backbone, mean=mean, std=std, image_size=16, provenance=provenance)


def inside(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts the target "fake" into the table: quietvit's own without the plain code, changed as a test wants."""

    def put(**changes: Any) -> None:
        own = TARGETS["safetensors"]
        changes = {"name": "fake", "further": lambda *_: (), **changes}
        monkeypatch.setitem(sys.modules, "fake_target", SimpleNamespace(TARGET=replace(own, **changes)))  # type: ignore[arg-type]
        monkeypatch.setitem(all_targets.MODULES, "fake", "fake_target")  # type: ignore[arg-type]

    return put


def test_what_is_exported_is_the_model(tmp_path: Path) -> None:
    model = teacher(tmp_path / "run")
    report = export_model(tmp_path / "run", tmp_path / "deep" / "out")
    out = tmp_path / "deep" / "out"
    assert inside(out) == ["README.md", "report.json", "teacher.json", "teacher.safetensors"]
    a, b = load(model, device="cpu"), load(out, device="cpu")
    assert weights_hash(a.backbone) == weights_hash(b.backbone) == report.weights
    images = torch.randn(3, 3, 24, 32)
    for x, y in zip(a.last_blocks(images, 2), b.last_blocks(images, 2), strict=True):
        for name in ("cls", "registers", "patches"):
            assert torch.equal(getattr(x, name), getattr(y, name)), name
    assert (b.mean, b.std, b.image_size) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.3), 16)
    assert b.meta["provenance"] == a.meta["provenance"]
    assert json.loads((out / "teacher.json").read_text())["provenance"]["data"] == "pictures"
    assert stat.S_IMODE(out.stat().st_mode) == 0o755
    assert inside(out.parent) == ["out"]
    assert report.max_difference == 0.0
    assert {(p.reader, p.output) for p in report.parities} == {
        (reader, output) for reader in ("safetensors", "plain PyTorch") for output in ("cls", "registers", "patches")
    }
    sizes = {p.size for p in report.parities if p.reader == "safetensors"}
    assert (16, 16) in sizes
    assert any(height != width for height, width in sizes)
    stored = json.loads((out / "report.json").read_text())
    assert stored["max_difference"] == 0.0
    assert stored["weights"] == report.weights
    assert len(stored["parity"]) == len(report.parities)
    assert {"quietvit", "torch", "safetensors"} <= set(stored["versions"])


def test_a_loaded_model_is_exported_as_well(tmp_path: Path, fake: Callable[..., None]) -> None:
    fake()
    extractor = load(teacher(tmp_path / "run"), device="cpu")
    report = export_model(extractor, tmp_path / "out", to="fake")
    assert report.weights == extractor.identity()["hash"]
    assert weights_hash(load(tmp_path / "out", device="cpu").backbone) == report.weights


def test_hints_reach_the_loader(tmp_path: Path) -> None:
    teacher(tmp_path / "run")
    with pytest.raises(ValueError, match="how many heads"):
        export_model(tmp_path / "run", tmp_path / "out", hints={"num_heads": 3})
    assert inside(tmp_path) == ["run"]


def test_an_empty_folder_may_be_there_already(tmp_path: Path, fake: Callable[..., None]) -> None:
    fake()
    teacher(tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "linked", target_is_directory=True)
    (tmp_path / "linked").mkdir()
    for name in ("out", "link"):
        export_model(tmp_path / "run", tmp_path / name, to="fake")
        assert "teacher.safetensors" in inside(tmp_path / name)
    assert inside(tmp_path) == ["link", "linked", "out", "run"]


def test_a_place_that_is_in_use_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher(tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty: choose a new folder"):
        export_model(tmp_path / "run", tmp_path / "out")
    with pytest.raises(FileExistsError, match="is a file: choose a new folder"):
        export_model(tmp_path / "run", tmp_path / "out" / "notes.txt")
    assert inside(tmp_path / "out") == ["notes.txt"]
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(FileExistsError, match="is the folder you are in"):
        export_model(tmp_path / "run", Path("."))


def other_weights(extractor: BackboneExtractor, folder: Path, options: ExportOptions) -> None:
    teacher(folder, seed=1)


def half_written(error: BaseException) -> Callable[..., None]:
    def write(extractor: BackboneExtractor, folder: Path, options: ExportOptions) -> None:
        (folder / "half").write_bytes(b"1")
        raise error

    return write


def raising(error: BaseException) -> Callable[..., Any]:
    def function(*args: object) -> Any:
        raise error

    return function


DISK = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"write": other_weights}, ValueError, r"differs from the model in cls at 16 x 16 px by [0-9.]+, where 0 is"),
        ({"write": half_written(DISK)}, OSError, "No space left"),
        ({"write": half_written(KeyboardInterrupt())}, KeyboardInterrupt, "^$"),
        ({"reopen": raising(RuntimeError("cannot be opened"))}, RuntimeError, "cannot be opened"),
        ({"reopen": lambda *_: raising(KeyboardInterrupt())}, KeyboardInterrupt, "^$"),
        ({"usage": raising(DISK)}, OSError, "No space left"),
        ({"further": lambda *_: [Parity("a browser", "cls", (16, 16), 0.5, 0.1)]}, ValueError, "read by a browser"),
    ],
)
def test_a_failed_export_leaves_nothing_behind(
    tmp_path: Path, fake: Callable[..., None], changes: dict[str, Any], error: type[BaseException], words: str
) -> None:
    fake(**changes)
    teacher(tmp_path / "run")
    before = inside(tmp_path / "run")
    for out in (tmp_path / "out", tmp_path / "new" / "deep" / "out"):
        with pytest.raises(error, match=words):
            export_model(tmp_path / "run", out, to="fake")
        assert inside(tmp_path) == ["run"]
    (tmp_path / "out").mkdir()
    with pytest.raises(error, match=words):
        export_model(tmp_path / "run", tmp_path / "out", to="fake")
    assert inside(tmp_path) == ["out", "run"]
    assert inside(tmp_path / "out") == []
    assert inside(tmp_path / "run") == before


def test_a_missing_model_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model at"):
        export_model(tmp_path / "nowhere", tmp_path / "deep" / "out")
    assert inside(tmp_path) == []


def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path: Path, fake: Callable[..., None]) -> None:
    fake(refusal=lambda *_: "this format has no registers: use --to onnx", write=raising(AssertionError("written")))
    teacher(tmp_path / "run")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="has no registers: use --to onnx"):
        export_model(tmp_path / "run", out, to="fake")
    with pytest.raises(ValueError, match="unknown export target 'transformer'; did you mean transformers"):
        export_model(tmp_path / "run", out, to="transformer")
    with pytest.raises(ValueError, match=r"unknown export target 'qqq'; known: safetensors, transformers, timm, onnx"):
        export_model(tmp_path / "run", out, to="qqq")
    with pytest.raises(ValueError, match="takes images of any size: leave sizes out"):
        export_model(tmp_path / "run", out, options=ExportOptions(sizes=((32, 32),)))
    for license_name in ("all mine!", "", "MIT\nlibrary_name: other", "MIT AND", 'MIT"'):
        with pytest.raises(ValueError, match="is no SPDX name"):
            export_model(tmp_path / "run", out, options=ExportOptions(license=license_name))
    assert inside(tmp_path) == ["run"]


# ---- the comparison


def changed(extractor: BackboneExtractor, change: Callable[[Features], Features | None]) -> Opened:
    def opened(images: Tensor) -> Features:
        features = extractor(images)
        return change(features) or features

    return opened


@pytest.mark.parametrize("part", ["cls", "registers", "patches"])
def test_the_comparison_looks_at_every_kind_of_token(tmp_path: Path, part: str) -> None:
    model = load(teacher(tmp_path), device="cpu")

    def shift(features: Features) -> None:
        getattr(features, part)[-1, ..., -1] += 0.5

    for opened in (changed(model, lambda f: None), model):
        assert {p.difference for p in compare(model, opened, [(16, 24)], reader="x", tolerance=0)} == {0.0}
    found = compare(model, changed(model, shift), [(16, 16), (8, 24)], reader="x", tolerance=0.1)
    wrong = [p for p in found if not p.passes]
    assert [(p.output, p.size) for p in wrong] == [(part, (16, 16)), (part, (8, 24))]
    assert all(p.difference == pytest.approx(0.5, abs=1e-5) for p in wrong)
    assert {p.difference for p in found if p.passes} == {0.0}
    with pytest.raises(ValueError, match=rf"read by x, .* {part} at 16 x 16 px by 0.5, .*; {part} at 8 x 24 px"):
        check_parities(found)
    check_parities([p for p in found if p.passes])


def test_what_is_not_a_number_passes_no_comparison(tmp_path: Path) -> None:
    model = load(teacher(tmp_path), device="cpu")

    def spoil(features: Features) -> None:
        if len(features.cls) > 1:  # the batch of one, which comes later, is right
            features.patches[1, 0, 0, 0] = torch.nan

    found = compare(model, changed(model, spoil), [(16, 16)], reader="x", tolerance=1e9)
    assert [p.output for p in found if not p.passes] == ["patches"]
    with pytest.raises(ValueError, match="patches at 16 x 16 px by nan"):
        check_parities(found)


def test_shapes_and_batch_sizes_are_compared(tmp_path: Path) -> None:
    model = load(teacher(tmp_path), device="cpu")
    no_registers = changed(model, lambda f: Features(f.cls, f.registers[:, :0], f.patches))
    with pytest.raises(ValueError, match=r"x reads registers as \[3, 0, 24\] instead of \[3, 3, 24\]"):
        compare(model, no_registers, [(16, 16)], reader="x", tolerance=0)
    frozen = changed(model, lambda f: Features(*(t.expand(3, *t.shape[1:]) for t in (f.cls, f.registers, f.patches))))
    with pytest.raises(ValueError, match=r"x reads cls as \[3, 24\] instead of \[1, 24\]"):
        compare(model, frozen, [(16, 16)], reader="x", tolerance=1e9)


def test_class_scores_are_compared_where_both_have_them(tmp_path: Path) -> None:
    model = load(teacher(tmp_path / "a", num_classes=5), device="cpu")

    class Opened:
        def __call__(self, images: Tensor) -> Features:
            return model(images)

        def logits(self, images: Tensor) -> Tensor:
            return model.logits(images) + 0.25

    found = compare(model, Opened(), [(16, 16)], reader="x", tolerance=0)
    assert [(p.output, round(p.difference, 5)) for p in found if not p.passes] == [("logits", 0.25)]
    headless = load(teacher(tmp_path / "b"), device="cpu")
    assert "logits" not in [p.output for p in compare(headless, headless, [(16, 16)], reader="x", tolerance=0)]
    features_only = changed(model, lambda f: None)
    assert "logits" not in [p.output for p in compare(model, features_only, [(16, 16)], reader="x", tolerance=0)]


def test_images_to_compare_on_are_pictures_and_noise_and_always_the_same(tmp_path: Path) -> None:
    model = load(teacher(tmp_path), device="cpu")
    torch.manual_seed(1)
    images, single = check_batches(model, (24, 40))
    assert images.shape == (3, 3, 24, 40)
    assert torch.equal(single, images[:1])
    torch.manual_seed(2)
    assert torch.equal(images, check_batches(model, (24, 40))[0])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.mean, model.std))
    pixels = images[:2] * std + mean
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    assert (pixels.flatten(1).std(1) > 0.05).all()
    assert not torch.equal(images[0], images[1])
    assert images[2].std() == pytest.approx(1, abs=0.1)


def test_the_table_of_targets_is_imported_row_by_row() -> None:
    assert list(TARGETS) == ["safetensors", "transformers", "timm", "onnx", "torch"]
    assert isinstance(TARGETS["safetensors"], Target)
    assert "quietvit" in TARGETS["safetensors"].about
