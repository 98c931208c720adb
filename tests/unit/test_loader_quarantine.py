"""The list of unreadable images, and when there are too many of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from quietvit.contracts import BadSample
from quietvit.data.quarantine import BadImages, TooManyUnreadable


def bad(*names: str) -> list[BadSample]:
    return [BadSample(name, f"reason of {name}") for name in names]


def test_each_image_is_listed_once(tmp_path: Path) -> None:
    images = BadImages(tmp_path, 1000)
    images.add([])
    assert not images.file.exists()
    images.add(bad("a", "b", "a"))
    images.add(bad("b", "c"))
    assert images.count == 3
    assert (tmp_path / "unreadable.txt").read_text() == "a\treason of a\nb\treason of b\nc\treason of c\n"


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    BadImages(tmp_path, 1000).add(bad("a", "b"))
    with (tmp_path / "unreadable.txt").open("a") as file:
        file.write("cut of")
    again = BadImages(tmp_path, 1000)
    assert again.count == 2
    again.add(bad("a", "c"))
    assert again.count == 3


@pytest.mark.parametrize(("num_images", "share", "limit"), [(100, 0.01, 10), (5000, 0.01, 50), (5000, 0.0, 10)])
def test_too_many_end_the_run(tmp_path: Path, num_images: int, share: float, limit: int) -> None:
    images = BadImages(tmp_path, num_images, max_share=share)
    for i in range(limit):
        images.add(bad(f"{i}.jpg") * 3)
    with pytest.raises(TooManyUnreadable) as caught:
        images.add(bad("last.jpg"))
    message = str(caught.value)
    assert f"{limit + 1} of {num_images:,} images cannot be read" in message
    assert "last.jpg: reason of last.jpg" in message
    assert str(tmp_path / "unreadable.txt") in message
    assert (tmp_path / "unreadable.txt").read_text().splitlines()[-1] == "last.jpg\treason of last.jpg"


def test_odd_names_do_not_break_the_table(tmp_path: Path) -> None:
    images = BadImages(tmp_path, 1000)
    names = ["tab\there", "line\nhere", "caf\udce9", "ü 漢", "next\x85line"]
    images.add(bad(*names))
    lines = images.file.read_text(encoding="utf-8").splitlines()
    assert [line.split("\t")[0] for line in lines] == [
        "tab\\there", "line\\nhere", "caf\\udce9", "ü 漢", "next\\x85line",
    ]  # fmt: skip
    again = BadImages(tmp_path, 1000)
    again.add(bad(*names))
    assert again.count == 5


def test_ranks_write_their_own_files(tmp_path: Path) -> None:
    for rank in range(2):
        BadImages(tmp_path, 1000, rank=rank).add(bad(f"{rank}.jpg"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["unreadable.rank1.txt", "unreadable.txt"]
