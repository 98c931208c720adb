"""transformers' own classes with random weights give our features; folders that disagree are refused."""

from __future__ import annotations

import json
import os
import shutil
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
from quietvit.weights.export.to_transformers import TARGET, transformers_config, transformers_tensors
from quietvit.weights.extractor import BackboneExtractor, load
from quietvit.weights.family import IMAGENET
from quietvit.weights.transformers_folder import our_tensors
from reference import VECTORS

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 56, "patch_size": 14,
}  # fmt: skip
SIZES = ((56, 56), (84, 84), (28, 28), (42, 70))
MEAN_STD = ((0.4, 0.5, 0.6), (0.1, 0.2, 0.3))
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "registers": ("Dinov2WithRegisters", {}),
    "no registers": ("Dinov2", {}),
    "registers, swiglu": ("Dinov2WithRegisters", {"use_swiglu_ffn": True, "num_register_tokens": 2}),
    "swiglu": ("Dinov2", {"use_swiglu_ffn": True, "mlp_ratio": 3}),
    "0 registers": ("Dinov2WithRegisters", {"num_register_tokens": 0}),
    "quick_gelu, epsilon": ("Dinov2", {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}),
    "no qkv bias": ("Dinov2", {"qkv_bias": False, "use_mask_token": False}),
}


