"""Folder trees: what is found, in which order, and when the kept index is trusted."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quietvit.data import folder as folder_module
from quietvit.data import index_cache
from quietvit.data.decode import UnreadableImage
from quietvit.data.folder import ClassFolders, FolderSource, ImageNetFolders, scan_folder
from quietvit.data.names import NameTable, labels_from_text


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIETVIT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Grows by one with each real reading of a tree."""
    reads: list[Path] = []
    read = folder_module._read_tree

    def counted(root: Path) -> index_cache.Arrays:
        reads.append(root)
        return read(root)

    monkeypatch.setattr(folder_module, "_read_tree", counted)
    return reads


def put(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), (i, 10, 20)).save(path, "PNG")
    return root


def make_old(root: Path) -> None:
    """Set all folders' times to yesterday: a folder changed a moment ago is not trusted."""
    for path, _, _ in os.walk(root):
        status = os.stat(path)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 86_400_000_000_000))


def names_of(source: FolderSource) -> list[str]:
    return [source.item_name(i) for i in range(len(source))]


def test_any_tree_in_a_fixed_order(tmp_path: Path) -> None:
    put(tmp_path, "z.png", "b/2.JPG", "b/1.png", "b/a/0.webp", "a/x/y/1.png", "ü/é.png")
    (tmp_path / "notes.txt").write_text("no image")
    put(tmp_path, ".hidden.png", ".git/1.png", "__MACOSX/1.png")
    source = FolderSource(tmp_path)
    assert names_of(source) == ["z.png", "a/x/y/1.png", "b/1.png", "b/2.JPG", "b/a/0.webp", "ü/é.png"]
    assert source.labels == {}
    assert source.load(0)[0, 0].tolist() == [0, 10, 20]
    assert "6 images" in source.name


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    try:
        put(tmp_path, os.fsdecode(b"caf\xe9.png"))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert FolderSource(tmp_path).load(0).shape == (4, 6, 3)


def test_the_kept_index_is_used_until_a_folder_changes(tmp_path: Path, count_reads: list[Path]) -> None:
    put(tmp_path, "a/1.png", "b/1.png")
    make_old(tmp_path)
    first = FolderSource(tmp_path)
    assert names_of(FolderSource(tmp_path)) == names_of(first)
    assert FolderSource(tmp_path).fingerprint() == first.fingerprint()
    assert len(count_reads) == 1
    put(tmp_path, "b/2.png")
    assert len(FolderSource(tmp_path)) == 3
    assert len(count_reads) == 2
    make_old(tmp_path)
    FolderSource(tmp_path)
    (tmp_path / "a/1.png").unlink()
    assert names_of(FolderSource(tmp_path)) == ["b/1.png", "b/2.png"]
    assert len(count_reads) == 4
    shutil.rmtree(tmp_path / "a")
    assert len(FolderSource(tmp_path)) == 2


def test_a_folder_changed_a_moment_ago_is_read_again(tmp_path: Path, count_reads: list[Path]) -> None:
    put(tmp_path, "1.png")
    FolderSource(tmp_path)
    FolderSource(tmp_path)
    assert len(count_reads) == 2  # a file added within one tick of the clock would not show


def test_refresh_sees_files_rewritten_in_place(tmp_path: Path, count_reads: list[Path]) -> None:
    put(tmp_path, "1.png", "2.png")
    make_old(tmp_path)
    before = FolderSource(tmp_path).fingerprint()
    with (tmp_path / "1.png").open("ab") as file:
        file.write(b"more")
    assert FolderSource(tmp_path).fingerprint() == before
    assert FolderSource(tmp_path, refresh=True).fingerprint() != before
    assert len(count_reads) == 2


def test_fingerprints_do_not_depend_on_the_place(tmp_path: Path) -> None:
    a, b = (FolderSource(put(tmp_path / name, "x/1.png", "2.png")).fingerprint() for name in ("a", "b"))
    assert a == b
    c = FolderSource(put(tmp_path / "c", "x1.png", "2.png")).fingerprint()
    assert c != a


