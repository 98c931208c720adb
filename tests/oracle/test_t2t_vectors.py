"""The tokens-to-token stem and T2T-ViT against numbers computed by their authors' own code (vectors/07_t2t)."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from quietvit.backbones import make_backbone
from quietvit.backbones.t2t_vit import OFFICIAL
from quietvit.backbones.trunk import Trunk
from quietvit.nn import tokens_to_token
from quietvit.nn.position import sinusoid_positions
from quietvit.nn.tokens_to_token import SOFT_SPLITS, TokensToToken
from reference import VECTORS, Case, case

FOLDER = VECTORS / "07_t2t"
STEMS = (
    "module_performer",
    "module_performer_224",
    "module_performer_epsilon",
    "module_transformer",
    "module_transformer_224",
)
MODELS = (
    "t2t_vit_transformer",
    "t2t_vit_performer",
    "t2t_vit_performer_224",
    "t2t_vit_se",
    "t2t_vit_ghost",
    "t2t_vit_dense",
)
STEM_ATTENTION = {"performer": "performer_official", "transformer": "transformer"}
VARIANT: dict[str, dict[str, Any]] = {
    "t2t_vit_se": {"attention_layer": "se"},
    "t2t_vit_ghost": {"attention_layer": "ghost", "ffn": "ghost"},
}


def images(c: Case, run: str) -> Tensor:
    """The images of a run, or those of run "forward" scaled: they are stored as bytes."""
    stored = c.inputs(run).get("x_bytes", c.tensors.get("forward/in/x_bytes"))
    assert stored is not None
    return (stored.float() - 128) / 64 * float(c.info["runs"][run]["settings"].get("x_scale", 1.0))


def load_stem(c: Case) -> TokensToToken:
    given = c.info["constructor"]
    stem = TokensToToken(
        given["embed_dim"],
        splits=SOFT_SPLITS[16],
        token_dim=given["token_dim"],
        attention=STEM_ATTENTION[given["tokens_type"]],
        norm_eps=OFFICIAL["norm_eps"],
    )
    stem.load_state_dict({k: v.float() for k, v in c.weights().items()}, strict=True)
    return stem.eval()


def load_model(name: str) -> tuple[Case, Trunk]:
    c = case(f"07_t2t/{name}")
    given = c.info["constructor"]
    arguments = {**OFFICIAL, **VARIANT.get(name, {})}
    if "block_config" in given:  # dense groups, with a transition between two of them
        arguments["dense_groups"] = "-".join(map(str, given["block_config"]))
        arguments["growth"] = given["growth_rate"]
        depth = sum(given["block_config"]) + len(given["block_config"]) - 1
    else:
        depth = given["depth"]
    arguments["qkv_bias"] = given.get("qkv_bias", arguments["qkv_bias"])
    model = make_backbone(
        "t2t_vit",
        **arguments,
        depth=depth,
        image_size=given["img_size"],
        embed_dim=given["embed_dim"],
        num_heads=given["num_heads"],
        mlp_ratio=given["mlp_ratio"],
        token_dim=given.get("token_dim", 64),
        stem_attention=STEM_ATTENTION[given["tokens_type"]],
        num_classes=given["num_classes"],
    )
    weights = {k: v.float() for k, v in c.weights().items()}
    model.load_state_dict({**weights, "mask_token": model.mask_token.detach()}, strict=True)
    return c, model.eval()


def stem_outputs(stem: TokensToToken, x: Tensor) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    first = stem.get_submodule("attention1")
    hook = first.register_forward_hook(lambda _, __, out: outputs.update(after_attention1=out))
    outputs["tokens"] = stem(x)[0]
    hook.remove()
    return outputs


@pytest.mark.parametrize("name", STEMS)
def test_stem(name: str) -> None:
    c = case(f"07_t2t/{name}")
    stem = load_stem(c)
    for run, described in c.info["runs"].items():
        outputs = stem_outputs(stem, images(c, run))
        for output in described["outputs"]:
            c.check(run, output, outputs[output])


def test_epsilon_is_part_of_the_released_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without 1e-8 in the denominator the tokens move by as much as the original's were seen to."""
    c = case("07_t2t/module_performer_epsilon")
    stem = load_stem(c)
    x = images(c, "size_32")
    tokens = stem(x)[0]
    monkeypatch.setattr(tokens_to_token, "OFFICIAL_EPSILON", 0.0)
    moved = (stem(x)[0] - tokens).abs().max().item()
    assert moved == pytest.approx(c.info["sensitivity"]["max_change_without_epsilon"], rel=5e-3)


@pytest.mark.parametrize("name", MODELS)
def test_whole_model(name: str) -> None:
    c, model = load_model(name)
    for run in ("forward", "forward_faint_image"):
        features = model(images(c, run))
        values = {"features": features.cls, "logits": model.logits(features)}
        for output in c.info["runs"][run]["outputs"]:
            c.check(run, output, values[output])


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_the_whole_model(name: str) -> None:
    c, model = load_model(name)
    logits = model.logits(model(images(c, "gradients")))
    (logits * c.inputs("gradients")["probe"]).sum().backward()
    parameters = dict(model.named_parameters())
    for output in c.info["runs"]["gradients"]["outputs"]:
        gradient = parameters[output.removeprefix("grad/")].grad
        assert gradient is not None, output
        c.check("gradients", output, gradient)


def test_sinusoid_table() -> None:
    c = case("07_t2t/sinusoid")
    for run, described in c.info["runs"].items():
        settings = described["settings"]
        c.check(run, "table", sinusoid_positions(settings["n_position"], settings["d_hid"]))


def official(name: str) -> Trunk:
    """A released model by its own name, without values."""
    size = name.removeprefix("t2t_vit_").replace("_", "-")
    stem = "transformer" if size.startswith("t-") else "performer_official"
    with torch.device("meta"):
        return make_backbone("t2t_vit", size=size, **OFFICIAL, stem_attention=stem, num_classes=1000)


COUNTS = {row["name"]: row for row in json.loads((FOLDER / "parameter_counts.json").read_text())["rows"]}
SHAPES = json.loads((FOLDER / "state_dict_shapes.json").read_text())["models"]


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name: str) -> None:
    """Its fixed tables are frozen parameters in the original and buffers here; the mask token is ours."""
    row = COUNTS[name]
    model = official(name)
    state = model.state_dict()
    ours = {"mask_token"}
    frozen = {k: v.numel() for k, v in model.named_buffers() if k in state}
    assert sorted(frozen) == sorted(row["frozen_names"])
    assert sum(frozen.values()) == row["frozen"]
    assert sum(v.numel() for k, v in model.named_parameters() if k not in ours) == row["trainable"]
    assert sum(v.numel() for k, v in state.items() if k not in ours) == row["parameters"]
    assert sum(v.numel() for k, v in state.items() if k.startswith("head.")) == row["head_parameters"]
    assert len(state.keys() - ours) == row["tensors_in_state_dict"]
    assert model.num_blocks == row["blocks"]
    assert model.options.embed_dim == row["embed_dim"]


@pytest.mark.parametrize("name", SHAPES)
def test_names_and_shapes_of_released_models(name: str) -> None:
    state = {k: list(v.shape) for k, v in official(name).state_dict().items()}
    assert state.pop("mask_token") == [1, COUNTS[name]["embed_dim"]]
    assert state == SHAPES[name]


def test_every_vector_has_a_test() -> None:
    tables = {"sinusoid", "parameter_counts", "state_dict_shapes"}
    assert {p.stem for p in FOLDER.glob("*.json")} == {*STEMS, *MODELS, *tables}
