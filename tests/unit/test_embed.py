"""`embed`: names and embeddings of a folder, in both formats, without the images that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from quietvit.backbones import make_backbone
from quietvit.weights import load, save_teacher
from quietvit_eval.embed import embed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    backbone = make_backbone("vit", embed_dim=8, depth=2, num_heads=2, patch_size=4, image_size=16)
    save_teacher(tmp_path / "run", backbone, mean=(0.5,) * 3, std=(0.25,) * 3, image_size=16, provenance={})
    images = tmp_path / "images"
    (images / "deeper").mkdir(parents=True)
    for i, name in enumerate(("b.png", "a.png", "deeper/c é.png")):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / name)
    (images / "broken.png").write_bytes(b"not an image")
    return tmp_path


def expected(folder: Path, name: str) -> np.ndarray:
    pixels = torch.from_numpy(np.array(Image.open(folder / "images" / name))).permute(2, 0, 1) / 255
    return load(folder / "run", device="cpu")((pixels[None] - 0.5) / 0.25).cls[0].numpy()


def check(folder: Path, names: list[str], rows: np.ndarray, about: dict[str, object]) -> None:
    assert sorted(names) == ["a.png", "b.png", "deeper/c é.png"]
    assert rows.dtype == np.float32
    for name, row in zip(names, rows, strict=True):
        np.testing.assert_allclose(row, expected(folder, name), atol=2e-5, rtol=1e-4)
    assert about["image_size"] == 16
    assert len(about["model"]["hash"]) == 64  # type: ignore[index]


def test_npz(folder: Path) -> None:
    done = embed(folder / "images", folder / "run", folder / "new" / "out.npz", batch_size=2, device="cpu")
    assert (done.images, done.embed_dim, [b.name for b in done.skipped]) == (3, 8, ["broken.png"])
    with np.load(folder / "new" / "out.npz", allow_pickle=False) as stored:
        check(folder, stored["names"].tolist(), stored["embeddings"], json.loads(str(stored["about"])))
    assert [p.name for p in (folder / "new").iterdir()] == ["out.npz"]


def test_parquet(folder: Path) -> None:
    from pyarrow import parquet

    embed(folder / "images", folder / "run", folder / "out.parquet", batch_size=2, device="cpu")
    table = parquet.read_table(folder / "out.parquet")
    about = json.loads(table.schema.metadata[b"quietvit"])
    check(folder, table["name"].to_pylist(), np.array(table["embedding"].to_pylist(), dtype=np.float32), about)


def test_mistakes_leave_no_file(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"\.npz or \.parquet"):
        embed(folder / "images", folder / "run", folder / "out.csv")
    empty = folder / "empty"
    empty.mkdir()
    (empty / "broken.png").write_bytes(b"no")
    with pytest.raises(ValueError, match="none of the 1 images"):
        embed(empty, folder / "run", folder / "out.npz", kind="folder", device="cpu")
    assert not list(folder.glob("out.*"))
    assert not list(folder.glob(".out.*"))
