"""Which images the probe looks at: the same every time, apart from the bank, and only those whose class is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quietvit.data.decode import UnreadableImage
from quietvit.train.held_out import HeldOut, choose_held_out

CLASSES = ["ant", "bee", "cat"]


class Numbered:
    """Image i of a split is filled with its number, so that pixels tell which image they are."""

    def __init__(self, num: int, *, first: int = 0, labelled: bool = True, classes: list[str] = CLASSES) -> None:
        self.name, self.num, self.first = "numbered", num, first
        self.labels = {"class": np.arange(num, dtype=np.int64) % len(classes)} if labelled else {}
        self.classes = {"class": classes} if labelled else {}
        self.unreadable: set[int] = set()

    def __len__(self) -> int:
        return self.num

    def load(self, index: int, *, min_side: int | None = None) -> np.ndarray:
        if index in self.unreadable:
            raise UnreadableImage(str(index), "cut off")
        return np.full((12, 20, 3), self.first + index, np.uint8)

    def item_name(self, index: int) -> str:
        return str(index)

    def fingerprint(self) -> str:
        return "0"


def choose(train: Numbered, val: Numbered | None = None, *, images: int = 10, bank: int = 12, seed: int = 0) -> HeldOut:
    return choose_held_out(train, val, label="class", num_images=images, num_bank=bank, size=8, seed=seed)


def numbers(images: torch.Tensor | None) -> list[int]:
    assert images is not None
    assert images.dtype == torch.uint8
    assert images.shape[1:] == (3, 8, 8)
    return images[:, 0, 0, 0].tolist()


def check_labels(held_out: HeldOut, train: Numbered, queries: Numbered) -> None:
    """Labels belong to their images, by name."""
    assert held_out.labels is not None
    assert held_out.bank_labels is not None
    for source, images, labels in (
        (queries, held_out.images, held_out.labels),
        (train, held_out.bank, held_out.bank_labels),
    ):
        names = [source.classes["class"][source.labels["class"][n - source.first]] for n in numbers(images)]
        assert [train.classes["class"][i] for i in labels.tolist()] == names
    assert held_out.num_classes == len(train.classes["class"])


def test_without_a_split_images_and_bank_are_disjoint() -> None:
    train = Numbered(40)
    found = choose(train)
    assert (len(found.images), len(numbers(found.bank))) == (10, 12)
    assert not set(numbers(found.images)) & set(numbers(found.bank))
    check_labels(found, train, train)


def test_with_a_split_images_come_from_it_and_the_bank_from_train() -> None:
    train, val = Numbered(40), Numbered(15, first=100)
    found = choose(train, val)
    assert len(set(numbers(found.images))) == 10
    assert min(numbers(found.images)) >= 100
    assert len(set(numbers(found.bank))) == 12
    assert max(numbers(found.bank)) < 40
    check_labels(found, train, val)


@pytest.mark.parametrize("split", [False, True])
def test_the_seed_decides(split: bool) -> None:
    def picked(seed: int) -> tuple[list[int], list[int]]:
        found = choose(Numbered(60), Numbered(60, first=100) if split else None, seed=seed)
        return numbers(found.images), numbers(found.bank)

    assert picked(3) == picked(3)
    assert picked(3)[0] != picked(4)[0]
    assert picked(3)[1] != picked(4)[1]


def test_without_labels_there_are_images_only() -> None:
    for train, val in ((Numbered(40, labelled=False), None), (Numbered(40), Numbered(20, labelled=False))):
        found = choose(train, val)
        assert len(numbers(found.images)) == 10
        assert (found.labels, found.bank, found.bank_labels) == (None, None, None)


def test_images_of_unknown_class_are_left_out() -> None:
    """Pictures beside the class folders have the label -1: no k-NN can count them."""
    train = Numbered(40)
    train.labels["class"][:25] = -1
    found = choose(train, images=5)
    assert set(numbers(found.images)) | set(numbers(found.bank)) == {*range(25, 40)}
    check_labels(found, train, train)
    train.labels["class"][:] = -1
    assert choose(train).labels is None


def test_a_small_labelled_set_keeps_a_bank() -> None:
    found = choose(Numbered(9), images=500, bank=2000)
    assert (len(numbers(found.images)), len(numbers(found.bank))) == (4, 5)


def test_splits_that_number_their_classes_differently_are_compared_by_name() -> None:
    train, val = Numbered(40), Numbered(40, first=100, classes=["bee", "cat", "dog"])
    found = choose(train, val, images=40)
    check_labels(found, train, val)
    assert len(numbers(found.images)) == 27  # no train image is called dog


def test_unreadable_images_are_passed_over_with_their_labels() -> None:
    train = Numbered(40)
    train.unreadable = set(range(0, 40, 3))
    found = choose(train, images=20, bank=20)
    assert not (set(numbers(found.images)) | set(numbers(found.bank))) & train.unreadable
    check_labels(found, train, train)
