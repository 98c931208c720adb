"""Depth sets as they lie on disk: each layout in miniature, read pixel by pixel, and broken in many ways."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.io
from PIL import Image

from quietvit.data.decode import UnreadableImage
from quietvit_eval.dense_data.depth_rule import DepthRule
from quietvit_eval.dense_data.pairs import METRES, PairSource, open_pairs

DEPTH = Path(__file__).parents[3] / "shared" / "data" / "depth.tar"
HEIGHT, WIDTH = 6, 8


def photo(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(path)


def millimetres(seed: int) -> np.ndarray:
    """Up to 10 m, with holes."""
    values = np.random.default_rng(seed).integers(1, 10_000, (HEIGHT, WIDTH)).astype(np.uint16)
    values[seed % HEIGHT] = 0
    return values


def depth_png(path: Path, values: np.ndarray) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return values


def opened(kind: str, root: Path, split: str = "train", **options: Any) -> PairSource:
    return open_pairs(METRES, kind, str(root), split=split, **options)


def depth_of(source: PairSource, index: int) -> np.ndarray:
    image, depth = source.load(index)
    assert image.dtype == np.uint8
    assert image.shape == (*depth.shape, 3)
    assert depth.dtype == np.float32
    return depth


# ---- NYU Depth v2 by lists

SCENES = ("basement_0001a", "kitchen_0002")


def make_nyu(root: Path, train: str = "", test: str = "", lists: str = "", slash: str = "/") -> Path:
    """Three train pairs and one for testing, each with its lists and folders where people have them."""
    for base, name, seeds in ((train, "nyu_train.txt", (0, 1, 2)), (test, "nyu_test.txt", (3,))):
        lines = []
        for seed in seeds:
            scene = SCENES[seed % 2] if base == train and seed < 3 else "bathroom"
            rgb, depth = f"{scene}/rgb_{seed:05d}.jpg", f"{scene}/sync_depth_{seed:05d}.png"
            photo(root / base / rgb, seed)
            depth_png(root / base / depth, millimetres(seed))
            lead = slash if seed < 3 else ""
            lines.append(f"{lead}{rgb} {lead}{depth} 518.8579")
        (root / lists).mkdir(parents=True, exist_ok=True)
        (root / lists / name).write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize(
    "places",
    [
        {},
        {"slash": ""},
        {"lists": "lists/nested"},
        {"train": "sync", "test": "official_splits/test"},
        {"train": "x/sync", "test": "x/sync", "lists": "x/sync"},
    ],
)
def test_nyu_lists_with_and_without_the_leading_slash(tmp_path: Path, places: dict[str, str]) -> None:
    make_nyu(tmp_path, **places)
    train, test, val = (opened("nyu", tmp_path, split) for split in ("train", "test", "val"))
    assert (len(train), len(test), train.kind, train.class_names) == (3, 1, "metres", [])
    names = [train.item_name(i) for i in range(3)]
    assert names == [
        "basement_0001a/rgb_00000.jpg", "basement_0001a/rgb_00002.jpg", "kitchen_0002/rgb_00001.jpg",
    ]  # fmt: skip
    for index, seed in enumerate((0, 2, 1)):
        np.testing.assert_array_equal(depth_of(train, index), millimetres(seed).astype(np.float32) / np.float32(1000))
    assert (depth_of(train, 0)[0] == 0).all()
    assert val.name.endswith("test (1 pairs; there is no split 'val')")
    assert val.fingerprint() == test.fingerprint() != train.fingerprint()


def rewrite(file: Path, text: str) -> None:
    file.write_text(text)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: (r / "nyu_train.txt").unlink(), r"no list nyu_train.txt or nyudepthv2_train_files_with_gt.txt any"),
        (lambda r: rewrite(r / "nyu_train.txt", "\n\n"), "names nothing"),
        (lambda r: rewrite(r / "nyu_train.txt", "a.jpg\n"), "each line must be 'rgb depth'.*found 'a.jpg'"),
        (lambda r: rewrite(r / "nyu_train.txt", "a b c d\n"), "each line must be"),
        (lambda r: rewrite(r / "nyu_train.txt", "a.jpg None 518\n"), "each line must be"),
        (
            lambda r: rewrite(r / "nyu_train.txt", "/a.jpg /a.png 518\n"),
            "first images are not there, e.g. a.jpg; looked in",
        ),
        (
            lambda r: [p.unlink() for p in r.rglob("*_00001.*")],
            r"names 2 files \(of 6\) .*the first: kitchen_0002/rgb_00001.jpg",
        ),
        (
            lambda r: [depth_png(p, np.ones((6, 8), np.uint8)) for p in r.rglob("sync*.png")],
            "8-bit depth, which cannot hold millimetres.*Kaggle",
        ),
    ],
)
def test_broken_nyu_lists(tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    make_nyu(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        opened("nyu", tmp_path)


def test_two_different_lists(tmp_path: Path) -> None:
    make_nyu(tmp_path, lists="a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "nyu_train.txt").write_text((tmp_path / "a" / "nyu_train.txt").read_text())
    assert len(opened("nyu", tmp_path)) == 3
    (tmp_path / "b" / "nyu_train.txt").write_text("x.jpg x.png\n")
    with pytest.raises(ValueError, match="holds different lists"):
        opened("nyu", tmp_path)


# ---- NYU Depth v2, labelled


def mat_arrays(count: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images [N H W 3], raw and filled depths [N H W] in metres, 480 x 640, cheap to compress."""
    rows, columns = np.arange(480)[:, None], np.arange(640)[None, :]
    planes = [rows + 0 * columns, columns + 0 * rows]
    images = np.stack([np.stack([*planes, np.full((480, 640), 10 * i + 5)], -1) for i in range(count)])
    raw = np.stack([(rows // 40 + columns // 40 + i) / 7.0 for i in range(count)]).astype(np.float32)
    return images.astype(np.uint8), raw, raw + np.float32(0.25)


def make_mat(root: Path, *, train: Any = (1, 3), test: Any = (2, 4), **changed: Any) -> Path:
    """HDF5 with MATLAB's 512-byte header and all axes reversed, and a v5 file of 1-based columns."""
    root.mkdir(parents=True, exist_ok=True)
    images, raw, filled = mat_arrays()
    arrays = {"images": images.transpose(0, 3, 2, 1), "rawDepths": raw.transpose(0, 2, 1)}
    arrays |= {"depths": filled.transpose(0, 2, 1)} | changed
    file = root / "nyu_depth_v2_labeled.mat"
    with h5py.File(file, "w", userblock_size=512) as mat:
        for name, array in arrays.items():
            if array is not None:
                mat.create_dataset(name, data=array, compression="gzip", compression_opts=1)
    with file.open("r+b") as raw_file:
        raw_file.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")
    columns = {"trainNdxs": np.array(train).reshape(-1, 1), "testNdxs": np.array(test).reshape(-1, 1)}
    scipy.io.savemat(root / "splits.mat", columns)
    return root


@pytest.fixture(scope="module")
def mat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mat(tmp_path_factory.mktemp("mat"))


def test_the_labelled_set_upright_with_its_frame_and_holes(mat: Path) -> None:
    images, raw, filled = mat_arrays()
    for split, indices in (("train", (0, 2)), ("test", (1, 3)), ("val", (1, 3))):
        source = opened("nyu_mat", mat, split)
        assert [source.item_name(i) for i in range(len(source))] == [f"rgb_{i:05d}" for i in indices]
        for at, index in enumerate(indices):
            image, depth = source.load(at)
            wanted = np.zeros_like(images[index])
            wanted[7:474, 7:632] = images[index][7:474, 7:632]
            np.testing.assert_array_equal(image, wanted)
            assert image.flags.c_contiguous
            stored = (raw[index] * 1000).astype(np.uint16)  # what BTS's script writes
            np.testing.assert_array_equal(depth, stored.astype(np.float32) / np.float32(1000))
            assert depth.dtype == np.float32
            np.testing.assert_array_equal(opened("nyu_mat", mat, split, depth="filled").load(at)[1], filled[index])
    assert depth_of(opened("nyu_mat", mat), 0)[0, 0] == 0
    assert source.name.endswith("test (2 pairs, raw depth; no split 'val')")


def test_the_labelled_set_by_its_file_and_anywhere(mat: Path, tmp_path: Path) -> None:
    by_file = opened("nyu_mat", mat / "nyu_depth_v2_labeled.mat")
    assert by_file.fingerprint() == opened("nyu_mat", mat).fingerprint() == opened("auto", mat).fingerprint()
    others = [opened("nyu_mat", mat, "test"), opened("nyu_mat", mat, depth="filled")]
    assert len({s.fingerprint() for s in (by_file, *others)}) == 3
    scipy.io.savemat(tmp_path / "own.mat", {"trainNdxs": [[4]], "testNdxs": [[1]]})
    own = opened("nyu_mat", mat, splits=tmp_path / "own.mat")
    assert [own.item_name(i) for i in range(len(own))] == ["rgb_00003"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": (0, 1)}, r"'trainNdxs' runs from 0 to 1; MATLAB's indices of 4 images run from 1 to 4"),
        ({"test": (2, 5)}, "'testNdxs' runs from 2 to 5"),
        ({"test": (3, 4)}, "1 images are in train and in test, the first number 3"),
        ({"test": (2.5,)}, "must hold whole numbers"),
        ({"test": ()}, "must hold whole numbers"),
        ({"images": None}, "has no 'images'; it holds depths, rawDepths"),
        ({"rawDepths": None}, "has no 'rawDepths'"),
        ({"images": np.zeros((4, 3, 640, 480), np.float32)}, "'images' is of type float32; uint8"),
        ({"rawDepths": np.zeros((4, 640, 480), np.uint16)}, "'rawDepths' is of type uint16; float32"),
        ({"images": np.zeros((4, 480, 640, 3), np.uint8)}, r"images are \(4, 480, 640, 3\)"),
        ({"rawDepths": np.zeros((4, 480, 640), np.float32)}, r"rawDepths \(4, 480, 640\); \(N, 3, width, height\)"),
    ],
)
def test_broken_labelled_sets(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    make_mat(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        opened("nyu_mat", tmp_path)


def test_labelled_set_with_files_missing_or_cut(mat: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no nyu_depth_v2_labeled.mat; found no sub-folders"):
        opened("nyu_mat", tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        opened("nyu_mat", tmp_path / "none")
    with pytest.raises(ValueError, match="depth is 'depths'; one of raw, filled"):
        opened("nyu_mat", mat, depth="depths")
    whole = (mat / "nyu_depth_v2_labeled.mat").read_bytes()
    file = tmp_path / "nyu_depth_v2_labeled.mat"
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot be read as a MATLAB v7.3 file .*the published one 2,972,037,809"):
        opened("nyu_mat", tmp_path)
    file.write_bytes(whole)
    with pytest.raises(ValueError, match=r"splits.mat is missing"):
        opened("nyu_mat", tmp_path)
    (tmp_path / "splits.mat").write_bytes(b"no mat file at all" * 20)
    with pytest.raises(ValueError, match="cannot be read as a MATLAB v5 file"):
        opened("nyu_mat", tmp_path)
    scipy.io.savemat(tmp_path / "splits.mat", {"trainNdxs": [[1]]})
    with pytest.raises(ValueError, match="has no 'testNdxs'; it holds trainNdxs"):
        opened("nyu_mat", tmp_path)


def test_damage_inside_the_labelled_set_is_a_bad_pair(mat: Path, tmp_path: Path) -> None:
    make_mat(tmp_path)
    source = opened("nyu_mat", tmp_path)
    file = tmp_path / "nyu_depth_v2_labeled.mat"
    with h5py.File(file) as content:
        chunk = content["rawDepths"].id.get_chunk_info(0)
    with file.open("r+b") as raw_file:
        raw_file.seek(chunk.byte_offset)
        raw_file.write(b"\xff" * min(64, chunk.size))
    with pytest.raises(UnreadableImage, match=r"rgb_00000: nyu_depth_v2_labeled.mat is damaged"):
        source.load(0)
    file.unlink()
    with pytest.raises(UnreadableImage, match="rgb_00002"):
        source.load(1)


# ---- SUN RGB-D


def test_sun_rgbd_turns_words_back_and_stops_at_8_metres(tmp_path: Path) -> None:
    depths = np.resize(np.array([0, 1, 500, 7999, 8000, 8191, 1234], np.uint16), (HEIGHT, WIDTH))
    stored = (depths << 3) | (depths >> 13)
    depths[0, 0] = 60_000  # rotating keeps all 16 bits
    stored[0, 0] = (60_000 << 3 & 0xFFFF) | (60_000 >> 13)
    photo(tmp_path / "SUNRGBD/kv2/a/image/1.jpg")
    depth_png(tmp_path / "SUNRGBD/kv2/a/depth/1.png", stored)
    (tmp_path / "SUNRGBD_val_splits.txt").write_text("SUNRGBD/kv2/a/image/1.jpg SUNRGBD/kv2/a/depth/1.png\n")
    source = opened("auto", tmp_path, "test")
    assert source.name.startswith("sunrgbd:")
    np.testing.assert_array_equal(depth_of(source, 0), np.minimum(depths, 8000).astype(np.float32) / np.float32(1000))
    with pytest.raises(ValueError, match=r"no list SUNRGBD_train_splits.txt"):
        opened("sunrgbd", tmp_path)
    depth_png(tmp_path / "SUNRGBD/kv2/a/depth/1.png", stored.astype(np.uint8))
    with pytest.raises(ValueError, match="8-bit depth"):
        opened("sunrgbd", tmp_path, "test")


# ---- folders


def make_folders(root: Path, rgb: str = "rgb/train", depth: str = "depth/train") -> Path:
    for seed, name in enumerate("abc"):
        photo(root / rgb / f"{name}.jpg", seed)
        depth_png(root / depth / f"{name}.png", millimetres(seed))
    return root


@pytest.mark.parametrize(("rgb", "depth"), [("rgb/train", "depth/training"), ("train/rgb", "train/depth")])
def test_folders_in_millimetres(tmp_path: Path, rgb: str, depth: str) -> None:
    make_folders(tmp_path, rgb, depth)
    source = opened("folders", tmp_path)
    assert len(source) == 3
    for seed in range(3):
        np.testing.assert_array_equal(depth_of(source, seed), millimetres(seed).astype(np.float32) / np.float32(1000))
    np.testing.assert_allclose(  # KITTI's units
        depth_of(opened("folders", tmp_path, scale=256), 1), millimetres(1) / 256, rtol=1e-6
    )
    clipped = depth_of(opened("folders", tmp_path, max_depth=5), 1)
    np.testing.assert_array_equal(clipped, np.minimum(millimetres(1).astype(np.float32) / np.float32(1000), 5))
    prints = [opened("folders", tmp_path, **o).fingerprint() for o in ({}, {"scale": 256}, {"max_depth": 5.0})]
    assert len(set(prints)) == 3


def test_undivided_folders_with_lists(tmp_path: Path) -> None:
    make_folders(tmp_path, "rgb", "depth")
    with pytest.raises(ValueError, match=r"undivided folders with a list \(train\|training\).txt; found depth/, rgb/"):
        opened("folders", tmp_path)
    (tmp_path / "train.txt").write_text("c\na\n")
    (tmp_path / "test.txt").write_text("b.jpg\n")
    train, val = opened("folders", tmp_path), opened("folders", tmp_path, "val")
    assert [train.item_name(i) for i in range(2)] == ["rgb/a.jpg", "rgb/c.jpg"]
    assert val.name.endswith("test (1 pairs; there is no split 'val')")
    (tmp_path / "depth" / "c.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 images .*no file of the same name .*c.jpg"):
        opened("folders", tmp_path)
    (tmp_path / "train.txt").write_text("a\nd\n")
    with pytest.raises(ValueError, match=r"train.txt names 1 files .*: d"):
        opened("folders", tmp_path)


def test_own_folder_names_lists_and_suffixes(tmp_path: Path) -> None:
    photo(tmp_path / "cam" / "0_color.png")
    depth_png(tmp_path / "range" / "0_depth.png", millimetres(0))
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "train_files.txt").write_text("cam/0_color.png\n")
    source = opened(
        "folders", tmp_path, rgb="cam", depth="range", rgb_suffix="_color", depth_suffix="_depth",
        lists="lists/{split}_files.txt",
    )  # fmt: skip
    np.testing.assert_array_equal(depth_of(source, 0), millimetres(0).astype(np.float32) / np.float32(1000))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint16, np.int32])
def test_arrays_of_metres_or_of_units(tmp_path: Path, dtype: type) -> None:
    make_folders(tmp_path)
    (tmp_path / "depth" / "train" / "b.png").unlink()
    values = np.linspace(0, 9, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(dtype)
    if values.dtype.kind == "f":
        values[1, :3] = [np.nan, np.inf, -1]
    np.save(tmp_path / "depth" / "train" / "b.npy", values)
    wanted = values.astype(np.float32)
    wanted[~np.isfinite(wanted) | (wanted < 0)] = 0
    if values.dtype.kind != "f":
        wanted /= 1000
    np.testing.assert_allclose(depth_of(opened("folders", tmp_path), 1), wanted, rtol=1e-6)
    np.testing.assert_allclose(  # a scale concerns whole numbers alone
        depth_of(opened("folders", tmp_path, scale=500), 1), wanted * (1 if values.dtype.kind == "f" else 2), rtol=1e-6
    )


def test_8_bits_need_a_scale(tmp_path: Path) -> None:
    make_folders(tmp_path)
    for file in (tmp_path / "depth").rglob("*.png"):
        depth_png(file, np.full((HEIGHT, WIDTH), 51, np.uint8))
    with pytest.raises(ValueError, match=r"8-bit depth, .*set scale to the units per metre"):
        opened("folders", tmp_path)
    assert (depth_of(opened("folders", tmp_path, scale=25.5), 0) == 2).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0}, "scale is 0; it must be a number above 0"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"scale": "mm"}, "scale is 'mm'"),
        ({"max_depth": -1}, "max_depth is -1"),
        ({"rgb": "colour"}, r"looked for colour/ and depth/\(train\|training\)/"),
        ({"depths": "x"}, "no option 'depths'; it has: rgb, depth, scale"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    make_folders(tmp_path)
    with pytest.raises(ValueError, match=message):
        opened("folders", tmp_path, **options)


def test_float_images_are_metres(tmp_path: Path) -> None:
    values = np.linspace(0, 9, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)
    Image.fromarray(values).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(DepthRule(scale=1000).read(tmp_path / "a.tif"), values)


# A change to the second depth map of three, and why the pair cannot be read.
SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "damaged"),
    "gone": (lambda p: p.unlink(), "No such file"),
    "colours": (lambda p: photo(p), r"colours \(RGB\)"),
    "8 bits": (lambda p: depth_png(p, np.ones((6, 8), np.uint8)), "8-bit depth"),
    "smaller": (lambda p: depth_png(p, np.zeros((3, 4), np.uint16)), "image has 8 x 6 pixels, its target 4 x 3"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_one_bad_depth_map_is_one_bad_pair(tmp_path: Path, how: str) -> None:
    spoil, message = SPOILT[how]
    source = opened("folders", make_folders(tmp_path))
    spoil(tmp_path / "depth" / "train" / "b.png")
    with pytest.raises(UnreadableImage, match=message) as error:
        source.load(1)
    assert error.value.name == "rgb/train/b.jpg"
    depth_of(source, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged .npy"),
        (b"\x93NUMPY\x01\x00v\x00{'descr'", "damaged .npy"),
        (np.ones((2, 3, 1)), r"\(2, 3, 1\); \[H W\] of real"),
        (np.ones((2, 3), complex), "of real numbers"),
        (np.array([["a"]]), "of real numbers"),
        (np.array([[None]]), "damaged .npy"),  # a pickle inside
    ],
)
def test_broken_arrays(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "a.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.save(file, content)
    with pytest.raises(ValueError, match=message):
        DepthRule().read(file)


# ---- auto


def test_layouts_are_found_out(tmp_path: Path, mat: Path) -> None:
    make_nyu(tmp_path / "a", lists="deep/inside")
    make_folders(tmp_path / "b", "rgb", "depth")
    (tmp_path / "b" / "train.txt").write_text("a")
    for kind, root in (("nyu", tmp_path / "a"), ("folders", tmp_path / "b"), ("nyu_mat", mat)):
        source = opened("auto", root)
        assert source.name.startswith(f"{kind}:")
        assert source.fingerprint() == opened(kind, root).fingerprint()
    assert opened("auto", mat / "nyu_depth_v2_labeled.mat").name.startswith("nyu_mat:")
    with pytest.raises(ValueError, match=r"looked for nyu_train.txt or nyu_test.txt.*; found no sub-folders"):
        opened("auto", tmp_path / "b" / "rgb")


@pytest.mark.skipif(not DEPTH.exists(), reason="the archive of depth pairs is not here")
def test_sensor_pairs(tmp_path: Path) -> None:
    with tarfile.open(DEPTH) as archive:
        archive.extractall(tmp_path, [archive.getmember(n) for n in ("train.txt", "test.txt")], filter="data")
        chosen = {}
        for split in ("train", "test"):
            chosen[split] = (tmp_path / f"{split}.txt").read_text().split()[:2]
            (tmp_path / f"{split}.txt").write_text("\n".join(chosen[split]))
            names = [f for name in chosen[split] for f in (f"rgb/{name}.jpg", f"depth/{name}.png")]
            archive.extractall(tmp_path, [archive.getmember(n) for n in names], filter="data")
        member = archive.extractfile(f"depth/{sorted(chosen['test'])[0]}.png")
        assert member is not None
        stored = np.asarray(Image.open(io.BytesIO(member.read()))).astype(np.float32)
    train, test = opened("auto", tmp_path, scale=1000), opened("folders", tmp_path, "test")
    assert (len(train), len(test)) == (2, 2)
    depth = depth_of(test, 0)
    np.testing.assert_array_equal(depth, stored / np.float32(1000))
    assert 0.3 < np.median(depth[depth > 0]) < 9.9
