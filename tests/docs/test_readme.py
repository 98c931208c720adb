"""What README.md and docs/ tell people to type is typed here.

A ```bash or ```python block is preceded by a comment: `<!-- test -->`, and it is run, or `<!-- not run: reason -->`.
The blocks of one document run in order in one empty folder, as a reader would, so a later one may use what an earlier
one made. A block without a comment fails: nothing is passed over in silence.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
DOCUMENTS = [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md"))]
RUNNERS = {"bash": ("bash", "-euo", "pipefail", "-c"), "python": (sys.executable, "-c")}
# Other names of the same languages: a block must not escape by its label.
ALIASES = {"sh", "shell", "console", "shell-session", "zsh", "py", "python3", "pycon"}
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<code>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL
)
COMMENT = re.compile(r"<!-- *(?P<run>test|not run: \S.*?) *-->\s*\Z")
LINK = re.compile(r"\[[^\]]*\]\((?!https?:|mailto:|#)(?P<target>[^)#\s]+)")


@dataclass(frozen=True)
class Block:
    """A fenced block that should run; `line` is where its fence opens."""

    line: int
    language: str
    code: str


def blocks(text: str) -> list[Block]:
    """The blocks marked to run. Raises ValueError for one that is neither marked nor excused."""
    out = []
    for fence in FENCE.finditer(text):
        line, language = text.count("\n", 0, fence.start()) + 1, fence["language"]
        if language in ALIASES:
            raise ValueError(f"line {line}: write ```bash or ```python, not ```{language}")
        if language not in RUNNERS:
            continue
        comment = COMMENT.search(text[: fence.start()])
        if comment is None:
            raise ValueError(f"line {line}: put <!-- test --> or <!-- not run: reason --> before this block")
        if comment["run"] == "test":
            code = re.sub(rf"^{fence['indent']}", "", fence["code"], flags=re.MULTILINE)
            out.append(Block(line, language, code))
    return out


def run(block: Block, folder: Path, name: str) -> str:
    """Run a block in `folder` with the commands of this environment first on the path. Fails the test if it fails."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        [*RUNNERS[block.language], block.code],
        cwd=folder,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
    )
    if result.returncode:
        pytest.fail(f"{name}:{block.line} exits with {result.returncode}\n{block.code}\n{result.stdout}{result.stderr}")
    return result.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_the_commands_of_a_document_work(path: Path, tmp_path: Path) -> None:
    for block in blocks(path.read_text(encoding="utf-8")):
        run(block, tmp_path, path.name)


def test_the_readme_has_commands_that_are_tested() -> None:
    assert blocks((REPO / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_inside_the_repository_lead_somewhere(path: Path) -> None:
    targets = [m["target"] for m in LINK.finditer(path.read_text(encoding="utf-8"))]
    assert [t for t in targets if not (path.parent / t).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_the_make_targets_of_a_document_exist(path: Path) -> None:
    named = set(re.findall(r"(?:`|^\s*)make ([a-z-]+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    known = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert named <= known


def test_marked_blocks_are_found_with_their_lines() -> None:
    plain = "# T\n\n<!-- test -->\n```bash\nls\n```\n"
    indented = "- item\n\n  <!-- test -->\n  ```python\n  if 1:\n      x = 2\n  ```\n"
    text = plain + indented + "```text\nno\n```\n"
    assert blocks(text) == [Block(4, "bash", "ls\n"), Block(10, "python", "if 1:\n    x = 2\n")]


def test_an_excused_block_is_not_run() -> None:
    assert blocks("<!-- not run: needs eight GPUs -->\n```bash\nquietvit pretrain\n```\n") == []


@pytest.mark.parametrize(
    "text",
    [
        "```bash\nls\n```\n",
        "<!-- not run: -->\n```bash\nls\n```\n",
        "<!-- test -->\nSome words between.\n```python\n1\n```\n",
        "<!-- test -->\n```console\n$ ls\n```\n",
    ],
)
def test_a_block_that_would_be_passed_over_in_silence_fails(text: str) -> None:
    with pytest.raises(ValueError, match="line"):
        blocks(text)


def test_a_failing_command_in_the_middle_of_a_block_fails(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"X\.md:7"):
        run(Block(7, "bash", "false\ntrue\n"), tmp_path, "X.md")
    assert run(Block(1, "bash", "touch a; ls"), tmp_path, "X.md") == "a\n"
