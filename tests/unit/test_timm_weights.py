"""timm's own classes with random weights give our features, read and written; what cannot be read says why."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quietvit.backbones import make_backbone
from quietvit.contracts import Features
from quietvit.weights.export import export_model
from quietvit.weights.export.target import ExportOptions
from quietvit.weights.export.to_timm import TARGET, architecture, timm_tensors
from quietvit.weights.extractor import BackboneExtractor, load
from quietvit.weights.family import IMAGENET, Hints
from quietvit.weights.timm import convert, recognises
from reference import VECTORS

timm = pytest.importorskip("timm")
hub = pytest.importorskip("timm.models._hub")

SMALL: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 56, "patch_size": 14}
SIZES = ((56, 56), (84, 84), (28, 28), (42, 70))
MEAN_STD = ((0.4, 0.5, 0.6), (0.1, 0.2, 0.3))
# name of an architecture, its arguments, what the caller must say of a bare file
THEIRS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dinov2_reg4": ("vit_small_patch14_reg4_dinov2", {}, {}),
    "dinov2": ("vit_small_patch14_dinov2", {}, {}),
    "swiglu_reg4": ("vit_giant_patch14_reg4_dinov2", {}, {}),
    "swiglu": ("vit_giant_patch14_dinov2", {"mlp_ratio": 16 / 3}, {}),
    "augreg": ("vit_small_patch16_224", {"num_classes": 5, "mlp_ratio": 2.5}, {}),
    "deit3": ("deit3_small_patch16_224", {"num_classes": 5}, {}),
    "clip": ("vit_base_patch16_clip_224", {"num_classes": 5}, {}),
    "quick_gelu": ("vit_base_patch16_clip_quickgelu_224", {"num_classes": 0}, {"activation": "quick_gelu"}),
    "class_and_register_rows": ("vit_small_patch14_reg4_dinov2", {"no_embed_class": False}, {}),
    "no_biases": ("vit_small_patch14_dinov2", {"qkv_bias": False, "proj_bias": False}, {}),
}  # fmt: skip


def randomise(module: nn.Module) -> None:
    """All parameters away from where they start, small enough for fp32 to agree to 1e-5."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.1)


def theirs(name: str, **arguments: Any) -> Any:
    model = timm.create_model(name, **{**SMALL, "num_classes": 0, "dynamic_img_size": True, **arguments}).eval()
    randomise(model)
    return model


def tokens(f: Features) -> Tensor:
    return torch.cat((f.cls[:, None], f.registers, f.patches.flatten(1, 2)), dim=1)


def assert_same(model: BackboneExtractor, other: Any) -> None:
    """Tokens at native, larger, smaller and non-square sizes, and class scores, to 1e-5."""
    with torch.no_grad():
        for size in SIZES:
            images = torch.randn(2, 3, *size)
            torch.testing.assert_close(tokens(model(images)), other.forward_features(images), atol=1e-5, rtol=0)
            if model.num_classes:
                torch.testing.assert_close(model.logits(images), other(images), atol=1e-5, rtol=0)


def extractor(**changes: Any) -> BackboneExtractor:
    backbone = make_backbone("vit", **{"embed_dim": 48, "depth": 2, "num_heads": 3, "image_size": 56, **changes})
    randomise(backbone)
    spec = {"name": "vit", "arguments": backbone.arguments}
    mean, std = MEAN_STD
    meta = {"backbone": spec, "normalisation": {"mean": mean, "std": std}, "image_size": 56, "provenance": {}}
    return BackboneExtractor(backbone, meta, device=torch.device("cpu"))


@pytest.mark.parametrize("case", sorted(THEIRS))
def test_a_file_of_timm_gives_its_features(tmp_path: Path, case: str) -> None:
    name, arguments, said = THEIRS[case]
    model = theirs(name, **arguments)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
    mean, std = MEAN_STD
    read = load(tmp_path / "weights.pth", "cpu", num_heads=3, mean=mean, std=std, **said)
    assert read.num_classes == model.num_classes
    assert read.backbone.num_registers == model.num_reg_tokens
    assert (read.mean, read.std) == MEAN_STD
    assert_same(read, model)


