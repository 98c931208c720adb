"""`pip install .` works away from the checkout: the wheel is whole, its recipes are found, its command starts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
CODE = {"ssl": "quietvit", "eval": "quietvit_eval", "launch": "quietvit_launch"}
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md")
JUNK = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info", ".*")  # also what tools leave, as .mypy_cache

# Run with -I -S: no checkout, no .pth file and no editable finder on the path, only what is put there.
PROBE = """
import json, sys
sys.path[:0] = json.loads(sys.argv.pop(1))
import ssl, quietvit, quietvit_eval, quietvit_launch
from importlib import metadata, resources
from quietvit.config.load import load_config, recipes
for name in recipes():
    load_config(name)
configs = resources.files("quietvit.configs")
folders = [f for f in configs.iterdir() if f.is_dir()]
print(json.dumps({
    "modules": [m.__file__ for m in (quietvit, quietvit_eval, quietvit_launch)],
    "ssl": ssl.__file__,
    "recipes": sorted(f"{d.name}/{f.name}" for d in folders for f in d.iterdir() if f.name.endswith(".yaml")),
    "license": metadata.metadata("quietvit")["License-Expression"],
}), flush=True)
(script,) = metadata.entry_points(group="console_scripts", name="quietvit")
sys.argv[1:] = ["--help"]
sys.exit(script.load()())
"""


def call(*command: str, cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def shipped(folder: Path, prefix: str, pattern: str = "*") -> set[str]:
    """Paths in the wheel that the files of `folder` should have."""
    files = (p.relative_to(folder) for p in folder.rglob(pattern) if p.is_file() and p.suffix != ".pyc")
    return {f"{prefix}/{p.as_posix()}" for p in files if not any(part.startswith(".") for part in p.parts)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # From a copy: setuptools would leave build/ in the checkout, and put stale files of an older one into the wheel.
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in FILES:
        shutil.copy(REPO / name, source)
    for folder in (*CODE, "configs"):
        shutil.copytree(REPO / folder, source / folder, ignore=JUNK)
    build = ("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(dist), str(source))
    call(sys.executable, "-m", "pip", *build, cwd=dist)
    (path,) = dist.glob("quietvit-*-py3-none-any.whl")
    return path


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = shipped(REPO / "configs", "quietvit/configs", "*.yaml") | {"quietvit/configs/__init__.py"}
    for root, package in CODE.items():
        wanted |= shipped(REPO / root / package, package)
    assert {name for name in inside if ".dist-info/" not in name} == wanted
    assert any(name.endswith("licenses/LICENSE") for name in inside)


def test_the_installed_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = ("install", "--no-deps", "--no-index", "--no-compile", "--target", str(site), str(wheel))
    call(sys.executable, "-m", "pip", *install, cwd=elsewhere)
    libraries = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    found, _, help_text = call(
        sys.executable, "-I", "-S", "-c", PROBE, json.dumps([str(site), *libraries]), cwd=elsewhere
    ).partition("\n")
    facts = json.loads(found)
    assert all(Path(f).is_relative_to(site) for f in facts["modules"])
    assert not Path(facts["ssl"]).is_relative_to(site)
    assert facts["recipes"] == sorted(
        p.relative_to(REPO / "configs").as_posix() for p in (REPO / "configs").rglob("*.yaml")
    )
    assert facts["license"] == "Apache-2.0"
    assert "usage" in help_text.lower()
