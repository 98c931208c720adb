"""The backbone against numbers computed by DINOv2's own code (tests/oracle/vectors/01_vit, 09_names)."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from quietvit.backbones import make_backbone
from quietvit.backbones.trunk import Trunk
from quietvit.contracts import Features
from quietvit.nn.block import Block
from quietvit.nn.drop_path import branch_drop, drop_rates, subset_size
from quietvit.nn.packing import pack, unpack
from quietvit.nn.position import resize_positions
from reference import VECTORS, Case, case

MODELS = (
    "p14_reg0_mlp_plain",
    "p14_reg4_mlp_hub",
    "p14_reg4_small_activations",
    "p16_reg0_chunked_nols_noqkvbias",
    "p16_reg4_swiglu_plain",
)


def build(info: dict[str, Any]) -> Trunk:
    """The model that a description's constructor arguments stand for, in our names."""
    given = dict(info["constructor"])
    offset = given["interpolate_offset"]
    return make_backbone(
        "vit",
        image_size=given["img_size"],
        patch_size=given["patch_size"],
        embed_dim=given["embed_dim"],
        depth=given["depth"],
        num_heads=given["num_heads"],
        mlp_ratio=given.get("mlp_ratio", 4.0),
        layer_scale=given["init_values"] or 0.0,
        qkv_bias=given.get("qkv_bias", True),
        num_registers=given.get("num_register_tokens", 0),
        ffn={"swiglufused": "swiglu"}.get(given.get("ffn_layer", ""), "mlp"),
        pos_interpolation="offset" if offset else "size",
        pos_offset=offset,
        pos_antialias=given["interpolate_antialias"],
    ).eval()


def load(c: Case) -> Trunk:
    model = build(c.info)
    chunked = c.info["constructor"].get("block_chunks", 0) > 0
    weights = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", k) if chunked else k: v for k, v in c.weights().items()}
    model.load_state_dict(weights, strict=True)
    return model


def check_features(c: Case, run: str, features: Features, prefix: str = "") -> None:
    c.check(run, f"{prefix}x_norm_clstoken", features.cls)
    if f"{prefix}x_norm_regtokens" in c.outputs(run):
        c.check(run, f"{prefix}x_norm_regtokens", features.registers)
    else:
        assert features.registers.shape[1] == 0
    c.check(run, f"{prefix}x_norm_patchtokens", features.patches.flatten(1, 2))


def check_layers(c: Case, run: str, model: Trunk, images: Tensor) -> None:
    settings = c.info["runs"][run]["settings"]
    layers = model.last_blocks(images, settings["n"], norm=settings["norm"])
    assert len(layers) == (settings["n"] if isinstance(settings["n"], int) else len(settings["n"]))
    for i, layer in enumerate(layers):
        patches = layer.patches.permute(0, 3, 1, 2) if settings["reshape"] else layer.patches.flatten(1, 2)
        c.check(run, f"layer{i}_patch", patches)
        if settings["return_class_token"]:
            c.check(run, f"layer{i}_cls", layer.cls)


@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", MODELS)
def test_forward(name: str, gradients: bool) -> None:
    c = case(f"01_vit/{name}")
    model = load(c)
    with torch.set_grad_enabled(gradients):
        for run in c.info["runs"]:
            inputs = c.inputs(run)
            if run.startswith("inter_"):
                check_layers(c, run, model, inputs["x"])
                continue
            check_features(c, run, model(inputs["x"], inputs.get("masks")))
            (tokens,) = model.tokens([inputs["x"]], [inputs.get("masks")])
            c.check(run, "x_prenorm", tokens)


def test_list_forward() -> None:
    c = case("01_vit/list_forward_reg4")
    model = load(c)
    inputs = c.inputs("list_forward")
    large, small = model([inputs["x_global"], inputs["x_local"]], [inputs["masks"], None])
    check_features(c, "list_forward", large, "global/")
    check_features(c, "list_forward", small, "local/")


