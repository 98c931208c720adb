"""`make demo`: the whole line on the embedded data set, in minutes, with the controls that make it believable."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from quietvit_launch.job import Job, run_job

RECIPE = "quickstart"
TASKS = ("knn", "linear")
SUBJECTS = {"model": "trained", "random-init": "random", "pixels": "pixels"}
# As many images as make the standard error of a score about one point; more would take longer than the training.
NUM_TRAIN, NUM_TEST = 3000, 2000
LINEAR = {"batch_size": 128, "steps": 600}  # DINOv2's batch per GPU; 12,288 pixels an image are many weights


def run_demo(out: Path, *, seed: int) -> int:
    """Pretrain, export, reload, score against controls, write summary.json and report.html into `out`.

    Started again it resumes the pretraining where that was interrupted. Returns the exit code.
    """
    console = Console()
    seconds: dict[str, float] = {}
    began = time.monotonic()
    console.rule("1. pretrain a nano ViT with 4 registers, without labels")
    code = run_job(Job(RECIPE, (f"train.seed={seed}",), str(out / "pretrain")), console)
    seconds["pretrain"] = time.monotonic() - began
    if code:
        return code

    console.rule("2. export the teacher and reload it")
    began = time.monotonic()
    from quietvit.weights.export import export_teacher

    shutil.rmtree(out / "teacher", ignore_errors=True)
    exported = export_teacher(out / "pretrain", out / "teacher")
    console.print(f"{exported['weights']}: same features after reloading", highlight=False, soft_wrap=True)
    seconds["export"] = time.monotonic() - began

    console.rule("3. judge the frozen features")
    began = time.monotonic()
    from quietvit.data.ram_cache import cached
    from quietvit.data.sources import open_source
    from quietvit_eval.evaluate import evaluate

    # In memory: each picture is asked for three times, and rendering it takes longer than the network.
    sizes = {"train": NUM_TRAIN, "test": NUM_TEST}
    train, test = (
        cached(open_source("scenes", None, split=split, num_images=num, image_size=64)) for split, num in sizes.items()
    )
    cards = evaluate(
        out / "teacher",
        TASKS,
        (train, test),
        random_init=True,
        pixels=True,
        options={"linear": LINEAR},
        seed=seed,
        out_dir=out / "eval",
    )
    seconds["evaluate"] = time.monotonic() - began
    scores: dict[str, dict[str, float]] = {task: {} for task in TASKS}
    for card in cards:
        scores[card.task][SUBJECTS[card.subject]] = round(100 * card.scores[card.main], 2)
    errors = {card.task: round(100 * card.standard_error, 2) for card in cards if card.subject == "model"}
    summary: dict[str, Any] = {
        **scores,
        "standard_error": errors,
        "label": cards[0].label,
        "classes": cards[0].num_classes,
        "images": {split: part["images"] for split, part in cards[0].data.items()},
        "seconds": {k: round(v, 1) for k, v in seconds.items()},
        "teacher": exported["weights"],
        "seed": seed,
    }
    _report(out, summary, console)
    return 0


def _report(out: Path, summary: dict[str, Any], console: Console) -> None:
    from quietvit.files import write_text
    from quietvit_eval.demo_report import write_report

    table = Table(title=f"accuracy in %, {summary['classes']} classes, chance {100 / summary['classes']:.0f}")
    for column in ("task", "trained", "random", "pixels"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task in TASKS:
        trained = f"{summary[task]['trained']:.1f} ± {summary['standard_error'][task]:.1f}"
        table.add_row(task, trained, *(f"{summary[task][s]:.1f}" for s in ("random", "pixels")))
    console.print(table)
    write_report(out, summary)
    write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    console.print(f"written: {out / 'summary.json'}, {out / 'report.html'}", highlight=False, soft_wrap=True)
