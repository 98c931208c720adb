"""Class colours, overlays, legends and file names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quietvit_eval.dense_data.pairs import IGNORE
from quietvit_eval.pictures import (
    overlay,
    palette,
    picture_path,
    segmentation_picture,
    side_by_side,
    with_legend,
    write_png,
)

GREY = np.full((40, 60, 3), 100, np.uint8)


def test_every_class_has_a_colour_of_its_own() -> None:
    colours = palette(150)
    assert len({tuple(c) for c in colours}) == 150
    assert np.array_equal(palette(9), colours[:9])
    few = colours[:20].astype(int)
    distances = np.abs(few[:, None] - few[None]).sum(axis=-1)
    assert distances[~np.eye(20, dtype=bool)].min() > 60
    assert palette(0).shape == (0, 3)
    with pytest.raises(ValueError, match="more than there are colours"):
        palette(5000)


def test_overlays_tint_classes_and_darken_what_does_not_count() -> None:
    classes = np.zeros((40, 60), np.int16)
    classes[:, 20:40], classes[:, 40:] = 1, IGNORE
    tinted = overlay(GREY, classes, palette(2))
    for column, number in ((0, 0), (30, 1)):
        assert tinted[5, column].tolist() == (0.4 * 100 + 0.6 * palette(2)[number]).round().tolist()
    assert tinted[5, 50].tolist() == [25, 25, 25]


def test_small_panels_grow_and_large_ones_shrink() -> None:
    small = side_by_side([("image", GREY), ("truth", GREY)])
    assert small.shape == (240 + 30 + 8, 8 + 2 * (360 + 8), 3)
    large = side_by_side([("image", np.zeros((2000, 1000, 3), np.uint8))])
    assert large.shape[:2] == (480 + 38, 240 + 16)
    wide = side_by_side([("image", np.zeros((10, 9000, 3), np.uint8))])
    assert wide.shape[1] == 960 + 16


def test_legends_name_the_classes_that_are_there() -> None:
    truth = np.zeros((40, 60), np.int16)
    predicted = np.full((40, 60), 2)
    names = ["sky", "never", "ground"]
    colours = [tuple(c) for c in palette(3)]

    def legend(picture: np.ndarray) -> set[tuple[int, ...]]:
        below = picture[278:].reshape(-1, 3)
        return {tuple(int(v) for v in c) for c in np.unique(below, axis=0)}

    found = legend(segmentation_picture(GREY, truth, predicted, names))
    assert {colours[0], colours[2]} <= found
    assert colours[1] not in found
    assert (0, 0, 0) not in found
    truth[0] = IGNORE
    assert (0, 0, 0) in legend(segmentation_picture(GREY, truth, predicted, names))
    every = np.arange(2400).reshape(40, 60) % 100
    assert segmentation_picture(GREY, every.astype(np.int16), every, [str(i) for i in range(100)]).shape[0] < 400
    plain = np.zeros((10, 10, 3), np.uint8)
    assert with_legend(plain, []) is plain
    assert with_legend(plain, [("a name far longer than the picture", (1, 2, 3))]).shape[1] > 100


def test_files_are_told_apart_by_facts_and_name(tmp_path: Path) -> None:
    paths = {
        picture_path(tmp_path, "segmentation", facts, name)
        for facts in (["model"], ["other"])
        for name in ("a/b c.png", "a-b-c.png", "x" * 300 + "1", "y" * 300 + "1")
    }
    assert len(paths) == 8
    assert all(p.parent == tmp_path / "pictures" and len(p.name) < 120 and " " not in p.name for p in paths)
    path = paths.pop()
    write_png(path, GREY)
    assert np.array_equal(np.asarray(Image.open(path)), GREY)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
