"""Imports point down the house, and asking the command line for help does not cost seconds of importing torch."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=120)


def test_the_contracts_of_imports_hold() -> None:
    entry = "from importlinter.cli import lint_imports; import sys; sys.exit(lint_imports(no_cache=True))"
    result = run(entry)
    contracts = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"Contracts: {len(contracts)} kept, 0 broken" in result.stdout


@pytest.mark.parametrize(
    "module", ["quietvit_launch.cli", "quietvit.config.load", "quietvit.config.resolve", "quietvit.schedules"]
)
def test_a_light_module_leaves_torch_alone(module: str) -> None:
    result = run(f"import sys, {module}; print('torch' in sys.modules)")
    assert (result.stdout.strip(), result.stderr) == ("False", "")


@pytest.mark.parametrize("module", ["quietvit", "quietvit_eval", "quietvit_launch"])
def test_importing_a_package_is_cheap(module: str) -> None:
    # `import quietvit` runs whenever any submodule is imported, the light ones too.
    result = run(f"import sys, {module}; print('torch' in sys.modules)")
    assert (result.stdout.strip(), result.stderr) == ("False", "")
