"""The code of a model card computes the model's features with torch and safetensors alone."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quietvit.backbones import Trunk, make_backbone
from quietvit.weights.export import export_model
from quietvit.weights.export.plain_code import needs_quietvit, plain_code, run_plain_code
from quietvit.weights.extractor import load
from quietvit.weights.native import save_teacher

SHAPE = {"embed_dim": 24, "depth": 3, "num_heads": 3}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "registers and layer scale": ("vit", {"patch_size": 4, "image_size": 16, "num_registers": 3}),
    "bare": (
        "vit",
        {
            "patch_size": 8, "image_size": 24, "num_registers": 0, "layer_scale": 0.0, "qkv_bias": False,
            "proj_bias": False, "ffn_bias": False, "norm_eps": 1e-3,
        },
    ),
    "swiglu and a head": ("vit", {"patch_size": 4, "image_size": 16, "ffn": "swiglu", "num_classes": 5}),
    "clip": ("vit", {"patch_size": 4, "image_size": 16, "pre_norm": True, "activation": "quick_gelu"}),
    "performer, 16 px": ("t2t_vit", {"patch_size": 16, "image_size": 48, "token_dim": 8}),
    "official performer, 8 px": (
        "t2t_vit",
        {
            "patch_size": 8, "image_size": 32, "token_dim": 8, "stem_attention": "performer_official",
            "positions": "sinusoid", "num_registers": 0, "qkv_bias": False, "layer_scale": 0.0,
        },
    ),
    "transformer, 4 px": (
        "t2t_vit", {"patch_size": 4, "image_size": 16, "token_dim": 8, "stem_attention": "transformer"},
    ),
}  # fmt: skip
ALLOWED = {"json", "torch", "torch.nn.functional", "safetensors.torch"}


def backbone_of(architecture: str) -> tuple[str, Trunk]:
    name, arguments = ARCHITECTURES[architecture]
    torch.manual_seed(3)
    backbone = make_backbone(name, **{**SHAPE, **arguments}).eval()
    with torch.no_grad():
        for p in backbone.parameters():  # nothing is left at a value that would not show
            p.add_(torch.randn_like(p) * 0.3)
    return name, backbone


def saved(folder: Path, name: str, backbone: Trunk) -> Path:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.2)
    return save_teacher(
        folder, backbone, mean=mean, std=std, image_size=backbone.image_size, provenance={}, backbone_name=name
    )


def executed(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(code, "card", "exec"), names)
    return names


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_computes_the_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    name, backbone = backbone_of(architecture)
    saved(tmp_path, name, backbone)
    code = plain_code(backbone)
    imports = {a.name for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Import) for a in n.names}
    imports |= {str(n.module) for n in ast.walk(ast.parse(code)) if isinstance(n, ast.ImportFrom)}
    assert imports == ALLOWED
    assert max(map(len, code.splitlines())) <= 120
    assert not re.search(r"[A-Z]{4}", code)  # no place was left unfilled
    monkeypatch.chdir(tmp_path)
    names = executed(code)
    images = torch.randn(2, 3, backbone.image_size, backbone.image_size)
    with torch.no_grad():
        expected = backbone(images)
    found = names["features"](images)
    for value, wanted in zip(found, (expected.cls, expected.registers, expected.patches), strict=True):
        assert value.shape == wanted.shape
        assert torch.allclose(value, wanted, rtol=0, atol=1e-5)
        assert wanted.numel() == 0 or wanted.std() > 0.1
    # The example at the end: as many pixels as the model wants, normalised as it wants.
    side = backbone.image_size
    assert names["images"].shape == (1, 3, side, side)
    pixels = (names["images"] - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.2]).view(
        3, 1, 1
    )
    with torch.no_grad():
        example = backbone(pixels)
        assert torch.allclose(names["patches"], example.patches, rtol=0, atol=1e-5)
        if backbone.options.num_classes:
            assert torch.allclose(names["scores"], backbone.logits(example), rtol=0, atol=1e-5)
    assert ("scores" in names) == bool(backbone.options.num_classes)


def test_a_vit_takes_few_lines() -> None:
    lines = [line for line in plain_code(backbone_of("registers and layer scale")[1]).splitlines() if line.strip()]
    assert len(lines) <= 34


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"attention_layer": "se"}, "attention layers are of the kind 'se'"),
        ({"attention_layer": "ghost"}, "attention layers are of the kind 'ghost'"),
        ({"ffn": "ghost", "mlp_ratio": 3.0}, "feed-forward layers are of the kind 'ghost'"),
        ({"dense_groups": "1-1", "growth": 8, "num_heads": 2}, "dense connections"),
    ],
)
def test_others_need_quietvit_and_the_card_says_so(tmp_path: Path, arguments: dict[str, Any], reason: str) -> None:
    backbone = make_backbone("t2t_vit", **{**SHAPE, "patch_size": 4, "image_size": 16, "token_dim": 8, **arguments})
    assert reason in str(needs_quietvit(backbone))
    saved(tmp_path / "run", "t2t_vit", backbone)
    report = export_model(tmp_path / "run", tmp_path / "out")
    assert {p.reader for p in report.parities} == {"safetensors"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"by quietvit alone: {needs_quietvit(backbone)}." in card
    assert "load_file" not in card


def test_a_fresh_process_runs_what_the_card_prints_out_of_reach_of_quietvit(tmp_path: Path) -> None:
    name, backbone = backbone_of("registers and layer scale")
    saved(tmp_path / "run", name, backbone)
    report = export_model(tmp_path / "run", tmp_path / "out")
    assert {p.output for p in report.parities if p.reader == "plain PyTorch"} == {"cls", "registers", "patches"}
    card = (tmp_path / "out" / "README.md").read_text()
    with_quietvit, without = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "import quietvit" in with_quietvit
    images = torch.randn(2, 3, 16, 16)
    [found] = run_plain_code(without, tmp_path / "out", [images])
    expected = load(tmp_path / "out", device="cpu")(images)
    assert torch.allclose(found.cls, expected.cls, rtol=0, atol=1e-5)
    with pytest.raises(
        ValueError, match="does not run: ImportError: the code of a model card must do without quietvit"
    ):
        run_plain_code(with_quietvit, tmp_path / "out", [images])


def test_code_that_computes_something_else_fails_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, backbone = backbone_of("registers and layer scale")
    saved(tmp_path / "run", name, backbone)
    honest = plain_code(backbone)
    assert "F.gelu" in honest
    monkeypatch.setattr(
        "quietvit.weights.export.safetensors_folder.plain_code", lambda _: honest.replace("F.gelu", "F.relu")
    )
    with pytest.raises(ValueError, match="read by plain PyTorch, differs from the model in cls at 16 x 16 px by"):
        export_model(tmp_path / "run", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_the_card_s_own_code_for_quietvit_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, backbone = backbone_of("swiglu and a head")
    saved(tmp_path, name, backbone)
    monkeypatch.chdir(tmp_path)
    from quietvit.weights.export import TARGETS, ExportOptions

    names = executed(TARGETS["safetensors"].usage(load(tmp_path, device="cpu"), ExportOptions()))
    assert names["features"].patches.shape == (1, 4, 4, 24)
    assert isinstance(names["scores"], Tensor)
    assert names["scores"].shape == (1, 5)
