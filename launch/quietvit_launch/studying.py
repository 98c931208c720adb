"""`quietvit study registers`: train or take runs, score and look into each, and write the page. Each part once."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quietvit.config.load import config_hash, load_config
from quietvit.config.schema import RunConfig
from quietvit_launch.job import Job
from quietvit_launch.jobs import ask, find_runs, look
from quietvit_launch.mistakes import message_for_user
from quietvit_launch.stopping import sigterm_stops
from quietvit_launch.study_scores import check_evaluations, evaluate_once, evaluations_of
from quietvit_launch.sweep import run_sweep

if TYPE_CHECKING:
    from quietvit.data.sources import Source
    from quietvit_eval.study.looks import LookOptions
    from quietvit_eval.study.plan import StudyRun
    from quietvit_eval.study.results import Entry

RUNS, CARDS, LOOKS, COST = "runs", "cards", "looks", "cost.json"
Place = tuple[int, int]  # registers, seed


class Interrupted(Exception):  # noqa: N818  (no error: a signal asked for it)
    """A part was stopped by a signal; `code` is the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass
class Study:
    """What was asked for and what is known of it by now."""

    out: Path
    recipe: str | None
    settings: tuple[str, ...]
    reference: RunConfig  # the settings that all runs must have
    counts: tuple[int, ...]
    seeds: tuple[int, ...]
    runs: dict[Place, StudyRun]
    missing: list[str]
    failed: bool = False

    def absent(self) -> list[Place]:
        """Which runs are not there."""
        return [(c, s) for s in self.seeds for c in self.counts if (c, s) not in self.runs]

    def note(self, sentence: str) -> None:
        """Something is missing: it is said now, and on the page."""
        self.missing.append(sentence)
        print(f"quietvit: {sentence}", file=sys.stderr)


def run_study(args: argparse.Namespace) -> int:
    """Everything that is not done yet, then the page. Returns the exit code: 2 where a part failed."""
    recipe, words = part_recipe(args.overrides)
    slurm = _check_place(args)
    out = Path(args.out).expanduser()
    if out.exists() and not out.is_dir():
        raise ValueError(f"{args.out} is a file: name a folder for the study")
    study = _open_study(args, out, recipe, tuple(w for w in words if w not in slurm))
    evaluations = evaluations_of(args, study.reference)
    check_evaluations(evaluations)
    retrofits = parse_retrofits(args.retrofit)
    if study.absent() and study.recipe is not None and not args.page_only:
        if args.on == "slurm":
            return _submit(args, study, slurm)
        if code := _train(args, study):
            return code
    for count, seed in study.absent():
        study.note(f"the run with {count} registers and seed {seed}: {_why_absent(out, count, seed)}")
    with sigterm_stops():
        try:
            entries = _look_and_score(args, study, evaluations, retrofits)
            cost = _cost(args, study)
        except Interrupted as stop:
            return stop.code
        return _write(study, entries, cost)


def _check_place(args: argparse.Namespace) -> tuple[str, ...]:
    """Settings of the Slurm jobs. Raises ValueError for what does not go with the place."""
    slurm = tuple(word for word in args.overrides if word.startswith("slurm."))
    if args.on != "slurm":
        given = {"--dry-run": args.dry_run, f"--slurm {args.slurm}": args.slurm, " ".join(slurm): slurm}
        for words in (words for words, value in given.items() if value):
            raise ValueError(f"{words}: only with --on slurm")
    elif args.processes:
        raise ValueError("--processes is for --on local: slurm.nodes and slurm.tasks_per_node say how many")
    return slurm


def part_recipe(words: Sequence[str]) -> tuple[str | None, tuple[str, ...]]:
    """The recipe, which is the one word without "=", and the settings. Raises ValueError for two recipes."""
    named = [word for word in words if "=" not in word]
    if len(named) > 1:
        raise ValueError(f"{named[1]!r} is not a setting: write it as key=value")
    return (named[0] if named else None), tuple(word for word in words if "=" in word)


