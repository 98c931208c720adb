"""The commands `eval` and `embed`: arguments to calls of quietvit_eval."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from quietvit_launch.reporting import wide_console
from quietvit_launch.stopping import sigterm_stops

if TYPE_CHECKING:
    from quietvit_eval.cards import Card
    from quietvit_eval.protocols import Protocol

# What can be told wrong before torch is imported is told from here; a test holds these against the tables themselves.
TASK_TARGETS: Mapping[str, str] = {
    "knn": "labels",
    "linear": "labels",
    "logistic": "labels",
    "finetune": "labels",
    "classifier": "labels",
    "segmentation": "classes",
    "segmentation-patches": "classes",
    "depth": "metres",
    "discovery": "boxes",
}
OUT_SUFFIXES = (".npz", ".parquet")
WEIGHTS = "teacher.safetensors"
OWN = re.compile(r"(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)")


@dataclass(frozen=True)
class Plan:
    """What `eval` was asked for: its tasks with their settings."""

    tasks: tuple[str, ...]
    settings: Mapping[str, Mapping[str, Any]]  # by task
    size: int | None = None
    protocol: Protocol | None = None
    deviations: tuple[str, ...] = field(default=())  # what the command line has otherwise than the protocol


def check_tasks(text: str) -> list[str]:
    """ "knn,linear" as a list. Raises ValueError for an unknown task; needs no torch."""
    tasks = [word.strip() for word in text.split(",") if word.strip()]
    if not tasks or (unknown := [t for t in tasks if t not in TASK_TARGETS]):
        raise ValueError(f"unknown task {unknown[0] if tasks else text!r}: choose from {', '.join(TASK_TARGETS)}")
    targets = {TASK_TARGETS[task]: task for task in tasks}
    if len(targets) > 1:
        said = " and ".join(f"{task} needs {target}" for target, task in targets.items())
        raise ValueError(f"one command scores tasks of one kind, but {said}: run them one after the other")
    return tasks


def make_plan(what: str, words: Sequence[str], *, size: int | None = None, select: str | None = None) -> Plan:
    """Tasks, or a protocol by its name or file, with the settings on the command line.

    Raises ValueError for an unknown task or protocol and for words that are no settings; needs no torch. Names and
    values of settings are looked at by `typed_settings`.
    """
    from quietvit_eval.protocols import SUFFIXES, load_protocol, protocols

    names = [word.strip() for word in what.split(",") if word.strip()]
    protocol = None
    if len(names) == 1 and (names[0] in protocols() or names[0].endswith(SUFFIXES)):
        protocol = load_protocol(names[0])
        tasks = check_tasks(protocol.task)
    elif len(names) > 1 and (mixed := [n for n in names if n in protocols()]):
        raise ValueError(f"{mixed[0]} is a protocol: a command takes tasks, or one protocol by itself")
    else:
        tasks = _tasks_or_protocol(what, list(protocols()))
    given = _settings(tasks, words)
    if select is not None:
        if "linear" not in tasks:
            raise ValueError("--select is a setting of the task linear, which is not among those to run")
        given["linear"]["select"] = select
    if protocol is None:
        return Plan(tuple(tasks), given, size)
    task = tasks[0]
    settings = {task: {**protocol.options, **given[task]}}
    deviations = [name for name, value in given[task].items() if protocol.options.get(name) != value]
    if size is not None and size != protocol.size:
        deviations.append("--size")
    return Plan(tuple(tasks), settings, protocol.size if size is None else size, protocol, tuple(deviations))


def _tasks_or_protocol(what: str, protocols: list[str]) -> list[str]:
    try:
        return check_tasks(what)
    except ValueError as error:
        near = difflib.get_close_matches(what, [*TASK_TARGETS, *protocols], n=1)
        if not near or "unknown task" not in str(error):
            raise
        raise ValueError(f"{error}; or a protocol (see `quietvit protocols`). Nearest: {near[0]}") from error


def _settings(tasks: Sequence[str], words: Sequence[str]) -> dict[str, dict[str, Any]]:
    from quietvit_eval.option_values import parse_setting

    given: dict[str, dict[str, Any]] = {task: {} for task in tasks}
    for word in words:
        if word in TASK_TARGETS:
            raise ValueError(f"tasks are joined by commas: {','.join([*tasks, word])}")
        name, value = parse_setting(word)
        task, dot, option = name.rpartition(".")
        if not dot:
            if len(tasks) > 1:
                raise ValueError(f"{word!r} is a setting of which task? Write {tasks[0]}.{word} or {tasks[1]}.{word}")
            task = tasks[0]
        elif task not in tasks:
            raise ValueError(f"{word!r} is a setting of task {task!r}, which is not among those to run")
        given[task][option] = value
    return given


def typed_settings(plan: Plan) -> dict[str, dict[str, Any]]:
    """The settings in the types of the tasks' options. Raises ValueError for an unknown one or a wrong type."""
    from quietvit_eval.option_values import typed_options
    from quietvit_eval.task import find_task, make_options

    typed = {}
    for task, given in plan.settings.items():
        typed[task] = typed_options(find_task(task).options, given, f"task {task}")
        make_options(task, typed[task])
    return typed


