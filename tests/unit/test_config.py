"""A recipe becomes a RunConfig, or an error that says what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from quietvit.config import resolve
from quietvit.config.load import (
    ConfigError,
    config_hash,
    differences,
    flatten,
    from_mapping,
    load_config,
    recipes,
    to_yaml,
)
from quietvit.config.schema import RunConfig

ROOT = Path(__file__).parents[2]


def make(**sections: object) -> RunConfig:
    return from_mapping(RunConfig, {"train": {"steps": 10}, **sections}, "")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"train": {"stepz": 5}}, "Did you mean 'train.steps'"),
        ({"model": {"batch_size": 4}}, "Did you mean 'train.batch_size'"),
        ({"modle": {}}, "Did you mean 'model'"),
        ({"train": {"steps": "many"}}, "'train.steps' takes"),
        ({"train": {"steps": True}}, "'train.steps' takes"),
        ({"train": 5}, "is a section"),
        ({"crops": {"global_scale": [1]}}, "takes 2 values"),
        ({"optim": {"lr": "fast"}}, "'optim.lr' takes"),
    ],
)
def test_wrong_settings_are_named_with_a_way_out(values: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        from_mapping(RunConfig, values, "")


def test_values_are_converted_as_people_write_them() -> None:
    config = make(optim={"lr": "1e-3", "clip": 3}, crops={"global_scale": [0.4, 1]}, model={"embed_dim": None})
    assert config.optim.lr == 1e-3
    assert config.optim.clip == 3.0
    assert isinstance(config.optim.clip, float)
    assert config.crops.global_scale == (0.4, 1.0)


def test_a_name_may_be_a_number(tmp_path: Path) -> None:
    """YAML reads them as numbers: T2T-ViT has sizes 7 to 24, and folders are named after years."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: {backbone: t2t_vit, size: 14}\ntrain: {steps: 5}\ndata: {path: 2024}\n")
    for config in (load_config(str(recipe)), load_config("own_images", ["model.size=14", "data.path=2024"])):
        assert (config.model.size, config.data.path) == ("14", "2024")
        again = tmp_path / "config.yaml"
        again.write_text(to_yaml(config))
        assert load_config(str(again)) == config
    for wrong in (True, 1.5, [14]):
        with pytest.raises(ConfigError, match=r"'model\.size' takes a value of type str"):
            make(model={"size": wrong})
    assert make(train={"steps": 5, "batch_size": 64}).train.batch_size == 64  # a number where one is meant