def _open_study(args: argparse.Namespace, out: Path, recipe: str | None, settings: tuple[str, ...]) -> Study:
    """Settings, and the runs that are there. Raises ValueError for runs that differ in more than they may."""
    from quietvit_eval.study.plan import COUNTS, SEEDS, by_place, check_alike

    found = [*_finished(args.runs), *_own(out)]
    if recipe is not None:
        reference, what = load_config(recipe, settings), f"the recipe {recipe} with the settings given"
    elif found and not settings:
        reference, what = found[0].config, str(found[0].folder)
    else:
        raise ValueError("name the recipe, or give finished --runs alone, without settings")
    counts = args.registers or (COUNTS if recipe is not None else tuple(sorted({r.registers for r in found})))
    seeds = args.seeds or (SEEDS if recipe is not None else tuple(sorted({r.seed for r in found})))
    kept = [run for run in found if run.registers in counts and run.seed in seeds]
    if found and not kept and recipe is None:
        raise ValueError(f"none of the {len(found)} runs has {counts} registers and a seed of {seeds}")
    check_alike(kept, reference, what)
    return Study(out, recipe, settings, reference, counts, seeds, by_place(kept), [])


def _finished(folders: Sequence[str]) -> list[StudyRun]:
    """Finished runs at or below the folders; others are said and left out. Raises ValueError where there is none."""
    from quietvit_eval.study.plan import read_run

    runs = []
    for text in folders:
        place = Path(text).expanduser()
        if not place.is_dir():
            raise ValueError(f"--runs {text}: there is no such folder")
        below = list(find_runs(place))
        states = {run: look(run, ask([run])) for run in below}
        for run, row in states.items():
            if row.state == "finished":
                runs.append(read_run(run))
            else:
                steps = f", step {row.step} of {row.steps}" if row.steps else ""
                print(f"quietvit: {run} is left out: {row.state}{steps}", file=sys.stderr)
        if not any(row.state == "finished" for row in states.values()):
            raise ValueError(f"--runs {text}: {'no run there is finished' if below else 'there are no runs'}")
    return runs


def _own(out: Path) -> list[StudyRun]:
    """The study's own finished runs."""
    from quietvit_eval.study.plan import read_run

    below = list(find_runs(out / RUNS)) if (out / RUNS).is_dir() else []
    asked = ask(below)
    return [read_run(run) for run in below if look(run, asked).state == "finished"]


def _why_absent(out: Path, count: int, seed: int) -> str:
    from quietvit_eval.study.plan import run_name

    run = out / RUNS / run_name(count, seed)
    if not run.is_dir():
        return "it is not there"
    row = look(run, ask([run]))
    steps = f" at step {row.step} of {row.steps}" if row.steps else ""
    return f"{row.state}{steps}" + (f": {row.message.splitlines()[0]}" if row.message else "")


# ---- training


def jobs_of(study: Study) -> list[Job]:
    """The runs that are not there, in folders named as a sweep's. Raises ConfigError for settings that cannot be."""
    from quietvit_eval.study.plan import run_name

    assert study.recipe is not None
    jobs = []
    for count, seed in study.absent():
        words = (*study.settings, f"model.num_registers={count}", f"train.seed={seed}")
        jobs.append(Job(study.recipe, words, str(study.out / RUNS / run_name(count, seed))))
    for job in jobs:
        job.config()
    return jobs


def _train(args: argparse.Namespace, study: Study) -> int:
    """One after the other; what failed is left out. Returns the exit code of a stop at a signal, else 0."""
    from quietvit_launch.local import run_locally

    code = run_sweep(jobs_of(study), partial(run_locally, processes=args.processes))
    if code > 2:
        return code
    study.failed = bool(code)
    _take_own(study)
    return 0


def _take_own(study: Study) -> None:
    from quietvit_eval.study.plan import by_place, check_alike

    wanted = [r for r in _own(study.out) if r.registers in study.counts and r.seed in study.seeds]
    every = [*study.runs.values(), *(r for r in wanted if (r.registers, r.seed) not in study.runs)]
    check_alike(every, study.reference, "the settings given")
    study.runs = by_place(every)


