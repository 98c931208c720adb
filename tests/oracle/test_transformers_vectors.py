"""transformers' names against the stored ones (vectors/09_names), and what its own class computed with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from quietvit.backbones import make_backbone
from quietvit.backbones.trunk import Trunk
from quietvit.weights.export.to_transformers import transformers_config, transformers_tensors
from quietvit.weights.extractor import load
from quietvit.weights.native import load_strictly
from quietvit.weights.transformers_folder import our_tensors
from reference import VECTORS, Case, case

CASES = ("transformers_reg4", "transformers_reg4_swiglu")
TABLE: dict[str, Any] = json.loads((VECTORS / "09_names" / "other_library_shapes.json").read_text())


def config_of(c: Case) -> dict[str, Any]:
    given = c.info["constructor"]
    return {
        "model_type": "dinov2_with_registers",
        "hidden_size": given["embed_dim"],
        "num_hidden_layers": given["depth"],
        "num_attention_heads": given["num_heads"],
        "mlp_ratio": 4,
        "image_size": given["img_size"],
        "patch_size": given["patch_size"],
        "num_register_tokens": given["num_register_tokens"],
        "use_swiglu_ffn": given["ffn_layer"] == "swiglufused",
    }


def in_memory(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the modules of transformers 5 name them: the rules in the notes of the vectors."""
    short = {"attention.query": "q_proj", "attention.key": "k_proj", "attention.value": "v_proj",
             "output.dense": "o_proj"}  # fmt: skip
    out = {}
    for key, value in weights.items():
        for theirs, now in short.items():
            key = key.replace(f"attention.{theirs}", f"attention.{now}")
        key = key.replace("mlp.weights_out", "mlp.down_proj")
        if "mlp.weights_in" in key:
            gate, up = value.chunk(2)
            out[key.replace("weights_in", "gate_proj")] = gate.clone()
            out[key.replace("weights_in", "up_proj")] = up.clone()
        else:
            out[key] = value
    return out


def as_dinov2(c: Case) -> Trunk:
    given = c.info["constructor"]
    backbone = make_backbone(
        "vit",
        image_size=given["img_size"],
        patch_size=given["patch_size"],
        embed_dim=given["embed_dim"],
        depth=given["depth"],
        num_heads=given["num_heads"],
        ffn="swiglu" if given["ffn_layer"] == "swiglufused" else "mlp",
        layer_scale=given["init_values"],
        num_registers=given["num_register_tokens"],
    )
    load_strictly(backbone, c.weights(), what="vector")
    return backbone.eval()


@pytest.mark.parametrize("style", ["published", "in_memory"])
@pytest.mark.parametrize("name", CASES)
def test_folders_give_the_stored_tokens_and_weights(tmp_path: Path, name: str, style: str) -> None:
    c = case(f"09_names/{name}")
    weights = c.weights("weights_hf")
    save_file(weights if style == "published" else in_memory(weights), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_of(c)))
    model = load(tmp_path, "cpu")
    for key, value in c.weights().items():
        assert torch.equal(model.backbone.state_dict()[key], value), key
    for run in c.info["runs"]:
        inputs = c.inputs(run)
        x = inputs.get("x", c.inputs("size_56x56").get("x"))
        with torch.no_grad():
            f = model.backbone(x, inputs.get("masks"))
        c.check(run, "last_hidden_state", torch.cat((f.cls[:, None], f.registers, f.patches.flatten(1, 2)), dim=1))
        c.check(run, "pooler_output", f.cls)


@pytest.mark.parametrize("name", CASES)
def test_the_export_is_the_stored_file(name: str) -> None:
    c = case(f"09_names/{name}")
    stored, backbone = c.weights("weights_hf"), as_dinov2(c)
    ours = transformers_tensors(backbone)
    assert set(ours) == set(stored)
    for key, value in stored.items():
        assert torch.equal(ours[key], value), key
    config = transformers_config(backbone)
    assert {k: config[k] for k in config_of(c)} == config_of(c)


def test_names_and_shapes_of_the_small_model_with_registers() -> None:
    with torch.device("meta"):
        backbone = make_backbone("vit", size="small", image_size=518)
    shapes = {k: list(v.shape) for k, v in transformers_tensors(backbone).items()}
    assert shapes == TABLE["transformers_checkpoint_file"]
    wanted = {k: list(v.shape) for k, v in backbone.state_dict().items()}
    for style in ("transformers_checkpoint_file", "transformers_5_in_memory"):
        stored = {k: torch.empty(shape, device="meta") for k, shape in TABLE[style].items()}
        assert {k: list(v.shape) for k, v in our_tensors(stored).items()} == wanted, style
