"""`quietvit export`: what it prints, refuses and leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quietvit.backbones import make_backbone
from quietvit.weights import family
from quietvit.weights.export import TARGETS
from quietvit.weights.extractor import load
from quietvit.weights.native import save_teacher
from quietvit_eval.cards import Card, write_card
from quietvit_launch import cli, export_arguments
from quietvit_launch.exporting import score_rows


def run_folder(folder: Path, backbone: str = "vit", **arguments: Any) -> Path:
    shape = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4, "image_size": 16, "num_registers": 3}
    torch.manual_seed(0)
    made = make_backbone(backbone, **{**shape, **arguments})
    normalisation = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.3)}
    save_teacher(
        folder, made, **normalisation, image_size=16, provenance={"step": 3, "seed": 0}, backbone_name=backbone
    )  # fmt: skip
    (folder / "config.yaml").write_text("model: {size: nano}\n")
    return folder


def result_card(model: dict[str, Any], subject: str, score: float, **changes: Any) -> Card:
    card = Card(
        task="knn",
        subject=subject,
        scores={"top1@20": score, "top1@10": 0.1},
        main="top1@20",
        higher_is_better=True,
        standard_error=0.0111,
        model=model,
        data={"test": {"name": "scenes", "fingerprint": "f", "images": 2000, "unreadable": 0, "unreadable_names": []}},
        label="class",
        num_classes=8,
        protocol={"name": "k-NN on [CLS] of the last block", "image_size": 64},
        details={},
        seed=0,
        environment={},
        seconds=1.0,
        created="2026-01-01T00:00:00+00:00",
    )
    return replace(card, **changes)


def test_tables_told_without_torch_are_those_with_it() -> None:
    assert tuple(TARGETS) == export_arguments.TARGETS
    assert tuple(family.NORMALISATIONS) == export_arguments.NORMALISATIONS


def test_a_run_with_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path / "run")
    extractor = load(run, device="cpu")
    own, spec = extractor.identity(), {"backbone": extractor.meta["backbone"]}
    pictures = {"test": {"name": "pictures", "fingerprint": "g", "images": 9, "unreadable": 0, "unreadable_names": []}}
    for card in (
        result_card(own, "model", 0.446),
        result_card({"hash": "r", **spec}, "random-init", 0.402),
        result_card({"hash": None, "class": "Pixels"}, "pixels", 0.3),
        result_card({**own, "hash": "of an older checkpoint"}, "model", 0.777),
        result_card(own, "model", 0.5, task="depth", main="rmse", scores={"rmse": 0.9134}, higher_is_better=False,
                    standard_error=0.01, data=pictures),
    ):  # fmt: skip
        write_card(card, run / "eval")
    (run / "eval" / "broken.json").write_text('{"format": "quietvit-card-1"}')
    assert cli.main(["export", str(run), "--out", str(tmp_path / "out"), "--license", "MIT"]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {tmp_path / 'out'}: features equal after reloading (greatest difference 0)" in printed
    assert '  extractor = quietvit.load("teacher.safetensors")' in printed
    assert "not in the model card: " in printed
    assert "broken.json is not a result card" in printed
    assert [line.split()[-1] for line in printed.splitlines() if "plain PyTorch" in line] == ["1e-05"] * 3
    text = (tmp_path / "out" / "README.md").read_text()
    key = result_card(own, "model", 0).protocol_key()
    assert (
        "| knn, class | top1@20 44.6 ± 1.1 % | top1@20 40.2 ± 1.1 % | "
        f"k-NN on [CLS] of the last block ({key}) | 64 px | 2,000 images of scenes |"
    ) in text
    assert "| rmse 0.913 ± 0.010 m (lower is better) | not scored |" in text
    assert "77.7" not in text
    assert "license: mit\n" in text
    assert "model: {size: nano}" in text


def test_a_control_of_another_protocol_or_architecture_is_no_control(tmp_path: Path) -> None:
    folder, spec = tmp_path / "eval", {"backbone": {"name": "vit"}}
    write_card(result_card({"hash": "m", **spec}, "model", 0.4), folder)
    write_card(result_card({"hash": "a", **spec}, "random-init", 0.3, label="shape"), folder)
    write_card(result_card({"hash": "b", "backbone": {"name": "t2t_vit"}}, "random-init", 0.2), folder)
    rows, unread = score_rows(tmp_path)
    assert ([r.random_init for r in rows], unread) == ([""], [])
    write_card(result_card({"hash": "c", **spec}, "random-init", 0.35), folder)
    assert [r.random_init for r in score_rows(tmp_path)[0]] == ["top1@20 35.0 ± 1.1 %"]
    assert score_rows(tmp_path / "nowhere") == ([], [])


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The message of a command that ends with exit code 2."""
    try:
        code: object = cli.main(["export", *words])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(run_folder(tmp_path / "run")), str(tmp_path / "out")
    for words, message in {
        ("--to", "onxx"): "unknown export target 'onxx'; did you mean onnx? known: safetensors, transformers",
        ("--to", "42"): "unknown export target '42'; known: safetensors",
        ("--size", "22x"): "'22x' is no image size: write 224, or 224x448",
        ("--size", "0"): "'0' is no image size",
        ("--size", "32"): "an export to safetensors takes images of any size: leave sizes out",
        ("--license", "all rights"): "license 'all rights' is no SPDX name",
        ("--normalisation", "mine"): "invalid choice: 'mine'",
        ("--num-heads", "0"): "'0' is not a whole number of at least 1",
        ("--num-heads", "3"): "says itself how many heads",
    }.items():
        assert message in refused(capsys, run, "--out", out, *words), words
    assert "required: --out" in refused(capsys, run)
    assert "is not empty: choose a new folder" in refused(capsys, run, "--out", str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("target", ["transformers", "timm"])
def test_a_t2t_vit_is_refused_where_there_is_no_such_architecture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    run = run_folder(tmp_path / "run", "t2t_vit", token_dim=8)
    message = refused(capsys, str(run), "--to", target, "--out", str(tmp_path / "deep" / "out"))
    assert f"{target} has no architecture for t2t_vit" in message
    assert "export it to" in message
    assert len(message.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_two_sizes_for_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(run_folder(tmp_path / "run")), tmp_path / "out"
    assert cli.main(["export", run, "--to", "torch", "--size", "16", "--size", "8x24", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "8 x 24" in printed
    assert "model = torch.export.load(" in printed
    report = json.loads((out / "report.json").read_text())
    assert report["max_difference"] <= 1e-5
    assert {tuple(p["size"]) for p in report["parity"]} == {(16, 16), (8, 24)}
    assert "library_name: pytorch\n" in (out / "README.md").read_text()


def test_weights_that_do_not_tell_their_normalisation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = make_backbone(
        "vit", embed_dim=24, depth=2, num_heads=2, patch_size=4, image_size=16, num_registers=0, layer_scale=0.0
    )
    tensors = {k: v.detach().clone() for k, v in backbone.state_dict().items() if k != "mask_token"}
    save_file(tensors, tmp_path / "vit.safetensors")
    words = [str(tmp_path / "vit.safetensors"), "--num-heads", "2", "--out", str(tmp_path / "out")]
    assert "--normalisation imagenet|inception|clip" in refused(capsys, *words)
    assert cli.main(["export", *words, "--normalisation", "clip"]) == 0
    loaded = load(tmp_path / "out", device="cpu")
    assert (loaded.mean, loaded.std) == family.CLIP
    assert loaded.backbone.options.num_heads == 2  # type: ignore[union-attr]
    assert torch.equal(loaded.backbone.get_parameter("cls_token"), backbone.cls_token)
    assert "converted by quietvit" in (tmp_path / "out" / "README.md").read_text()
