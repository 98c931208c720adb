"""The snapshot is the code as it is, complete enough to run from, and not that of a minute later."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quietvit_launch import snapshot
from quietvit_launch.snapshot import code_files, snapshot_path, take_snapshot


def test_it_is_imported_instead_of_the_checkout(tmp_path: Path) -> None:
    code = take_snapshot(tmp_path)
    assert code == snapshot_path(tmp_path)
    assert take_snapshot(tmp_path) == code
    assert [p.name for p in tmp_path.iterdir()] == [code.name]
    assert code.stat().st_mode & 0o777 == 0o755
    look = "import quietvit, quietvit_eval, quietvit_launch.cli as c; from quietvit.config.load import recipes\n"
    look += "print(quietvit.__file__, quietvit_eval.__file__, c.__file__, recipes()['quickstart'], sep='\\n')"
    env = {**os.environ, "PYTHONPATH": f"{code}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    told = subprocess.run([sys.executable, "-c", look], env=env, capture_output=True, text=True, check=True)
    lines = told.stdout.splitlines()
    assert len(lines) == 4
    assert all(line.startswith(f"{code}/") for line in lines)


def test_files_are_those_of_the_working_tree() -> None:
    files = code_files()
    for name in ("quietvit/__init__.py", "quietvit/configs/launch/slurm.yaml", "quietvit_eval/py.typed"):
        assert files[name].is_file()
    assert not [name for name in files if "__pycache__" in name]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of a package of three files, which stands in for ours."""
    root = tmp_path / "checkout" / "pack"
    root.mkdir(parents=True)
    for name in ("__init__.py", "new.py", "ignored.bin"):
        (root / name).write_text(name)
    (root.parent / ".gitignore").write_text("*.bin\n")
    monkeypatch.setattr(
        snapshot, "code_files", lambda: {f"pack/{p.relative_to(root)}": p for p in snapshot._files(root)}
    )
    return root


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_says_which_files_are_code(package: Path, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q"], cwd=package.parent, check=True)
    subprocess.run(["git", "add", "pack/__init__.py"], cwd=package.parent, check=True)
    first = take_snapshot(tmp_path / "out")
    assert sorted(p.name for p in (first / "pack").iterdir()) == ["__init__.py", "new.py"]
    (package / "ignored.bin").write_text("changed")
    assert snapshot_path(tmp_path / "out") == first
    (package / "new.py").write_text("changed")
    second = take_snapshot(tmp_path / "out")
    assert second != first
    assert (first / "pack" / "new.py").read_text() == "new.py"
    (package / "__init__.py").unlink()
    assert [p.name for p in (take_snapshot(tmp_path / "out") / "pack").iterdir()] == ["new.py"]


def test_outside_a_checkout_all_is_code(package: Path, tmp_path: Path) -> None:
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "new.cpython-311.pyc").write_bytes(b"")
    code = take_snapshot(tmp_path / "out")
    assert sorted(p.name for p in (code / "pack").iterdir()) == ["__init__.py", "ignored.bin", "new.py"]


def test_a_copy_that_fails_leaves_nothing(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        take_snapshot(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