def check_model(path: str) -> Path:
    """The model's path. Raises ValueError if no model can be there; needs no torch."""
    model = Path(path).expanduser()
    what = f"a run folder, a {WEIGHTS}, or weights of DINOv2, T2T-ViT, open_clip, timm or transformers"
    if not model.exists():
        raise ValueError(f"there is no model at {path}: give {what}")
    places = (WEIGHTS, f"checkpoints/step_*/{WEIGHTS}", "config.json", "open_clip_config.json")
    if model.is_dir() and not any(any(model.glob(place)) for place in places):
        names = sorted(p.name for p in model.iterdir())[:8]
        raise ValueError(
            f"there is no model in the folder {path}: looked for {' and '.join(places[:2])}, found "
            f"{', '.join(names) or 'nothing'}. Give {what}"
        )
    return model


def check_eval_model(text: str) -> tuple[Path, str | None]:
    """Where the model lies, and the whole `file.py:name` if it is one of the user's own. Raises ValueError if no model
    can be there; needs no torch."""
    match = OWN.fullmatch(text)
    if match is None:
        if text.endswith(".py"):
            raise ValueError(f"{text} holds a model of your own? Name the class or function too: {text}:name")
        return check_model(text), None
    file = Path(match["file"]).expanduser()
    if not file.is_file():
        raise ValueError(f"there is no file {match['file']} with a model of your own")
    return file, text


def open_data(args: argparse.Namespace, target: str) -> tuple[Any, Any]:
    """The sources of train and test. Raises ValueError for data that are not there or of another layout; needs no
    torch."""
    from quietvit.data.sources import open_source
    from quietvit_eval.dense_data.pairs import open_pairs
    from quietvit_eval.option_values import parse_setting

    options = dict(parse_setting(word) for word in args.data_option)
    test_place = args.test_data or args.data
    test_split = args.test_split or ("val" if args.test_data is None or target != "labels" else split_at(test_place))
    places = [
        (args.data, args.kind, args.train_split),
        (test_place, args.test_kind or args.kind, test_split),
    ]
    found: list[Any] = []
    for place, layout, split in places:
        kind, path = ("scenes", None) if place == "scenes" else (layout, place)
        if target == "labels":
            found.append(open_source(kind, path, split=split, **options))
        else:
            found.append(open_pairs(target, kind, path, split=split, **options))
    return found[0], found[1]


def split_at(place: str) -> str | None:
    """The split of a test set by itself: "val" if a folder has one (or a test split), else None, which is all of it."""
    from quietvit.data.folder import SPLIT_FOLDERS

    folder = Path(place).expanduser()
    return "val" if any((folder / name).is_dir() for name in SPLIT_FOLDERS["val"]) else None


