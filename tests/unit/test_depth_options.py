"""Settings of the depth task that cannot be, and what an image size makes of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from quietvit_eval.depth.options import DepthOptions, at_size
from quietvit_eval.task import TASKS, make_options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"head": "unet"}, "head is one of linear, dpt, not 'unet'"),
        ({"eval_crop": "centre"}, "eval_crop is one of eigen, garg, none"),
        ({"train_crop": True}, "train_crop is one of nyu, none"),
        ({"decay": "linear"}, "decay is one of"),
        ({"layers": 0}, "layers is a whole number from 1, not 0"),
        ({"layers": True}, "layers is a whole number from 1, not True"),
        ({"steps": 1.5}, "steps is a whole number"),
        ({"pictures": -1}, "pictures is a whole number from 0"),
        ({"lr": 0.0}, "lr is a number above 0"),
        ({"lr": float("nan")}, "lr is a number above 0"),
        ({"clip": "35"}, "clip is a number above 0, not '35'"),
        ({"rotate": -1.0}, "rotate is a number from 0"),
        ({"brightness": 1.5}, "brightness is a number from 0 to 1"),
        ({"bins": 1}, "bins is 0"),
        ({"crop": 416}, "crop is two whole numbers, rows and columns, not 416"),
        ({"crop": (416, 0)}, "crop is two whole numbers"),
        ({"crop": (416,)}, "crop is two whole numbers"),
        ({"betas": (0.9, 1.0)}, "betas is two numbers"),
        ({"betas": ("a", "b")}, "betas is two numbers"),
        ({"resize": 0}, "resize is a whole number of pixels"),
        ({"layer_indices": ()}, "layer_indices is a list of block numbers"),
        ({"layer_indices": (1.0,)}, "layer_indices is a list of block numbers"),
        ({"min_depth": 0.0}, "min_depth is a number above 0"),
        ({"min_depth": 5, "max_depth": 2}, "needs 0 < min_depth < max_depth"),
        ({"max_depth": "10"}, "max_depth is a number above 0"),
        ({"flip": "yes"}, "flip is true or false, not 'yes'"),
        ({"head": "dpt"}, "DPT head reads 4 blocks"),
        ({"head": "dpt", "layers": 4, "with_cls": False}, "DPT head reads 4 blocks"),
    ],
)
def test_options_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"depth: .*{message}"):
        make_options("depth", given)


def test_a_file_may_give_lists() -> None:
    given = {"head": "dpt", "layer_indices": [4, 11, 17, 23], "crop": [64, 80], "bins": 0}
    options = make_options("depth", json.loads(json.dumps(given)))
    assert options == DepthOptions(head="dpt", layer_indices=(4, 11, 17, 23), crop=(64, 80), bins=0)
    assert options.as_protocol()["crop"] == [64, 80]
    assert "pictures" not in options.as_protocol()
    assert TASKS["depth"].target == "metres"


def test_an_image_size_sets_the_shorter_side_and_a_crop_in_whole_patches() -> None:
    options = DepthOptions()
    assert at_size(options, None, 14) is options
    at = at_size(options, 480, 14)
    assert (at.resize, at.crop) == (480, (420, 420))
    assert at.crop[0] <= 427  # what is left of NYU's height
    assert at_size(options, 64, 8).crop == (56, 56)
    assert at_size(options, 8, 8).crop == (8, 8)
    with pytest.raises(ValueError, match="less than one patch of 14"):
        at_size(options, 13, 14)