@pytest.mark.parametrize("case", ["dinov2_reg4", "swiglu", "augreg", "deit3", "quick_gelu"])
def test_a_folder_of_timm_says_everything_itself(tmp_path: Path, case: str) -> None:
    name, arguments, _ = THEIRS[case]
    model = theirs(name, **arguments)
    hub.save_for_hf(model, tmp_path, safe_serialization="both" if case == "deit3" else True)
    if case == "deit3":
        (tmp_path / "model.safetensors").unlink()  # the torch file is read too
    for path in (tmp_path, next(p for p in tmp_path.iterdir() if p.suffix in (".safetensors", ".bin"))):
        read = load(path, "cpu")
        assert (read.mean, read.std) == tuple(tuple(model.pretrained_cfg[k]) for k in ("mean", "std"))
        assert_same(read, model)
    assert read.meta["provenance"]["architecture"] == f"timm {name}"


def test_original_names_of_deit3_are_layer_scale(tmp_path: Path) -> None:
    model = theirs("deit3_small_patch16_224", num_classes=4)
    original = {re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", k): v for k, v in model.state_dict().items()}
    assert "blocks.0.gamma_1" in original
    torch.save({"model": original}, tmp_path / "deit_3_small_224_1k.pth")
    read = load(tmp_path / "deit_3_small_224_1k.pth", "cpu", num_heads=3)
    assert (read.mean, read.std) == IMAGENET
    assert_same(read, model)


def test_normalisation_is_told_only_where_the_names_tell_it() -> None:
    def told(name: str, **arguments: Any) -> object:
        return convert(theirs(name, **arguments).state_dict(), Hints(num_heads=3)).normalisation

    assert told("vit_small_patch14_dinov2") == told("vit_small_patch14_reg4_dinov2") == IMAGENET
    assert told("vit_base_patch14_reg1_tipsv2") is None  # it is trained on pixels as they are
    assert told("vit_small_patch14_dinov2", patch_size=8) is None
    assert told("vit_small_patch16_224") is None  # augreg's and DeiT's are alike
    assert told("vit_base_patch16_clip_224") is None


def test_a_file_that_does_not_tell_is_refused_with_both_ways_out(tmp_path: Path) -> None:
    save_file(theirs("vit_small_patch16_224").state_dict(), tmp_path / "augreg.safetensors")
    with pytest.raises(ValueError, match=r"does not tell which mean.*config\.json beside it.*--normalisation"):
        load(tmp_path / "augreg.safetensors", "cpu", num_heads=3)
    config = {"architecture": "vit_small_patch16_224", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
              "model_args": {"num_heads": 3}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(tmp_path / "augreg.safetensors", "cpu").mean == (0.5, 0.5, 0.5)


def test_a_head_on_averaged_patches_is_left_out(tmp_path: Path) -> None:
    model = theirs("vit_small_patch16_224", num_classes=4, global_pool="avg", fc_norm=False)
    hub.save_for_hf(model, tmp_path, safe_serialization=True)
    read = load(tmp_path, "cpu")
    assert read.num_classes == 0
    assert any("class head: left out" in note for note in read.meta["provenance"]["notes"])


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "distilled": (lambda: timm.create_model("deit_tiny_distilled_patch16_224", depth=1), "second class token"),
    "averaged": (lambda: theirs("vit_small_patch16_224", global_pool="avg"), r"fc_norm"),
    "no class token": (
        lambda: theirs("vit_small_patch16_224", class_token=False, global_pool="avg", fc_norm=False),
        "no class token",
    ),
    "attention pool": (lambda: theirs("vit_base_patch16_siglip_224"), "pools by attention"),
    "qk norm": (lambda: theirs("vit_small_patch16_224", qk_norm=True), "qk_norm"),
    "relative": (
        lambda: timm.create_model("vit_relpos_small_patch16_224", depth=1, class_token=True, global_pool="token"),
        "positions are relative",
    ),
    "eva": (lambda: timm.create_model("eva02_tiny_patch14_224", depth=1), "EVA or BEiT"),
    "hybrid": (lambda: timm.create_model("vit_tiny_r_s16_p8_224", depth=1), "convolutional"),
    "parallel": (lambda: timm.create_model("vit_small_patch16_18x2_224", depth=1), "parallel"),
    "not square": (lambda: theirs("vit_small_patch16_224", img_size=(56, 70)), "not square"),
    "gray": (lambda: theirs("vit_small_patch16_224", in_chans=1), "RGB"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_cannot_be_read_says_why(tmp_path: Path, case: str) -> None:
    make, reason = REFUSED[case]
    state = make().state_dict()
    assert recognises(state.keys())
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=reason):
        load(tmp_path / "weights.safetensors", "cpu", num_heads=3, mean=(0.5,) * 3, std=(0.5,) * 3)


def test_missing_unexpected_and_misshaped_names_are_listed(tmp_path: Path) -> None:
    state = theirs("vit_small_patch14_reg4_dinov2").state_dict()
    path = tmp_path / "weights.safetensors"

    def refuse(changed: dict[str, Tensor], message: str) -> None:
        save_file(changed, path)
        with pytest.raises(ValueError, match=message):
            load(path, "cpu", num_heads=3)

    refuse({k: v for k, v in state.items() if k != "blocks.1.ls2.gamma"}, r"1 keys missing: blocks\.1\.ls2\.gamma")
    refuse({**state, "blocks.1.gate": torch.zeros(1)}, r"1 keys unexpected: blocks\.1\.gate")
    refuse({**state, "norm.bias": torch.zeros(3)}, r"norm\.bias \(3,\) instead of \(48,\)")
    refuse({k: v for k, v in state.items() if not k.startswith("blocks.0.")}, "no family|block 0 is missing|lacks")
    refuse({**state, "pos_embed": torch.zeros(1, 23, 48)}, "not square")


def test_a_configuration_of_other_weights_is_refused(tmp_path: Path) -> None:
    hub.save_for_hf(theirs("vit_small_patch14_reg4_dinov2"), tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())

    def refuse(message: str, **changes: Any) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ValueError, match=message):
            load(tmp_path, "cpu")

    refuse("reg_tokens 0 instead of 4", model_args={**config["model_args"], "reg_tokens": 0})
    refuse("depth 3 instead of 2", model_args={**config["model_args"], "depth": 3})
    refuse("activation 'relu'", model_args={**config["model_args"], "act_layer": "relu"})
    refuse("bilinearly", architecture="vit_base_patch16_radio_v3")
    refuse("mean in config.json must be three numbers", pretrained_cfg={"mean": [0.5], "std": [0.5] * 3})
    refuse("positive", pretrained_cfg={"mean": [0.5] * 3, "std": [0.5, 0, 1]})


OURS: dict[str, dict[str, Any]] = {
    "registers": {},
    "16 registers": {"num_registers": 16},
    "none": {"num_registers": 0},
    "swiglu": {"ffn": "swiglu"},
    "swiglu without layer scale": {"ffn": "swiglu", "layer_scale": 0.0, "num_registers": 0, "mlp_ratio": 3.0},
    "no layer scale, a head": {"layer_scale": 0.0, "num_classes": 5},
    "no biases": {"qkv_bias": False, "proj_bias": False, "ffn_bias": False, "mlp_ratio": 2.3},
    "norm before, quick_gelu": {"pre_norm": True, "norm_eps": 1e-5, "activation": "quick_gelu", "num_registers": 0},
    "norm before, registers": {"pre_norm": True},
    "other epsilon": {"norm_eps": 1e-5},
    "patches of 8": {"patch_size": 8},
    "offset": {"pos_interpolation": "offset", "pos_antialias": False, "num_registers": 0},
}


@pytest.mark.parametrize("case", sorted(OURS))
def test_timm_opens_what_is_written_and_it_comes_back(tmp_path: Path, case: str) -> None:
    ours, options = extractor(**OURS[case]), ExportOptions(license="MIT")
    assert TARGET.refusal(ours, options) is None
    TARGET.write(ours, tmp_path, options)
    opened = TARGET.reopen(tmp_path, options)
    back = load(tmp_path, "cpu")
    assert (back.mean, back.std) == MEAN_STD
    exact = not OURS[case].get("pre_norm")  # there the bias of the stem moves into the positions
    for size in TARGET.sizes(ours, options):
        images = torch.randn(2, 3, *size)
        f = ours(images)
        torch.testing.assert_close(tokens(opened(images)), tokens(f), atol=1e-5, rtol=0)
        torch.testing.assert_close(tokens(back(images)), tokens(f), atol=0 if exact else 1e-5, rtol=0)
        if ours.num_classes:
            torch.testing.assert_close(opened.logits(images), ours.logits(images), atol=1e-5, rtol=0)  # type: ignore[attr-defined]
    mine, again = ours.backbone.state_dict(), back.backbone.state_dict()
    moved = {"cls_token", "pos_embed", "mask_token", "patch_embed.proj.bias"}
    for key in mine.keys() - moved:
        assert torch.equal(mine[key], again[key]), key
    assert all(not again[key].any() for key in again.keys() - mine.keys())  # biases that timm cannot leave out


def test_sizes_to_compare_are_all_kinds_where_positions_are_alike() -> None:
    sizes = TARGET.sizes(extractor(), ExportOptions())
    assert sizes[0] == (56, 56)
    assert any(h == w > 56 for h, w in sizes)
    assert any(h == w < 56 for h, w in sizes)
    assert any(h != w for h, w in sizes)
    offset = extractor(pos_interpolation="offset")
    assert list(TARGET.sizes(offset, ExportOptions())) == [(56, 56)]
    assert "56 px only" in TARGET.remarks(offset, ExportOptions())
    assert "px only" not in TARGET.remarks(extractor(), ExportOptions())


@pytest.mark.parametrize("case", ["registers", "swiglu", "norm before, quick_gelu", "no layer scale, a head"])
def test_timm_opens_the_folder_itself(tmp_path: Path, case: str) -> None:
    ours = extractor(**OURS[case])
    TARGET.write(ours, tmp_path, ExportOptions())
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert_same(ours, model)
    data = timm.data.resolve_model_data_config(model)
    assert [list(data[k]) for k in ("mean", "std", "input_size")] == [*map(list, MEAN_STD), [3, 56, 56]]


def test_usage_runs_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = extractor(num_classes=3)
    TARGET.write(ours, tmp_path, ExportOptions())
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(TARGET.usage(ours, ExportOptions()), names)
    assert names["patches"].shape == (1, 16, 48)
    assert names["registers"].shape == (1, 4, 48)
    assert names["scores"].shape == (1, 3)


def test_the_whole_export_is_compared_and_described(tmp_path: Path) -> None:
    report = export_model(extractor(), tmp_path / "out", to="timm")
    assert {(p.output, p.size) for p in report.parities} >= {("patches", (56, 56)), ("registers", (28, 70))}
    assert 0 <= report.max_difference < 1e-5
    assert {"README.md", "config.json", "model.safetensors"} <= {p.name for p in (tmp_path / "out").iterdir()}


def test_what_timm_cannot_express_is_refused() -> None:
    options = ExportOptions()
    assert "epsilon" in str(TARGET.refusal(extractor(norm_eps=1e-4), options))
    assert "epsilon" in str(TARGET.refusal(extractor(norm_eps=1e-5, ffn="swiglu"), options))
    assert "attention_layer 'se'" in str(TARGET.refusal(extractor(attention_layer="se"), options))
    assert "sinusoid" in str(TARGET.refusal(extractor(positions="sinusoid"), options))
    t2t = extractor()
    t2t.meta["backbone"] = {"name": "t2t_vit", "arguments": {}}
    assert "no architecture for t2t_vit" in str(TARGET.refusal(t2t, options))


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'quietvit[timm]'" in str(TARGET.refusal(extractor(), ExportOptions()))


FULL = json.loads((VECTORS / "09_names" / "dinov2_state_dict_shapes.json").read_text())["models"]


@pytest.mark.parametrize("name", sorted(FULL))
def test_full_size_models_have_timms_names_and_shapes(name: str) -> None:
    registers = "reg" in name
    size = {"s": "small", "b": "base", "l": "large", "g": "giant"}[name[10]]
    with torch.device("meta"):
        backbone = make_backbone("vit", size=size, image_size=518, num_registers=4 if registers else 0)
        known = timm.create_model(f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2")
        nearest, arguments = architecture(backbone)
        ours = timm.create_model(nearest, **arguments)
    shapes = {k: tuple(v.shape) for k, v in known.state_dict().items()}
    assert {k: tuple(v.shape) for k, v in timm_tensors(backbone).items()} == shapes
    assert {k: tuple(v.shape) for k, v in ours.state_dict().items()} == shapes
    assert f"vit_{size}" in nearest
    found = convert(known.state_dict(), Hints())
    wanted = {k: list(v.shape) for k, v in backbone.state_dict().items()}
    assert wanted == FULL[name]["state_dict"]
    assert {k: list(v.shape) for k, v in found.tensors.items()} == wanted
    assert found.arguments["num_heads"] == backbone.options.num_heads == known.blocks[0].attn.num_heads


def test_written_weights_are_plain_fp32(tmp_path: Path) -> None:
    ours = extractor()
    TARGET.write(ours, tmp_path, ExportOptions())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert {v.dtype for v in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}
