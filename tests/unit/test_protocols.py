"""Recipes of evaluation: each loads through its task's own options, and mistakes in one are named."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from quietvit.data.sources import DATASETS
from quietvit_eval.dense_data.pairs import DEPTH_SETS, SEGMENTATION_SETS
from quietvit_eval.discovery.data import BOX_SETS
from quietvit_eval.option_values import parse_setting, parse_value, typed_options
from quietvit_eval.protocols import check_options, load_protocol, protocols, to_yaml
from quietvit_eval.task import TASKS, find_task
from quietvit_launch import cli

NAMES = sorted(protocols())
LAYOUTS = {"labels": DATASETS, "classes": SEGMENTATION_SETS, "metres": DEPTH_SETS, "boxes": BOX_SETS}


def test_the_published_protocols_are_there() -> None:
    wanted = {
        "dinov2-imagenet-knn", "dinov2-imagenet-linear", "dinov2-imagenet-logistic", "dinov2-ade20k-linear",
        "dinov2-ade20k-multiscale", "dinov2-cityscapes-linear", "dinov2-voc-linear", "dinov2-nyu-linear1",
        "dinov2-nyu-linear4", "dinov2-nyu-dpt", "dinov3-ade20k-linear", "dinov3-nyu-linear", "cheap-linear",
        "cheap-segmentation", "cheap-depth", "cpu-segmentation", "cpu-depth", "heldout-imagenet-linear",
        "lost-voc07", "lost-voc12", "lost-coco20k",
    }  # fmt: skip
    assert set(NAMES) == wanted
    assert not wanted & set(TASKS)  # a word on the command line is one or the other


@pytest.mark.parametrize("name", NAMES)
def test_a_protocol_is_one_of_its_task_and_its_data(name: str) -> None:
    protocol = load_protocol(name)
    task = find_task(protocol.task)
    options = check_options(protocol)
    for key, value in protocol.options.items():
        found = getattr(options, key)
        assert (list(found) if isinstance(found, tuple) else found) == value
    assert set(protocol.data) <= set(LAYOUTS[task.target])
    assert len(protocol.about) > 30
    assert protocol.about.endswith(".")


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_is_a_possible_one_and_larger_models_are_there(name: str) -> None:
    published = load_protocol(name).published
    if published is None:
        assert not name.startswith("dinov2") or name == "dinov2-imagenet-logistic"
        return
    low, high = (0.1, 1.0) if published.score == "rmse" else (20, 100)
    assert all(low < figure < high for figure in published.figures.values())
    if name.startswith("dinov2"):
        assert {"ViT-S/14", "ViT-B/14", "ViT-L/14", "ViT-g/14"} <= set(published.figures)


def test_printed_protocols_read_back_with_every_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["protocols"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == NAMES
    for name in NAMES:
        protocol = load_protocol(name)
        assert cli.main(["protocols", name]) == 0
        file = tmp_path / f"{name}.yaml"
        file.write_text(capsys.readouterr().out)
        again = load_protocol(str(file))
        assert check_options(again) == check_options(protocol)
        assert dataclasses.replace(again, options=protocol.options) == protocol
        assert set(again.options) == {f.name for f in dataclasses.fields(find_task(protocol.task).options)}


GOOD = """# What it is.
task: knn
data: imagenet
size: 224
options: {temp: 0.1}
published: {score: top1@20, source: a paper, figures: {ViT-S/14: 79.0}}
"""


def test_a_recipe_of_the_user_s_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD)
    protocol = load_protocol(str(file))
    assert (protocol.name, protocol.about, protocol.data, protocol.size) == ("mine", "What it is.", ("imagenet",), 224)
    assert check_options(protocol).temp == 0.1
    assert protocol.published is not None
    assert protocol.published.figures == {"ViT-S/14": 79.0}
    assert "temp: 0.1" in to_yaml(protocol)
    assert "ks:" in to_yaml(protocol)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("task: knn", "tusk: knn", "unknown key 'tusk'; nearest: task"),
        ("data: imagenet\n", "", "lacks data"),
        ("data: imagenet", "data: []", "data must be the name of a layout"),
        ("# What it is.", "", "its first line must be a comment"),
        ("task: knn", "task: [knn]", "task must be the name of a task"),
        ("size: 224", "size: 22.4", "size must be a whole number"),
        ("size: 224", "size: true", "size must be a whole number"),
        ("{temp: 0.1}", "[temp]", "options must be a mapping"),
        ("source: a paper, ", "", "published lacks source"),
        ("source:", "sauce:", "unknown key 'sauce'; nearest: source"),
        ("{ViT-S/14: 79.0}", "{ViT-S/14: high}", "figures must be a mapping of models to numbers"),
        ("published: {", "published: [{", "not valid YAML"),
        ("size: 224", "size: 224\nsize: 225", "not valid YAML"),
    ],
)
def test_a_broken_recipe_is_explained(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        load_protocol(str(file))


def test_unknown_names_are_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown protocol 'dinov2-nyu-linear'; nearest: dinov2-nyu-linear"):
        load_protocol("dinov2-nyu-linear")
    with pytest.raises(ValueError, match=r"there is no protocol file nowhere\.yaml"):
        load_protocol("nowhere.yaml")
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD.replace("temp:", "temperature:"))
    with pytest.raises(ValueError, match="task knn has no option 'temperature'; nearest: temp"):
        check_options(load_protocol(str(file)))
    file.write_text(GOOD.replace("knn", "knm"))
    with pytest.raises(ValueError, match="unknown task 'knm'; nearest: knn"):
        check_options(load_protocol(str(file)))
    file.write_bytes(b"# \xff\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_protocol(str(file))


# ---- values


@dataclasses.dataclass(frozen=True)
class Options:
    count: int = 1
    rate: float = 1.0
    on: bool = False
    word: str = "a"
    maybe: int | None = None
    many: tuple[int, ...] = ()
    two: tuple[float, float] = (0.0, 1.0)
    either: int | tuple[int, ...] = 1
    blocks: int | str = 1
    choice: Literal["x", "y"] = "x"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("count=5", 5), ("rate=5", 5.0), ("rate=1e-3", 1e-3), ("on=true", True), ("word=b", "b"), ("maybe=null", None),
        ("maybe=3", 3), ("many=[1, 4]", (1, 4)), ("many=[]", ()), ("two=[1, 2.5]", (1.0, 2.5)), ("either=4", 4),
        ("either=[2, 5]", (2, 5)), ("blocks=all", "all"), ("blocks=2", 2), ("choice=y", "y"), ("rate = 2", 2.0),
    ],
)  # fmt: skip
def test_values_take_the_type_of_their_option(text: str, expected: object) -> None:
    name, value = parse_setting(text)
    found = typed_options(Options, {name: value}, "it")[name]
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("count=1.5", "it: count takes a whole number, not 1.5"),
        ("count=many", "count takes a whole number, not 'many'"),
        ("count=true", "count takes a whole number, not True"),
        ("count=null", "count takes a whole number, not None"),
        ("rate=fast", "rate takes a number"),
        ("rate=true", "rate takes a number"),
        ("on=1", "on takes true or false"),
        ("maybe=x", "maybe takes a whole number or null"),
        ("many=1", r"many takes a list \[...\] of values, each a whole number"),
        ("many=[1, x]", "many takes a list"),
        ("two=[1]", r"two takes a list of 2 values, \[x, x\], each a number"),
        ("choice=z", "choice takes x or y, not 'z'"),
        ("cuont=1", "it has no option 'cuont'; nearest: count"),
        ("count", "write it as key=value"),
        ("=1", "write it as key=value"),
        ("count=[1", "not valid YAML"),
        ("count=${x}", "does not parse"),
    ],
)
def test_a_value_of_another_type_is_explained(text: str, message: str) -> None:
    def typed() -> None:
        name, value = parse_setting(text)
        typed_options(Options, {name: value}, "it")

    with pytest.raises(ValueError, match=message):
        typed()


def test_values_are_yaml() -> None:
    assert [parse_value(t) for t in ("", "5", "1e-5", "word", "[a, 1]", "a=b")] == [
        None,
        5,
        1e-5,
        "word",
        ["a", 1],
        "a=b",
    ]