@pytest.mark.parametrize("damage", ["cut", "rubbish", "empty", "foreign"])
def test_a_damaged_cache_is_as_good_as_none(tmp_path: Path, count_reads: list[Path], damage: str) -> None:
    put(tmp_path, "1.png")
    make_old(tmp_path)
    FolderSource(tmp_path)
    (file,) = index_cache.cache_folder().iterdir()
    content = file.read_bytes()
    if damage == "foreign":
        index_cache.save("another key", {"a": np.zeros(1)})
        (other,) = set(index_cache.cache_folder().iterdir()) - {file}
        os.replace(other, file)
    else:
        file.write_bytes({"cut": content[: len(content) // 2], "rubbish": b"rubbish" * 99, "empty": b""}[damage])
    assert len(FolderSource(tmp_path)) == 1
    assert len(count_reads) == 2


def test_a_cache_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path / "data", "1.png")
    (tmp_path / "file").write_text("in the way")  # root may write anywhere, but not into a file
    monkeypatch.setenv("QUIETVIT_CACHE", str(tmp_path / "file" / "cache"))
    assert len(FolderSource(tmp_path / "data")) == 1
    assert "QUIETVIT_CACHE" in caplog.text


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUIETVIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert index_cache.cache_folder() == Path("/x/quietvit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert index_cache.cache_folder() == Path("/h/.cache/quietvit")


def test_the_cache_holds_no_pickle(tmp_path: Path) -> None:
    scan_folder(put(tmp_path, "1.png"))
    (file,) = index_cache.cache_folder().iterdir()
    with np.load(file, allow_pickle=False) as arrays:
        assert all(arrays[name].dtype != object for name in arrays.files)


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    put(tmp_path / "data", "cats/1.png", "dogs/1.png")
    put(tmp_path / "elsewhere", "2.png")
    data = tmp_path / "data"
    (data / "a-link").symlink_to(tmp_path / "elsewhere")
    (data / "cats" / "up").symlink_to(data)
    (data / "dogs" / "cats").symlink_to(data / "cats")
    (data / "aaa").symlink_to(data / "cats")  # sorts first, but must not take the images away from cats/
    (data / "self").symlink_to(data / "self")
    (data / "broken.png").symlink_to(tmp_path / "nowhere.png")
    (data / "linked.png").symlink_to(tmp_path / "elsewhere" / "2.png")
    assert sorted(names_of(FolderSource(data))) == ["a-link/2.png", "cats/1.png", "dogs/1.png", "linked.png"]


def test_empty_folder_and_folder_of_other_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there are no files at all \(looked for .*\.jpg"):
        FolderSource(tmp_path)
    for name in ("a.txt", "b.txt", "c.docx", "LICENCE"):
        (tmp_path / name).write_text("text")
    with pytest.raises(ValueError, match=r"found 4 other files \(2 x \.txt, 1 x \.docx, 1 x no extension\)"):
        FolderSource(tmp_path)


def test_missing_folder_and_file_instead_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        FolderSource(tmp_path / "nowhere")
    put(tmp_path, "1.png")
    with pytest.raises(ValueError, match="is a file"):
        FolderSource(tmp_path / "1.png")


def test_a_damaged_file_is_unreadable_by_name(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png")
    content = (tmp_path / "a/1.png").read_bytes()
    (tmp_path / "a/1.png").write_bytes(content[: len(content) // 2])
    source = FolderSource(tmp_path)
    with pytest.raises(UnreadableImage) as caught:
        source.load(0)
    assert caught.value.name == "a/1.png"


# ---- classes and splits


def test_class_folders_without_splits(tmp_path: Path) -> None:
    put(tmp_path, "dog/2.png", "cat/deep/er/1.png", "stray.png", "ape/1.png")
    source = ClassFolders(tmp_path)
    assert source.classes == {"class": ["ape", "cat", "dog"]}
    labels = dict(zip(names_of(source), source.labels["class"].tolist(), strict=True))
    assert labels == {"stray.png": -1, "ape/1.png": 0, "cat/deep/er/1.png": 1, "dog/2.png": 2}
    assert source.labels["class"].dtype == np.int64
    with pytest.raises(ValueError, match=r"looked for val/, valid/, validation/, test/; found ape/, cat/, dog/"):
        ClassFolders(tmp_path, split="val")


def test_splits_share_their_classes(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", "test/c/1.png", "test/b/1.png")
    train, val = ClassFolders(tmp_path, split="train"), ClassFolders(tmp_path, split="val")
    assert train.classes == val.classes == {"class": ["a", "b", "c"]}
    assert train.labels["class"].tolist() == [0, 1, 2]
    assert val.labels["class"].tolist() == [1, 2]  # a is missing from test/, and yet b stays 1
    assert ClassFolders(tmp_path).fingerprint() == train.fingerprint()
    assert ClassFolders(tmp_path, split="test").fingerprint() == val.fingerprint()


def test_val_is_not_confused_with_test(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.png", "val/a/2.png", "test/a/3.png")
    assert names_of(ClassFolders(tmp_path, split="val")) == ["a/2.png"]
    assert names_of(ClassFolders(tmp_path, split="test")) == ["a/3.png"]
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        ClassFolders(tmp_path, split="dev")


def test_folder_source_and_splits(tmp_path: Path) -> None:
    put(tmp_path, "train/1.png", "val/2.png", "3.png")
    assert len(FolderSource(tmp_path)) == 3
    assert names_of(FolderSource(tmp_path, split="train")) == ["1.png"]
    assert names_of(FolderSource(tmp_path, split="val")) == ["2.png"]
    flat = put(tmp_path / "flat", "1.png", "2.png")
    assert len(FolderSource(flat, split="train")) == 2
    with pytest.raises(ValueError, match="no images for split 'val'"):
        FolderSource(flat, split="val")


def test_class_folders_need_class_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use source 'folder'"):
        ClassFolders(put(tmp_path, "1.png"))


def test_imagenet_needs_nothing_but_train_and_val(tmp_path: Path) -> None:
    put(tmp_path, "train/n02000001/a.JPEG", "train/n01440764/b.JPEG", "val/n02000001/c.JPEG")
    train, val = (ImageNetFolders(tmp_path, split=split) for split in ("train", "val"))
    assert train.classes["class"] == ["n01440764", "n02000001"]
    assert (train.labels["class"].tolist(), val.labels["class"].tolist()) == ([0, 1], [1])
    assert train.name.startswith("imagenet:")


def test_imagenet_that_is_not_imagenet(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no train/ as ImageNet has; found n01440764/"):
        ImageNetFolders(put(tmp_path / "a", "n01440764/1.png"))
    flat = put(tmp_path / "b", "train/n01440764/1.png", "val/ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(ValueError, match="move each image into the folder of its WNID"):
        ImageNetFolders(flat, split="val")
    with pytest.raises(ValueError, match="'cat' is not a WNID"):
        ImageNetFolders(put(tmp_path / "c", "train/cat/1.png"))


# ---- names and labels


def test_name_table_is_a_list_in_little_room() -> None:
    names = [f"folder {i % 7}/ä{i}.jpg".encode() for i in range(1000)] + [b"", b"x"]
    table = NameTable.of(names)
    assert list(table) == names == [table[i] for i in range(len(table))]
    assert table.blob.nbytes + table.ends.nbytes == sum(map(len, names)) + 8 * len(names)
    for index in (-1, len(names)):
        with pytest.raises(IndexError):
            table[index]


@pytest.mark.parametrize(("texts", "labels", "classes"), [
    (["2", "0", "", "2"], [2, 0, -1, 2], ["0", "1", "2"]),
    (["b", "a", "b", ""], [1, 0, 1, -1], ["a", "b"]),
    (["10", "9", "x"], [0, 1, 2], ["10", "9", "x"]),
    (["-1", "0"], [0, 1], ["-1", "0"]),
    (["²"], [0], ["²"]),  # a digit to str.isdigit, but not to int
    (["9999999999", "5"], [1, 0], ["5", "9999999999"]),  # identifiers, not ten thousand million classes
])  # fmt: skip
def test_labels_from_text(texts: list[str], labels: list[int], classes: list[str]) -> None:
    found, names = labels_from_text(texts)
    assert (found.tolist(), names) == (labels, classes)
    assert found.dtype == np.int64