def _submit(args: argparse.Namespace, study: Study, slurm: Sequence[str]) -> int:
    """The runs that are neither there nor on their way, as an array. Returns the exit code."""
    from quietvit_launch.slurm import load_slurm, submit

    jobs: list[Job] = []
    waiting: list[Job] = []
    for job in jobs_of(study):
        run = Path(job.out_dir)
        under_way = run.is_dir() and look(run, ask([run])).state in ("queued", "running")
        (waiting if under_way else jobs).append(job)
    code = 0
    if jobs:
        settings = load_slurm(args.slurm or "slurm", slurm)
        code = submit(jobs, settings, study.out / RUNS, dry_run=args.dry_run)
    if not args.dry_run and not code:
        print(
            f"{len(jobs) + len(waiting)} runs are queued or running (`quietvit jobs {study.out / RUNS}`): when they "
            "have ended, the same command scores them and writes the page; with --page-only it takes what is there"
        )
    return code


# ---- looking and scoring


def parse_retrofits(words: Sequence[str]) -> list[tuple[str, Path]]:
    """NAME=MODEL words. Raises ValueError for one that is none, and for a model that is not there."""
    from quietvit_launch.evaluation import check_model

    found = []
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or not name.strip() or not path:
            raise ValueError(f"--retrofit {word!r}: write NAME=MODEL, e.g. 'test-time registers=retrofits/seed0'")
        if name.strip().isdecimal():
            raise ValueError(
                f"--retrofit {word!r}: a number would be taken for a number of registers; name it otherwise"
            )
        found.append((name.strip(), check_model(path)))
    return found


def _look_and_score(
    args: argparse.Namespace,
    study: Study,
    evaluations: Sequence[tuple[str, ...]],
    retrofits: Sequence[tuple[str, Path]],
) -> list[Entry]:
    from quietvit_eval.study.looks import LookOptions
    from quietvit_eval.study.plan import model_hash
    from quietvit_eval.study.results import Entry

    options = LookOptions(images=args.images, shown=args.shown, image_size=args.size)
    source = None if args.page_only else held_out(args, study.reference)
    entries = []
    for number, ((count, seed), run) in enumerate(sorted(study.runs.items()), start=1):
        print(f"run {number} of {len(study.runs)}: {run.folder}", flush=True)
        model = _Model(run.name, run.folder, run.weights(), None)
        cards = _scores(args, study, model, evaluations, controls=not args.no_controls)
        entries.append(
            Entry(str(count), count, seed, run.folder.name, _seen(args, study, model, source, options), cards)
        )
    for name, path in retrofits:
        print(f"retrofit {name}: {path}", flush=True)
        weights = model_hash(path)
        model = _Model(f"retrofit-{weights[:12]}", path, weights, name)
        found = _seen(args, study, model, source, options)
        cards = _scores(args, study, model, evaluations, controls=False)
        told: int | None = None if found is None else found["seed"]
        entries.append(Entry(name, None, told, path.name, found, cards))
    return sorted(entries, key=lambda e: (e.registers is None, e.registers or 0))


@dataclass(frozen=True)
class _Model:
    name: str  # of its folders and files
    path: Path
    weights: str
    retrofit: str | None


def _seen(
    args: argparse.Namespace, study: Study, model: _Model, source: Source | None, options: LookOptions
) -> Mapping[str, Any] | None:
    """What is seen inside; None, with a note, where it cannot be."""
    from quietvit_eval.study.looks import look_once, read_look

    file = study.out / LOOKS / f"{model.name}.json"
    what = model.retrofit or model.name
    if source is None:
        known = read_look(file)
        if known is None:
            study.note(f"norms and attention of {what}: not looked into yet")
        return known
    from quietvit.weights.extractor import load

    try:
        return look_once(partial(load, model.path, args.device), model.weights, source, options, file)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        message = message_for_user(error)
        if message is None:
            raise
        study.failed = True
        study.note(f"norms and attention of {what}: {message.splitlines()[0]}")
        return None


