"""DINOv2 files: the released key lists load strictly, nested, prefixed and chunked files too, and wrong ones do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import quietvit
from quietvit.backbones import make_backbone
from quietvit.weights import load_released
from quietvit.weights.dinov2 import convert
from quietvit.weights.family import Hints
from quietvit.weights.native import load_strictly, weights_hash
from reference import VECTORS

NAMES = json.loads((VECTORS / "09_names" / "dinov2_state_dict_shapes.json").read_text())["models"]


@pytest.mark.parametrize("name", sorted(NAMES))
def test_released_key_lists_meet_the_inferred_architecture(name: str) -> None:
    with torch.device("meta"):
        converted = convert({k: torch.empty(shape) for k, shape in NAMES[name]["state_dict"].items()}, Hints())
        arguments = converted.arguments
        backbone = make_backbone(converted.backbone, **arguments)
        load_strictly(backbone, converted.tensors, what=name)
    assert sum(p.numel() for p in backbone.parameters()) == NAMES[name]["parameters"]
    size = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "g": (1536, 40, 24)}[name[10]]
    assert (arguments["embed_dim"], arguments["depth"], arguments["num_heads"]) == size
    assert (arguments["patch_size"], arguments["image_size"], arguments["mlp_ratio"]) == (14, 518, 4.0)
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
    """As DINOv2's training code names them with two blocks per chunk: identities pad the second chunk to index 2."""
    out = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "blocks":
            parts.insert(1, str(int(parts[1]) // 2))
        out[prefix + ".".join(parts)] = value
    return out


def forms(state: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The same weights as files of several codes hold them."""
    heads = {"dino_head.mlp.0.weight": torch.zeros(3), "ibot_head.last_layer.weight": torch.zeros(2)}
    student = {f"student.backbone.{k}": torch.zeros_like(v) for k, v in state.items()}
    wrapped = {k.replace("blocks.", "blocks._fsdp_wrapped_module."): v for k, v in state.items()}
    return {
        "flat": state,
        "teacher": {"teacher": {**{f"backbone.{k}": v for k, v in state.items()}, **heads}},
        "teacher_and_student": {"student": {k: torch.zeros_like(v) for k, v in state.items()}, "teacher": state},
        "teacher_keys": {**{f"teacher.backbone.{k}": v for k, v in state.items()}, **student},
        "module": {"model": {f"module.backbone.{k}": v for k, v in state.items()}},
        "chunked": {"teacher": {**chunked(state, "backbone."), **heads}},
        "fsdp": {"model": {f"module.teacher.backbone._fsdp_wrapped_module.{k}": v for k, v in wrapped.items()}},
        "compiled": {f"_orig_mod.{k}": v for k, v in state.items()},
        "compiled_ddp": {f"module._orig_mod.backbone.{k}": v for k, v in state.items()},
    }


@pytest.mark.parametrize("form", sorted(forms({})))
def test_every_nesting_gives_the_same_model(tmp_path: Path, form: str) -> None:
    backbone = small()
    torch.save(forms(backbone.state_dict())[form], tmp_path / "model.pth")
    loaded, meta = load_released(tmp_path / "model.pth")
    assert weights_hash(loaded) == weights_hash(backbone)
    assert meta["image_size"] == 20
    images = torch.randn(1, 3, 20, 20)
    with torch.no_grad():
        assert torch.equal(loaded(images).cls, backbone(images).cls)


def test_provenance_says_what_was_read(tmp_path: Path) -> None:
    for form, entry, heads_left_out in (("flat", "", False), ("teacher", "teacher", True)):
        torch.save(forms(small().state_dict())[form], tmp_path / "model.pth")
        provenance = load_released(tmp_path / "model.pth")[1]["provenance"]
        assert {k: provenance[k] for k in ("source", "file", "entry", "heads")} == {
            "source": "dinov2", "file": "model.pth", "entry": entry, "heads": "1, each 64 wide",
        }  # fmt: skip
        assert ("heads of the training left out: 2 tensors" in provenance.get("notes", ())) == heads_left_out


def test_a_student_without_its_teacher_is_not_taken_for_one(tmp_path: Path) -> None:
    state = small().state_dict()
    for content in ({f"student.backbone.{k}": v for k, v in state.items()}, {"student": state}):
        torch.save(content, tmp_path / "model.pth")
        with pytest.raises(ValueError, match="a student without its teacher"):
            quietvit.load(tmp_path / "model.pth", device="cpu")


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


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_scale": 0.0, "qkv_bias": False, "ffn": "swiglu"},
        {"mlp_ratio": 3.7778},  # so400m: int(64 * 3.7778) = 241
        {"ffn": "swiglu", "mlp_ratio": 3.0},
        {"proj_bias": False, "ffn_bias": False},
        {"image_size": 4},
    ],
)
def test_variants_are_read_off_names_and_shapes(tmp_path: Path, changes: dict[str, Any]) -> None:
    backbone = small(**changes)
    torch.save(backbone.state_dict(), tmp_path / "model.pth")
    assert weights_hash(load_released(tmp_path / "model.pth")[0]) == weights_hash(backbone)


def test_heads_may_be_said_and_must_divide_the_width(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(small(num_heads=4).state_dict(), path)
    for asked, heads, reason in ((None, 1, "1, each 64 wide"), (4, 4, "4, as asked for")):
        model = quietvit.load(path, device="cpu", num_heads=asked)
        assert model.backbone.blocks[0].attn.num_heads == heads  # type: ignore[union-attr,index]
        assert model.meta["provenance"]["heads"] == reason
    for bad in (3, 0, -1):
        with pytest.raises(ValueError, match=f"model.pth, read as dinov2: width 64 cannot be divided among {bad}"):
            quietvit.load(path, device="cpu", num_heads=bad)


def test_a_safetensors_file_is_read_as_the_torch_file_is(tmp_path: Path) -> None:
    backbone = small()
    save_file(backbone.state_dict(), tmp_path / "weights.pth")  # what it is called says nothing
    torch.save(backbone.state_dict(), tmp_path / "weights.safetensors")
    for name in ("weights.pth", "weights.safetensors"):
        model = quietvit.load(tmp_path / name, device="cpu")
        assert weights_hash(model.backbone) == weights_hash(backbone)
        assert model.meta["provenance"]["source"] == "dinov2"


def test_old_torch_files_and_half_precision_are_read_as_float32(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    backbone = small()
    torch.save(backbone.state_dict(), path, _use_new_zipfile_serialization=False)
    assert weights_hash(load_released(path)[0]) == weights_hash(backbone)
    for dtype, name in ((torch.float16, "float16"), (torch.bfloat16, "bfloat16"), (torch.float64, "float64")):
        torch.save({k: v.to(dtype) for k, v in backbone.state_dict().items()}, path)
        loaded, meta = load_released(path)
        assert {v.dtype for v in loaded.state_dict().values()} == {torch.float32}
        assert torch.equal(loaded.cls_token, backbone.cls_token.to(dtype).float())  # type: ignore[arg-type]
        assert meta["provenance"]["stored_as"] == name


def test_files_that_do_not_fit_say_why(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    state = small().state_dict()

    def refuse(content: object, message: str) -> None:
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            load_released(path)

    def without(name: str) -> dict[str, Tensor]:
        return {k: v for k, v in state.items() if k != name}

    refuse([1, 2], "holds a list")
    refuse({"fc.weight": torch.zeros(2, 2)}, r"of no family.*DINOv2 backbone has patch_embed.*Found: 1 tensors \(fc")
    refuse(without("cls_token"), r"model\.pth, read as dinov2: .*lacks cls_token")
    refuse(without("blocks.2.ls1.gamma"), r"1 keys missing: blocks\.2\.ls1\.gamma")
    refuse(without("mask_token") | {"register_tokens": torch.zeros(1, 3, 64)}, "1 keys missing: mask_token")
    refuse({**state, "head.weight": torch.zeros(2, 64)}, r"1 keys unexpected: head\.weight")
    refuse({**state, "norm_pre.weight": torch.ones(64)}, r"1 keys unexpected: norm_pre\.weight")
    refuse({**state, "pos_embed": torch.zeros(1, 8, 64)}, "7 patches is not square")
    refuse({**state, "norm.bias": torch.zeros(32)}, r"norm\.bias \(32,\) instead of \(64,\)")
    refuse({**state, "cls_token": torch.zeros(1, 1, 40)}, "width 40")
    refuse({k: v for k, v in state.items() if not k.startswith("blocks.1.")}, "block 1 is missing")
    refuse({**state, "blocks.1000000000.norm1.weight": torch.ones(64)}, "block 4 is missing")
    refuse({f"backbone.{k}": v for k, v in state.items()} | {"norm.weight": torch.ones(64)},
           r"model\.pth: it holds two tensors that are both 'norm\.weight'")  # fmt: skip
    refuse({**chunked(state, ""), "blocks.0.norm1.weight": torch.ones(64)}, "two tensors that are both 'blocks.0.norm1")
    with pytest.raises(FileNotFoundError, match="no weights file"):
        load_released(tmp_path / "nothing.pth")
