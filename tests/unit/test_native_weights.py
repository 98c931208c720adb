"""teacher.safetensors: round trips, `load` on all it may point at, and every way a file can be wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import quietvit
from quietvit.backbones import make_backbone
from quietvit.contracts import Extractor
from quietvit.weights import BackboneExtractor, load_backbone, random_like, save_teacher
from quietvit.weights.native import METADATA_KEY, load_strictly, weights_hash

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def nano(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    arguments: dict[str, Any] = {
        "embed_dim": 32,
        "depth": 3,
        "num_heads": 2,
        "patch_size": 8,
        "image_size": 32,
        "num_registers": 2,
    }
    return make_backbone("vit", **{**arguments, **changes}).eval()


def save(folder: Path, backbone: nn.Module, **provenance: object) -> Path:
    return save_teacher(folder, backbone, mean=MEAN, std=STD, image_size=32, provenance=provenance)


def test_round_trip_gives_the_same_features(tmp_path: Path) -> None:
    backbone = nano()
    path = save(tmp_path, backbone, seed=7, step=12)
    model = quietvit.load(path, device="cpu")
    assert isinstance(model, Extractor)
    assert (model.embed_dim, model.num_blocks, model.stride, model.image_size) == (32, 3, 8, 32)
    assert (model.mean, model.std) == (MEAN, STD)
    images = torch.randn(2, 3, 40, 32)
    with torch.no_grad():
        expected = backbone(images)
    got = model(images)
    assert torch.equal(got.cls, expected.cls)
    assert torch.equal(got.patches, expected.patches)
    assert got.patches.shape == (2, 5, 4, 32)
    last = model.last_blocks(images, 2)
    torch.testing.assert_close(last[-1].cls, expected.cls)
    assert not torch.allclose(last[0].cls, expected.cls)
    assert not got.cls.requires_grad


def test_the_json_beside_is_the_json_inside_and_says_all(tmp_path: Path) -> None:
    path = save(tmp_path, nano(), seed=7)
    beside = json.loads((tmp_path / "teacher.json").read_text())
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()[METADATA_KEY]) == beside
    assert beside["backbone"]["arguments"]["num_registers"] == 2
    assert beside["provenance"] == {"seed": 7}
    assert beside["normalisation"] == {"mean": list(MEAN), "std": list(STD)}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["teacher.json", "teacher.safetensors"]  # nothing temporary


def test_weights_are_stored_as_fp32_under_released_names(tmp_path: Path) -> None:
    backbone = nano()
    tensors = load_file(save(tmp_path, backbone.bfloat16()))
    assert {v.dtype for v in tensors.values()} == {torch.float32}
    assert {"cls_token", "register_tokens", "patch_embed.proj.weight", "blocks.2.attn.qkv.bias", "norm.weight"} <= set(
        tensors
    )


def test_run_folder_gives_the_newest_complete_teacher(tmp_path: Path) -> None:
    for step in (100, 1200, 300):
        save(tmp_path / "checkpoints" / f"step_{step:08d}", nano(step), step=step)
    newest = save(tmp_path, nano(1200), step=1200)
    assert quietvit.load(tmp_path, device="cpu").meta["provenance"] == {"step": 1200}
    newest.write_bytes(newest.read_bytes()[:-10])  # the disk was full
    assert quietvit.load(tmp_path, device="cpu").meta["provenance"] == {"step": 1200}  # of its checkpoint folder
    cut = tmp_path / "checkpoints" / "step_00001200" / "teacher.safetensors"
    cut.write_bytes(b"")
    model = quietvit.load(tmp_path, device="cpu")
    assert model.meta["provenance"] == {"step": 300}
    assert model.identity()["hash"] == weights_hash(nano(300))
    for file in tmp_path.glob("checkpoints/*/teacher.safetensors"):
        file.write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match="no usable teacher") as error:
        quietvit.load(tmp_path)
    assert "step_00000100" in str(error.value)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_file_is_named_as_such(tmp_path: Path, keep: int) -> None:
    path = save(tmp_path, nano())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="truncated"):
        load_backbone(path)


def test_missing_models_say_what_was_looked_for_and_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(FileNotFoundError, match=r"teacher\.safetensors.*metrics\.jsonl"):
        quietvit.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no model at .*typo.*metrics\.jsonl"):
        quietvit.load(tmp_path / "typo")
    with pytest.raises(ValueError, match="a model is"):
        quietvit.load(tmp_path / "metrics.jsonl")


def test_foreign_safetensors_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors is of no family that can be read.*Found: 1 tensors \(x\)"):
        quietvit.load(tmp_path / "a.safetensors")
    save_file({"x": torch.zeros(2)}, tmp_path / "b.safetensors", metadata={METADATA_KEY: '{"format": "quietvit-9"}'})
    with pytest.raises(ValueError, match="quietvit-9"):
        quietvit.load(tmp_path / "b.safetensors")


def test_an_unknown_argument_is_explained(tmp_path: Path) -> None:
    path = save(tmp_path, nano())
    meta = json.loads((tmp_path / "teacher.json").read_text())
    meta["backbone"]["arguments"]["rope"] = True
    save_file(load_file(path), path, metadata={METADATA_KEY: json.dumps(meta)})
    with pytest.raises(ValueError, match=r"cannot build.*rope"):
        load_backbone(path)


def test_another_architecture_names_the_keys() -> None:
    state = nano().state_dict()
    with pytest.raises(ValueError, match=r"1 keys unexpected: register_tokens\."):
        load_strictly(nano(num_registers=0), state, what="here")
    with pytest.raises(ValueError, match=r"1 keys missing: register_tokens\."):
        load_strictly(nano(), {k: v for k, v in state.items() if k != "register_tokens"}, what="here")
    with pytest.raises(ValueError, match=r"register_tokens \(1, 2, 32\) instead of \(1, 4, 32\)"):
        load_strictly(nano(num_registers=4), state, what="here")
    with pytest.raises(ValueError, match=r"28 keys missing: blocks\.3.*and 16 more"):
        load_strictly(nano(depth=5), state, what="here")


def test_the_hash_is_that_of_the_values(tmp_path: Path) -> None:
    backbone = nano()
    before = weights_hash(backbone)
    assert load_backbone(save(tmp_path, backbone))[0] is not backbone
    assert weights_hash(load_backbone(tmp_path / "teacher.safetensors")[0]) == before
    with torch.no_grad():
        backbone.norm.bias[3] += 1e-6
    assert weights_hash(backbone) != before


def test_random_control_is_the_initialisation_of_the_run(tmp_path: Path) -> None:
    start = nano(seed=11)
    trained = nano(seed=99)
    save(tmp_path, trained, seed=11)
    model = quietvit.load(tmp_path, device="cpu")
    state = torch.random.get_rng_state()
    control = random_like(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert weights_hash(control.backbone) == weights_hash(start) != weights_hash(trained)
    assert control.meta["provenance"] == {"random_init": True, "seed": 11, "seed_of_run": True}
    begun = BackboneExtractor(
        model.backbone, {**model.meta, "provenance": {"seed": 11, "init": {"file": "a"}}}, device=model.device
    )
    assert random_like(begun).meta["provenance"] == {"random_init": True, "seed": 0, "seed_of_run": False}
    other = random_like(model, seed=5)
    assert weights_hash(other.backbone) == weights_hash(nano(seed=5))
    assert model.identity()["provenance"] == {"seed": 11}


def test_importing_quietvit_alone_does_not_import_torch() -> None:
    code = "import sys, quietvit; assert 'torch' not in sys.modules; assert quietvit.__version__"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = quietvit.lode
