"""Schedules against every value of the originals (DINOv2 CosineScheduler, build_schedulers; DINOv3's two forms)."""

from __future__ import annotations

import pytest
import torch

from quietvit.schedules import Cosine, Linear, Schedules
from reference import case

COSINE = case("04_schedules/cosine")
RUNS = case("04_schedules/training_schedules").info["runs"]
NAMES = {
    "base_value": "start",
    "final_value": "final",
    "total_iters": "total_steps",
    "warmup_iters": "warmup_steps",
    "start_warmup_value": "warmup_start",
    "freeze_iters": "freeze_steps",
    "trunc_extra": "truncation",
}


def curve_of(run: str) -> Cosine:
    settings = dict(COSINE.info["runs"][run]["settings"])
    if not run.startswith("linear_warmup"):
        return Cosine(**{NAMES[k]: v for k, v in settings.items()}, closed="trunc_extra" in settings)
    warmup = settings["warmup_iterations"]
    cosine = settings.get("cosine_iterations", settings["total_iterations"] - warmup)
    return Cosine(
        start=settings["peak"],
        final=settings["end"],
        total_steps=warmup + cosine,
        warmup_steps=warmup,
        warmup_start=settings["start"],
        repeat_peak=False,
        closed=True,
    )


@pytest.mark.parametrize("run", COSINE.info["runs"])
def test_cosine(run: str) -> None:
    curve = curve_of(run)
    num = len(COSINE.outputs(run)["values"])
    COSINE.check(run, "values", torch.tensor([curve.at(i) for i in range(num)], dtype=torch.float64))


# epochs, warm-up epochs, weight decay, momentum of the two recipes; both rest one epoch and warm the teacher up for 30
RECIPES = {1250: (100, 10, (0.04, 0.4), (0.992, 1.0)), 10: (500, 80, (0.04, 0.2), (0.994, 1.0))}


@pytest.mark.parametrize("run", RUNS, ids=[r["config_file"] for r in RUNS])
def test_training_schedules(run: dict) -> None:
    epoch = run["overrides"].get("train", {}).get("OFFICIAL_EPOCH_LENGTH", 1250)
    epochs, warmup, decay, momentum = RECIPES[epoch]
    steps = epochs * epoch
    assert steps == run["total_iterations"]
    schedules = Schedules(
        lr=Cosine(run["optim.lr_after_scaling"], 1e-6, steps, warmup_steps=warmup * epoch),
        weight_decay=Cosine(*decay, steps),
        momentum=Cosine(*momentum, steps),
        teacher_temp=Linear(0.04, 0.07, 30 * epoch),
        last_layer_freeze_steps=epoch,
    )
    ours = [schedules.at(i) for i in run["iterations"]]
    for stored, name in [
        ("lr", "lr"),
        ("wd", "weight_decay"),
        ("momentum", "momentum"),
        ("teacher_temp", "teacher_temp"),
        ("last_layer_lr", "last_layer_lr"),
    ]:
        assert [getattr(v, name) for v in ours] == pytest.approx(run[stored], rel=1e-9, abs=1e-12), stored
