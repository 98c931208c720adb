"""Does a T2T-ViT with registers learn as the ViT of the same trunk does, for as many steps and for as much time?

    python -m benchmarks.stems_learning run quickstart --stem vit --seed 0 --out runs/stems   # t2t_vit, seeds 1, 2 too
    python -m benchmarks.stems_learning ratio quickstart --out runs/stems
    python -m benchmarks.stems_learning run quickstart --stem t2t_vit --seed 0 --ratio 1.3 --out runs/stems
    python -m benchmarks.stems_learning report --out runs/stems --write benchmarks/results/stems-<date>

Settings go to the recipe, e.g. `run cifar10 ... --settings data.path=cifar10 train.steps=600`. One thread a run, so
that two can go side by side: start vit and t2t_vit of a seed together, and the ratio of their step times is fair on a
busy machine too. `--ratio R` trains for 1/R of the steps: schedules are shares of a run, so that is a whole run in
the time of the other stem's. Every run is scored with its own initialisation; a run that is complete is not run again.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
from benchmarks.quickstart import interval
from rich.console import Console

from quietvit.config.load import load_config
from quietvit.data.ram_cache import cached
from quietvit.data.sources import Source, open_source
from quietvit.train.environment import environment
from quietvit_eval.cards import Card, read_card
from quietvit_eval.evaluate import evaluate
from quietvit_launch.job import Job, run_job

TASKS = ("knn", "linear")
SUBJECTS = {"model": "trained", "random-init": "random"}
RUN = re.compile(r"(?P<stem>\w+)-(?P<seed>\d+)-(?P<budget>steps|time)")
LINEAR = {"batch_size": 128, "steps": 600}  # as in the demo
WARM = 20  # steps before times count


def run(recipe: str, stem: str, seed: int, ratio: float | None, overrides: tuple[str, ...], out: Path) -> None:
    """Train and score one run."""
    budget = "steps" if ratio is None else "time"
    folder = out / recipe / f"{stem}-{seed}-{budget}"
    given = (f"model.backbone={stem}", f"train.seed={seed}", "train.threads=1", "health.images=0", *overrides)
    config = load_config(recipe, list(given))
    assert config.train.steps is not None
    if ratio is not None:
        given = (*given, f"train.steps={round(config.train.steps / ratio)}")
    if code := run_job(Job(recipe, given, str(folder)), Console()):
        raise SystemExit(code)
    torch.set_num_threads(1)
    score(folder, given, recipe, seed)


def score(folder: Path, overrides: Iterable[str], recipe: str, seed: int) -> None:
    """Cards of both tasks for the teacher and for its initialisation."""
    if len(list((folder / "eval").glob("*.json"))) >= len(TASKS) * len(SUBJECTS):
        return
    evaluate(
        folder,
        TASKS,
        _labelled(recipe, overrides),
        limit_train=10_000,
        limit_test=5_000,
        random_init=True,
        options={"linear": LINEAR} if recipe == "quickstart" else {},
        seed=seed,
        out_dir=folder / "eval",
    )


def _labelled(recipe: str, overrides: Iterable[str]) -> tuple[Source, Source]:
    """Train and test images: as many of scenes as the demo takes, else what the recipe's data hold."""
    data = load_config(recipe, list(overrides)).data
    if data.source == "scenes":
        sizes = {"train": 3000, "test": 2000}
        train, test = (
            cached(open_source("scenes", None, split=s, num_images=n, image_size=64)) for s, n in sizes.items()
        )
        return train, test
    return open_source(data.source, data.path, split="train"), open_source(data.source, data.path, split="val")


def step_seconds(folder: Path, batch_size: int) -> float:
    """Median time of a step, data included."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = [batch_size / r["images_per_s"] for r in rows if "images_per_s" in r]
    return statistics.median(times[WARM:])


def ratios(out: Path, recipe: str) -> dict[int, float]:
    """Step time of the T2T-ViT over the ViT's, by seed, of runs that went side by side."""
    batch_size = load_config(recipe).train.batch_size
    assert isinstance(batch_size, int)
    found = {}
    for folder in sorted((out / recipe).glob("t2t_vit-*-steps")):
        twin = folder.with_name(folder.name.replace("t2t_vit", "vit"))
        if all((f / "teacher.safetensors").is_file() for f in (folder, twin)):
            found[int(folder.name.split("-")[1])] = step_seconds(folder, batch_size) / step_seconds(twin, batch_size)
    return found