def randomise(module: nn.Module) -> None:
    """All parameters away from where they start, small enough for fp32 to agree to 1e-5."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.1)


def theirs(kind: str, form: str = "Model", **arguments: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **arguments})
    model = getattr(transformers, f"{kind}{form}")(config).eval()
    randomise(model)
    return model


def tokens(f: Features) -> Tensor:
    return torch.cat((f.cls[:, None], f.registers, f.patches.flatten(1, 2)), dim=1)


def copied(path: Path) -> dict[str, Tensor]:
    """Tensors that outlive their file: `load_file` maps it into memory."""
    return {k: v.clone() for k, v in load_file(path).items()}


def assert_same(model: BackboneExtractor, other: Any) -> None:
    with torch.no_grad():
        for size in SIZES:
            images = torch.randn(2, 3, *size)
            wanted = other(pixel_values=images)
            torch.testing.assert_close(tokens(model(images)), wanted.last_hidden_state, atol=1e-5, rtol=0)
            torch.testing.assert_close(model(images).cls, wanted.pooler_output, atol=1e-5, rtol=0)


def extractor(**changes: Any) -> BackboneExtractor:
    backbone = make_backbone("vit", **{"embed_dim": 48, "depth": 2, "num_heads": 3, "image_size": 56, **changes})
    randomise(backbone)
    spec = {"name": "vit", "arguments": backbone.arguments}
    mean, std = MEAN_STD
    meta = {"backbone": spec, "normalisation": {"mean": mean, "std": std}, "image_size": 70, "provenance": {}}
    return BackboneExtractor(backbone, meta, device=torch.device("cpu"))


@pytest.mark.parametrize("case", sorted(THEIRS))
def test_a_folder_gives_the_features_of_its_class(tmp_path: Path, case: str) -> None:
    kind, arguments = THEIRS[case]
    model = theirs(kind, **arguments)
    model.save_pretrained(tmp_path)
    read = load(tmp_path, "cpu")
    assert read.backbone.num_registers == getattr(model.config, "num_register_tokens", 0)
    assert (read.mean, read.std) == IMAGENET  # there is no preprocessor_config.json
    assert (read.image_size, read.stride) == (56, 14)
    assert_same(read, model)


def test_names_of_modules_parts_and_torch_files_are_read(tmp_path: Path) -> None:
    model = theirs("Dinov2WithRegisters", use_swiglu_ffn=True)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "parts", max_shard_size="40KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    for name in ("module", "torch"):
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / "one" / "config.json", tmp_path / name)
    save_file(model.state_dict(), tmp_path / "module" / "model.safetensors")
    torch.save(load_file(tmp_path / "one" / "model.safetensors"), tmp_path / "torch" / "pytorch_model.bin")
    wanted = load(tmp_path / "one", "cpu").backbone.state_dict()
    for name in ("parts", "module", "torch"):
        found = load(tmp_path / name, "cpu").backbone.state_dict()
        assert all(torch.equal(found[k], v) for k, v in wanted.items()), name


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters"])
def test_the_backbone_of_a_classifier_is_read_without_its_head(tmp_path: Path, kind: str) -> None:
    model = theirs(kind, "ForImageClassification", num_labels=3)
    model.save_pretrained(tmp_path)
    read = load(tmp_path, "cpu")
    assert read.num_classes == 0
    assert any("class head: left out" in note for note in read.meta["provenance"]["notes"])
    assert_same(read, getattr(model, model.base_model_prefix))


def test_the_image_processor_tells_the_normalisation(tmp_path: Path) -> None:
    theirs("Dinov2").save_pretrained(tmp_path)

    def told(**processor: Any) -> tuple[Any, Any]:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
        read = load(tmp_path, "cpu")
        return read.mean, read.std

    stated = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    assert told(**stated) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert told(**stated, do_normalize=False) == ((0, 0, 0), (1, 1, 1))
    bytes_in = told(image_mean=[25.5, 51, 76.5], image_std=[51] * 3, do_rescale=False)  # pixels stay 0 to 255
    torch.testing.assert_close(torch.tensor(bytes_in), torch.tensor([[0.1, 0.2, 0.3], [0.2] * 3]))
    with pytest.raises(ValueError, match=r"image_mean in .* must be three numbers"):
        told(image_mean=0.5)
    with pytest.raises(ValueError, match="rescale_factor must be a positive number"):
        told(rescale_factor=0)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match="truncated or not JSON"):
        load(tmp_path, "cpu")
    mean, std = MEAN_STD
    assert load(tmp_path, "cpu", mean=mean, std=std).std == std


def test_configuration_and_weights_must_agree(tmp_path: Path) -> None:
    theirs("Dinov2WithRegisters").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def refuse(message: str, **changes: Any) -> None:
        changed = {k: v for k, v in {**config, **changes}.items() if v is not None}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            load(tmp_path, "cpu")

    refuse(r"model_type 'dinov2'\) says 0 registers, and the weights have 4", model_type="dinov2")
    refuse("says 2 registers, and the weights have 4", num_register_tokens=2)
    refuse("hidden_size 96, where the weights have 48", hidden_size=96)
    refuse("num_hidden_layers 3, where the weights have 2", num_hidden_layers=3)
    refuse("mlp_ratio 3, where the weights have 4", mlp_ratio=3)
    refuse("use_swiglu_ffn True, where the weights have False", use_swiglu_ffn=True)
    refuse("qkv_bias False, where the weights have True", qkv_bias=False)
    refuse("patch_size 7, where the weights have 14", patch_size=7)
    refuse("image_size 28, where the weights have 56", image_size=28)
    refuse("patch_size 16, where the weights have 14", patch_size=None)  # what transformers assumes
    refuse("cannot be divided among 5 attention heads", num_attention_heads=5)
    refuse("activation 'relu'", hidden_act="relu")
    refuse("model of type 'vit'", model_type="vit")
    refuse("mlp_ratio must be a positive number, not 'four'", mlp_ratio="four")
    refuse("hidden_size must be a positive number", hidden_size=[48])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="says 3 attention heads; leave num_heads 4 out"):
        load(tmp_path, "cpu", num_heads=4)


def test_registers_in_a_folder_without_any_are_refused(tmp_path: Path) -> None:
    theirs("Dinov2").save_pretrained(tmp_path / "plain")
    theirs("Dinov2WithRegisters").save_pretrained(tmp_path / "registers")
    for config, weights, message in (
        ("plain", "registers", "'dinov2'.* says 0 registers, and the weights have 4"),
        ("registers", "plain", "'dinov2_with_registers'.* says 4 registers, and the weights have 0"),
    ):
        mixed = tmp_path / f"mixed_{config}"
        mixed.mkdir()
        shutil.copy(tmp_path / config / "config.json", mixed)
        shutil.copy(tmp_path / weights / "model.safetensors", mixed)
        with pytest.raises(ValueError, match=message):
            load(mixed, "cpu")


def test_broken_folders_say_what_is_wrong(tmp_path: Path) -> None:
    theirs("Dinov2").save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, state = weights.read_bytes(), copied(weights)

    def refuse(message: str, kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=message):
            load(tmp_path, "cpu")

    weights.write_bytes(whole[: len(whole) // 2])
    refuse("truncated")
    save_file({k: v for k, v in state.items() if "layer.1.norm1.bias" not in k}, weights)
    refuse(r"1 keys missing: blocks\.1\.norm1\.bias")
    save_file({**state, "encoder.layer.0.gate": torch.zeros(1)}, weights)
    refuse(r"1 keys unexpected: blocks\.0\.gate")
    save_file({k: v for k, v in state.items() if "layer.1.attention.attention.key.weight" not in k}, weights)
    refuse(r"attn\.q\.weight is there without blocks\.1\.attn\.k\.weight")
    save_file({**state, "encoder.layer.1.attention.q_proj.bias": torch.zeros(48)}, weights)
    refuse(r"two tensors that are both 'blocks\.1\.attn\.q\.bias'")
    weights.unlink()
    refuse("no weights in .*looked for model.safetensors", FileNotFoundError)
    weights.write_bytes(whole)
    for text, message in (("{", "truncated or not JSON"), ("[1]", "not a JSON object"), ("\x00", "not JSON")):
        config.write_text(text)
        refuse(message)


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    theirs("Dinov2").save_pretrained(tmp_path, max_shard_size="40KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    places = index["weight_map"]

    def refuse(changed: object, message: str, kind: type[Exception] = ValueError) -> None:
        path.write_text(json.dumps({**index, "weight_map": changed}))
        with pytest.raises(kind, match=message):
            load(tmp_path, "cpu")

    refuse({**places, "layernorm.bias": "../elsewhere.safetensors"}, "not in its folder")
    refuse({**places, "layernorm.bias": "missing.safetensors"}, "which is not there", FileNotFoundError)
    refuse({**places, "other.weight": places["layernorm.bias"]}, "holds other tensors.*other.weight")
    refuse({k: v for k, v in places.items() if k != "layernorm.bias"}, "holds other tensors.*layernorm.bias")
    refuse([1], "has no weight_map")


OURS: dict[str, dict[str, Any]] = {
    "registers": {},
    "16 registers, swiglu": {"num_registers": 16, "ffn": "swiglu"},
    "none, as registers resize": {"num_registers": 0},
    "none, without antialias": {"num_registers": 0, "pos_antialias": False},
    "none, offset": {"num_registers": 0, "pos_interpolation": "offset", "pos_antialias": False},
    "registers, offset": {"pos_interpolation": "offset"},
    "no layer scale": {"layer_scale": 0.0, "num_classes": 5},
    "no biases": {"qkv_bias": False, "proj_bias": False, "ffn_bias": False},
    "quick_gelu, epsilon": {"activation": "quick_gelu", "norm_eps": 1e-5, "patch_size": 8},
    "narrow swiglu": {"ffn": "swiglu", "mlp_ratio": 3.01},
}


@pytest.mark.parametrize("case", sorted(OURS))
def test_transformers_opens_what_is_written_and_it_comes_back(tmp_path: Path, case: str) -> None:
    ours, options = extractor(**OURS[case]), ExportOptions()
    assert TARGET.refusal(ours, options) is None
    TARGET.write(ours, tmp_path, options)
    opened = TARGET.reopen(tmp_path, options)
    back = load(tmp_path, "cpu")
    assert (back.mean, back.std) == MEAN_STD
    sizes = TARGET.sizes(ours, options)
    assert len(sizes) == (1 if "offset" in case else 4)
    for size in sizes:
        images = torch.randn(2, 3, *size)
        f = ours(images)
        torch.testing.assert_close(tokens(opened(images)), tokens(f), atol=1e-5, rtol=0)
        torch.testing.assert_close(tokens(back(images)), tokens(f), atol=0, rtol=0)
    mine, again = ours.backbone.state_dict(), back.backbone.state_dict()
    for key in mine.keys() - {"head.weight", "head.bias"}:
        assert torch.equal(mine[key], again[key]), key
    for key in again.keys() - mine.keys():  # what transformers cannot leave out
        assert bool((again[key] == (1.0 if key.endswith("gamma") else 0.0)).all()), key
    transformers.AutoModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "theirs")
    third = load(tmp_path / "theirs", "cpu").backbone.state_dict()
    assert all(torch.equal(third[k], v) for k, v in again.items())


def test_the_image_processor_crops_and_normalises_as_the_model_wants(tmp_path: Path) -> None:
    ours = extractor()
    TARGET.write(ours, tmp_path, ExportOptions())
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    images = torch.full((3, 100, 160), 255, dtype=torch.uint8)
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 70, 70)
    mean, std = (torch.tensor(v) for v in MEAN_STD)
    torch.testing.assert_close(pixels[0, :, 30, 30], (1 - mean) / std)
    assert (processor.size["shortest_edge"], processor.resample) == (80, 3)


def test_usage_runs_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = extractor()
    TARGET.write(ours, tmp_path, ExportOptions())
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(TARGET.usage(ours, ExportOptions()), names)
    assert names["patches"].shape == (1, 25, 48)
    assert names["registers"].shape == (1, 4, 48)


def test_what_is_lost_stands_in_the_card() -> None:
    options = ExportOptions()
    assert TARGET.remarks(extractor(), options) == ""
    assert "56 px only" in TARGET.remarks(extractor(pos_interpolation="offset"), options)
    assert "head is left out" in TARGET.remarks(extractor(num_classes=2), options)


def test_the_whole_export_is_compared_and_described(tmp_path: Path) -> None:
    report = export_model(extractor(), tmp_path / "out", to="transformers")
    assert {(p.output, p.size) for p in report.parities} >= {("patches", (56, 56)), ("registers", (28, 70))}
    assert 0 <= report.max_difference < 1e-5
    assert {"README.md", "config.json", "model.safetensors"} <= {p.name for p in (tmp_path / "out").iterdir()}


def test_what_transformers_cannot_express_is_refused() -> None:
    options = ExportOptions()
    assert "no norm before" in str(TARGET.refusal(extractor(pre_norm=True), options))
    assert "whole numbers as mlp_ratio" in str(TARGET.refusal(extractor(mlp_ratio=2.5), options))
    assert "ffn 'ghost'" in str(TARGET.refusal(extractor(ffn="ghost", mlp_ratio=3.0), options))
    t2t = extractor()
    t2t.meta["backbone"] = {"name": "t2t_vit", "arguments": {}}
    assert "no architecture for t2t_vit" in str(TARGET.refusal(t2t, options))


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'quietvit[transformers]'" in str(TARGET.refusal(extractor(), ExportOptions()))


def test_tensors_that_transformers_would_leave_random_fail_the_export(tmp_path: Path) -> None:
    TARGET.write(extractor(), tmp_path, ExportOptions())
    state = copied(tmp_path / "model.safetensors")
    state.pop("embeddings.register_tokens")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"did not take every tensor.*embeddings\.register_tokens"):
        TARGET.reopen(tmp_path, ExportOptions())


FULL = json.loads((VECTORS / "09_names" / "dinov2_state_dict_shapes.json").read_text())["models"]


@pytest.mark.parametrize("name", sorted(FULL))
def test_full_size_models_have_their_names_and_shapes(name: str) -> None:
    registers = {"num_registers": 4} if "reg" in name else {"num_registers": 0, "pos_antialias": False}
    size = {"s": "small", "b": "base", "l": "large", "g": "giant"}[name[10]]
    with torch.device("meta"):
        backbone = make_backbone("vit", size=size, image_size=518, **registers)
        config = transformers_config(backbone)
        kind = config["architectures"][0].removesuffix("Model")
        model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**config))
    assert kind == ("Dinov2WithRegisters" if "reg" in name else "Dinov2")
    wanted = {k: list(v.shape) for k, v in backbone.state_dict().items()}
    assert wanted == FULL[name]["state_dict"]
    for tensors in (transformers_tensors(backbone), model.state_dict()):  # names of files, and of modules
        assert {k: list(v.shape) for k, v in our_tensors(tensors).items()} == wanted
