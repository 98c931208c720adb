"""How often each random step was applied in the original DataAugmentationDINO, against ours "as run"."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from quietvit.data.crops import MultiCrop, View
from reference import case

INFO = case("05_masking/augmentation_statistics").info
NUM_IMAGES = 4000

STEPS = {
    "hflip": lambda view: view.flip,
    "adjust_hue": lambda view: view.jitter is not None,
    "rgb_to_grayscale": lambda view: view.grayscale,
    "gaussian_blur": lambda view: view.blur_sigma is not None,
    "solarize": lambda view: view.solarize,
}


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[View]]:
    crop, rng = MultiCrop(), np.random.default_rng(INFO["seed"])
    views = [crop.draw(64, 64, rng) for _ in range(NUM_IMAGES)]
    return {
        "global_crop_1": [v[0] for v in views],
        "global_crop_2": [v[1] for v in views],
        "local_crop": [local for v in views for local in v[2:]],
    }


@pytest.mark.parametrize("kind", INFO["share"])
@pytest.mark.parametrize("step", STEPS)
def test_share_of_views_with_this_step(drawn: dict[str, list[View]], kind: str, step: str) -> None:
    stored = INFO["share"][kind][step]
    ours = float(np.mean([STEPS[step](view) for view in drawn[kind]]))
    if stored in (0.0, 1.0):
        assert ours == stored
        return
    error = math.sqrt(stored * (1 - stored) * (1 / INFO["draws_per_crop_kind"] + 1 / len(drawn[kind])))
    assert abs(ours - stored) < 4 * error


def test_the_original_inverts_the_blur_and_the_paper_does_not() -> None:
    """The vectors show blur on the second global view, the paper states it for the first."""
    share: dict[str, Any] = INFO["share"]
    assert share["global_crop_1"]["gaussian_blur"] == 0.0
    rng = np.random.default_rng(0)
    views = [MultiCrop(blur="paper").draw(64, 64, rng) for _ in range(1000)]
    assert all(v[0].blur_sigma is not None for v in views)
    as_run, stated = share["global_crop_2"]["gaussian_blur"], np.mean([v[1].blur_sigma is not None for v in views])
    assert abs(stated - (1 - as_run)) < 0.04


def test_views_have_the_stored_shapes() -> None:
    share = INFO["share"]
    large, small = share["global_crop_1"]["shape"][-1], share["local_crop"]["shape"][-1]
    crop = MultiCrop(global_size=large, local_size=small)
    globals_, locals_ = crop(np.zeros((64, 64, 3), np.uint8), np.random.default_rng(0))
    for kind, views in (
        ("global_crop_1", globals_[:1]),
        ("global_crop_2", globals_[1:]),
        ("local_crop", locals_),
    ):
        for view in views:
            assert [view.shape[2], *view.shape[:2]] == share[kind]["shape"]
