"""What the code imports is what setup.py asks for: no more, no less, and constraints.txt pins all of it."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
PACKAGES = {"quietvit": "ssl", "quietvit_eval": "eval", "quietvit_launch": "launch"}
# Asked for by name and imported under another, or through a door of torch's.
IMPORTED_AS = {
    "import-linter": "importlinter",
    "open-clip-torch": "open_clip",
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "tensorboard": "torch.utils.tensorboard",
}


def imported(files: Iterable[Path]) -> set[str]:
    """Modules imported in `files`, by their full dotted names, wherever in the file."""
    out = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                out |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                out.add(node.module)
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                out |= {a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return out


def asked(*, extras: bool) -> dict[str, str]:
    """{module: distribution} of what setup.py asks for."""
    lines = [r for r in metadata.requires("quietvit") or [] if extras or "extra ==" not in r]
    names = [m[0].lower() for r in lines if (m := re.match(r"[\w.-]+", r))]
    return {IMPORTED_AS.get(name, name.replace("-", "_")): name for name in names}


LIBRARY = imported(p for name, root in PACKAGES.items() for p in (REPO / root / name).rglob("*.py"))


def test_every_import_of_the_library_is_asked_for() -> None:
    outside = {m.partition(".")[0] for m in LIBRARY} - set(sys.stdlib_module_names) - set(PACKAGES)
    known = asked(extras=True)
    assert outside - set(known) - set(known.values()) == set()


def test_every_import_of_the_tests_is_asked_for() -> None:
    tests = list((REPO / "tests").rglob("*.py"))
    own = {p.stem for p in tests} | set(PACKAGES) | {"setuptools", "benchmarks"}
    outside = {m.partition(".")[0] for m in imported(tests)} - set(sys.stdlib_module_names) - own
    known = asked(extras=True)
    assert outside - set(known) - set(known.values()) == set()


@pytest.mark.parametrize(("module", "name"), asked(extras=False).items())
def test_what_every_user_installs_is_used(module: str, name: str) -> None:
    assert any(m == module or m.startswith(f"{module}.") for m in LIBRARY), f"nothing imports {name}"


def test_constraints_pin_everything_that_is_asked_for() -> None:
    lines = (REPO / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert set(asked(extras=True).values()) - pins == set()


def test_nothing_names_a_package_index() -> None:
    # People install through the index they have.
    text = "".join((REPO / name).read_text(encoding="utf-8") for name in ("constraints.txt", "Makefile", "setup.py"))
    assert not re.search(r"index-url|find-links|://", text)
