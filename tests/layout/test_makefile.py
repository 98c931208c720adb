"""The Makefile tells a newcomer what there is, and what to install when Python is missing."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    # The outer make hands its flags down in the environment; these calls stand alone.
    env = {"PATH": "/usr/bin:/bin"}
    return subprocess.run(["make", *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout without .venv, at a path with a space in it."""
    folder = tmp_path / "my checkout"
    folder.mkdir()
    for name in ("Makefile", "setup.py", "constraints.txt", "pyproject.toml"):
        shutil.copy(REPO / name, folder)
    return folder


def stub(folder: Path, body: str) -> Path:
    """An executable that stands in for a Python: it gets `-c CODE` as $1 and $2."""
    path = folder / "python-stub"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_make_alone_lists_every_target(checkout: Path) -> None:
    targets = re.search(r"^\.PHONY: (.*)$", (REPO / "Makefile").read_text(), re.MULTILINE)
    assert targets is not None
    result = make(cwd=checkout)
    assert result.returncode == 0
    listed = re.findall(r"^  ([a-z-]+) +\S", result.stdout, re.MULTILINE)
    assert listed == targets[1].split()


def test_without_a_python_it_says_what_to_install(checkout: Path) -> None:
    # A version manager's stub is found on the path and then does not run.
    broken = stub(checkout.parent, "echo 'command not found' >&2; exit 127")
    result = make("test", f"PYTHONS=no-such-python {broken}", cwd=checkout)
    assert result.returncode != 0
    assert "No Python >= 3.11" in result.stderr
    assert "apt-get install python3 python3-venv" in result.stderr
    assert not (checkout / ".venv").exists()


def test_without_the_venv_module_it_names_the_package(checkout: Path) -> None:
    body = 'case "$2" in *ensurepip*) exit 1;; *print*) echo python3.12;; esac'
    result = make("demo", f"PYTHONS={stub(checkout.parent, body)}", cwd=checkout)
    assert result.returncode != 0
    assert "apt-get install python3.12-venv" in result.stderr
    assert not (checkout / ".venv").exists()


def test_a_failed_install_is_tried_again(checkout: Path) -> None:
    # This "Python" makes a .venv whose pip fails: the second call must not take it for a finished one.
    copy = f'mkdir -p .venv/bin && cp "{checkout.parent}/python-stub" .venv/bin/python'
    body = f'[ "$2" = venv ] && {copy}; [ "$3" != install ]'
    python = stub(checkout.parent, body)
    for _ in range(2):
        result = make("setup", f"PYTHONS={python}", cwd=checkout)
        assert result.returncode != 0
        assert not (checkout / ".venv/.installed").exists()
