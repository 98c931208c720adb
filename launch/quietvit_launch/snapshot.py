"""A copy of the code as it is now, for jobs that start later: edits made meanwhile do not reach them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from importlib import resources, util
from pathlib import Path

PACKAGES = ("quietvit", "quietvit_eval", "quietvit_launch")
RECIPES = "quietvit/configs"  # where `quietvit.configs` lies in the copy, wherever it lies here


def snapshot_path(folder: Path) -> Path:
    """Where `take_snapshot(folder)` puts the code as it is now: `folder`/code-<hash of names and bytes>."""
    digest = hashlib.sha256()
    for name, path in sorted(code_files().items()):
        digest.update(f"{name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return folder / f"code-{digest.hexdigest()[:12]}"


def take_snapshot(folder: Path) -> Path:
    """Copy quietvit's packages to `snapshot_path(folder)` and return that path, to be put on PYTHONPATH.

    From a checkout: files that git tracks or does not ignore; else all of the installed package but caches. What is
    already there under this name is the same code and stays. Raises OSError as the file system does.
    """
    target = snapshot_path(folder)
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".code-", dir=folder))
    try:
        for name, path in code_files().items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, temporary / name)
        temporary.chmod(0o755)  # mkdtemp makes folders private
        os.replace(temporary, target)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if not target.is_dir():  # else another process was faster
            raise
    return target


def code_files() -> dict[str, Path]:
    """{path in the copy: file here} of everything that a job imports or reads of quietvit."""
    roots = {name: _folder(name) for name in PACKAGES}
    roots[RECIPES] = Path(str(resources.files("quietvit.configs")))
    return {f"{name}/{path.relative_to(root)}": path for name, root in roots.items() for path in _files(root)}


def _folder(package: str) -> Path:
    spec = util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _files(root: Path) -> list[Path]:
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard", "-z", "."],
        capture_output=True, text=True,
    ) if shutil.which("git") else None  # fmt: skip
    if listed is not None and listed.returncode == 0 and listed.stdout:
        found = [root / name for name in listed.stdout.split("\0") if name]
    else:
        found = [p for p in root.rglob("*") if "__pycache__" not in p.parts and p.suffix != ".pyc"]
    return sorted(p for p in found if p.is_file())  # a tracked file may have been deleted
