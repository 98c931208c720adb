"""Segmentation sets as they lie on disk: each layout in miniature, read pixel by pixel, and broken in many ways."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from quietvit.data.decode import UnreadableImage
from quietvit_eval.dense_data.class_map import ClassMap, make_class_map
from quietvit_eval.dense_data.numbers import Unfit, read_numbers
from quietvit_eval.dense_data.pairs import CLASSES, IGNORE, PairSource, open_pairs

CAMVID = Path(__file__).parents[3] / "shared" / "data" / "camvid.tar"
HEIGHT, WIDTH = 6, 8


def numbers(*values: int) -> np.ndarray:
    """An annotation that repeats the values row by row."""
    return np.resize(np.array(values, np.uint8), (HEIGHT, WIDTH))


def photo(path: Path, seed: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    """Writes a picture; .png keeps the colours that are returned."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def grey(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def palette(path: Path, values: np.ndarray) -> None:
    """A PNG of indices, its colours having nothing to do with them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    image.putpalette(np.random.default_rng(1).integers(0, 256, 768, dtype=np.uint8).tobytes())
    image.save(path)


def opened(kind: str, root: Path, split: str = "train", **options: Any) -> PairSource:
    return open_pairs(CLASSES, kind, str(root), split=split, **options)


def targets(source: PairSource) -> list[np.ndarray]:
    return [source.load(index)[1] for index in range(len(source))]


# ---- ADE20K


def make_ade(root: Path) -> Path:
    root = root / "ADEChallengeData2016"
    for folder, stem, count in (("training", "ADE_train", 3), ("validation", "ADE_val", 2)):
        for i in range(1, count + 1):
            photo(root / "images" / folder / f"{stem}_{i:08d}.jpg", i)
            grey(root / "annotations" / folder / f"{stem}_{i:08d}.png", numbers(0, 1, 150, 255, i))
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName", *(f"{i}\t0.1\t9\t1\t0\tthing {i}, other" for i in range(1, 151))]
    (root / "objectInfo150.txt").write_text("\n".join(lines))
    return root


def test_ade20k_ignores_0_and_255_and_counts_classes_from_1(tmp_path: Path) -> None:
    root = make_ade(tmp_path)
    train, val = opened("ade20k", root), opened("ade20k", tmp_path, "val")
    assert (len(train), len(val), val.kind) == (3, 2, "classes")
    for i, target in enumerate(targets(train), start=1):
        assert target.dtype == np.int16
        np.testing.assert_array_equal(target, np.resize([IGNORE, 0, 149, IGNORE, i - 1], (HEIGHT, WIDTH)))
    assert val.class_names[0] == "thing 1"
    assert len(val.class_names) == 150
    assert val.item_name(1) == "images/validation/ADE_val_00000002.jpg"
    assert val.name == f"ade20k:{root} val (2 pairs)"
    test = opened("ade20k", root, "test")
    assert test.name.endswith("val (2 pairs; there is no split 'test')")
    assert test.fingerprint() == val.fingerprint() != train.fingerprint()
    (root / "objectInfo150.txt").unlink()
    assert opened("ade20k", root).class_names[149] == "149"


def test_ade20k_lists_choose_the_images(tmp_path: Path) -> None:
    root = make_ade(tmp_path)
    (root / "ADE20K_object150_train.txt").write_text("training/ADE_train_00000003.jpg\nADE_train_00000001.jpg\n")
    source = opened("ade20k", root)
    assert [source.item_name(i)[-5] for i in range(len(source))] == ["1", "3"]
    assert "of ADE20K_object150_train.txt" in source.name
    (root / "ADE20K_object150_train.txt").write_text("training/ADE_train_00000009.jpg\n")
    with pytest.raises(ValueError, match=r"names 1 files that are not in .*ADE_train_00000009"):
        opened("ade20k", root)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: (r / "annotations/training/ADE_train_00000002.png").unlink(), "1 of 3 images .*ADE_train_00000002"),
        (lambda r: (r / "images/training/ADE_train_00000002.jpg").unlink(), "1 of 3 files .*no image .*00000002"),
        (lambda r: (r / "annotations/training").rename(r / "gone"), "training is missing; .*SceneParsing"),
        (lambda r: photo(r / "images/training/ADE_train_00000002.png"), "differ in their extension only"),
        (lambda r: (r / "objectInfo150.txt").write_text("1\t0\t0\t0\t0\twall"), "names 1"),
        (lambda r: [p.unlink() for p in (r / "images/training").iterdir()], "no images in"),
    ],
)
def test_broken_ade20k(tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    root = make_ade(tmp_path)
    spoil(root)
    with pytest.raises(ValueError, match=message):
        opened("ade20k", root)


def test_the_full_ade20k_is_not_the_challenge(tmp_path: Path) -> None:
    root = make_ade(tmp_path)
    for i in range(1, 4):
        photo(root / f"annotations/training/ADE_train_{i:08d}.png")
    with pytest.raises(ValueError, match=r"colours \(RGB\).*SceneParsing release"):
        opened("ade20k", root)


# ---- Pascal VOC


def make_voc(root: Path, year: int = 2012) -> Path:
    voc = root / "VOCdevkit" / f"VOC{year}"
    lists = voc / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (voc / "Annotations").mkdir()
    for i, name in enumerate(("2007_01", "2007_02", "2008_03", "2008_04")):
        photo(voc / "JPEGImages" / f"{name}.jpg", i)
        (voc / "Annotations" / f"{name}.xml").write_text(f"<annotation><filename>{name}.jpg</filename></annotation>")
        if name != "2008_04":
            palette(voc / "SegmentationClass" / f"{name}.png", numbers(0, 20, 255, i))
        grey(voc / "SegmentationClassAug" / f"{name}.png", numbers(5, 255, i))
    (lists / "train.txt").write_text("2007_01\n2007_02\n")
    (lists / "val.txt").write_text("2008_03\n")
    (lists / "test.txt").write_text("2008_04\n")
    (lists / "train_aug.txt").write_text("2007_01\n2008_04\n")
    return voc


def test_voc_reads_palette_indices(tmp_path: Path) -> None:
    voc = make_voc(tmp_path)
    for root in (tmp_path, tmp_path / "VOCdevkit", voc):
        source = opened("voc", root)
        assert len(source) == 2
        for i, target in enumerate(targets(source)):
            np.testing.assert_array_equal(target, np.resize([0, 20, IGNORE, i], (HEIGHT, WIDTH)))
    assert source.class_names[0] == "background"
    assert source.class_names[20] == "tvmonitor"
    assert len(source.class_names) == 21
    assert opened("voc", voc, "test").name.endswith("val (1 pairs; there is no split 'test')")


def test_voc_2007_has_a_test_split(tmp_path: Path) -> None:
    voc = make_voc(tmp_path, 2007)
    palette(voc / "SegmentationClass" / "2008_04.png", numbers(7))
    source = opened("voc", tmp_path, "test", year=2007)
    assert source.item_name(0) == "JPEGImages/2008_04.jpg"
    assert (targets(source)[0] == 7).all()
    with pytest.raises(ValueError, match=r"no VOC2012/ .*found VOCdevkit/"):
        opened("voc", tmp_path)


def test_voc_with_the_annotations_of_sbd(tmp_path: Path) -> None:
    voc = make_voc(tmp_path)
    source = opened("voc", tmp_path, aug=True)
    assert [source.item_name(i) for i in range(2)] == ["JPEGImages/2007_01.jpg", "JPEGImages/2008_04.jpg"]
    np.testing.assert_array_equal(targets(source)[1], np.resize([5, IGNORE, 3], (HEIGHT, WIDTH)))
    assert "SegmentationClassAug" in source.name
    np.testing.assert_array_equal(  # validation stays as it is
        targets(opened("voc", tmp_path, "val", aug=True))[0], np.resize([0, 20, IGNORE, 2], (HEIGHT, WIDTH))
    )
    lists = voc / "ImageSets" / "Segmentation"
    (lists / "train_aug.txt").write_text("2007_01\n2008_03\n")
    with pytest.raises(ValueError, match="share 1 images: 2008_03"):
        opened("voc", tmp_path, aug=True)
    (lists / "train_aug.txt").unlink()
    with pytest.raises(ValueError, match="none of train_aug"):
        opened("voc", tmp_path, aug=True)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda v: (v / "ImageSets/Segmentation/train.txt").unlink(), "train.txt: No such file"),
        (lambda v: (v / "ImageSets/Segmentation/train.txt").write_text("\n"), "train.txt names nothing"),
        (lambda v: (v / "ImageSets/Segmentation/train.txt").write_bytes(b"\xff\xfe"), "not a text file in UTF-8"),
        (
            lambda v: (v / "ImageSets/Segmentation/train.txt").write_text("2007_01\nx\n"),
            r"train.txt names 2 files \(of 4\) .*first: JPEGImages/x.jpg",
        ),
        (lambda v: (v / "SegmentationClass").rename(v / "gone"), "the first: SegmentationClass/2007_01.png"),
    ],
)
def test_broken_voc(tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    voc = make_voc(tmp_path)
    spoil(voc)
    with pytest.raises(ValueError, match=message):
        opened("voc", tmp_path)


# ---- Cityscapes

# The benchmark's table, written down apart from the code: id, trainId (255: not scored).
LABELS = (
    "0:255 1:255 2:255 3:255 4:255 5:255 6:255 7:0 8:1 9:255 10:255 11:2 12:3 13:4 14:255 15:255 16:255 17:5 18:255 "
    "19:6 20:7 21:8 22:9 23:10 24:11 25:12 26:13 27:14 28:15 29:255 30:255 31:16 32:17 33:18 255:255"
)


def make_cityscapes(root: Path, ends: tuple[str, ...] = ("labelTrainIds", "labelIds")) -> Path:
    rule = {int(a): int(b) for a, b in (pair.split(":") for pair in LABELS.split())}
    ids = numbers(*rule)
    train_ids = np.vectorize(rule.get)(ids).astype(np.uint8)
    for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "lindau")):
        stem = f"{city}_000000_000019"
        photo(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", len(city))
        folder = root / "gtFine" / split / city
        for end in ends:
            grey(folder / f"{stem}_gtFine_{end}.png", ids if end == "labelIds" else train_ids)
        grey(folder / f"{stem}_gtFine_instanceIds.png", numbers(99))
        (folder / f"{stem}_gtFine_polygons.json").write_text("{}")
    return root


def test_cityscapes_from_train_ids_and_from_label_ids(tmp_path: Path) -> None:
    trained = opened("cityscapes", make_cityscapes(tmp_path / "a"))
    plain = opened("cityscapes", make_cityscapes(tmp_path / "b", ("labelIds",)))
    assert (len(trained), len(trained.class_names)) == (2, 19)
    assert "from labelIds" in plain.name
    stored = np.asarray(Image.open(next((tmp_path / "a").rglob("*TrainIds.png")))).astype(int)
    for a, b in zip(targets(trained), targets(plain), strict=True):
        np.testing.assert_array_equal(a, np.where(stored == 255, IGNORE, stored))
        np.testing.assert_array_equal(a, b)
    assert trained.class_names[18] == "bicycle"
    assert trained.item_name(0) == "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png"
    assert opened("cityscapes", tmp_path / "a", "test").name.endswith("val (1 pairs; there is no split 'test')")


def test_broken_cityscapes(tmp_path: Path) -> None:
    root = make_cityscapes(tmp_path)
    next(root.rglob("bochum*TrainIds.png")).unlink()
    with pytest.raises(ValueError, match=r"1 of 2 images .*bochum"):
        opened("cityscapes", root)
    for file in root.rglob("*label*Ids.png"):
        file.unlink()
    with pytest.raises(ValueError, match=r"neither .*labelTrainIds.png nor"):
        opened("cityscapes", root)
    (root / "gtFine").rename(root / "gtCoarse")
    with pytest.raises(ValueError, match="gtFine/train is missing; found gtCoarse/, leftImg8bit/"):
        opened("cityscapes", root)


# ---- folders


def make_folders(root: Path, images: str = "images/training", masks: str = "annotations/training") -> Path:
    for i, name in enumerate(("a", "b", "deep/c")):
        photo(root / images / f"{name}.png", i)
        grey(root / masks / f"{name}.png", numbers(0, 1, 2, 3, i))
    return root


@pytest.mark.parametrize("word", ["train", "training"])
@pytest.mark.parametrize("pattern", ["{0}/{1}", "{1}/{0}"])
def test_folders_by_any_usual_name(tmp_path: Path, word: str, pattern: str) -> None:
    make_folders(tmp_path, pattern.format("images", word), pattern.format("annotations", word))
    source = opened("folders", tmp_path, num_classes=3, ignore=3)
    assert len(source) == 3
    for i in range(3):
        image, target = source.load(i)
        np.testing.assert_array_equal(image, photo(tmp_path / "x.png", i))
        np.testing.assert_array_equal(target, np.resize([0, 1, 2, IGNORE, i], (HEIGHT, WIDTH)))
    assert source.class_names == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("there", "asked"), [("val", "val"), ("valid", "val"), ("testing", "test"), ("validation", "val")]
)
def test_synonyms_and_stand_ins(tmp_path: Path, there: str, asked: str) -> None:
    make_folders(tmp_path, f"images/{there}", f"annotations/{there}")
    for split in ("val", "test"):
        name = opened("folders", tmp_path, split, num_classes=4).name
        assert name.endswith("(3 pairs)" if split == asked else f"there is no split {split!r})")
    with pytest.raises(ValueError, match=r"for split 'train': looked for images/\(train\|training\)/ and .*found"):
        opened("folders", tmp_path, num_classes=4)
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        opened("folders", tmp_path, "dev", num_classes=4)


def test_images_of_one_split_never_meet_annotations_of_another(tmp_path: Path) -> None:
    make_folders(tmp_path, "images/val", "annotations/test")
    with pytest.raises(ValueError, match="no images and annotations for split 'val'"):
        opened("folders", tmp_path, "val", num_classes=4)


def test_own_folder_names_and_suffixes(tmp_path: Path) -> None:
    for i, name in enumerate("ab"):
        photo(tmp_path / "left" / "training" / f"{name}_rgb.png", i)
        grey(tmp_path / "gt" / "train" / f"{name}_ids.png", numbers(i))
        grey(tmp_path / "gt" / "train" / f"{name}_instances.png", numbers(200))
    source = opened(
        "folders", tmp_path, images="left/{split}", annotations="gt/{split}", image_suffix="_rgb",
        annotation_suffix="_ids", num_classes=2,
    )  # fmt: skip
    assert [int(t.max()) for t in targets(source)] == [0, 1]
    with pytest.raises(ValueError, match="must be relative"):
        opened("folders", tmp_path, images="/left", annotations="gt/{split}", num_classes=2)


def test_undivided_folders_with_lists(tmp_path: Path) -> None:
    make_folders(tmp_path, "images", "annotations")
    (tmp_path / "train.txt").write_text("# ours\na\nimages/deep/c.png\n")
    (tmp_path / "test.txt").write_text("b.png\n")
    assert [opened("folders", tmp_path, num_classes=4).item_name(i) for i in (0, 1)] == [
        "images/a.png",
        "images/deep/c.png",
    ]
    assert opened("folders", tmp_path, "val", num_classes=4).name.endswith("test (1 pairs; there is no split 'val')")
    (tmp_path / "train.txt").write_text("a\nc\n")  # deep/c is another name
    with pytest.raises(ValueError, match=r"train.txt names 1 files that are not in .*: c"):
        opened("folders", tmp_path, num_classes=4)
    (tmp_path / "train.txt").unlink()
    with pytest.raises(ValueError, match=r"undivided folders with a list \(train\|training\).txt"):
        opened("folders", tmp_path, num_classes=4)


def test_class_names_as_list_and_as_file(tmp_path: Path) -> None:
    make_folders(tmp_path)
    (tmp_path / "names.txt").write_text("sky\nroad\ncar\ntree\n")
    for given in (["sky", "road", "car", "tree"], "names.txt", tmp_path / "names.txt"):
        assert opened("folders", tmp_path, class_names=given).class_names == ["sky", "road", "car", "tree"]
    with pytest.raises(ValueError, match="num_classes is 5, but there are 4 class names"):
        opened("folders", tmp_path, class_names="names.txt", num_classes=5)
    with pytest.raises(ValueError, match=r"none.txt: No such file"):
        opened("folders", tmp_path, class_names="none.txt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "set num_classes .*the first 3 annotations hold 0, 1, 2, 3"),
        (
            {"num_classes": 3},
            "holds 3, which is no class .*0 to 2; ignored: 255.*num_classes, ignore .* and reduce_zero",
        ),
        ({"num_classes": 2, "reduce_zero": True}, "holds 3, which is no class"),
        ({"num_classes": 0}, "set num_classes"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"num_classes": "four"}, "num_classes is 'four'"),
        ({"num_classes": 4, "ignore": "3"}, "ignore holds '3'; whole numbers"),
        ({"num_classes": 2, "ignore": [0, 1]}, "leaves none of the 2 classes"),
        ({"num_classes": 4, "ignore": 1 << 20}, "between -32768 and 65535"),
        ({"num_clases": 4}, "no option 'num_clases'; it has: images, annotations, num_classes"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    make_folders(tmp_path)
    with pytest.raises(ValueError, match=message):
        opened("folders", tmp_path, **options)


def test_the_rule_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    make_folders(tmp_path / "a")
    make_folders(tmp_path / "b")
    prints = [opened("folders", tmp_path / "a", num_classes=4, ignore=n).fingerprint() for n in (255, 3, [3, 255])]
    assert len(set(prints)) == 3
    assert opened("folders", tmp_path / "b", num_classes=4).fingerprint() == prints[0]
    (tmp_path / "b/annotations/training/a.png").write_bytes(b"x")
    assert opened("folders", tmp_path / "b", num_classes=4).fingerprint() != prints[0]


# ---- numbers and classes


def test_the_rule_of_ade20k() -> None:
    mapped = make_class_map(150, [255], reduce_zero=True).apply(np.array([[0, 1, 150, 255]], np.uint8))
    assert mapped.tolist() == [[IGNORE, 0, 149, IGNORE]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_class_maps_against_a_loop(dtype: type) -> None:
    rule = {0: 4, 3: IGNORE, 7: 0, 200: 2, 255: IGNORE} | ({-1: IGNORE, 60_000: 1} if dtype is np.int32 else {})
    values = np.random.default_rng(0).choice(list(rule), (9, 11)).astype(dtype)
    wanted = [[rule[int(v)] for v in row] for row in values]
    assert ClassMap(rule).apply(values).tolist() == wanted
    for stray in (4, 201, 254):
        values[4, 4] = stray
        with pytest.raises(Unfit, match=f"holds {stray}, which is no class .*0, 7, 200"):
            ClassMap(rule).apply(values)


def test_ignored_numbers_win_over_classes() -> None:
    assert make_class_map(4, [1, 77]).apply(np.array([[0, 1, 3, 77]])).tolist() == [[0, IGNORE, 3, IGNORE]]


def small_png(path: Path, values: np.ndarray, bits: int) -> None:
    """A grey PNG of 1, 2 or 4 bits, which Pillow does not write."""
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % (8 // bits)))).astype(np.uint8)
    binary = np.unpackbits(padded[..., None], axis=2)[..., -bits:]
    rows = np.packbits(binary.reshape(len(values), -1), axis=1)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))),
        (b"IEND", b""),
    ]
    packed = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_small_pngs_are_not_stretched(tmp_path: Path, bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 2**bits, (5, 7))
    small_png(tmp_path / "a.png", values, bits)
    np.testing.assert_array_equal(read_numbers(tmp_path / "a.png"), values)


@pytest.mark.parametrize("end", ["png", "tif", "bmp", "pgm"])
def test_every_format_of_numbers(tmp_path: Path, end: str) -> None:
    values = np.random.default_rng(0).integers(0, 256, (5, 7), dtype=np.uint8)
    grey(tmp_path / f"a.{end}", values)
    np.testing.assert_array_equal(read_numbers(tmp_path / f"a.{end}"), values)
    if end in ("png", "tif"):
        wide = values.astype(np.uint16) * 200
        grey(tmp_path / f"b.{end}", wide)
        np.testing.assert_array_equal(read_numbers(tmp_path / f"b.{end}"), wide)


def test_a_png_cut_anywhere_is_never_read_wrongly(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (9, 7), dtype=np.uint8)
    grey(tmp_path / "a.png", values)
    whole = (tmp_path / "a.png").read_bytes()
    refused = 0
    for length in range(len(whole)):
        (tmp_path / "a.png").write_bytes(whole[:length])
        try:
            np.testing.assert_array_equal(read_numbers(tmp_path / "a.png"), values)
        except ValueError:
            refused += 1
    assert refused >= len(whole) - 20  # checksums and the end marker, behind the last pixel


def inverted_tiff(path: Path) -> None:
    Image.fromarray(numbers(0, 1)).save(path, "TIFF", tiffinfo={262: 0})


# A change to the second annotation of three, and why the pair cannot be read.
SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "damaged"),
    "empty": (lambda p: p.write_bytes(b""), "damaged"),
    "no image": (lambda p: p.write_text("hello"), "damaged, or not an image"),
    "gone": (lambda p: p.unlink(), "No such file"),
    "colours": (lambda p: photo(p), r"colours \(RGB\)"),
    "transparency": (lambda p: Image.fromarray(np.zeros((6, 8, 2), np.uint8), "LA").save(p), r"colours \(LA\)"),
    "JPEG": (lambda p: Image.fromarray(numbers(1)).save(p, "JPEG"), "compression changes numbers"),
    "floats": (lambda p: Image.fromarray(numbers(1).astype(np.float32)).save(p, "TIFF"), "floating-point"),
    "inverted": (inverted_tiff, "inverted grey"),
    "smaller": (lambda p: grey(p, np.zeros((3, 4), np.uint8)), "image has 8 x 6 pixels, its target 4 x 3"),
    "turned": (lambda p: grey(p, np.zeros((8, 6), np.uint8)), "image has 8 x 6 pixels, its target 6 x 8"),
    "stray": (lambda p: grey(p, numbers(0, 9, 201)), "holds 9, 201, which is no class"),
    "16 bits": (lambda p: grey(p, np.full((6, 8), 4000, np.uint16)), "holds 4000"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_one_bad_annotation_is_one_bad_pair(tmp_path: Path, how: str) -> None:
    spoil, message = SPOILT[how]
    make_folders(tmp_path)
    source = opened("folders", tmp_path, num_classes=4)
    spoil(tmp_path / "annotations" / "training" / "b.png")
    for again in (source, opened("folders", tmp_path, num_classes=4) if how != "gone" else source):
        with pytest.raises(UnreadableImage, match=message) as error:
            again.load(1)
        assert error.value.name == "images/training/b.png"
        for index in (0, 2):
            again.load(index)


def test_a_broken_image_is_one_bad_pair(tmp_path: Path) -> None:
    make_folders(tmp_path)
    file = tmp_path / "images" / "training" / "b.png"
    source = opened("folders", tmp_path, num_classes=4)
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(UnreadableImage, match=r"images/training/b.png: "):
        source.load(1)
    file.unlink()
    with pytest.raises(UnreadableImage, match="No such file"):
        source.load(1)


@pytest.mark.parametrize("end", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_images_fit_their_annotations_either_way(tmp_path: Path, orientation: int, end: str) -> None:
    """Annotations drawn on the upright picture, and annotations of the stored pixels."""
    make_folders(tmp_path)
    stored = np.repeat(np.repeat(np.arange(12).reshape(3, 4, 1) * 20, 8, 0), 8, 1).repeat(3, 2).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "images" / "training" / f"b.{end}"
    (tmp_path / "images" / "training" / "b.png").unlink()
    Image.fromarray(stored).save(file, exif=exif, quality=95)
    upright = {1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1]} | {
        5: stored.transpose(1, 0, 2), 6: np.rot90(stored, -1), 7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(stored),
    }  # fmt: skip
    shown = upright[orientation]
    wanted = [shown, stored if orientation >= 5 else shown]
    for pixels, size in zip(wanted, (shown.shape[:2], stored.shape[:2]), strict=True):
        grey(tmp_path / "annotations" / "training" / "b.png", np.ones(size, np.uint8))
        image, target = opened("folders", tmp_path, num_classes=4).load(1)
        assert image.shape[:2] == target.shape
        assert image.flags.c_contiguous
        assert np.abs(image.astype(int) - pixels).mean() < 3


# ---- auto


def test_layouts_are_found_out(tmp_path: Path) -> None:
    makers: dict[str, Callable[[Path], Path]] = {
        "ade20k": make_ade, "voc": make_voc, "cityscapes": make_cityscapes, "folders": make_folders,
    }  # fmt: skip
    for kind, make in makers.items():
        make(tmp_path / kind)
        options = {"num_classes": 4} if kind == "folders" else {}
        source = opened("auto", tmp_path / kind, **options)
        assert source.name.startswith(f"{kind}:")
        assert source.fingerprint() == opened(kind, tmp_path / kind, **options).fingerprint()
    with pytest.raises(ValueError, match="layout 'ade20k' has no option 'num_classes'; it has: none"):
        opened("auto", tmp_path / "ade20k", num_classes=4)


def test_nothing_that_is_known(tmp_path: Path) -> None:
    (tmp_path / "stuff").mkdir()
    with pytest.raises(ValueError, match=r"looked for ADEChallengeData2016/.*; found stuff/"):
        opened("auto", tmp_path)
    with pytest.raises(ValueError, match=r"does not exist; looked for"):
        opened("auto", tmp_path / "none")
    for kind in ("ade20k", "voc", "cityscapes", "folders"):
        with pytest.raises(ValueError, match="does not exist"):
            opened(kind, tmp_path / "none")
        with pytest.raises(ValueError, match="needs a path; only 'scenes' goes without"):
            open_pairs(CLASSES, kind, None, split="train")
    with pytest.raises(ValueError, match=r"unknown layout 'ade20'.*did you mean 'ade20k'"):
        opened("ade20", tmp_path)


@pytest.mark.skipif(not CAMVID.exists(), reason="the CamVid archive is not here")
def test_camvid(tmp_path: Path) -> None:
    with tarfile.open(CAMVID) as archive:
        for split in ("training", "validation"):
            names = [n for n in archive.getnames() if n.startswith(f"annotations/{split}/")][:3]
            names += [n.replace("annotations", "images").replace(".png", ".jpg") for n in names]
            archive.extractall(tmp_path, [archive.getmember(name) for name in names], filter="data")
        member = archive.extractfile(names[0])
        assert member is not None
        stored = np.asarray(Image.open(io.BytesIO(member.read()))).astype(int)
    for kind in ("auto", "folders"):
        train, val = (opened(kind, tmp_path, split, num_classes=11, ignore=11) for split in ("train", "val"))
        assert (len(train), len(val)) == (3, 3)
    image, target = val.load(0)
    assert image.shape == (360, 480, 3)
    assert 11 in stored
    np.testing.assert_array_equal(target, np.where(stored == 11, IGNORE, stored))
    with pytest.raises(ValueError, match="holds 11, which is no class"):
        opened("folders", tmp_path, num_classes=11)
