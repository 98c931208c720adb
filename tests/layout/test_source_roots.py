"""Each code folder at the top is a source root: no __init__.py in it, and exactly one import package."""

from __future__ import annotations

import ssl
import sysconfig
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
ROOTS = {"ssl": "quietvit", "eval": "quietvit_eval", "launch": "quietvit_launch"}


@pytest.mark.parametrize("root", ROOTS)
def test_a_root_is_not_itself_a_package(root: str) -> None:
    # ssl/__init__.py would replace Python's own ssl for every process started in the checkout.
    assert not list((REPO / root).glob("*.py"))


@pytest.mark.parametrize(("root", "package"), ROOTS.items())
def test_a_root_holds_one_import_package(root: str, package: str) -> None:
    folders = {p.name for p in (REPO / root).iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert {name for name in folders if not name.endswith(".egg-info")} == {package}
    assert (REPO / root / package / "py.typed").is_file()


@pytest.mark.parametrize(("root", "package"), ROOTS.items())
def test_every_folder_of_code_is_a_package(root: str, package: str) -> None:
    # find_packages passes over a folder without __init__.py, and the wheel would lack it.
    folders = {p.parent for p in (REPO / root / package).rglob("*.py")}
    assert folders
    assert [str(f.relative_to(REPO)) for f in sorted(folders) if not (f / "__init__.py").is_file()] == []


def test_ssl_is_still_pythons_own() -> None:
    assert ssl.__file__ is not None
    assert Path(ssl.__file__).is_relative_to(sysconfig.get_path("stdlib"))
    assert hasattr(ssl, "create_default_context")
