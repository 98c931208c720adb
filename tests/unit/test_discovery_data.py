"""Boxes in XML, CSV and JSON mean the same pixels, splits are what they say, wrong files are explained."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from quietvit.data.decode import UnreadableImage
from quietvit_eval.dense_data.pairs import PairSource, open_pairs
from quietvit_eval.discovery.data import BOX_SETS, BOXES, BoxFiles, open_boxes, part_of

WIDTH, HEIGHT = 30, 20
# By name: boxes from the upper left corner of the image.
TRUTH: dict[str, list[tuple[int, int, int, int]]] = {
    "a": [(0, 0, 10, 20)],
    "b": [(2, 3, 12, 13), (20, 10, 30, 20)],
    "c": [],
    **{f"d{i}": [(i, 0, i + 5, 5)] for i in range(8)},
}
NAMES = sorted(TRUTH)
FULL = [name for name in NAMES if TRUTH[name]]


def images(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(NAMES):
        pixels = np.random.default_rng(i).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.jpg", quality=95)


def xml(boxes: list[tuple[int, int, int, int]], *, size: tuple[int, int] = (WIDTH, HEIGHT)) -> str:
    objects = "".join(
        f"<object><name>x</name><difficult>{i % 2}</difficult><truncated>1</truncated>"
        f"<bndbox><xmax>{r}</xmax><xmin>{x + 1}</xmin><ymin>{t + 1}.0</ymin><ymax>{b}</ymax></bndbox>"
        "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>"
        for i, (x, t, r, b) in enumerate(boxes)
    )
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"<annotation><filename>elsewhere.jpg</filename>{sides}{objects}</annotation>"


def make_voc(root: Path, **lists: list[str]) -> str:
    voc = root / "VOCdevkit" / "VOC2007"
    images(voc / "JPEGImages")
    (voc / "Annotations").mkdir()
    for name, boxes in TRUTH.items():
        (voc / "Annotations" / f"{name}.xml").write_text(xml(boxes))
    (voc / "ImageSets" / "Main").mkdir(parents=True)
    for split, names in lists.items():
        (voc / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{n}  1\n" for n in names))
    return str(root)


def make_csv(root: Path, first: int = 0, ending: str = ".jpg") -> str:
    images(root / "images")
    lines = ["filename,width,height,class,xmin,ymin,xmax,ymax"]
    for name, boxes in TRUTH.items():
        lines += [f"{name}{ending},{WIDTH},{HEIGHT},x,{x + first},{t + first},{r},{b}" for x, t, r, b in boxes]
        lines += [] if boxes else [f"{name}{ending},{WIDTH},{HEIGHT},,,,,"]
    (root / "boxes.csv").write_text("\n".join(lines))
    (root / "other.csv").write_text("epoch,loss\n1,2\n")
    return str(root)


def make_coco(root: Path) -> str:
    images(root / "train2014")
    listed = [{"id": 7 + i, "file_name": f"{n}.jpg", "width": WIDTH, "height": HEIGHT} for i, n in enumerate(NAMES)]
    found = [
        {"image_id": 7 + i, "bbox": [x, t, r - x, b - t], "iscrowd": 0, "category_id": 1}
        for i, n in enumerate(NAMES)
        for x, t, r, b in TRUTH[n]
    ]
    crowd = {"image_id": 7 + NAMES.index("c"), "bbox": [0, 0, 3, 3], "iscrowd": 1, "category_id": 1}
    (root / "annotations").mkdir()
    tree = {"images": listed, "annotations": [crowd, *found], "categories": []}
    (root / "annotations" / "instances_train2014.json").write_text(json.dumps(tree))
    return str(root)


MAKERS = {"voc": make_voc, "csv": make_csv, "coco": make_coco}


def stems(source: PairSource) -> list[str]:
    return [Path(source.item_name(i)).stem for i in range(len(source))]


@pytest.mark.parametrize("kind", [*MAKERS, "auto"])
def test_every_layout_gives_the_same_boxes(kind: str, tmp_path: Path) -> None:
    assert set(MAKERS) == set(BOX_SETS)
    path = MAKERS.get(kind, make_voc)(tmp_path)  # type: ignore[operator]
    source = open_pairs(BOXES, kind, path, split="trainval")
    assert isinstance(source, PairSource)
    assert (source.kind, source.class_names) == (BOXES, [])
    assert stems(source) == FULL
    assert "11 images" not in source.name
    assert "10 images; 1 without boxes left out" in source.name
    for i, name in enumerate(FULL):
        image, boxes = source.load(i)
        assert (image.shape, image.dtype, boxes.dtype) == ((HEIGHT, WIDTH, 3), np.uint8, np.float64)
        assert boxes.tolist() == [list(box) for box in TRUTH[name]]
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint() == source.fingerprint()
    assert len(bytes.fromhex(source.fingerprint())) == 32


def test_the_first_pixel_is_0_or_1(tmp_path: Path) -> None:
    path = make_csv(tmp_path, first=1, ending="")
    counted = open_boxes("csv", path, split="trainval", first_pixel=1)
    assert counted.load(0)[1].tolist() == [[0, 0, 10, 20]]
    measured = open_boxes("csv", path, split="trainval")
    assert measured.load(0)[1].tolist() == [[1, 1, 10, 20]]
    assert counted.fingerprint() != measured.fingerprint()
    with pytest.raises(ValueError, match="first_pixel is 0 or 1"):
        open_boxes("csv", path, split="val", first_pixel=2)


# ---- splits


def test_lists_of_voc_are_followed(tmp_path: Path) -> None:
    train, val = ["a", "d1", "c"], ["b", "d2", "d3"]
    path = make_voc(tmp_path, train=train, val=val)
    assert stems(open_boxes("voc", path, split="train")) == ["a", "d1"]
    assert stems(open_boxes("voc", path, split="val")) == val
    assert stems(open_boxes("voc", path, split="trainval")) == ["a", "b", "d1", "d2", "d3"]
    test = open_boxes("voc", path, split="test")
    assert stems(test) == val
    assert "there is no split 'test'" in test.name


def test_without_both_lists_one_in_five_is_train(tmp_path: Path) -> None:
    whole = [n for n in NAMES if n != "d7"]
    path = make_voc(tmp_path, trainval=whole, val=["a", "b"])  # a list of val alone may hold what train would
    train, val = (open_boxes("voc", path, split=s) for s in ("train", "val"))
    assert "one in five by hash" in train.name
    assert not set(stems(train)) & set(stems(val))
    assert {*stems(train), *stems(val)} == set(whole) - {"c"}


def test_parts_do_not_depend_on_the_order_of_the_names() -> None:
    names = [f"{i:04d}" for i in range(500)]
    train, val, test, whole = (part_of(names, s)[0] for s in ("train", "val", "test", "trainval"))
    assert (len(train), len(val)) == (100, 400)
    assert sorted(train + val) == names == whole
    assert test == val
    assert part_of(names[::-1], "train")[0] == train
    assert max(np.diff([int(n) for n in train])) < 60  # spread over the set
    with pytest.raises(ValueError, match="take the split trainval"):
        part_of(["only"], "val")


def test_a_list_of_names_restricts(tmp_path: Path) -> None:
    path = make_coco(tmp_path)
    names = tmp_path / "names.txt"
    names.write_text("train2014/a.jpg\nd3.jpg\nb\n")
    source = open_boxes("coco", path, split="trainval", names=str(names))
    assert stems(source) == ["a", "b", "d3"]
    names.write_text("a\nzz\n")
    with pytest.raises(ValueError, match=r"names 1 files that are not in .*zz"):
        open_boxes("coco", path, split="trainval", names=str(names))


# ---- what is wrong with a file


def test_xml_that_cannot_be_is_named(tmp_path: Path) -> None:
    path = make_voc(tmp_path)
    file = tmp_path / "VOCdevkit/VOC2007/Annotations/b.xml"
    good = file.read_text()
    for bad, message in (
        (good[:80], "b.xml is not an XML file that can be read"),
        ("<html></html>", "begins with <html>, not with <annotation>"),
        (good.replace("<xmin>3</xmin>", ""), "b.xml, object 1 has a box that lacks a corner"),
        (good.replace("<xmin>3</xmin>", "<xmin>left</xmin>"), "object 1 has 'left' for the corner of a box"),
        (good.replace("<xmin>3</xmin>", "<xmin>nan</xmin>"), "object 1 has 'nan' for the corner"),
        (good.replace("<xmin>21</xmin>", "<xmin>31</xmin>"), "object 2 has a box without area: 31, 11, 30, 20"),
    ):
        file.write_text(bad)
        with pytest.raises(ValueError, match=message):
            open_boxes("voc", path, split="trainval")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("xmin,ymin", "x,ymin", "found 0"),
        ("a.jpg,30,20,x,0,", "a.jpg,30,20,x,left,", "line 2 has 'left' for the corner of a box"),
        ("a.jpg,30,20,x,0,", "a.jpg,30,20,x,15,", "line 2 has a box without area"),
        ("a.jpg,", ",", "line 2 has no name"),
        ("a.jpg,", "zz.jpg,", "names 1 of 11 images that are not in .*images: zz.jpg"),
        ("0,0,10,20", "0,0,10", "line 2 has '' for the corner of a box"),
    ],
)
def test_a_table_that_cannot_be_is_explained(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = make_csv(tmp_path)
    table = tmp_path / "boxes.csv"
    assert old in table.read_text()
    table.write_text(table.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        open_boxes("csv", path, split="trainval")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.pop("images"), "lacks the lists 'images' and 'annotations'"),
        (lambda tree: tree["annotations"][1].pop("bbox"), "holds no instances of COCO: KeyError 'bbox'"),
        (lambda tree: tree["annotations"][1].update(bbox=[0, 0, 0, 5]), "annotation 1 has a box without area"),
        (lambda tree: tree["annotations"][1].update(image_id=999), "annotates 1 images that its list does not have"),
        (lambda tree: tree["images"][0].update(file_name="zz.jpg"), r"are in none of .*: looked for zz\.jpg"),
        (lambda tree: tree["images"][4].update(file_name="zz.jpg"), "names 1 files .* the first: zz.jpg"),
    ],
)
def test_a_json_that_cannot_be_is_explained(tmp_path: Path, change: Any, message: str) -> None:
    path = make_coco(tmp_path)
    file = tmp_path / "annotations/instances_train2014.json"
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=message):
        open_boxes("coco", path, split="trainval")
    file.write_text("{")
    with pytest.raises(ValueError, match="not a JSON file that can be read"):
        open_boxes("coco", path, split="trainval")


def test_another_layout_is_told_with_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for kind, message in (
        ("auto", r"looked for VOCdevkit.*instances.*CSV.*found pictures/"),
        ("voc", "looked for VOCdevkit.*found pictures/"),
        ("csv", "found 0"),
        ("coco", "found 0"),
        ("vco", "unknown layout 'vco' of images with boxes; did you mean 'voc'"),
    ):
        with pytest.raises(ValueError, match=message):
            open_boxes(kind, str(tmp_path), split="val")
    with pytest.raises(ValueError, match="nowhere does not exist"):
        open_boxes("auto", "nowhere", split="val")
    with pytest.raises(ValueError, match="needs a path"):
        open_boxes("voc", None, split="val")
    path = make_voc(tmp_path)
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        open_boxes("voc", path, split="dev")
    with pytest.raises(ValueError, match="no option 'yaer'; it has: year, first_pixel"):
        open_boxes("auto", path, split="val", yaer=2007)
    with pytest.raises(ValueError, match="of 2012; found"):
        open_boxes("voc", path, split="val", year=2012)


def test_of_several_years_one_is_chosen(tmp_path: Path) -> None:
    path = make_voc(tmp_path)
    (tmp_path / "VOCdevkit/VOC2012").symlink_to(tmp_path / "VOCdevkit/VOC2007")
    with pytest.raises(ValueError, match="holds VOC2007, VOC2012: choose one by its year"):
        open_boxes("voc", path, split="trainval")
    assert "VOC2012" in open_boxes("voc", path, split="trainval", year=2012).name


def test_images_missing_or_without_any_box(tmp_path: Path) -> None:
    path = make_voc(tmp_path, trainval=["c"], test=["a", "zz"])
    with pytest.raises(ValueError, match="none of its 1 images has a box"):
        open_boxes("voc", path, split="trainval")
    with pytest.raises(ValueError, match="lacks 1 images, for example zz"):
        open_boxes("voc", path, split="test")
    (tmp_path / "VOCdevkit/VOC2007/Annotations/a.xml").unlink()
    (tmp_path / "VOCdevkit/VOC2007/ImageSets/Main/test.txt").write_text("a\nb\n")
    assert stems(open_boxes("voc", path, split="test")) == ["b"]


def opened(path: Path) -> BoxFiles:
    return open_boxes("voc", str(path), split="trainval")


def test_a_broken_image_is_unreadable_and_so_is_a_box_outside(tmp_path: Path) -> None:
    make_voc(tmp_path)
    voc = tmp_path / "VOCdevkit/VOC2007"
    (voc / "JPEGImages/a.jpg").write_bytes((voc / "JPEGImages/a.jpg").read_bytes()[:300])
    (voc / "Annotations/b.xml").write_text(xml([(2, 3, 12, 13), (40, 0, 50, 5)]))
    (voc / "Annotations/d0.xml").write_text(xml([(2, 3, 12, 13)], size=(99, 98)))
    (voc / "Annotations/d1.xml").write_text(xml([(25, 3, 34, 13)], size=(0, 0)))
    source = opened(tmp_path)
    for i, message in ((0, "truncated"), (1, "outside its 30 x 20"), (2, "30 x 20 pixels, its target 99 x 98")):
        with pytest.raises(UnreadableImage, match=message):
            source.load(i)
    image, boxes = source.load(3)
    assert boxes.tolist() == [[25, 3, 30, 13]]  # clipped; no size told
    Image.fromarray(image).save(voc / "JPEGImages/d1.png")  # Pillow's arrays cannot be written, ours can
    (voc / "JPEGImages/d1.jpg").unlink()
    image[:], boxes[:] = 0, 0
    assert opened(tmp_path).load(3)[0].flags.writeable
    assert source.load(4)[1].any()