def _scores(
    args: argparse.Namespace, study: Study, model: _Model, evaluations: Sequence[tuple[str, ...]], *, controls: bool
) -> tuple[Any, ...]:
    """Cards of every evaluation that is done, or can be."""
    from quietvit_eval.study.results import read_cards

    folders = []
    for words in evaluations:
        wanted = (*words, "--random-init") if controls and "--random-init" not in words else words
        folder, code = evaluate_once(wanted, model.path, model.weights, study.out / CARDS / model.name, args.page_only)
        if code > 2:
            raise Interrupted(code)
        if code == 0:
            folders.append(folder)
        elif args.page_only:
            study.note(f"{words[0]} of {model.retrofit or model.name}: not scored yet")
        else:
            study.failed = True
            study.note(f"{words[0]} of {model.retrofit or model.name}: the evaluation failed")
    return read_cards(folders)


def held_out(args: argparse.Namespace, config: RunConfig) -> Source:
    """The images that all models are shown: of --data, else of the recipe's data; of val, or where there is none of
    train. Raises ValueError as `open_source`."""
    from quietvit.data.sources import open_source
    from quietvit.train.held_out import val_split
    from quietvit_launch.evaluation import split_at

    data = config.data
    if args.data is None:
        held = val_split(data.source, data.path, data.split, data.options)
        return held or open_source(data.source, data.path, split=data.split, **data.options)
    kind, path = ("scenes", None) if args.data == "scenes" else ("auto", args.data)
    options = data.options if kind == data.source else {}
    return open_source(kind, path, split="val" if path is None else split_at(path), **options)


# ---- cost and the page


def _cost(args: argparse.Namespace, study: Study) -> dict[str, Any] | None:
    """What is in cost.json if it is of the same settings and holds what is asked for; else it is found and written."""
    if not study.runs:
        return None
    from quietvit.files import write_text
    from quietvit.weights.native import read_meta
    from quietvit_eval.study.cost import counted, noted_speed
    from quietvit_launch.tasks import read_json

    meta = read_meta(next(iter(study.runs.values())).teacher)
    stride = int(meta["backbone"]["arguments"]["patch_size"])
    side = args.size or max(stride, min(int(meta["image_size"]), 224) // stride * stride)
    counts = sorted({0, *study.counts})
    plain = replace(study.reference, train=replace(study.reference.train, seed=0))
    key = {"settings": config_hash(plain), "counts": counts, "image_size": side}
    known = read_json(study.out / COST)
    cost = known["cost"] if known.get("key") == key else counted(meta["backbone"], study.reference, counts, side)
    speeds: dict[str, list[float]] = {}
    for (count, _), run in sorted(study.runs.items()):
        if (speed := noted_speed(run.folder)) is not None:
            speeds.setdefault(str(count), []).append(speed)
    cost["noted"] = {count: sum(values) / len(values) for count, values in speeds.items()}
    if args.measure and not args.page_only and "measured" not in cost:
        cost |= _measured(args, study, counts)
    study.out.mkdir(parents=True, exist_ok=True)
    write_text(study.out / COST, json.dumps({"key": key, "cost": cost}, indent=1) + "\n")
    return cost


def _measured(args: argparse.Namespace, study: Study, counts: Sequence[int]) -> dict[str, Any]:
    from quietvit_eval.study.cost import measured

    print(f"timing steps with {', '.join(map(str, counts))} registers by turns", flush=True)
    try:
        return {"measured": measured(study.reference, counts, rounds=args.rounds)}
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        message = message_for_user(error)
        if message is None:
            raise
        study.failed = True
        study.note(f"the time of training steps: {message.splitlines()[0]}")
        return {"measuring_failed": message.splitlines()[0]}


def _write(study: Study, entries: Sequence[Entry], cost: dict[str, Any] | None) -> int:
    from quietvit_eval.study.plan import settings_of
    from quietvit_eval.study.write import PAGE, About, write_study

    runs = list(study.runs.values())
    about = About(
        recipe=study.recipe or "that of the runs given",
        registers=study.counts,
        seeds=study.seeds,
        settings=settings_of(study.reference),
        steps=runs[0].step if runs else 0,
        data=runs[0].images if runs else "",
        missing=tuple(study.missing),
    )
    study.out.mkdir(parents=True, exist_ok=True)
    for sentence in write_study(study.out, about, entries, cost):
        print(sentence)
    print(f"page: {study.out / PAGE}")
    return 2 if study.failed else 0
