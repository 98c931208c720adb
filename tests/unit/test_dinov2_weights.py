"""DINOv2 files: the released key lists load strictly, nested, prefixed and chunked files too, and wrong ones do not."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quietvit
from quietvit.backbones import make_backbone
from quietvit.weights.dinov2 import backbone_tensors, infer_arguments, load_dinov2
from quietvit.weights.native import load_strictly, weights_hash
from reference import VECTORS

NAMES = json.loads((VECTORS / "09_names" / "dinov2_state_dict_shapes.json").read_text())["models"]


@pytest.mark.parametrize("name", sorted(NAMES))
def test_released_key_lists_meet_the_inferred_architecture(name: str) -> None:
    with torch.device("meta"):
        tensors = {k: torch.empty(shape) for k, shape in NAMES[name]["state_dict"].items()}
        arguments = infer_arguments(tensors, what=name)
        backbone = make_backbone("vit", **arguments)
        load_strictly(backbone, tensors, what=name)
    assert sum(p.numel() for p in backbone.parameters()) == NAMES[name]["parameters"]
    size = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "g": (1536, 40, 24)}[name[10]]
    assert (arguments["embed_dim"], arguments["depth"], arguments["num_heads"]) == size
    assert (arguments["patch_size"], arguments["image_size"]) == (14, 518)
    registers = "reg" in name
    assert arguments["num_registers"] == (4 if registers else 0)
    assert (arguments["pos_interpolation"], arguments["pos_antialias"]) == (
        ("size", True) if registers else ("offset", False)
    )
    assert arguments["ffn"] == ("swiglu" if name[10] == "g" else "mlp")


def small(**changes: Any) -> Any:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "embed_dim": 64,
        "depth": 4,
        "num_heads": 1,
        "patch_size": 4,
        "image_size": 20,
        "num_registers": 3,
    }
    return make_backbone("vit", **{**arguments, **changes}).eval()


def chunked(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """As DINOv2's training code names them with two blocks per chunk."""
    out = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "blocks":
            parts.insert(1, str(int(parts[1]) // 2))
        out[prefix + ".".join(parts)] = value
    return out


@pytest.mark.parametrize("form", ["flat", "teacher", "teacher_keys", "module", "chunked"])
def test_every_nesting_gives_the_same_model(tmp_path: Path, form: str) -> None:
    backbone = small()
    state = backbone.state_dict()
    heads = {"dino_head.mlp.0.weight": torch.zeros(3), "ibot_head.last_layer.weight": torch.zeros(2)}
    student = {f"student.backbone.{k}": torch.zeros_like(v) for k, v in state.items()}
    stored = {
        "flat": state,
        "teacher": {"teacher": {**{f"backbone.{k}": v for k, v in state.items()}, **heads}},
        "teacher_keys": {**{f"teacher.backbone.{k}": v for k, v in state.items()}, **student},
        "module": {"model": {f"module.backbone.{k}": v for k, v in state.items()}},
        "chunked": {"teacher": {**chunked(state, "backbone."), **heads}},
    }[form]
    torch.save(stored, tmp_path / "model.pth")
    loaded, meta = load_dinov2(tmp_path / "model.pth")
    assert weights_hash(loaded) == weights_hash(backbone)
    assert meta["image_size"] == 20
    images = torch.randn(1, 3, 20, 20)
    with torch.no_grad():
        assert torch.equal(loaded(images).cls, backbone(images).cls)


def test_load_reads_pth_files_and_other_sizes_interpolate_as_the_source_did(tmp_path: Path) -> None:
    for registers in (0, 3):
        backbone = small(
            num_registers=registers, pos_interpolation="size" if registers else "offset", pos_antialias=registers > 0
        )
        torch.save(backbone.state_dict(), tmp_path / "model.pth")
        model = quietvit.load(tmp_path / "model.pth", device="cpu")
        images = torch.randn(1, 3, 28, 32)
        with torch.no_grad():
            assert torch.equal(model(images).patches, backbone(images).patches)
    assert model.mean == (0.485, 0.456, 0.406)


def test_a_block_without_layer_scale_or_qkv_bias_is_seen(tmp_path: Path) -> None:
    backbone = small(layer_scale=0.0, qkv_bias=False, ffn="swiglu")
    torch.save(backbone.state_dict(), tmp_path / "model.pth")
    assert weights_hash(load_dinov2(tmp_path / "model.pth")[0]) == weights_hash(backbone)


def test_files_that_do_not_fit_say_why(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    state = small().state_dict()

    def refuse(content: object, message: str) -> None:
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            load_dinov2(path)

    refuse([1, 2], "holds a list")
    refuse({"fc.weight": torch.zeros(2, 2)}, r"not a DINOv2 backbone: it lacks cls_token.*fc\.weight")
    refuse({k: v for k, v in state.items() if k != "blocks.2.ls1.gamma"}, r"1 keys missing: blocks\.2\.ls1\.gamma")
    refuse({**state, "head.weight": torch.zeros(2)}, r"1 keys unexpected: head\.weight")
    refuse({**state, "pos_embed": torch.zeros(1, 8, 64)}, "7 patches is not square")
    refuse({**state, "cls_token": torch.zeros(1, 1, 40)}, "width 40")
    with pytest.raises(ValueError, match="two tensors"):
        backbone_tensors({"backbone.norm.weight": torch.zeros(1), "norm.weight": torch.zeros(1)}, what="x")
    with pytest.raises(FileNotFoundError, match="no weights file"):
        load_dinov2(tmp_path / "nothing.pth")


def test_truncated_files_and_files_with_code_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(small().state_dict(), path)
    whole = path.read_bytes()
    for keep in (0, 100, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match="truncated"):
            load_dinov2(path)

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (Path(tmp_path / "ran"),))  # type: ignore[return-value]

    torch.save({"cls_token": Payload()}, path, pickle_module=pickle)
    with pytest.raises(ValueError, match="would run code"):
        load_dinov2(path)
    assert not (tmp_path / "ran").exists()
