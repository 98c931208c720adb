"""timm's names against the stored ones (vectors/09_names): what its converter made of DINOv2's weights."""

from __future__ import annotations

import json
from typing import Any

import torch

from quietvit.backbones import make_backbone
from quietvit.backbones.trunk import Trunk
from quietvit.weights.export.to_timm import architecture, timm_tensors
from quietvit.weights.family import IMAGENET, Hints
from quietvit.weights.native import load_strictly
from quietvit.weights.timm import convert, recognises
from reference import VECTORS, Case, case

SHAPES: dict[str, list[int]] = json.loads((VECTORS / "09_names" / "other_library_shapes.json").read_text())["timm"]


def from_timm(c: Case) -> Trunk:
    weights = c.weights("weights_timm")
    assert recognises(weights.keys())
    assert not recognises(c.weights().keys())  # DINOv2's own
    found = convert(weights, Hints(num_heads=c.info["constructor"]["num_heads"]))
    assert found.normalisation == IMAGENET
    backbone = make_backbone(found.backbone, **found.arguments)
    load_strictly(backbone, found.tensors, what="vector")
    return backbone.eval()


def from_dinov2(c: Case) -> Trunk:
    given: dict[str, Any] = c.info["constructor"]
    backbone = make_backbone(
        "vit",
        image_size=given["img_size"],
        patch_size=given["patch_size"],
        embed_dim=given["embed_dim"],
        depth=given["depth"],
        num_heads=given["num_heads"],
        layer_scale=given["init_values"],
        num_registers=given["num_register_tokens"],
    )
    load_strictly(backbone, c.weights(), what="vector")
    return backbone.eval()


def test_timms_weights_give_the_stored_tokens() -> None:
    c = case("09_names/timm_reg4")
    backbone = from_timm(c)
    for run in c.info["runs"]:
        with torch.no_grad():
            f = backbone(c.inputs(run)["x"])
        c.check(run, "tokens", torch.cat((f.cls[:, None], f.registers, f.patches.flatten(1, 2)), dim=1))


def test_the_export_is_what_timms_converter_makes() -> None:
    c = case("09_names/timm_reg4")
    stored, ours = c.weights("weights_timm"), timm_tensors(from_dinov2(c))
    assert set(ours) == set(stored)
    for name, value in stored.items():
        assert torch.equal(ours[name], value), name


def test_names_and_shapes_of_the_small_model_with_registers() -> None:
    with torch.device("meta"):
        backbone = make_backbone("vit", size="small", image_size=518)
        found = convert({k: torch.empty(shape) for k, shape in SHAPES.items()}, Hints())
        load_strictly(make_backbone("vit", **found.arguments), found.tensors, what="stored names")
    assert {k: list(v.shape) for k, v in timm_tensors(backbone).items()} == SHAPES
    assert architecture(backbone)[0] == "vit_small_patch14_reg4_dinov2"
    wanted = {"embed_dim": 384, "depth": 12, "num_heads": 6, "image_size": 518, "num_registers": 4, "mlp_ratio": 4.0}
    assert {k: found.arguments[k] for k in wanted} == wanted