def collect(out: Path, recipe: str) -> dict[str, Any]:
    """All runs of a recipe, their gains over the initialisation, and the differences of the stems."""
    runs: dict[tuple[str, str], dict[int, dict[str, dict[str, float]]]] = {}
    steps = {}
    for folder in sorted(p for p in (out / recipe).iterdir() if p.is_dir()):
        found = RUN.fullmatch(folder.name)
        cards = [read_card(p) for p in (folder / "eval").glob("*.json")]
        if not found or not cards:
            continue
        key = (found["stem"], found["budget"])
        runs.setdefault(key, {})[int(found["seed"])] = _scores(cards)
        steps[key] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    report: dict[str, Any] = {"step_time_ratio": {str(s): round(r, 3) for s, r in ratios(out, recipe).items()}}
    for (stem, budget), by_seed in runs.items():
        report[f"{stem}, {budget}"] = {"steps": steps[stem, budget], **{t: _gain(by_seed, t) for t in TASKS}}
    for budget in ("steps", "time"):
        if ("vit", "steps") in runs and ("t2t_vit", budget) in runs:
            report[f"t2t_vit minus vit at equal {budget}"] = {
                task: _difference(runs["t2t_vit", budget], runs["vit", "steps"], task) for task in TASKS
            }
    return report


def _scores(cards: Iterable[Card]) -> dict[str, dict[str, float]]:
    scores: dict[str, dict[str, float]] = {task: {} for task in TASKS}
    for card in cards:
        scores[card.task][SUBJECTS[card.subject]] = round(100 * card.scores[card.main], 2)
    return scores


def _gain(by_seed: Mapping[int, Mapping[str, Mapping[str, float]]], task: str) -> dict[str, Any]:
    seeds = sorted(by_seed)
    rows = {who: [by_seed[s][task][who] for s in seeds] for who in ("trained", "random")}
    gains = [round(a - b, 2) for a, b in zip(rows["trained"], rows["random"], strict=True)]
    return {**rows, "gain_over_random": gains, "gain": interval(gains) if len(gains) > 1 else None}


def _difference(
    ours: Mapping[int, Mapping[str, Mapping[str, float]]],
    theirs: Mapping[int, Mapping[str, Mapping[str, float]]],
    task: str,
) -> dict[str, Any]:
    seeds = sorted(set(ours) & set(theirs))
    apart = [round(ours[s][task]["trained"] - theirs[s][task]["trained"], 2) for s in seeds]
    return {"by_seed": apart, "mean": interval(apart) if len(apart) > 1 else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("recipe")
    one.add_argument("--stem", choices=("vit", "t2t_vit"), required=True)
    one.add_argument("--seed", type=int, required=True)
    one.add_argument("--ratio", type=float, help="train for 1/ratio of the steps")
    one.add_argument("--settings", nargs="*", default=[], metavar="key=value")
    show = commands.add_parser("ratio")
    show.add_argument("recipe")
    tell = commands.add_parser("report")
    tell.add_argument("--write", type=Path, help="name of the .json to write")
    for command in (one, show, tell):
        command.add_argument("--out", type=Path, default=Path("runs/stems"))
    args = parser.parse_args()
    if args.command == "run":
        run(args.recipe, args.stem, args.seed, args.ratio, tuple(args.settings), args.out)
    elif args.command == "ratio":
        found = ratios(args.out, args.recipe)
        print(f"by seed: {found}; median {statistics.median(found.values()):.3f}")
    else:
        machine = {k: v for k, v in environment(torch.device("cpu")).items() if k != "command"}
        report: dict[str, Any] = {"date": date.today().isoformat(), "environment": machine}
        report |= {p.name: collect(args.out, p.name) for p in sorted(args.out.iterdir()) if p.is_dir()}
        print(json.dumps(report, indent=1))
        if args.write:
            args.write.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
