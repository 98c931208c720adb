"""Tar shards: labels in every form, many shards, packed and cut files, many processes."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from quietvit.data import index_cache
from quietvit.data import tar as tar_module
from quietvit.data.decode import UnreadableImage
from quietvit.data.tar import TarSource, find_shards

SAMPLES = Path(__file__).parents[3] / "shared" / "data" / "imagenet-samples.tar"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIETVIT_CACHE", str(tmp_path_factory.mktemp("cache")))


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (5, 4), (value, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(
    path: Path, members: Sequence[tuple[str, bytes]], kind: int = tarfile.GNU_FORMAT, mode: str = "w"
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=kind) as archive:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def values(source: TarSource) -> list[int]:
    return [int(source.load(i)[0, 0, 0]) for i in range(len(source))]


def names_of(source: TarSource) -> list[str]:
    return [source.item_name(i) for i in range(len(source))]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_members_are_read_in_place(tmp_path: Path, kind: int) -> None:
    long = "d" * 90 + "/" + "ü" * 30 + ".png"  # needs the long-name headers of GNU and pax
    members = [("d" * 90 + "/b.png", png(1)), ("notes.md", b"x" * 700), (long, png(2)), ("x/._y.png", b"?")]
    source = TarSource(write_tar(tmp_path / "a.tar", members, kind))
    assert names_of(source) == [members[0][0], long]
    assert values(source) == [1, 2]
    assert source.labels == {}  # one folder only
    assert "2 images in 1 shard)" in source.name


def test_folders_are_classes(tmp_path: Path) -> None:
    members = [("./b/2.png", png(1)), ("./a/deep/1.png", png(2)), ("./0.png", png(3)), ("./b/1.png", png(4))]
    source = TarSource(write_tar(tmp_path / "a.tar", members))
    assert source.classes == {"class": ["a", "b"]}
    assert source.labels["class"].tolist() == [1, 0, -1, 1]


def test_splits_inside_a_tar(tmp_path: Path) -> None:
    members = [("train/a/1.png", png(1)), ("test/b/1.png", png(2)), ("train/b/1.png", png(3)), ("list.csv", b"")]
    file = write_tar(tmp_path / "a.tar", members)
    assert values(TarSource(file)) == values(TarSource(file, split="train")) == [1, 3]
    assert TarSource(file).classes == {"class": ["a", "b"]}
    assert values(TarSource(file, split="val")) == [2]
    flat = write_tar(tmp_path / "flat.tar", [("1.png", png(1))])
    assert len(TarSource(flat, split="train")) == 1
    with pytest.raises(ValueError, match="no split 'val'"):
        TarSource(flat, split="val")


@pytest.mark.parametrize(("extension", "contents", "labels", "classes"), [
    ("cls", [b"1", b"0\n"], [1, 0], ["0", "1"]),
    ("cls", [b"dog", b"cat"], [1, 0], ["cat", "dog"]),
    ("json", [b'{"label": 2, "x": 1}', b"{}"], [2, -1], ["0", "1", "2"]),
    ("json", [b'{"class": "dog"}', b'{"cls": "cat"}'], [1, 0], ["cat", "dog"]),
    ("txt", [b"dog", b"cat"], [1, 0], ["cat", "dog"]),
    ("txt", [b"a dog on a mat", b"two cats"], None, None),
    ("json", [b"[1]", b"no json"], None, None),
])  # fmt: skip
def test_webdataset_labels(
    tmp_path: Path, extension: str, contents: list[bytes], labels: list[int] | None, classes: list[str] | None
) -> None:
    members = [(f"s/{i}.{e}", c) for i, text in enumerate(contents) for e, c in ((extension, text), ("PNG", png(i)))]
    source = TarSource(write_tar(tmp_path / "a.tar", members))
    assert values(source) == [0, 1]
    assert source.labels == {} if labels is None else source.labels["class"].tolist() == labels
    assert source.classes == ({} if classes is None else {"class": classes})


def test_webdataset_samples_have_one_image(tmp_path: Path) -> None:
    members = [
        *(("1.seg.png", png(9)), ("1.png", png(1)), ("1.cls", b"5"), ("1.webp", png(8))),
        *(("2.png", png(2)), ("2.cls", b"6")),
    ]
    source = TarSource(write_tar(tmp_path / "a.tar", members))
    assert (values(source), source.labels["class"].tolist()) == ([1, 2], [5, 6])


def test_dots_in_names_without_label_files(tmp_path: Path) -> None:
    source = TarSource(write_tar(tmp_path / "a.tar", [("photo.v2.png", png(1)), ("photo.v3.png", png(2))]))
    assert values(source) == [1, 2]


def test_many_shards(tmp_path: Path) -> None:
    for shard in range(3):
        members = [(f"{i}.{e}", c) for i in range(2) for e, c in (("png", png(10 * shard + i)), ("cls", b"%d" % shard))]
        write_tar(tmp_path / f"a-{shard:03d}.tar", members)
    wanted = [0, 1, 10, 11, 20, 21]
    for path in (tmp_path, tmp_path / "a-{000..002}.tar", tmp_path / "*-*.tar", tmp_path / "a-00{0,1,2}.tar"):
        source = TarSource(path)
        assert values(source) == wanted
        assert source.labels["class"].tolist() == [0, 0, 1, 1, 2, 2]
        assert source.item_name(3) == "a-001.tar/1.png"
    with pytest.raises(ValueError, match=r"1 of 4 tar files do not exist, e.g. .*a-003.tar"):
        TarSource(tmp_path / "a-{000..003}.tar")
    with pytest.raises(ValueError, match="no file matches"):
        TarSource(tmp_path / "b-*.tar")


def test_shards_in_split_folders(tmp_path: Path) -> None:
    write_tar(tmp_path / "train" / "1.tar", [("1.png", png(1))])
    write_tar(tmp_path / "val" / "1.tar", [("1.png", png(2))])
    assert values(TarSource(tmp_path)) == [1]
    assert values(TarSource(tmp_path, split="val")) == [2]


def test_more_shards_than_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_module, "_MAX_HANDLES", 2)
    for shard in range(5):
        write_tar(tmp_path / f"{shard}.tar", [("1.png", png(shard))])
    source = TarSource(tmp_path)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for _ in range(2):
        assert values(source) == [0, 1, 2, 3, 4]
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_headers_are_read_once_unless_the_shard_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    read = tar_module._read_headers

    def counted(shard: Path, size: int) -> index_cache.Arrays:
        reads.append(shard)
        return read(shard, size)

    monkeypatch.setattr(tar_module, "_read_headers", counted)
    file = write_tar(tmp_path / "a.tar", [("1.png", png(1)), ("1.cls", b"4")])
    first, second = TarSource(file), TarSource(file)
    assert (first.fingerprint(), first.labels["class"].tolist()) == (
        second.fingerprint(),
        second.labels["class"].tolist(),
    )
    assert len(reads) == 1
    write_tar(file, [("1.png", png(1)), ("2.png", png(2))])
    assert values(TarSource(file)) == [1, 2]
    TarSource(file, refresh=True)
    assert len(reads) == 3


# ---- bad files


def test_a_tar_cut_anywhere_is_an_error_with_shard_and_offset(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", [("a.png", png(1)), ("b.png", png(2) + bytes(600)), ("c.png", png(3))])
    content = whole.read_bytes()
    with tarfile.open(whole) as archive:
        data_end = archive.getmembers()[-1].offset_data + len(png(3))
    cut_file = tmp_path / "cut.tar"
    for cut in [*range(0, data_end, 100), *range(512, data_end + 512, 512), data_end]:
        cut_file.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=rf"cut\.tar.*(byte {cut:,}|first header)"):
            TarSource(cut_file)


def test_what_is_whole_of_a_cut_tar_can_be_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = write_tar(tmp_path / "whole.tar", [("a.png", png(1)), ("b.png", png(2)), ("c.png", png(3))])
    with tarfile.open(whole) as archive:
        inside_c = archive.getmembers()[2].offset_data + 20
    cut_file = tmp_path / "cut.tar"
    cut_file.write_bytes(whole.read_bytes()[:inside_c])
    with pytest.raises(ValueError, match="allow_truncated=true"):
        TarSource(cut_file)
    assert values(TarSource(cut_file, allow_truncated=True)) == [1, 2]
    assert "inside c.png" in caplog.text


def test_a_damaged_header_is_an_error(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", [("a.png", png(1)), ("b.png", png(2))])
    content = bytearray(file.read_bytes())
    header = content.index(b"b.png")
    content[header : header + 4] = b"????"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"damaged header at byte {header:,}"):
        TarSource(file)


@pytest.mark.parametrize(("name", "mode"), [("a.tar.gz", "w:gz"), ("a.tgz", "w:gz"), ("a.tar.xz", "w:xz")])
def test_packed_tars_are_refused_with_advice(tmp_path: Path, name: str, mode: str) -> None:
    write_tar(tmp_path / name, [("1.png", png(1))], mode=mode)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match=r"is compressed.*unpack it"):
            TarSource(path)


def test_not_a_tar_and_nothing_inside(tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_text("no tar at all" * 100)
    with pytest.raises(ValueError, match="not a plain tar file"):
        TarSource(tmp_path / "text.tar")
    write_tar(tmp_path / "gz.tar", [("1.png", png(1))], mode="w:gz")  # packed under a plain name
    with pytest.raises(ValueError, match="not a plain tar file"):
        TarSource(tmp_path / "gz.tar")
    other = write_tar(tmp_path / "other.tar", [("a.txt", b"x"), ("b.txt", b"y"), ("c", b"")])
    with pytest.raises(ValueError, match=r"found 3 other files \(2 x \.txt, 1 x no extension\)"):
        TarSource(other)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"has no \.tar files"):
        TarSource(tmp_path / "none")


def test_a_shard_that_shrinks_or_goes_under_way(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", [("1.png", png(1)), ("2.png", png(2))])
    source = TarSource(file)
    os.truncate(file, 700)
    with pytest.raises(UnreadableImage, match="become shorter"):
        source.load(1)
    other = pickle.loads(pickle.dumps(source))
    file.unlink()
    with pytest.raises(UnreadableImage, match="No such file"):
        other.load(0)


def test_a_damaged_member_is_unreadable_by_name(tmp_path: Path) -> None:
    source = TarSource(write_tar(tmp_path / "a.tar", [("x/1.png", png(1)[:40]), ("y/2.png", b"")]))
    for index, name in enumerate(("x/1.png", "y/2.png")):
        with pytest.raises(UnreadableImage) as caught:
            source.load(index)
        assert caught.value.name == name


# ---- processes


def _read_all(source: TarSource, seed: int, results: object) -> None:
    order = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(source)), 20))
    results.put(all(int(source.load(int(i))[0, 0, 0]) == i for i in order))  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_do_not_move_each_others_position(tmp_path: Path, method: str) -> None:
    source = TarSource(write_tar(tmp_path / "a.tar", [(f"{i}.png", png(i)) for i in range(20)]))
    source.load(3)  # the handle is open when the processes start
    context: Any = get_context(method)
    results = context.Queue()
    workers = [context.Process(target=_read_all, args=(source, seed, results)) for seed in range(2)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=60) for _ in workers] == [True, True]
    for worker in workers:
        worker.join()


def test_braces_keep_their_width() -> None:
    assert tar_module._expand_braces("s{0..1}/a-{08..10}.tar") == [
        f"s{s}/a-{i}.tar" for s in (0, 1) for i in ("08", "09", "10")
    ]


@pytest.mark.skipif(not SAMPLES.exists(), reason="the 1,000 ImageNet samples are not here")
def test_imagenet_samples() -> None:
    source = TarSource(SAMPLES)
    assert len(source) == 1000
    assert source.classes["class"][:2] == ["n01440764", "n01443537"]
    assert source.labels["class"].tolist() == list(range(1000))
    assert min(source.load(207).shape[:2]) == 256
    assert source.item_name(0) == "n01440764/n01440764_tench.JPEG"
    assert find_shards(SAMPLES) == [SAMPLES.absolute()]