def run_evaluation(args: argparse.Namespace) -> int:
    """`quietvit eval`: cards into a folder, tables on the screen."""
    plan = make_plan(args.tasks, args.settings, size=args.size, select=args.select)
    place, own = check_eval_model(args.model)
    if args.test_split is None and plan.protocol is not None:
        args.test_split = plan.protocol.test_split
    sources = open_data(args, TASK_TARGETS[plan.tasks[0]])
    out = Path(args.out).expanduser() if args.out else (place if place.is_dir() else place.parent) / "eval"
    settings = typed_settings(plan)
    from quietvit import dist
    from quietvit_eval.evaluate import evaluate
    from quietvit_eval.own_model import load_own
    from quietvit_launch.ranks import ranks

    # What is left out here has evaluate's own default.
    given = {"feature_cache": args.cache, "memory_gb": args.memory}
    with sigterm_stops(), ranks(args.device) as device:
        console = wide_console() if dist.rank() == 0 else None
        cards = evaluate(
            place if own is None else load_own(own, device),
            plan.tasks,
            sources,
            label=args.label,
            class_map=args.class_map,
            real_labels=args.real_labels,
            random_init=args.random_init,
            pixels=args.pixels,
            image_size=plan.size,
            limit_train=args.limit_train,
            limit_test=args.limit_test,
            options=settings,
            seed=args.seed,
            device=device,
            bf16=args.bf16,
            batch_size=args.batch_size,
            workers=args.workers,
            out_dir=out,
            console=console,
            **{name: value for name, value in given.items() if value is not None},
        )
        if console is not None:
            _print_published(plan, args, cards, console)
            console.print(f"cards: {out}", highlight=False, soft_wrap=True)
    return 0


def _print_published(plan: Plan, args: argparse.Namespace, cards: Sequence[Card], console: Console) -> None:
    """The figures of the protocol beside the model's, where the data are of the layout that they are for."""
    from quietvit_eval.report import unit_of

    if plan.protocol is None or plan.protocol.published is None:
        return
    published = plan.protocol.published
    for card in cards:
        layout = re.split(r"[:/ ]", str(card.data["test"]["name"]))[0]
        if card.subject != "model" or published.score not in card.scores or layout not in plan.protocol.data:
            continue
        unit = unit_of(published.score)
        figures = ", ".join(f"{model} {value:.{unit.decimals}f}" for model, value in published.figures.items())
        console.print(
            f"{published.score}{f' in {unit.name}' if unit.name else ''}: this model "
            f"{unit.text(card.scores[published.score])}. Published ({published.source}): {figures}",
            highlight=False,
        )
        limits = [f"--{n.replace('_', '-')}" for n in ("limit_train", "limit_test") if getattr(args, n) is not None]
        wanted = plan.protocol.test_split
        splits = ["--test-split"] if wanted is not None and args.test_split != wanted else []
        if changed := [*plan.deviations, *splits, *limits]:
            console.print(f"Not comparable with these: this command has other {', '.join(changed)}.", highlight=False)


def run_embedding(args: argparse.Namespace) -> int:
    """`quietvit embed`: names and embeddings into one file."""
    model, out = check_model(args.model), Path(args.out).expanduser()
    if out.suffix not in OUT_SUFFIXES or out.is_dir():
        raise ValueError(f"--out {args.out}: name a file that ends in {' or '.join(OUT_SUFFIXES)}")
    from quietvit.data.sources import open_source

    images = open_source("auto", args.images)
    from quietvit_eval.embed import embed

    done = embed(
        images,
        model,
        out,
        image_size=args.size,
        batch_size=args.batch_size,
        device=args.device,
        console=Console(),
    )
    print(f"wrote {done.path}: {done.images} images, {done.embed_dim} numbers each")
    for sample in done.skipped:
        print(f"  skipped {sample.name}: {sample.reason}")
    return 0
