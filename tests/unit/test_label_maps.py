"""Class maps and ReaL's labels: every form read right, every mistake told, and scores by them against loops."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.io import write_png

from labelled_pixels import Pictures, Pixels
from quietvit.data.sources import open_source
from quietvit_eval.cards import read_per_image
from quietvit_eval.data import choose_splits
from quietvit_eval.dense_data.scenes import SceneDepth
from quietvit_eval.evaluate import evaluate
from quietvit_eval.label_maps import map_hash, read_class_map, read_real_labels

TRAIN_NAMES = ["ant", "bee", "cat", "dog", "eel"]
TEST_NAMES = ["hound", "kitty", "wasp"]  # dog, cat, bee
EXPECTED = [3, 2, 1]


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".npy":
        np.save(path, content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.json", {"hound": "dog", "kitty": "cat", "wasp": "bee"}),
        ("m.json", {"wasp": 1, "hound": 3, "kitty": "2"}),
        ("m.json", [3, 2, 1]),
        ("m.csv", "wasp,bee\nkitty, 2\n\nhound,dog\n"),
        ("m.csv", "\ufefftest,train\nwasp,bee\nkitty,cat\nhound,dog\n"),
        ("m.tsv", "wasp\tbee\r\nkitty\tcat\r\nhound\t3\r\n"),
        ("m.txt", "3\n2\n1\n"),
        ("m.npy", np.array([3, 2, 1])),
        ("m.NPY", np.array([3, 2, 1], np.uint8)),
    ],
)
def test_every_form_says_the_same(tmp_path: Path, name: str, content: Any) -> None:
    path = tmp_path / name
    if path.suffix == ".NPY":
        with path.open("wb") as file:
            np.save(file, content)
    else:
        write(path, content)
    found = read_class_map(path, TEST_NAMES, TEST_NAMES, TRAIN_NAMES)
    assert found.tolist() == EXPECTED
    shuffled = ["wasp", "hound", "kitty"]  # lists go by sorted names, whatever the order of the source
    assert read_class_map(path, shuffled, TEST_NAMES, TRAIN_NAMES).tolist() == [1, 3, 2]
    assert map_hash(found, TEST_NAMES, TRAIN_NAMES) == map_hash(np.array([1, 3, 2]), shuffled, TRAIN_NAMES)
    assert map_hash(found, TEST_NAMES, TRAIN_NAMES) != map_hash(found[::-1], TEST_NAMES, TRAIN_NAMES)


def test_a_name_comes_before_an_index_and_a_class_without_images_may_be_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "m.json", {"x": "0", "y": 0})
    assert read_class_map(path, ["x", "y", "z"], ["x", "y"], ["5", "0"]).tolist() == [1, 0, -1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.json", {"hound": "dog", "kitty": "cat"}, "leaves out classes of the test set: wasp"),
        ("m.json", {"hound": "dgo", "kitty": "cat", "wasp": "bee"}, "classes that are not there: dgo .nearest.*dog"),
        ("m.json", {"huond": "dog", "kitty": "cat", "wasp": "bee"}, "the test set has not: huond .nearest.*hound"),
        ("m.json", '{"hound": 3, "hound": 2, "kitty": 1, "wasp": 0}', "lists test classes more than once: hound"),
        ("m.json", {"hound": 3, "kitty": 3, "wasp": 1}, "gives one train class, 'dog', to several: hound, kitty"),
        ("m.json", {"hound": 5, "kitty": 2, "wasp": 1}, "'hound' has the train index 5, but indices run from 0 to 4"),
        ("m.json", {"hound": -1, "kitty": 2, "wasp": 1}, "train index -1"),
        ("m.json", {"hound": [3], "kitty": 2, "wasp": 1}, "name or index of one train class"),
        ("m.json", {"hound": True, "kitty": 2, "wasp": 3}, "name or index of one train class"),
        ("m.json", {"hound": {"a": 1}, "kitty": 2, "wasp": 3}, "name or index of one train class"),
        ("m.json", "{", "is not JSON"),
        ("m.json", "3", "must hold an object"),
        ("m.json", [3, 2], "must list 3 train indices.*shape"),
        ("m.json", [3, 2, "bee"], "whole numbers; it has 'bee'"),
        ("m.csv", "hound,dog\nkitty,cat\nkitty,bee\nwasp,ant\n", "more than once: kitty"),
        ("m.csv", "hound,dog\nkitty\nwasp,bee\n", "line 2: 1 columns instead of 2"),
        ("m.csv", "hound\tdog\n", "line 1: 1 columns"),
        ("m.csv", "", "leaves out classes of the test set: hound, kitty, wasp"),
        ("m.txt", "3 2", r"must list 3 train indices.*shape \(2,\)"),
        ("m.txt", "3 2 5", "train index 5"),
        ("m.txt", "3 2 dog", "whole numbers; it has 'dog'"),
        ("m.txt", "3 3 1", "to several: hound, kitty"),
        ("m.npy", np.array([3.0, 2.0, 1.0]), "whole numbers; it has 3.0"),
        ("m.npy", np.array([True, False, True]), "whole numbers; it has True"),
        ("m.npy", np.ones((3, 2), np.int64), r"shape \(3, 2\)"),
        ("m.yaml", "a: b", "must be a .json, .csv, .tsv, .txt or .npy file, or the word 'index'"),
    ],
)  # fmt: skip
def test_mistakes_in_a_class_map(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=f"class map {re.escape(str(path))}.*{message}"):
        read_class_map(path, TEST_NAMES, TEST_NAMES, TRAIN_NAMES)


@pytest.mark.parametrize("name", ["m.json", "m.csv", "m.npy", "m.txt"])
@pytest.mark.parametrize("harm", ["missing", "bytes", "folder"])
def test_files_that_cannot_be_read(tmp_path: Path, name: str, harm: str) -> None:
    path = tmp_path / name
    if harm == "bytes":
        path.write_bytes(b"\xff\x00\xfe" * 20)
    elif harm == "folder":
        path.mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        read_class_map(path, TEST_NAMES, TEST_NAMES, TRAIN_NAMES)


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.npy"
    np.save(path, np.array([{"a": 1}, 2, 3], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be read"):
        read_class_map(path, TEST_NAMES, TEST_NAMES, TRAIN_NAMES)


def test_folders_named_by_numbers(tmp_path: Path) -> None:
    train_names = [f"n{i:08d}" for i in range(12)]
    numbers = sorted(map(str, range(12)))
    assert numbers[:4] == ["0", "1", "10", "11"]
    assert read_class_map("index", numbers, numbers, train_names).tolist() == [int(n) for n in numbers]
    assert read_class_map("index", ["1", "0"], [], ["1", "0"]).tolist() == [1, 0]  # an index even where names are such
    with pytest.raises(ValueError, match=r"sort as texts.*use 'index'"):
        read_class_map(write(tmp_path / "m.npy", np.arange(12)), numbers, numbers, train_names)
    for names, message in (
        (["0", "ant"], "must be named by train indices.*not ant"),
        (["0", "12"], "train index 12, but indices run from 0 to 11"),
        (["1", "01"], "to several: 1, 01"),
    ):
        with pytest.raises(ValueError, match=message):
            read_class_map("index", names, names, train_names)


def test_a_miniature_of_imagenet_v2_on_disk(tmp_path: Path) -> None:
    wnids = [f"n{7 * i:08d}" for i in range(12)]
    for i in range(12):
        for folder in (tmp_path / "imagenet/train" / wnids[i], tmp_path / "v2" / str(i)):
            folder.mkdir(parents=True)
            write_png(torch.full((3, 8, 8), 20 * i, dtype=torch.uint8), str(folder / "a.png"))
    train, test = open_source("imagenet", str(tmp_path / "imagenet")), open_source("classes", str(tmp_path / "v2"))
    chosen: dict[str, Any] = {"label": "class", "limit_train": None, "limit_test": None, "seed": 0}
    _, split, names = choose_splits(train, test, class_map="index", **chosen)
    assert names == wnids
    shades = [int(test.load(int(i))[0, 0, 0]) // 20 for i in split.indices]
    assert split.labels.tolist() == shades
    assert split.candidates is None
    with pytest.raises(ValueError, match=r"12 classes of .* a class map can say which train classes they are"):
        choose_splits(train, test, **chosen)


TRAIN = Pictures("train", [i % 5 for i in range(75)], TRAIN_NAMES, noise=80)
TEST = Pictures("val", [i % 3 for i in range(60)], TEST_NAMES, noise=80)
TASKS = ["knn", "linear", "logistic"]
QUICK = {"knn": {"ks": [10]}, "linear": {"steps": 60, "batch_size": 25}, "logistic": {"num_c": 4}}


def mapped_test_set() -> Pictures:
    """TEST with the pictures of the train classes its own are mapped to."""
    drawn = Pictures("val", [EXPECTED[i % 3] for i in range(60)], TRAIN_NAMES, noise=80)
    test = Pictures("val", [i % 3 for i in range(60)], TEST_NAMES)
    test.pixels = drawn.pixels
    return test


def test_tasks_answer_with_mapped_classes_only(tmp_path: Path) -> None:
    test = mapped_test_set()
    path = write(tmp_path / "map.json", {"hound": "dog", "kitty": "cat", "wasp": "bee"})
    cards = evaluate(Pixels(), TASKS, (TRAIN, test), class_map=path, options=QUICK, out_dir=tmp_path)
    same = Pictures("val", [EXPECTED[i % 3] for i in range(60)], TRAIN_NAMES)
    same.pixels = test.pixels
    open_to_all = evaluate(Pixels(), TASKS, (TRAIN, same), options=QUICK)
    for card, free in zip(cards, open_to_all, strict=True):
        assert card.protocol["candidates"] == "3 of 5 classes, those of the test set"
        assert free.protocol["candidates"] == "all"
        assert card.scores[card.main] > free.scores[free.main]  # ant and eel can no longer be mistaken for others
        assert card.scores[card.main] > 0.5
        assert not any("top5" in name for name in card.scores)
    table = write(tmp_path / "map.csv", "hound,3\nkitty,2\nwasp,1\n")
    (again,) = evaluate(Pixels(), ["knn"], (TRAIN, test), class_map=table, options={"knn": QUICK["knn"]})
    wrong = write(tmp_path / "wrong.csv", "hound,2\nkitty,3\nwasp,1\n")
    (other,) = evaluate(Pixels(), ["knn"], (TRAIN, test), class_map=wrong, options={"knn": QUICK["knn"]})
    assert again.scores == cards[0].scores
    assert again.protocol_key() == cards[0].protocol_key() != other.protocol_key()
    assert other.scores[other.main] < again.scores[again.main]


def test_a_subset_of_classes_by_name_and_classes_that_no_image_is_of() -> None:
    test = Pictures("val", [0, 2, 2], ["bee", "zebra", "eel"])
    chosen: dict[str, Any] = {"label": "class", "limit_train": None, "limit_test": None, "seed": 0}
    _, split, _ = choose_splits(TRAIN, test, **chosen)
    assert split.labels.tolist() == [1, 4, 4]
    assert split.candidates is not None
    assert split.candidates.tolist() == [1, 4]
    train = Pictures("train", TRAIN.labels["class"].tolist(), TRAIN_NAMES)
    train.classes = test.classes = {}  # classes without names: nobody said that the test set has no others
    _, split, _ = choose_splits(train, test, **chosen)
    assert split.candidates is None
    assert split.rules == {"candidates": "all"}


REAL = [[] for _ in range(50_000)]  # type: list[list[int]]
SOME = {1: [0], 2: [1, 4], 3: [], 4: [3], 5: [0, 2, 1], 50_000: [4]}


def real_file(folder: Path, labels: dict[int, Any]) -> Path:
    lists: list[Any] = list(REAL)
    for number, found in labels.items():
        lists[number - 1] = found
    return write(folder / "real.json", lists)


def test_real_labels_are_found_by_the_number_in_the_name(tmp_path: Path) -> None:
    path = real_file(tmp_path, SOME)
    names = [
        "val/n01/ILSVRC2012_val_00000005.JPEG", "ILSVRC2012_val_00050000.JPEG", "x/ILSVRC2012_val_00000003.JPEG",
        "ILSVRC2012_val_00000002_n01440764.png",
    ]  # fmt: skip
    assert read_real_labels(path, names, 5).tolist() == [[0, 2, 1], [4, -1, -1], [-1, -1, -1], [1, 4, -1]]


def test_tasks_judge_by_real_labels_and_leave_images_without_out(tmp_path: Path) -> None:
    test = Pictures("val", [i % 5 for i in range(80)], TRAIN_NAMES, noise=80)
    random = np.random.default_rng(0)
    numbers = random.permutation(50_000)[:80] + 1
    test.names = [f"val/x/ILSVRC2012_val_{n:08d}.JPEG" for n in numbers]
    lists = {int(n): random.permutation(5)[: i % 3].tolist() for i, n in enumerate(numbers)}
    path = real_file(tmp_path, lists)
    options = {"knn": {"ks": [10], "per_class": [3], "tries": 2}, "linear": QUICK["linear"], "logistic": {"num_c": 4}}
    plain = evaluate(Pixels(), TASKS, (TRAIN, test), options=options, out_dir=tmp_path / "plain")
    cards = evaluate(Pixels(), TASKS, (TRAIN, test), real_labels=path, options=options, out_dir=tmp_path / "real")
    for card, before in zip(cards, plain, strict=True):
        assert card.protocol["real_labels"]["images_without"] == 27
        assert card.data["test"]["images"] == 53
        assert "real_labels" not in before.protocol
        assert not any("mean_per_class" in name for name in card.scores)
        assert any("mean_per_class" in name for name in before.scores)
        assert card.scores[card.main] != before.scores[before.main]
    per_image = read_per_image(next((tmp_path / "real").glob("knn*.json")))
    assert per_image.names == [name for i, name in enumerate(test.names) if i % 3]
    assert float(per_image.values["top1@10"].mean()) == pytest.approx(cards[0].scores["top1@10"])
    bank, queries = (s.features() / s.features().norm(dim=1, keepdim=True) for s in (TRAIN, test))
    right = []
    for row, number in enumerate(numbers):
        near, rows = (queries[row] @ bank.T).topk(10)
        votes = torch.zeros(5, dtype=torch.float64).index_add(
            0, torch.from_numpy(TRAIN.labels["class"])[rows], (near / 0.07).exp()
        )
        if lists[int(number)]:
            right.append(int(votes.argmax()) in lists[int(number)])
    assert cards[0].scores["top1@10"] == pytest.approx(np.mean(right))
    assert 0.1 < np.mean(right) < 0.9


@pytest.mark.parametrize(
    ("harm", "names", "message"),
    [
        (lambda text: "{", None, "cannot be read"),
        (lambda text: '{"a": 1}', None, "must be a list of 50,000 lists.*not a dict"),
        (lambda text: "[[1]]", None, "not 1 entries"),
        (lambda text: text.replace("[0, 2, 1]", "7"), None, "entry 4 must be a list of classes.*it is 7"),
        (lambda text: text.replace("[0, 2, 1]", "[0.5]"), None, r"entry 4 .*it is \[0.5\]"),
        (lambda text: text.replace("[0, 2, 1]", "[-1]"), None, r"entry 4 .*it is \[-1\]"),
        (lambda text: text.replace("[0, 2, 1]", "[998]"), None, "has class 998, but the train set has 5 classes"),
        (None, ["0001.png"], "'0001.png' is not named as ImageNet's validation images are"),
        (None, ["ILSVRC2012_val_00050001.JPEG"], "is not named"),
        (None, ["ILSVRC2012_val_00000000.JPEG"], "is not named"),
        (None, ["ILSVRC2012_val_000000011.JPEG"], "is not named"),
        (None, ["a/ILSVRC2012_val_00000001.JPEG", "b/ILSVRC2012_val_00000001.png"], "00000001 more than once"),
    ],
)
def test_mistakes_in_real_labels(
    tmp_path: Path, harm: Callable[[str], str] | None, names: list[str] | None, message: str
) -> None:
    path = real_file(tmp_path, SOME)
    if harm is not None:
        path.write_text(harm(path.read_text()))
    with pytest.raises(ValueError, match=message):
        read_real_labels(path, names or ["ILSVRC2012_val_00000005.JPEG"], 5)


def test_a_missing_file_and_test_images_without_any_real_label(tmp_path: Path) -> None:
    test = Pictures("val", [0, 1], TRAIN_NAMES)
    test.names = ["ILSVRC2012_val_00000003.JPEG", "ILSVRC2012_val_00000009.JPEG"]
    with pytest.raises(ValueError, match="cannot be read"):
        evaluate(Pixels(), ["knn"], (TRAIN, test), real_labels=tmp_path / "real.json")
    with pytest.raises(ValueError, match="ReaL has no label for any of the 2 images"):
        evaluate(Pixels(), ["knn"], (TRAIN, test), real_labels=real_file(tmp_path, SOME))


def test_tasks_on_pixels_take_neither() -> None:
    pairs = (SceneDepth(split="train", num_images=2), SceneDepth(split="val", num_images=2))
    with pytest.raises(ValueError, match="for tasks on labelled images"):
        evaluate(Pixels(), ["depth"], pairs, class_map="index")
