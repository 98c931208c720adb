"""Every recipe is valid, says how to run it, and is where the installed package looks for it."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from quietvit.config.load import load_config, recipes

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(CONFIGS.rglob("*.yaml"))
PRETRAIN = sorted((CONFIGS / "pretrain").glob("*.yaml"))


def ids(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def test_there_are_recipes() -> None:
    assert PRETRAIN


def test_every_recipe_is_called_yaml() -> None:
    # Only *.yaml is packaged and listed.
    assert [ids(p) for p in CONFIGS.rglob("*") if p.suffix in {".yml", ".json", ".toml"}] == []


@pytest.mark.parametrize("path", RECIPES, ids=ids)
def test_a_recipe_is_a_mapping(path: Path) -> None:
    # OmegaConf also refuses doubled keys, of which plain YAML lets the last win in silence.
    assert isinstance(OmegaConf.create(path.read_text(encoding="utf-8")), DictConfig)


@pytest.mark.parametrize("path", RECIPES, ids=ids)
def test_a_recipe_opens_with_a_lab_note(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("#")


@pytest.mark.parametrize("path", PRETRAIN, ids=ids)
def test_a_pretraining_recipe_loads_by_path_and_by_name(path: Path) -> None:
    assert load_config(str(path)) == load_config(path.stem)


def test_the_package_finds_the_recipes_of_this_checkout() -> None:
    assert set(recipes()) == {p.stem for p in PRETRAIN}
    packaged = resources.files("quietvit.configs")
    for path in RECIPES:
        assert packaged.joinpath(*path.relative_to(CONFIGS).parts).read_bytes() == path.read_bytes()
