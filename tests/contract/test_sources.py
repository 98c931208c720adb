"""What is asked of every row of DATASETS: a new row is tested as soon as the table and `MAKERS` know it."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from quietvit.data.sources import DATASETS, Source, open_source

Opened = tuple[str | None, dict[str, Any]]


def jpeg(seed: int, side: int = 40) -> bytes:
    stream = io.BytesIO()
    colours = np.random.default_rng(seed).integers(0, 256, (side, side + 8, 3), dtype=np.uint8)
    Image.fromarray(colours).save(stream, "JPEG")
    return stream.getvalue()


def write_tree(root: Path, classes: tuple[str, ...]) -> Path:
    for split in ("train", "val"):
        for c, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(3):
                (folder / f"{i}.jpg").write_bytes(jpeg(c * 3 + i + (100 if split == "val" else 0)))
    return root


def make_folder(root: Path) -> Opened:
    return str(write_tree(root, ("a", "b"))), {}


def make_imagenet(root: Path) -> Opened:
    return str(write_tree(root, ("n01440764", "n01443537"))), {}


def make_list(root: Path) -> Opened:
    write_tree(root, ("a", "b"))
    rows = [f"train/{name}/{i}.jpg,{name}" for name in "ab" for i in range(3)]
    (root / "list.csv").write_text("path,label\n" + "\n".join(rows))
    return str(root / "list.csv"), {}


def make_tar(root: Path) -> Opened:
    with tarfile.open(root / "a.tar", "w") as archive:
        archive.add(write_tree(root / "tree", ("a", "b")), arcname=".")
    return str(root / "a.tar"), {}


def make_scenes(root: Path) -> Opened:
    return None, {"num_images": 6, "image_size": 24}


MAKERS: dict[str, Callable[[Path], Opened]] = {
    "auto": make_folder,
    "folder": make_folder,
    "classes": make_folder,
    "imagenet": make_imagenet,
    "list": make_list,
    "tar": make_tar,
    "scenes": make_scenes,
}


@pytest.fixture(params=sorted(DATASETS))
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any) -> str:
    monkeypatch.setenv("QUIETVIT_CACHE", str(tmp_path_factory.mktemp("cache")))
    return str(request.param)


@pytest.fixture
def source(kind: str, tmp_path: Path) -> Source:
    path, options = MAKERS[kind](tmp_path)
    return open_source(kind, path, split="train", **options)


def test_meets_the_protocol(source: Source) -> None:
    assert isinstance(source, Source)
    assert len(source) == 6
    assert source.name


def test_images_are_rgb_bytes_and_the_same_each_time(source: Source) -> None:
    for index in range(len(source)):
        image = source.load(index)
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] == 3
        assert image.flags.c_contiguous
        np.testing.assert_array_equal(image, source.load(index))
        assert image.std() > 1


def test_least_sides_are_kept(source: Source) -> None:
    full = min(source.load(0).shape[:2])
    for min_side in (1, 5, full // 2, full):
        assert min(source.load(0, min_side=min_side).shape[:2]) >= min_side


def test_labels_fit_their_classes(source: Source, kind: str) -> None:
    assert set(source.labels) == set(source.classes)
    assert ("class" in source.labels) == (kind != "folder")
    for name, labels in source.labels.items():
        assert labels.shape == (len(source),)
        assert labels.dtype == np.int64
        assert labels.min() >= -1
        assert labels.max() < len(source.classes[name])


def test_item_names_are_distinct(source: Source) -> None:
    assert len({source.item_name(index) for index in range(len(source))}) == len(source)


def test_fingerprints_are_stable_hex(kind: str, tmp_path: Path) -> None:
    path, options = MAKERS[kind](tmp_path)
    train, again = (open_source(kind, path, split="train", **options).fingerprint() for _ in range(2))
    assert train == again
    assert len(bytes.fromhex(train)) >= 8


def test_travels_to_workers(source: Source) -> None:
    source.load(0)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.load(4), source.load(4))
    assert copy.fingerprint() == source.fingerprint()


def test_outside_of_the_data_there_is_nothing(source: Source) -> None:
    with pytest.raises(IndexError):
        source.load(len(source))


def test_the_splits_are_different_data(kind: str, tmp_path: Path) -> None:
    path, options = MAKERS[kind](tmp_path)
    train = open_source(kind, path, split="train", **options)
    if kind == "list":
        with pytest.raises(ValueError, match="one list and has no split"):
            open_source(kind, path, split="val", **options)
        return
    val = open_source(kind, path, split="val", **options)
    assert val.classes == train.classes
    assert not np.array_equal(val.load(0), train.load(0))


def test_every_row_has_a_maker() -> None:
    assert set(MAKERS) == set(DATASETS)
