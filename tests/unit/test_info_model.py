"""`quietvit info FILE_OR_NAME`: names, costs against the formula, and what a file says of itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import quietvit
from quietvit.backbones import BACKBONES, make_backbone
from quietvit.backbones.cost import count_macs, count_parameters
from quietvit.weights import save_teacher
from quietvit_launch import cli, info_model
from quietvit_launch.info import PUBLISHED, WIDTH, published_form
from quietvit_launch.info_model import Named, count_costs, describe, find_name, open_model, size_of

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def told(*words: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.main(["info", *words, "--format", "json"]) == 0
    out: dict[str, Any] = json.loads(capsys.readouterr().out)
    return out


def saved(folder: Path, **changes: Any) -> Path:
    arguments = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8, "image_size": 32, **changes}
    return save_teacher(
        folder, make_backbone("vit", **arguments), mean=MEAN, std=STD, image_size=32,
        provenance={"step": 12, "data": "my photos", "bank": [1, 2]},
    )  # fmt: skip


# ---- names


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("vit-small", ("vit", "small")),
        ("ViT_Small", ("vit", "small")),
        ("small", ("vit", "small")),
        ("t2t_vit-14", ("t2t_vit", "14")),
        ("T2T_ViT_t_14", ("t2t_vit", "t-14")),
        ("14-wide", ("t2t_vit", "14-wide")),
        ("vit-nano", ("vit", "nano")),
        ("t2t-vit-nano", ("t2t_vit", "nano")),
    ],
)
def test_names_of_sizes(text: str, named: tuple[str, str]) -> None:
    assert find_name(text) == Named(*named, arguments={})


def test_every_size_has_a_name() -> None:
    for family, backbone in BACKBONES.items():
        for size in backbone.SIZES:
            assert find_name(f"{family}-{size}") == Named(family, size, {})
            assert find_name(size, family) == Named(family, size, {})
    assert find_name("vti-small") is None
    assert find_name("vit-small", "t2t_vit") is None


@pytest.mark.parametrize("size", ["small", "base", "large", "giant"])
def test_dinov2s_own_names_have_the_released_parameters(size: str) -> None:
    official = {"small": 22_056_576, "base": 86_580_480, "large": 304_368_640, "giant": 1_136_480_768}[size]
    width = BACKBONES["vit"].SIZES[size]["embed_dim"]
    for name, registers in ((f"dinov2_vit{size[0]}14", 0), (f"dinov2_vit{size[0]}14_reg", 4)):
        model = open_model(name)
        assert (model.family, model.image_size, model.stride) == ("vit", 518, 14)
        assert size_of("vit", model.arguments) == size
        assert count_parameters("vit", **model.arguments) == official + registers * width
        offset = registers == 0
        assert model.arguments["pos_interpolation"] == ("offset" if offset else "size")
        assert model.arguments["pos_antialias"] is not offset
    assert PUBLISHED["vit"][size].official == official + 4 * width
    assert find_name(f"dinov2_vit{size[0]}14_reg4") == find_name(f"dinov2_vit{size[0]}14_reg")


def test_ambiguous_and_wrong_names(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vit-smalls").mkdir()
    (tmp_path / "runs" / "photos").mkdir(parents=True)
    for words, message in (
        (["nano"], "nano is a size of vit and of t2t_vit: say vit-nano or t2t_vit-nano"),
        (["vit-smal"], "no size of that name; nearest names: vit-small, "),
        (["vit-smal"], "; nearest files: vit-smalls. `quietvit info` lists all sizes"),
        (
            ["runs/photo"],
            "there is no file or folder runs/photo, and no size of that name; nearest files: runs/photos.",
        ),
        (["runs2/a.pth"], "no file or folder runs2/a.pth (there is no folder runs2), and no size"),
        (["dinov2_vits14_rag"], "nearest names: dinov2_vits14_reg"),
        (["vit-small", "--backbone", "t2t_vit"], "no size of that name"),
        (["vit-small", "--backbone", "vti"], "unknown backbone 'vti': choose from vit, t2t_vit"),
        (["vit-small", "--num-heads", "3"], "which says how many heads it has: leave --num-heads out"),
        (["--num-heads", "3"], "--num-heads is for a file of weights: name one"),
        (["--image-size", "224", "--image-size", "518"], "several are for a model: name one"),
        (["vit-small", "--image-size", "224", "--image-size", "225"], "multiples of 14; use --image-size 224 or 238"),
        (["vit-small", "--image-size", "3"], "this model takes multiples of 14; use --image-size 14"),
    ):
        assert cli.main(["info", *words]) == cli.EXIT_USER_ERROR
        assert message in capsys.readouterr().err


def test_a_wrong_name_is_told_without_torch(tmp_path: Path) -> None:
    code = "import sys; from quietvit_launch.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    for name in ("vit-smal", "nano"):
        done = subprocess.run(
            [sys.executable, "-c", code, "info", name], capture_output=True, text=True, timeout=120, cwd=tmp_path
        )
        assert done.stdout == "2 False\n"


# ---- costs


@pytest.mark.parametrize(
    ("size", "side", "printed"),
    [
        ("small", 224, "1.72"),
        ("base", 224, "1.64"),
        ("large", 224, "1.62"),
        ("giant", 224, "1.60"),
        ("small", 518, "0.40"),
    ],
)
def test_the_share_of_registers_follows_the_formula(size: str, side: int, printed: str) -> None:
    # L blocks of width D on T tokens take L (12 T D^2 + 2 T^2 D) multiply-adds: SwiGLU's 3 D 4096 are 8 D^2 in giant.
    shape, patches = BACKBONES["vit"].SIZES[size], (side // 14) ** 2
    d, depth = shape["embed_dim"], shape["depth"]

    def blocks(tokens: int) -> int:
        return depth * (12 * tokens * d * d + 2 * tokens * tokens * d)

    stem = patches * 3 * 14 * 14 * d
    (cost,) = count_costs("vit", open_model(f"vit-{size}").arguments, [side])
    assert (cost.grid, cost.tokens) == (side // 14, 5 + patches)
    assert cost.macs == stem + blocks(5 + patches)
    assert cost.macs_without_registers == stem + blocks(1 + patches)
    assert f"{100 * (blocks(5 + patches) / blocks(1 + patches) - 1):.2f}" == printed  # the blocks alone
    assert cost.register_share == pytest.approx(cost.macs / cost.macs_without_registers - 1)
    assert 100 * cost.register_share == pytest.approx(float(printed), abs=0.03)


@pytest.mark.parametrize("count", [0, 1, 16])
def test_costs_count_whatever_the_arguments_say(count: int) -> None:
    arguments = make_backbone("t2t_vit", size="nano", image_size=64, num_registers=count, num_classes=3).arguments
    (cost,) = count_costs("t2t_vit", arguments, [96])
    assert cost.tokens == 1 + count + 36
    assert cost.macs == count_macs("t2t_vit", size="nano", image_size=96, num_registers=count, num_classes=3)
    assert cost.macs_without_registers == count_macs(
        "t2t_vit", size="nano", image_size=96, num_registers=0, num_classes=3
    )
    assert (cost.register_share == 0) is (count == 0)


def test_counting_needs_no_kernels_of_the_machine_that_trained() -> None:
    arguments = make_backbone("vit", size="nano", image_size=56).arguments
    assert count_macs("vit", **{**arguments, "attention": "xformers"}) == count_macs("vit", size="nano", image_size=56)


@pytest.mark.parametrize("family", PUBLISHED)
def test_shapes_are_known_again(family: str) -> None:
    for size in BACKBONES[family].SIZES:
        model = open_model(f"{family}-{size}")
        assert size_of(family, model.arguments) == size
        if size in PUBLISHED[family]:
            released = {**model.arguments, **published_form(family, size)}
            assert size_of(family, released) == size  # as published: other positions, biases, the official Performer
        assert size_of(family, {**model.arguments, "depth": 77}) == ""


# ---- files


def test_a_file_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(tmp_path, num_registers=2)
    found = told(str(file), capsys=capsys)
    read = quietvit.load(file, "cpu")
    stored = sum(t.numel() for t in read.backbone.state_dict().values())
    assert (found["backbone"], found["size"], found["image_size"]) == ("vit", "", 32)
    assert found["arguments"].items() >= {"embed_dim": 32, "depth": 3, "num_registers": 2, "patch_size": 8}.items()
    assert found["parameters"] == {
        "all": stored, "of_registers": 64, "register_share": pytest.approx(64 / (stored - 64)),
    }  # fmt: skip
    assert found["weights_bytes"] == {"fp32": 4 * stored, "bf16": 2 * stored}
    assert found["provenance"] == {"step": 12, "data": "my photos", "bank": [1, 2]}
    assert found["normalisation"] == {"mean": list(MEAN), "std": list(STD)}
    assert found["weights_hash"] == read.identity()["hash"]
    assert [c["image_size"] for c in found["costs"]] == [32]
    assert found["notes"] == []
    two = told(str(tmp_path), "--image-size", "64", "--image-size", "40", "--image-size", "64", capsys=capsys)
    assert [(c["image_size"], c["tokens"]) for c in two["costs"]] == [(64, 67), (40, 28)]


def test_a_path_comes_before_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told("tiny", capsys=capsys)["arguments"]["embed_dim"] == 192
    saved(tmp_path / "tiny")
    assert told("tiny", capsys=capsys)["arguments"]["embed_dim"] == 32
    assert cli.main(["info", "tiny", "--backbone", "vit"]) == cli.EXIT_USER_ERROR
    assert "tiny says itself of which family it is" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert cli.main(["info", "empty"]) == cli.EXIT_USER_ERROR
    assert "empty" in capsys.readouterr().err


def test_a_dinov2_file_is_told_with_its_quirk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = make_backbone("vit", size="small", image_size=28, num_registers=0)
    torch.save(backbone.state_dict(), tmp_path / "dinov2_vits14_pretrain.pth")
    found = told(str(tmp_path / "dinov2_vits14_pretrain.pth"), capsys=capsys)
    assert (found["size"], found["provenance"]["source"]) == ("small", "dinov2")
    assert found["positions"] == (
        "learned for 2 x 2 patches; for others resized at scales with an offset of 0.1, bicubic without antialiasing"
    )
    offset, registers = found["notes"]
    assert "resized with an offset" in offset
    assert registers.startswith("no registers")
    assert found["published"]["official"] == 22_058_112


def test_a_file_that_hides_its_normalisation_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = make_backbone(
        "vit", size="tiny", patch_size=16, image_size=32, num_registers=0, layer_scale=0.0
    ).state_dict()
    del state["mask_token"]
    save_file(state, tmp_path / "augreg.safetensors")
    found = told(str(tmp_path / "augreg.safetensors"), capsys=capsys)
    assert (found["size"], found["normalisation"]) == ("tiny", None)
    assert found["notes"][0].startswith("nothing tells which normalisation its images had: give mean and std")
    assert "asked for" not in json.dumps(found["provenance"])
    with pytest.raises(ValueError, match="does not tell which mean and standard deviation"):
        quietvit.load(tmp_path / "augreg.safetensors", "cpu")


def test_notes_are_only_about_what_applies() -> None:
    assert describe(open_model("vit-nano"))["notes"] == []
    stripes = info_model.Model("x", "vit", {**open_model("vit-nano").arguments, "pos_antialias": False}, 14, 224)
    (note,) = describe(stripes)["notes"]
    assert "without antialiasing" in note


# ---- the table


def test_the_table_says_the_same_and_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(tmp_path, num_registers=2)
    assert cli.main(["info", str(file), "--image-size", "32", "--image-size", "64"]) == 0
    printed = capsys.readouterr().out
    words = " ".join(printed.split())
    digest = quietvit.load(file, "cpu").identity()["hash"]
    for part in (
        "backbone vit, of no size that has a name here",
        "blocks 3 of width 32, 2 heads, mlp of ratio 4, with layer scale",
        "patches 8 px; made for images of 32 px",
        "registers 2",
        "normalisation mean 0.5, 0.4, 0.3; std 0.2, 0.25, 0.3",
        "provenance step: 12 data: my photos bank: [1, 2]",
        f"weights hash {digest}",
        "32 4 x 4 19 ",
        "64 8 x 8 67 ",
    ):
        assert part in words
    assert max(map(len, printed.splitlines()[1:])) <= WIDTH
    assert cli.main(["info", "dinov2_vits14_reg", "--image-size", "224"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "parameters 22,058,112; 1,536 of them in registers (0.0070 % more)" in words
    assert "weights 84.1 MiB in fp32, 42.1 MiB in bf16" in words
    assert "224 16 x 16 261 6.23 6.12 1.70 %" in words
    assert "Note" not in words
