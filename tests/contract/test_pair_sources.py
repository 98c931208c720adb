"""What is asked of every row of SEGMENTATION_SETS and DEPTH_SETS: a new row is tested once `MAKERS` knows it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from quietvit.data.decode import UnreadableImage
from quietvit_eval.dense_data.pairs import CLASSES, IGNORE, PAIR_SETS, PairSource, open_pairs
from quietvit_eval.extract import Reading
from quietvit_eval.pair_data import PairData, choose_pairs

HEIGHT, WIDTH = 20, 30
COUNTS = {"train": 5, "val": 3}

Opened = tuple[str | None, dict[str, Any]]


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_pairs(root: Path, image: str, target: str, make: Callable[[int], np.ndarray], **words: str) -> None:
    """Pairs of both splits. {split} and {name} are filled in; `words` are the layout's names of the splits."""
    for split, count in COUNTS.items():
        for i in range(count):
            seed = 100 * (split == "val") + i
            write(root / image.format(split=words[split], name=i), noise(seed, HEIGHT, WIDTH, 3))
            write(root / target.format(split=words[split], name=i), make(seed))


def classes_of(num: int) -> Callable[[int], np.ndarray]:
    return lambda seed: noise(seed + 1, HEIGHT, WIDTH) % num


def depth_of(seed: int) -> np.ndarray:
    return noise(seed + 1, HEIGHT, WIDTH).astype(np.uint16) * 30


def make_ade20k(root: Path) -> Opened:
    pattern = "ADEChallengeData2016/{}/{{split}}/ADE_{{name}}.{}"
    write_pairs(
        root, pattern.format("images", "jpg"), pattern.format("annotations", "png"), classes_of(151),
        train="training", val="validation",
    )  # fmt: skip
    return str(root), {}


def make_voc(root: Path) -> Opened:
    voc = root / "VOCdevkit" / "VOC2012"
    write_pairs(
        voc, "JPEGImages/{split}_{name}.jpg", "SegmentationClass/{split}_{name}.png", classes_of(21),
        train="2007", val="2008",
    )  # fmt: skip
    for split, word in (("train", "2007"), ("val", "2008")):
        names = voc / "ImageSets" / "Segmentation" / f"{split}.txt"
        names.parent.mkdir(parents=True, exist_ok=True)
        names.write_text("\n".join(f"{word}_{i}" for i in range(COUNTS[split])))
    return str(root), {}


def make_cityscapes(root: Path) -> Opened:
    write_pairs(
        root, "leftImg8bit/{split}/ulm/{name}_leftImg8bit.png", "gtFine/{split}/ulm/{name}_gtFine_labelTrainIds.png",
        classes_of(19), train="train", val="val",
    )  # fmt: skip
    return str(root), {}


def make_masks(root: Path) -> Opened:
    write_pairs(
        root, "images/{split}/{name}.jpg", "annotations/{split}/{name}.png", classes_of(12), train="train", val="val"
    )
    return str(root), {"num_classes": 11, "ignore": 11}


def make_depths(root: Path) -> Opened:
    write_pairs(root, "rgb/{split}/{name}.jpg", "depth/{split}/{name}.png", depth_of, train="train", val="val")
    return str(root), {"scale": 1000}


def make_lists(root: Path, train: str, val: str) -> Opened:
    write_pairs(root, "{split}/rgb_{name}.jpg", "{split}/sync_depth_{name}.png", depth_of, train="a", val="b")
    for name, split, word in ((train, "train", "a"), (val, "val", "b")):
        lines = [f"/{word}/rgb_{i}.jpg /{word}/sync_depth_{i}.png 518.8579" for i in range(COUNTS[split])]
        (root / name).write_text("\n".join(lines))
    return str(root), {}


def make_mat(root: Path) -> Opened:
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w", userblock_size=512) as mat:
        mat["images"] = noise(0, 8, 3, WIDTH, HEIGHT)
        mat["rawDepths"] = noise(1, 8, WIDTH, HEIGHT).astype(np.float32) / 30
    scipy.io.savemat(root / "splits.mat", {"trainNdxs": np.arange(1, 6)[:, None], "testNdxs": [[6], [7], [8]]})
    return str(root), {}


def make_scenes(root: Path) -> Opened:
    return None, {"num_images": 5, "image_size": 24}


MAKERS: dict[tuple[str, str], Callable[[Path], Opened]] = {
    ("classes", "auto"): make_masks,
    ("classes", "ade20k"): make_ade20k,
    ("classes", "voc"): make_voc,
    ("classes", "cityscapes"): make_cityscapes,
    ("classes", "folders"): make_masks,
    ("classes", "scenes"): make_scenes,
    ("metres", "auto"): make_depths,
    ("metres", "nyu"): lambda root: make_lists(root, "nyu_train.txt", "nyu_test.txt"),
    ("metres", "nyu_mat"): make_mat,
    ("metres", "sunrgbd"): lambda root: make_lists(root, "SUNRGBD_train_splits.txt", "SUNRGBD_val_splits.txt"),
    ("metres", "folders"): make_depths,
    ("metres", "scenes"): make_scenes,
}
ROWS = [(target, kind) for target, table in PAIR_SETS.items() for kind in table]


def test_every_row_has_a_maker() -> None:
    assert set(MAKERS) == set(ROWS)


@pytest.fixture(params=ROWS, ids="-".join)
def row(request: pytest.FixtureRequest) -> tuple[str, str]:
    pair: tuple[str, str] = request.param
    return pair


