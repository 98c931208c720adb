"""Finding out what lies at a path, and what `open_source` says to those who err."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from PIL import Image

from quietvit.data.sources import detect_kind, open_source


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIETVIT_CACHE", str(tmp_path_factory.mktemp("cache")))


def put(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".tar"):
            tarfile.open(root / name, "w").close()
        else:
            Image.new("RGB", (4, 4)).save(root / name, "PNG")
    return root


@pytest.mark.parametrize(("names", "kind"), [
    (["1.jpg", "2.jpg"], "folder"),
    (["a/1.jpg", "b/1.jpg"], "classes"),
    (["a/1.jpg"], "folder"),  # one folder is no classification
    (["a/1.jpg", "b/1.jpg", "stray.jpg"], "folder"),
    (["a/x/1.jpg", "b/1.jpg"], "folder"),
    (["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg"], "classes"),
    (["train/n01440764/1.JPEG", "val/n01440764/1.JPEG"], "imagenet"),
    (["n01440764/1.JPEG", "n01443537/1.JPEG"], "classes"),
    (["train/1.jpg", "val/1.jpg"], "folder"),
    (["test/1.jpg", "val/1.jpg"], "folder"),
    (["0.tar", "1.tar"], "tar"),
    (["train/0.tar", "val/0.tar"], "tar"),
])  # fmt: skip
def test_folders(tmp_path: Path, names: list[str], kind: str) -> None:
    assert detect_kind(str(put(tmp_path, *names))) == kind


@pytest.mark.parametrize(("name", "kind"), [
    ("a.tar", "tar"), ("a.tar.gz", "tar"), ("a.TGZ", "tar"), ("a.txt", "list"), ("a.CSV", "list"),
])  # fmt: skip
def test_files(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).touch()
    assert detect_kind(str(tmp_path / name)) == kind


def test_patterns(tmp_path: Path) -> None:
    assert detect_kind(f"{tmp_path}/a-{{000..012}}.tar") == detect_kind(f"{tmp_path}/*.tar") == "tar"


def test_what_is_none_of_these_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist \(looked for a folder of images, a \.tar file"):
        detect_kind(str(tmp_path / "nowhere"))
    (tmp_path / "data.h5").touch()
    with pytest.raises(ValueError, match=r"file of kind \.h5; looked for"):
        detect_kind(str(tmp_path / "data.h5"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images in .*empty: there are no files at all"):
        open_source("auto", str(tmp_path / "empty"))


def test_auto_opens_what_it_found(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/b/1.jpg")
    assert open_source("auto", str(tmp_path)).name.startswith("classes:")
    assert open_source("auto", str(tmp_path), split="val").labels["class"].tolist() == [1]


def test_unknown_kinds_and_options(tmp_path: Path) -> None:
    put(tmp_path, "1.jpg")
    with pytest.raises(ValueError, match="unknown data source 'foldr'; did you mean 'folder'"):
        open_source("foldr", str(tmp_path))
    with pytest.raises(ValueError, match=r"'folder' has no option 'refrsh'; it has: refresh"):
        open_source("folder", str(tmp_path), refrsh=True)
    with pytest.raises(ValueError, match=r"'folder' has no option 'allow_truncated'"):
        open_source("auto", str(tmp_path), allow_truncated=True)
    with pytest.raises(ValueError, match=r"'scenes' has no option 'size'"):
        open_source("scenes", None, size=3)
    with pytest.raises(ValueError, match="'tar' needs a path"):
        open_source("tar", None)
    with pytest.raises(ValueError, match="takes no path"):
        open_source("scenes", "/some/where")
