"""Images kept in memory are the images of the source, and only if they fit."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quietvit.data.decode import UnreadableImage
from quietvit.data.folder import FolderSource
from quietvit.data.ram_cache import CachedSource, cached


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderSource:
    monkeypatch.setenv("QUIETVIT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32 + i, 40, 3), dtype=np.uint8)).save(stream, "JPEG")
        (folder / f"{i}.jpg").write_bytes(stream.getvalue()[: 200 if i == 2 else None])
    return FolderSource(folder)


@pytest.mark.parametrize("min_side", [None, 10])
def test_the_same_pixels_with_and_without(source: FolderSource, min_side: int | None) -> None:
    kept = cached(source, min_side=min_side)
    assert isinstance(kept, CachedSource)
    assert len(kept) == len(source)
    for index in (5, 0, 1, 3, 4):
        for side in (min_side, 16):
            wanted = source.load(index, min_side=side)
            np.testing.assert_array_equal(kept.load(index, min_side=side), wanted)
    with pytest.raises(UnreadableImage, match=r"2\.jpg: truncated JPEG"):
        kept.load(2, min_side=min_side)
    assert (kept.item_name(3), kept.fingerprint()) == (source.item_name(3), source.fingerprint())
    for index in (-1, 6):
        with pytest.raises(IndexError):
            kept.load(index, min_side=min_side)


def test_images_come_from_memory_and_cannot_be_spoilt(source: FolderSource) -> None:
    kept = cached(source)
    wanted = source.load(0)
    for file in source.root.iterdir():
        file.unlink()
    kept.load(0)[:] = 0
    np.testing.assert_array_equal(kept.load(0), wanted)


def test_what_does_not_fit_stays_on_disk(source: FolderSource) -> None:
    assert cached(source, max_mb=0) is source
    assert CachedSource.of(source, min_side=None, max_mb=0) is None


def test_nothing_readable_stays_on_disk(source: FolderSource) -> None:
    for file in source.root.iterdir():
        file.write_bytes(b"")
    assert cached(source) is source
