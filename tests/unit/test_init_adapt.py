"""A model fitted to other settings: resized patches and positions by definition, added registers, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quietvit.backbones import Trunk, make_backbone
from quietvit.config.adopt import adopt, backbone_arguments
from quietvit.config.load import ConfigError, from_mapping, load_config, to_yaml
from quietvit.config.schema import RunConfig
from quietvit.nn.position import resize_positions
from quietvit.weights.adapt import adapt, resize_patches

NANO: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32}
T2T: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32, "token_dim": 16}


def source_of(name: str = "vit", **arguments: Any) -> Trunk:
    torch.manual_seed(1)
    backbone = make_backbone(name, **{**(NANO if name == "vit" else T2T), **arguments}).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(std=0.3)  # trained weights are not those of a start
    return backbone


def changed(source: Trunk, name: str = "vit", **arguments: Any) -> tuple[Trunk, list[str]]:
    torch.manual_seed(2)
    backbone, changes = adapt(source, name, {**source.arguments, **arguments})
    return backbone.eval(), changes


def resized(patches: Tensor, side: int) -> Tensor:
    return F.interpolate(patches, (side, side), mode="bicubic", antialias=True)


@pytest.mark.parametrize(("p", "q"), [(8, 16), (8, 9), (14, 16), (4, 4)])
def test_an_upsampled_patch_keeps_its_token(p: int, q: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 3, p, p, generator=generator, dtype=torch.float64)
    patches = torch.randn(7, 3, p, p, generator=generator, dtype=torch.float64)
    tokens = torch.einsum("bchw,dchw->bd", patches, weight)
    again = torch.einsum("bchw,dchw->bd", resized(patches, q), resize_patches(weight, q))
    torch.testing.assert_close(again, tokens, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("p", "q"), [(8, 4), (16, 14), (16, 5)])
def test_a_smaller_patch_has_the_weights_of_least_squares(p: int, q: int) -> None:
    """E (w . x - v . B x)^2 over white noise is |w - B' v|^2: numpy's least squares on the whole matrix B."""
    weight = torch.randn(2, 1, p, p, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = torch.eye(p * p, dtype=torch.float64).view(p * p, 1, p, p)
    matrix = resized(unit, q).flatten(1).T.numpy()  # [q q, p p]
    for row, made in zip(weight, resize_patches(weight, q), strict=True):
        best = np.linalg.lstsq(matrix.T, row.flatten().numpy(), rcond=None)[0]
        np.testing.assert_allclose(made.flatten().numpy(), best, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("patch", [4, 16])
def test_another_patch_side_in_a_whole_model(patch: int) -> None:
    source = source_of()
    backbone, changes = changed(source, patch_size=patch, image_size=4 * patch)  # the same grid
    assert changes == [f"patch 8 -> {patch} px (pseudo-inverse resize)"]
    assert torch.equal(backbone.pos_embed, source.pos_embed)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    grid = images.unflatten(3, (4, 8)).unflatten(2, (4, 8)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    larger = resized(grid, patch).view(2, 4, 4, 3, patch, patch).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    close = torch.allclose(backbone(larger).cls, source(images).cls, atol=1e-4)
    assert close == (patch > 8)


@pytest.mark.parametrize("mode", ["size", "offset"])
def test_positions_go_through_the_models_own_resampling(mode: str) -> None:
    source = source_of(pos_interpolation=mode, pos_antialias=mode == "size")
    backbone, changes = changed(source, image_size=48)
    assert changes == ["position grid 4 x 4 -> 6 x 6 (the model's own bicubic resampling)"]
    table = resize_positions(source.pos_embed, (4, 4), (6, 6), mode=mode, antialias=mode == "size")
    assert torch.equal(backbone.pos_embed, table)
    images = torch.randn(2, 3, 48, 48)
    assert torch.equal(backbone(images).patches, source(images).patches)


def test_nothing_changed_is_bit_equal() -> None:
    source = source_of(num_registers=3)
    backbone, changes = changed(source)
    assert changes == []
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in backbone.state_dict().items())


@pytest.mark.parametrize(("had", "has"), [(0, 4), (2, 5)])
def test_added_registers_start_as_from_scratch_and_old_ones_stay(had: int, has: int) -> None:
    source = source_of(num_registers=had)
    backbone, changes = changed(source, num_registers=has)
    assert changes == [f"registers {had} -> {has}"]
    new = backbone.register_tokens[0, had:]
    assert 0 < float(new.detach().abs().max()) < 1e-5
    if had:
        assert torch.equal(backbone.register_tokens[:, :had], source.register_tokens)
    others = {k: v for k, v in backbone.state_dict().items() if k != "register_tokens"}
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in others.items())


def test_a_supervised_head_is_left_out() -> None:
    source = source_of("t2t_vit", num_classes=5)
    backbone, changes = changed(source, "t2t_vit", num_classes=0)
    assert changes == ["supervised head left out"]
    assert not any(k.startswith("head.") for k in backbone.state_dict())


def test_a_tokens_to_token_model_gets_registers_and_another_grid() -> None:
    source = source_of("t2t_vit", positions="sinusoid", num_registers=0)
    backbone, changes = changed(source, "t2t_vit", num_registers=2, image_size=48)
    assert changes == ["registers 0 -> 2", "position grid 4 x 4 -> 6 x 6 (computed)"]
    assert backbone.pos_embed.shape == (1, 37, 24)
    assert backbone(torch.zeros(1, 3, 48, 48)).patches.shape == (1, 6, 6, 24)


def test_other_differences_are_refused_by_name() -> None:
    source = source_of(num_registers=2)
    with pytest.raises(
        ValueError, match=r"another architecture .*register_tokens \(1, 2, 24\) instead of \(1, 1, 24\)"
    ):
        changed(source, num_registers=1)
    with pytest.raises(ValueError, match=r"unexpected: register_tokens"):
        changed(source, num_registers=0)


def adopted(backbone: Trunk, *, mean: tuple[float, float, float] = (0.5, 0.5, 0.5), **sections: Any) -> RunConfig:
    name = "t2t_vit" if "token_dim" in backbone.arguments else "vit"
    opened = {
        "init": {"from": "model.pth", **sections.pop("init", {})},
        "data": {"mean": None, "std": None, **sections.pop("data", {})},
        "model": {
            **dict.fromkeys(("backbone", "size", "patch_size", "num_registers", "layer_scale", "pos_interpolation")),
            "pos_antialias": None,
            **sections.pop("model", {}),
        },
    }
    config = from_mapping(RunConfig, opened, "")
    return adopt(
        config, name=name, arguments=backbone.arguments, mean=mean, std=(0.2, 0.2, 0.2), sizes=type(backbone).SIZES
    )


def test_what_is_left_open_is_the_models() -> None:
    source = source_of(num_registers=3, layer_scale=0.5, qkv_bias=False, pos_interpolation="offset", drop_path=0.1)
    config = adopted(source, model={"drop_path": 0.25, "attention": "sdpa"})
    model = config.model
    assert (model.backbone, model.size, model.embed_dim, model.depth) == ("vit", None, 24, 2)
    assert (model.patch_size, model.image_size, model.num_registers) == (8, 32, 3)
    assert (model.pos_interpolation, model.layer_scale) == ("offset", 0.5)
    assert (config.data.mean, config.data.std) == ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    arguments = backbone_arguments(model, source.arguments)
    differs = {k: v for k, v in arguments.items() if v != source.arguments[k]}
    assert differs == {"drop_path": 0.25, "attention": "sdpa"}


def test_sizes_are_recognised_by_name() -> None:
    assert adopted(make_backbone("vit", size="nano", patch_size=8, image_size=32)).model.size == "nano"
    with pytest.raises(ConfigError, match=r"model\.size=micro has embed_dim=128, there it is 96; .*depth=6, there"):
        adopted(make_backbone("vit", size="nano", patch_size=8, image_size=32), model={"size": "micro"})


def test_what_may_differ() -> None:
    model = adopted(source_of(), model={"patch_size": 4, "num_registers": 6}).model
    assert (model.patch_size, model.image_size, model.num_registers) == (4, 32, 6)
    assert adopted(source_of(), model={"patch_size": 5}).model.image_size == 30
    assert adopted(source_of(), model={"image_size": 64}).model.image_size == 64


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"embed_dim": 48}, r"init\.from=model\.pth is another model .*: model\.embed_dim=48, there it is 24"),
        ({"depth": 3, "num_heads": 3}, r"model\.depth=3, there it is 2; model\.num_heads=3, there it is 2"),
        ({"ffn": "swiglu"}, r"model\.ffn=swiglu, there it is mlp"),
        ({"layer_scale": 0.0}, r"model\.layer_scale=0\.0, there it is 1e-05"),
        ({"pos_interpolation": "offset"}, r"model\.pos_interpolation=offset, there it is size"),
        ({"backbone": "t2t_vit"}, r"model\.backbone=t2t_vit, but init\.from=model\.pth is a vit"),
        ({"num_registers": 1}, r"model\.num_registers=1, but model\.pth has 2 registers"),
        ({"num_registers": 0}, r"model\.num_registers=0, but model\.pth has 2 registers"),
        ({"size": "smal"}, r"model\.size=smal: a vit has nano, micro"),
        ({"stem": {"token_dim": 32}}, r"model\.stem\.token_dim=32, there is none"),
        ({"patch_size": 0}, r"model\.patch_size=0: at least 1 pixel"),
    ],
)
def test_contradictions_are_named(model: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        adopted(source_of(num_registers=2), model=model)


def test_a_tokens_to_token_stem_keeps_its_patch() -> None:
    with pytest.raises(ConfigError, match=r"makes tokens of 8 pixels, and such a stem cannot be resized"):
        adopted(source_of("t2t_vit"), model={"patch_size": 16})


def test_the_normalisation_is_the_models() -> None:
    assert adopted(source_of(), data={"mean": [0.5, 0.5, 0.5]}).data.std == (0.2, 0.2, 0.2)
    with pytest.raises(ConfigError, match=r"leave both out, or write data\.mean=\[0\.5,0\.5,0\.5\] data\.std=\[0\.2,"):
        adopted(source_of(), data={"mean": [0.485, 0.456, 0.406]})


def test_open_settings_survive_the_record_of_a_run(tmp_path: Any) -> None:
    config = load_config("quickstart", ["init.from=here", "init.freeze_steps=3"])
    assert (config.init.from_, config.model.backbone, config.model.size, config.data.mean) == (
        "here",
        None,
        "nano",
        None,
    )
    written = tmp_path / "config.yaml"
    written.write_text(to_yaml(config))
    assert "from: here" in written.read_text()
    assert load_config(str(written)) == config
