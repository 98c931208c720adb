"""Answers without a look at the picture, against sums done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from quietvit_eval.constants import commonest_class, depth_map, mean_depth
from quietvit_eval.dense_data.held import HeldPairs
from quietvit_eval.dense_data.pairs import CLASSES, IGNORE, METRES, open_pairs


class Given:
    def __init__(self, targets: list[np.ndarray], kind: str, num_classes: int = 0) -> None:
        self.targets, self.kind, self.name = targets, kind, "given"
        self.class_names = [str(i) for i in range(num_classes)]

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        target = self.targets[index]
        return np.zeros((*target.shape, 3), np.uint8), target

    def item_name(self, index: int) -> str:
        return str(index)

    def fingerprint(self) -> str:
        return "abc"


def test_the_commonest_class() -> None:
    train = Given([np.array([[1, 1, 2], [IGNORE, IGNORE, IGNORE]], np.int16)], CLASSES, 3)
    test = Given([np.array([[1, 2, 1, IGNORE]], np.int16), np.array([[0, 1]], np.int16)], CLASSES, 3)
    found = commonest_class(train, test)
    assert found.answer == 1
    assert found.score == pytest.approx((0 + 3 / 5 + 0) / 3)  # 5 pixels called 1, 3 of them rightly; 0 and 2 never


def test_mean_depth_everywhere_and_at_each_place() -> None:
    train = Given([np.array([[1.0, 0.0]], np.float32), np.array([[3.0, 5.0]], np.float32)], METRES)
    test = Given([np.array([[2.0, 4.0]], np.float32), np.array([[0.0, 5.0]], np.float32)], METRES)
    everywhere, at_each = mean_depth(train, test), depth_map(train, test)
    assert everywhere.answer == pytest.approx(3.0)
    assert everywhere.score == pytest.approx((1.0 + 2.0) / 2)
    assert at_each.score == pytest.approx((math.sqrt((0 + 1) / 2) + 0.0) / 2)  # the map is 2 and 5


@pytest.mark.parametrize("target", [CLASSES, METRES])
def test_pairs_held_in_memory_are_the_same(target: str) -> None:
    source = open_pairs(target, "scenes", None, split="val", num_images=3, image_size=16)
    held = HeldPairs(source)
    assert (len(held), held.kind, held.class_names) == (3, source.kind, source.class_names)
    assert (held.fingerprint(), held.item_name(2)) == (source.fingerprint(), source.item_name(2))
    for a, b in zip(held.load(1), source.load(1), strict=True):
        np.testing.assert_array_equal(a, b)


def test_masks_of_surroundings_are_the_pictures_label_outside_the_solids() -> None:
    masks = open_pairs(CLASSES, "scenes", None, split="val", num_images=4, image_size=32)
    solids = open_pairs(CLASSES, "scenes", None, split="val", num_images=4, image_size=32, category="shape")
    assert masks.class_names[0] == "solid"
    assert solids.class_names[0] == "floor and wall"
    for i in range(4):
        mask, inside = masks.load(i)[1], solids.load(i)[1] > 0
        assert mask.dtype == np.int16
        assert (mask[inside] == 0).all()
        assert (mask[~inside] == 1 + masks.scenes.labels["background"][i]).all()  # type: ignore[attr-defined]
    assert masks.fingerprint() != solids.fingerprint()
    with pytest.raises(ValueError, match="not 'colour'"):
        open_pairs(CLASSES, "scenes", None, split="val", category="colour")
