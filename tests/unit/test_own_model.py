"""A model of the user's own: ten lines are enough, and what is wrong with them is said."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quietvit.contracts import Features
from quietvit_eval.evaluate import DataSpec, evaluate
from quietvit_eval.own_model import load_own
from quietvit_launch import cli

TEN_LINES = """
import torch
from quietvit.contracts import Features

class Averages:
    embed_dim, num_blocks, stride, image_size = 3, 1, 8, 32
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    def __call__(self, images):
        patches = torch.nn.functional.avg_pool2d(images, 8).permute(0, 2, 3, 1)
        return Features(images.mean(dim=(2, 3)), images.new_empty(len(images), 0, 3), patches)
    def last_blocks(self, images, num):
        return [self(images)] * num
"""


def write(folder: Path, text: str = TEN_LINES) -> Path:
    file = folder / "mine.py"
    file.write_text(text)
    return file


def test_ten_lines_are_a_model(tmp_path: Path) -> None:
    extractor = load_own(f"{write(tmp_path)}:Averages")
    assert extractor(torch.zeros(2, 3, 16, 24)).patches.shape == (2, 2, 3, 3)
    spec = DataSpec("scenes", options={"image_size": 32, "num_images": 60})
    (card,) = evaluate(extractor, ["knn"], spec)
    assert card.model == {"hash": None, "class": "Averages"}
    assert 0 <= card.scores[card.main] <= 1


def test_it_goes_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = f"{write(tmp_path)}:Averages"
    words = ["eval", "knn", "--model", spec, "--data", "scenes", "--data-option", "num_images=60", "--device", "cpu"]
    assert cli.main([*words, "--size", "32"]) == 0
    assert len(list((tmp_path / "eval").glob("knn_*.json"))) == 1
    assert "Averages" in capsys.readouterr().out
    assert cli.main([*words[:3], f"{tmp_path}/mine.py", *words[4:]]) == 2
    assert "Name the class or function too" in capsys.readouterr().err
    assert cli.main([*words[:3], f"{tmp_path}/other.py:x", *words[4:]]) == 2
    assert "there is no file" in capsys.readouterr().err


def test_functions_are_told_the_device_and_may_import_what_lies_beside(tmp_path: Path) -> None:
    (tmp_path / "beside_mine.py").write_text("WIDTH = 3\n")
    text = TEN_LINES + (
        "from beside_mine import WIDTH\ndef make(device):\n    model = Averages()\n    model.device = device\n"
        "    assert WIDTH == 3\n    return model\nready = Averages()\n"
    )
    file = write(tmp_path, text)
    assert load_own(f"{file}:make", "cpu").device == torch.device("cpu")  # type: ignore[attr-defined]
    assert load_own(f"{file}:ready").embed_dim == 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("class Averages:", "class Averages(:", "cannot be run: SyntaxError"),
        ("import torch\n", "import nowhere_at_all\n", r"cannot be run: ModuleNotFoundError.*line 2"),
        ("class Averages:", "class Others:", "has no 'Averages'; it has: .*Others"),
        ("embed_dim, num_blocks", "width, num_blocks", "gives a Averages, which lacks embed_dim"),
        ("def __call__", "def features", r"lacks __call__\(images\)"),
        ("= 3, 1, 8, 32", "= 3, 1, 8.0, 32", "stride must be a whole number of at least 1, not 8.0"),
        ("(0.25, 0.25, 0.25)", "(0.25, 0.25, 0)", "std must be three numbers above 0"),
        ("mean, std = (0.5, 0.5, 0.5)", "mean, std = (0.5, 0.5)", "mean must be three numbers"),
        (".permute(0, 2, 3, 1)", "", r"patches must be of shape \[1, 4, 4, 3\], not \[1, 3, 4, 4\]"),
        ("images.mean(dim=(2, 3))", "images.mean(dim=(1, 2, 3))", r"cls must be of shape \[1, 3\], not \[1\]"),
        ("len(images), 0, 3", "len(images), 3", r"registers must be of shape \[1, R, 3\], not \[1, 3\]"),
        ("* num", "* 2", r"last_blocks\(images, 1\) must give a list of 1 Features"),
        ("return Features(", "return len(", "fails on one black image: TypeError"),
        ("Features(images.mean(dim=(2, 3)),", "Features(images.mean(dim=(2, 3)) / 0 * 0,", "no finite numbers"),
        ("images.mean(dim=(2, 3)),", "torch.rand(1, 3),", "other features each time"),
        ("images.mean(dim=(2, 3)),", "torch.ones(1, 3, requires_grad=True),", "carries a gradient"),
        ("avg_pool2d(images, 8)", "avg_pool2d(images[:, :1, :0], 8)", r"fails on one black image: .*\(.*line \d+\)"),
        ("class Averages:", "class Averages:\n    device = 'cpu'", "device must be a torch.device"),
        (
            "    def __call__",
            "    def __init__(self):\n        raise KeyError('x')\n    def __call__",
            "cannot be made",
        ),
    ],
)
def test_what_is_missing_or_wrong_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TEN_LINES
    file = write(tmp_path, TEN_LINES.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        load_own(f"{file}:Averages")


def test_things_that_are_no_models_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path, TEN_LINES + "nothing = 5\nnet = torch.nn.Linear(2, 2)\n")
    with pytest.raises(ValueError, match=r"gives a int, which lacks embed_dim, num_blocks"):
        load_own(f"{file}:nothing")
    with pytest.raises(ValueError, match=r"gives a Linear, which lacks"):
        load_own(f"{file}:net")
    for spec in ("mine.py", "mine:Averages", f"{file}:not a name"):
        with pytest.raises(ValueError, match=r"write file\.py:name"):
            load_own(spec)


class Trained(torch.nn.Module):
    """An own module whose dropout is on."""

    embed_dim, num_blocks, stride, image_size = 3, 1, 8, 32
    mean = std = (0.5, 0.5, 0.5)

    def forward(self, images: torch.Tensor) -> Any:
        return SimpleNamespace(cls=images)

    def last_blocks(self, images: torch.Tensor, num: int) -> list[Features]:
        return []


def test_modules_must_be_in_eval_mode_and_give_features() -> None:
    from quietvit_eval.own_model import check_extractor

    with pytest.raises(ValueError, match="in training mode"):
        check_extractor(Trained(), "it")
    with pytest.raises(ValueError, match="gives a SimpleNamespace without registers, patches"):
        check_extractor(Trained().eval(), "it")