@pytest.mark.parametrize("name", list(recipes()))
def test_every_recipe_loads_checks_and_round_trips(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    resolve.check(config)
    written = tmp_path / "config.yaml"
    written.write_text(to_yaml(config))
    again = load_config(str(written))
    assert again == config
    assert config_hash(again) == config_hash(config)


def test_overrides_win_and_change_the_hash() -> None:
    plain = load_config("quickstart")
    changed = load_config("quickstart", ["model.num_registers=2", "optim.lr=5e-4"])
    assert (changed.model.num_registers, changed.optim.lr) == (2, 5e-4)
    assert config_hash(plain) != config_hash(changed)
    assert differences(plain, changed)[0].startswith("model.num_registers: 4 -> 2")


def test_settings_that_change_nothing_computed_may_differ_on_resume() -> None:
    assert (
        differences(load_config("quickstart"), load_config("quickstart", ["data.workers=3", "checkpoint.keep=9"])) == []
    )


@pytest.mark.parametrize(
    ("recipe", "override", "said"),
    [
        ("quickstrat", "train.steps=5", "Did you mean 'quickstart'"),
        ("missing.yaml", "train.steps=5", "no recipe file"),
        ("quickstart", "train.steps", "write it as key=value"),
        ("quickstart", "train.steps=[", "valid YAML|does not parse"),
    ],
)
def test_wrong_command_lines(recipe: str, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(recipe, [override])


@pytest.mark.parametrize(("side", "good"), [(100, "96 or 112"), (10, "16"), (225, "224 or 240")])
def test_crops_that_are_no_multiple_of_the_patch(side: int, good: str) -> None:
    config = make(crops={"global_size": side}, model={"patch_size": 16})
    with pytest.raises(ConfigError, match=f"crops.global_size={side} .*use {good}"):
        resolve.check(config)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"train": {"steps": 5, "passes": 1.0}}, "one of the two"),
        ({"train": {"steps": 5, "batch_size": 10, "accumulate": 3}}, "multiple of the number of micro-batches"),
        ({"train": {"steps": 5, "batch_size": "big"}}, "a number, or auto"),
        ({"train": {"steps": 5, "precision": "fp16"}}, "choose auto, fp32, bf16"),
        ({"objective": {"centering": "centring"}}, "choose sinkhorn_knopp"),
        ({"optim": {"warmup": 10.0}}, "between 0 and 1"),
        ({"checkpoint": {"every": 0}}, "at least 1"),
    ],
)
def test_values_that_no_run_can_have(section: dict[str, dict[str, object]], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve.check(make(**section))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"backbone": "t2t_vit", "stem": {"attention": "perfomer"}}, "stem.attention='perfomer': choose performer, "),
        ({"backbone": "t2t_vit", "patch_size": 14}, r"model.patch_size=14: .* 4, 8, 16 \(16 is T2T-ViT's own\)"),
        ({"stem": {"token_dim": 32}}, "model.stem.token_dim is a setting of t2t_vit.*add model.backbone=t2t_vit"),
        ({"stem": {"recompute": True}}, "model.stem.recompute is a setting of t2t_vit"),
        ({"backbone": "t2t_vit", "image_size": 50}, r"model.image_size=50 .*\(16 px\): use 48 or 64"),
    ],
)
def test_stems_that_cannot_be(model: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve.check(make(model=model))


def test_misspelt_stem_settings_are_named() -> None:
    with pytest.raises(ConfigError, match=r"'model.stem.token_dims'. Did you mean 'model.stem.token_dim'"):
        make(model={"stem": {"token_dims": 32}})
    with pytest.raises(ConfigError, match=r"'model.stem' is a section"):
        make(model={"stem": "performer"})
    with pytest.raises(ConfigError, match=r"Did you mean 'model.stem.token_dim'"):
        make(model={"token_dim": 32})


@pytest.mark.parametrize(("crops", "good"), [({"local_size": 98}, "96 or 112"), ({"global_size": 518}, "512 or 528")])
def test_crops_of_dinov2_that_a_tokens_to_token_stem_does_not_cut_evenly(crops: dict[str, int], good: str) -> None:
    with pytest.raises(ConfigError, match=f"use {good}"):
        resolve.check(make(model={"backbone": "t2t_vit", "size": "14"}, crops=crops))


def test_plan_in_absolute_numbers() -> None:
    config = from_mapping(RunConfig, {"train": {"passes": 2.5}, "optim": {"warmup": 0.1}}, "")
    plan = resolve.plan(config, num_images=1000, batch_size=100, stride=16)
    assert (plan.steps, plan.passes, plan.lr_warmup_steps, plan.grid) == (25, 2.5, 2, (14, 14))
    assert plan.lr == pytest.approx(0.004 * (100 / 1024) ** 0.5)


def test_lr_scaling_reaches_the_published_peak() -> None:
    # DINOv2's short recipe: base 0.004 at a batch of 2048 gives 5.66e-3.
    assert resolve.scaled_lr(0.004, 2048, "sqrt_wrt_1024") == pytest.approx(5.6569e-3, rel=1e-4)
    with pytest.raises(ConfigError, match="choose sqrt_wrt_1024"):
        resolve.scaled_lr(0.004, 2048, "sqrt")


def test_fewer_images_than_a_batch() -> None:
    with pytest.raises(ConfigError, match=r"50 images, fewer than one batch of 64: set train.batch_size=32"):
        resolve.plan(make(), num_images=50, batch_size=64, stride=16)


def test_every_field_is_read_by_some_code() -> None:
    code = "\n".join(
        p.read_text() for p in (ROOT / "ssl" / "quietvit").rglob("*.py") if p.name not in ("schema.py", "load.py")
    )
    for path in flatten(RunConfig()):
        assert f".{path.rsplit('.', 1)[-1]}" in code, f"nothing reads {path}"


def test_null_takes_away_the_options_of_a_recipe() -> None:
    assert load_config("quickstart").data.options
    assert load_config("quickstart", ["data.source=folder", "data.options=null"]).data.options == {}
    assert load_config("quickstart", ["data.options={}"]).data.options == load_config("quickstart").data.options


@pytest.mark.parametrize("text", ["[1, 2]", "3", "- a: 1"])
def test_a_recipe_that_is_no_mapping(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"{text}\n")
    with pytest.raises(ConfigError, match="must be a mapping of sections"):
        load_config(str(tmp_path / "recipe.yaml"))