@pytest.fixture
def opener(row: tuple[str, str], tmp_path: Path) -> Callable[[str], PairSource]:
    path, options = MAKERS[row](tmp_path)
    return lambda split: open_pairs(*row, path, split=split, **options)


def test_meets_the_protocol(opener: Callable[[str], PairSource], row: tuple[str, str]) -> None:
    source = opener("train")
    assert isinstance(source, PairSource)
    assert source.kind == row[0]
    assert len(source) == 5
    assert "5" in source.name or row[1] == "scenes"
    assert bool(source.class_names) == (source.kind == CLASSES)


def test_images_and_targets_fit_and_stay_the_same(opener: Callable[[str], PairSource]) -> None:
    source = opener("train")
    seen: set[int] = set()
    for index in range(len(source)):
        (image, target), (again, target_again) = source.load(index), source.load(index)
        assert image.dtype == np.uint8
        assert image.shape == (*target.shape, 3)
        assert image.flags.c_contiguous
        np.testing.assert_array_equal(image, again)
        np.testing.assert_array_equal(target, target_again)
        if source.kind == CLASSES:
            assert target.dtype == np.int16
            assert target.min() >= IGNORE
            assert target.max() < len(source.class_names)
            seen |= set(np.unique(target).tolist())
        else:
            assert target.dtype == np.float32
            assert np.isfinite(target).all()
            assert target.min() >= 0
            assert 0.1 < target.max() < 100
    if source.kind == CLASSES:
        assert len(seen - {IGNORE}) > 2


def test_arrays_belong_to_the_caller(opener: Callable[[str], PairSource]) -> None:
    """Augmentation may write into them."""
    source = opener("train")
    for array in source.load(0):
        array[:] = 0
    assert source.load(0)[0].std() > 1


def test_names_are_distinct_and_relative(opener: Callable[[str], PairSource], tmp_path: Path) -> None:
    source = opener("train")
    names = {source.item_name(index) for index in range(len(source))}
    assert len(names) == len(source)
    assert not any(str(tmp_path) in name for name in names)


def test_splits_are_other_data_with_the_same_classes(opener: Callable[[str], PairSource], row: tuple[str, str]) -> None:
    train, val, test = (opener(split) for split in ("train", "val", "test"))
    assert val.class_names == train.class_names
    assert val.fingerprint() != train.fingerprint()
    assert not np.array_equal(val.load(0)[0], train.load(0)[0])
    if row[1] != "scenes":  # which has three splits: the others let one stand in for the missing one, and say so
        assert test.fingerprint() == val.fingerprint()
        assert ("no split" in val.name) != ("no split" in test.name)
    with pytest.raises(ValueError, match="split"):
        opener("dev")


def test_fingerprints_are_hex_and_the_same_anywhere(row: tuple[str, str], tmp_path: Path) -> None:
    prints = set()
    for folder in ("here", "there/and/deeper"):
        (tmp_path / folder).mkdir(parents=True)
        path, options = MAKERS[row](tmp_path / folder)
        prints.add(open_pairs(*row, path, split="train", **options).fingerprint())
    assert len(prints) == 1
    assert len(bytes.fromhex(prints.pop())) >= 8


def test_travels_to_workers(opener: Callable[[str], PairSource]) -> None:
    source = opener("train")
    source.load(0)
    copy = pickle.loads(pickle.dumps(source))
    for mine, its in zip(source.load(4), copy.load(4), strict=True):
        np.testing.assert_array_equal(mine, its)
    assert copy.fingerprint() == source.fingerprint()


def test_two_workers_read_what_one_process_reads(opener: Callable[[str], PairSource]) -> None:
    """The parent has read before its workers are forked."""
    source = opener("train")
    source.load(0)
    part = choose_pairs(source, None, 0)
    data = PairData(part, part, None, Reading(workers=2), 0, torch.device("cpu"), None, None)
    pairs = list(data.pairs("test", "reading"))
    assert [p.name for p in pairs] == [source.item_name(i) for i in range(5)]
    for pair in pairs:
        image, target = source.load(pair.row)
        np.testing.assert_array_equal(pair.image, image)
        np.testing.assert_array_equal(pair.target, target)


def test_outside_of_the_data_there_is_nothing(opener: Callable[[str], PairSource]) -> None:
    source = opener("train")
    with pytest.raises(IndexError):
        source.load(len(source))


def test_files_that_vanish_are_bad_pairs(
    opener: Callable[[str], PairSource], row: tuple[str, str], tmp_path: Path
) -> None:
    if row[1] == "scenes":
        pytest.skip("scenes has no files")
    source = opener("train")
    for file in tmp_path.rglob("*.*"):
        if file.is_file():
            file.unlink()
    with pytest.raises(UnreadableImage) as error:
        source.load(2)
    assert error.value.name == source.item_name(2)
    assert error.value.reason


@pytest.mark.parametrize(("target", "kind"), ROWS)
def test_a_path_is_needed_and_must_be_there(target: str, kind: str, tmp_path: Path) -> None:
    if kind == "scenes":
        with pytest.raises(ValueError, match="takes no path"):
            open_pairs(target, kind, str(tmp_path), split="train")
        return
    with pytest.raises(ValueError, match="needs a path"):
        open_pairs(target, kind, None, split="train")
    with pytest.raises(ValueError, match="does not exist"):
        open_pairs(target, kind, str(tmp_path / "none"), split="train")
    with pytest.raises(ValueError, match=r"(?s)looked|missing|has no|found"):
        open_pairs(target, kind, str(tmp_path), split="train")
