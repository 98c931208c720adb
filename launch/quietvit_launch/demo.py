"""`make demo`: the whole line on the embedded data set, in minutes, with the controls that make it believable."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from quietvit_launch.job import Job, run_job

if TYPE_CHECKING:
    from quietvit_eval.cards import Card

RECIPE = "quickstart"
SUBJECTS = {"model": "trained", "random-init": "random", "pixels": "pixels"}
# As many images as make the standard error of a score about one point; more would take longer than the training.
NUM_TRAIN, NUM_TEST = 3000, 2000
NUM_DENSE_TRAIN, NUM_DENSE_TEST = 600, 300  # every picture has 4,096 targets
LINEAR = {"batch_size": 128, "steps": 600}  # DINOv2's batch per GPU; 12,288 pixels an image are many weights
# Whole pictures without augmentation: a few hundred steps of a linear layer on a small network need no more (ours).
SEGMENTATION = {
    "short_side": 64, "crop": 64, "stride": 64, "ratio": (1.0, 1.0), "max_share": 1.0, "photometric": False,
    "average": "valid", "steps": 250, "warmup_steps": 10, "lr": 1e-2, "pictures": 3,
}  # fmt: skip
DEPTH = {
    "layers": 4, "norm": True, "with_cls": False, "batch_norm": True, "upsample": 1, "bins": 64,
    "train_crop": "none", "crop": (64, 64), "rotate": 0.0, "color": False, "eval_crop": "none",
    "batch_size": 8, "steps": 200, "warmup_steps": 0, "sig_warmup": 0, "gradient_weight": 0.0, "lr": 3e-3,
    "pictures": 3,
}  # fmt: skip


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
    from quietvit.weights.export import export_model
    from quietvit.weights.native import WEIGHTS_NAME

    shutil.rmtree(out / "teacher", ignore_errors=True)
    export_model(out / "pretrain", out / "teacher")
    teacher = str(out / "teacher" / WEIGHTS_NAME)
    console.print(f"{teacher}: same features after reloading", highlight=False, soft_wrap=True)
    seconds["export"] = time.monotonic() - began

    console.rule("3. judge the frozen features: labels of pictures")
    began = time.monotonic()
    cards = _judge_labels(out, seed, console)
    seconds["classes"] = time.monotonic() - began
    console.rule("4. judge the frozen features: every pixel")
    began = time.monotonic()
    dense, constants = _judge_pixels(out, seed, console)
    seconds["pixels"] = time.monotonic() - began

    summary = _summary([*cards, *dense])
    for task, scores in constants.items():
        summary[task] |= scores
    summary |= {
        "label": cards[0].label,
        "classes": cards[0].num_classes,
        "images": {split: part["images"] for split, part in cards[0].data.items()},
        "dense_images": {split: part["images"] for split, part in dense[0].data.items()},
        "pictures": {c.task: [f"eval/{p}" for p in c.details["pictures"]] for c in dense if c.subject == "model"},
        "seconds": {k: round(v, 1) for k, v in seconds.items()},
        "teacher": teacher,
        "seed": seed,
    }
    _report(out, summary, console)
    return 0


def _judge_labels(out: Path, seed: int, console: Console) -> list[Card]:
    from quietvit.data.ram_cache import cached
    from quietvit.data.sources import open_source
    from quietvit_eval.evaluate import evaluate

    # In memory: each picture is asked for three times, and rendering it takes longer than the network.
    sizes = {"train": NUM_TRAIN, "test": NUM_TEST}
    train, test = (
        cached(open_source("scenes", None, split=split, num_images=num, image_size=64)) for split, num in sizes.items()
    )
    return evaluate(
        out / "teacher",
        ("knn", "linear"),
        (train, test),
        random_init=True,
        pixels=True,
        options={"linear": LINEAR},
        seed=seed,
        feature_cache_gb=0,  # the weights are new each time
        out_dir=out / "eval",
    )


def _judge_pixels(out: Path, seed: int, console: Console) -> tuple[list[Card], dict[str, dict[str, float]]]:
    """Cards of both dense tasks, and what answers without a look at the picture score."""
    from quietvit_eval.constants import commonest_class, depth_map, mean_depth
    from quietvit_eval.dense_data.held import HeldPairs
    from quietvit_eval.dense_data.pairs import CLASSES, METRES, open_pairs
    from quietvit_eval.evaluate import evaluate

    cards: list[Card] = []
    constants: dict[str, dict[str, float]] = {}
    sizes = {"train": NUM_DENSE_TRAIN, "test": NUM_DENSE_TEST}
    for task, target, options in (("segmentation", CLASSES, SEGMENTATION), ("depth", METRES, DEPTH)):
        train, test = (
            HeldPairs(open_pairs(target, "scenes", None, split=s, num_images=n, image_size=64))
            for s, n in sizes.items()
        )
        cards += evaluate(
            out / "teacher",
            (task,),
            (train, test),
            random_init=True,
            options={task: options},
            seed=seed,
            out_dir=out / "eval",
            console=console if console.is_terminal else None,
        )
        if target == CLASSES:
            constants[task] = {"constant": round(100 * commonest_class(train, test).score, 2)}
        else:
            found = {"constant": mean_depth(train, test), "place": depth_map(train, test)}
            constants[task] = {name: round(c.score, 4) for name, c in found.items()}
    return cards, constants


def _summary(cards: Sequence[Card]) -> dict[str, Any]:
    """Scores and standard errors by task and subject: shares in %, depth in metres."""
    from quietvit_eval.demo_scores import SHOWN

    summary: dict[str, Any] = {"standard_error": {}}
    for card in cards:
        factor, digits = (100, 2) if SHOWN[card.task].unit == "%" else (1, 4)
        summary.setdefault(card.task, {})[SUBJECTS[card.subject]] = round(factor * card.scores[card.main], digits)
        if card.subject == "model":
            summary["standard_error"][card.task] = round(factor * card.standard_error, digits)
    return summary


def _report(out: Path, summary: dict[str, Any], console: Console) -> None:
    from quietvit.files import write_text
    from quietvit_eval.demo_report import write_report
    from quietvit_eval.demo_scores import SHOWN, SUBJECTS

    table = Table(title="scores of the frozen features, and of the controls")
    for column in ("task", *SUBJECTS.values()):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, shown in SHOWN.items():
        scores = {key: shown.text(value) for key, value in summary[task].items()}
        scores["trained"] += f" ± {shown.error_text(summary['standard_error'][task])}"
        table.add_row(shown.title, *(scores.get(key, "") for key in SUBJECTS))
    console.print(table)
    for shown in SHOWN.values():
        console.print(f"[bold]{shown.title.partition(':')[0]}[/bold]: {shown.meaning}", highlight=False)
    write_report(out, summary)
    write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    console.print(f"written: {out / 'summary.json'}, {out / 'report.html'}", highlight=False, soft_wrap=True)
