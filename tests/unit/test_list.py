"""Lists of images: text and tables, and what is wrong with bad ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from quietvit.data.decode import UnreadableImage
from quietvit.data.listing import ListSource


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for i, name in enumerate(("a/1.png", "a/two words.png", "b/3.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (5, 4), (i, 0, 0)).save(tmp_path / name)
    return tmp_path


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_text_list_keeps_its_order(images: Path) -> None:
    file = write(images, "list.txt", f"\ufeff# comment\nb/3.png\r\n\na/two words.png\n{images}/a/1.png\n")
    source = ListSource(file)
    assert [source.item_name(i) for i in range(3)] == ["b/3.png", "a/two words.png", f"{images}/a/1.png"]
    assert [int(source.load(i)[0, 0, 0]) for i in range(3)] == [2, 1, 0]
    assert (source.labels, source.classes) == ({}, {})
    assert "3 images" in source.name


def test_relative_to_a_root(images: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = write(tmp_path_factory.mktemp("lists"), "list.txt", "1.png\n")
    assert ListSource(file, root=images / "a").load(0).shape == (4, 5, 3)
    with pytest.raises(ValueError, match=r"none of the first 1 images exists.*set `root`"):
        ListSource(file)


@pytest.mark.parametrize(("name", "text"), [
    ("t.csv", 'id,Path,label\n7,a/1.png,cat\n8,"b/3.png",\n9,a/two words.png,ape\n'),
    ("t.tsv", "file\tclass\na/1.png\tcat\nb/3.png\t\n\na/two words.png\tape\n"),
])  # fmt: skip
def test_tables_with_labels(images: Path, name: str, text: str) -> None:
    source = ListSource(write(images, name, text))
    assert source.labels["class"].tolist() == [1, -1, 0]
    assert source.classes == {"class": ["ape", "cat"]}
    assert [source.item_name(i) for i in range(3)] == ["a/1.png", "b/3.png", "a/two words.png"]


def test_numbers_are_the_labels_themselves(images: Path) -> None:
    source = ListSource(write(images, "t.csv", "image,label\na/1.png,3\nb/3.png,1\n"))
    assert source.labels["class"].tolist() == [3, 1]


def test_table_without_labels(images: Path) -> None:
    assert ListSource(write(images, "t.csv", "image\na/1.png\n")).labels == {}


@pytest.mark.parametrize(("text", "message"), [
    ("a/1.png,cat\nb/3.png,dog\n", "first line must name the columns"),
    ("path,label\na/1.png\n", "line 2: 1 fields, the header has 2"),
    ("path,label\na/1.png,x\n,y\n", "line 3: the path is empty"),
    ("path,label\n", "names no images"),
    ("", "first line must name the columns"),
])  # fmt: skip
def test_bad_tables(images: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ListSource(write(images, "t.csv", text))


def test_bad_lists(images: Path) -> None:
    with pytest.raises(ValueError, match="names no images"):
        ListSource(write(images, "empty.txt", "# nothing\n\n"))
    with pytest.raises(ValueError, match="is not a file"):
        ListSource(images / "gone.txt")
    (images / "binary.txt").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match="not a text file in UTF-8"):
        ListSource(images / "binary.txt")
    with pytest.raises(ValueError, match="has no split 'val'"):
        ListSource(write(images, "one.txt", "a/1.png\n"), split="val")


def test_a_missing_image_is_unreadable(images: Path) -> None:
    source = ListSource(write(images, "list.txt", "a/1.png\ngone.png\n"))
    with pytest.raises(UnreadableImage, match=r"gone\.png: No such file"):
        source.load(1)
    before = source.fingerprint()
    Image.new("RGB", (9, 9)).save(images / "gone.png")
    assert source.fingerprint() != before