@pytest.mark.parametrize("name", ["pos_interp_14", "pos_interp_37"])
def test_position_table(name: str) -> None:
    c = case(f"01_vit/{name}")
    side = c.info["constructor"]["native_grid"]
    for run, described in c.info["runs"].items():
        settings = described["settings"]
        offset = settings["interpolate_offset"]
        value = resize_positions(
            c.weights()["pos_embed"],
            (side, side),
            (settings["rows"], settings["cols"]),
            mode="offset" if offset else "size",
            offset=offset,
            antialias=settings["interpolate_antialias"],
        )
        c.check(run, "pos", value)


def stochastic_block() -> tuple[Case, Block]:
    c = case("01_vit/stochastic_depth")
    block = Block(32, 4, layer_scale=0.5, norm_eps=1e-5)  # the bare block was made with LayerNorm's own default
    block.load_state_dict(c.weights(), strict=True)
    return c, block


def test_stochastic_depth_on_a_subset() -> None:
    c, block = stochastic_block()
    inputs = c.inputs("subset")
    x, groups = pack([inputs["x"]])
    drops = [branch_drop(groups, [inputs[f"subset_{b}"]], 0.3, dtype=x.dtype) for b in ("attn", "ffn")]
    assert drops[0].scale == pytest.approx(c.info["runs"]["subset"]["settings"]["scale"])
    (y,) = unpack(block(x, groups, drops=tuple(drops)), groups)
    c.check("subset", "y", y)


def test_stochastic_depth_on_subsets_of_two_groups() -> None:
    c, block = stochastic_block()
    inputs = c.inputs("subset_list")
    x, groups = pack([inputs["x0"], inputs["x1"]])
    drops = [
        branch_drop(groups, [inputs[f"subset_{b}0"], inputs[f"subset_{b}1"]], 0.3, dtype=x.dtype)
        for b in ("attn", "ffn")
    ]
    assert [subset_size(batch, 0.3) for batch, _ in groups] == c.info["runs"]["subset_list"]["settings"]["kept"]
    y0, y1 = unpack(block(x, groups, drops=tuple(drops)), groups)
    c.check("subset_list", "y0", y0)
    c.check("subset_list", "y1", y1)


def test_stochastic_depth_sample_by_sample() -> None:
    c, block = stochastic_block()
    inputs = c.inputs("bernoulli")
    x, groups = pack([inputs["x"]])
    rate = c.info["runs"]["bernoulli"]["settings"]["drop_path"]
    drops = [branch_drop(groups, [inputs[f"keep_{b}"]], rate, dtype=x.dtype) for b in ("attn", "ffn")]
    (y,) = unpack(block(x, groups, drops=tuple(drops)), groups)
    c.check("bernoulli", "y", y)


def test_rate_of_each_block() -> None:
    for row in case("01_vit/drop_path_schedule").info["table"]:
        rates = drop_rates(row["drop_path_rate"], row["depth"], uniform=row["drop_path_uniform"])
        assert rates == pytest.approx(row["per_block"], abs=1e-12)


SIZE_OF = {"s": "small", "b": "base", "l": "large", "g": "giant"}
RELEASED = json.loads((VECTORS / "09_names" / "dinov2_state_dict_shapes.json").read_text())["models"]


@pytest.mark.parametrize("name", RELEASED)
def test_names_and_shapes_of_released_models(name: str) -> None:
    registers = 4 if name.endswith("_reg") else 0
    with torch.device("meta"):
        model = make_backbone("vit", size=SIZE_OF[name[len("dinov2_vit")]], image_size=518, num_registers=registers)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == RELEASED[name]["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == RELEASED[name]["parameters"]


# training.md 1.4: exact counts with a 37x37 position table, without and with 4 registers; millions at 16x16 with 4.
COUNTS = {
    "small": (22_056_576, 22_058_112, 21.63),
    "base": (86_580_480, 86_583_552, 85.73),
    "large": (304_368_640, 304_372_736, 303.23),
    "giant": (1_136_480_768, 1_136_486_912, 1134.78),
}


@pytest.mark.parametrize("size", COUNTS)
def test_parameter_counts(size: str) -> None:
    def count(**arguments: Any) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in make_backbone("vit", size=size, **arguments).parameters())

    plain, with_registers, millions = COUNTS[size]
    assert count(image_size=518, num_registers=0) == plain
    assert count(image_size=518, num_registers=4) == with_registers
    assert round(count(image_size=224, num_registers=4) / 1e6, 2) == millions
