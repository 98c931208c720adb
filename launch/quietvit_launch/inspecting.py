"""The command `inspect`: arguments to calls of quietvit_eval.inspect."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rich.console import Console
from rich.table import Table

from quietvit_launch.evaluation import check_eval_model
from quietvit_launch.inspect_arguments import ACTIONS
from quietvit_launch.reporting import wide_console
from quietvit_launch.stopping import sigterm_stops

if TYPE_CHECKING:
    from quietvit.contracts import Extractor
    from quietvit.data.sources import Source


def run_inspect(args: argparse.Namespace) -> int:
    """`quietvit inspect ACTION`: what its row of ACTIONS names."""
    module, _, name = ACTIONS[args.action].run.partition(":")
    run = cast(Callable[[argparse.Namespace], int], getattr(importlib.import_module(f"quietvit_launch.{module}"), name))
    with sigterm_stops():
        return run(args)


def open_images(args: argparse.Namespace) -> Source:
    """The images of --data. Raises ValueError for data that are not there or of another layout; needs no torch."""
    from quietvit.data.sources import open_source
    from quietvit_eval.option_values import parse_setting
    from quietvit_launch.evaluation import split_at

    options = dict(parse_setting(word) for word in args.data_option)
    kind, path = ("scenes", None) if args.data == "scenes" else (args.kind, args.data)
    split = args.split or ("val" if path is None else split_at(path))
    return open_source(kind, path, split=split, **options)


def open_model(text: str, args: argparse.Namespace) -> Extractor:
    """The model that a --model names, one of the user's own too. Raises ValueError and FileNotFoundError as
    `quietvit.load` and `load_own`."""
    from quietvit.weights.extractor import load
    from quietvit_eval.own_model import load_own

    place, own = check_eval_model(text)
    return load(place, args.device, bf16=args.bf16) if own is None else load_own(own, args.device)


def out_folder(args: argparse.Namespace, model: str) -> Path:
    """--out, or the folder inspect/<action> beside or in the model's. It is not made here."""
    if args.out:
        return Path(args.out).expanduser()
    place, _ = check_eval_model(model)
    return (place if place.is_dir() else place.parent) / "inspect" / str(args.action)


def run_artifacts(args: argparse.Namespace) -> int:
    """`quietvit inspect artifacts`: result.json, pictures and a page; on the screen the table of all models."""
    layers = layer_numbers(args.layers)
    places = [check_eval_model(text)[0] for text in args.model]
    if args.checkpoints and not any((place / "checkpoints").is_dir() for place in places):
        raise ValueError("--checkpoints follows a run: none of the models is a run folder with checkpoints")
    source, out, console = open_images(args), out_folder(args, args.model[0]), wide_console()
    from quietvit_eval.inspect.artifacts import Options, Subject, inspect_artifacts
    from quietvit_eval.inspect.page import overview_row

    options = Options(
        images=args.images,
        image_size=args.size,
        layers=layers,
        probe_layer=args.probe_layer,
        probes=not args.no_probes,
        checkpoints=args.checkpoints,
        label=args.label,
        draws=args.draws,
        seed=args.seed,
        batch_size=args.batch_size,
        workers=args.workers,
    )
    subjects = [
        Subject(
            text,
            partial(open_model, text, args),
            run=place if (place / "metrics.jsonl").is_file() else None,
            open_checkpoint=lambda file: open_model(str(file), args),
        )
        for text, place in zip(args.model, places, strict=True)
    ]
    result = inspect_artifacts(subjects, source, options, out, console=console)
    print_overview([overview_row(model) for model in result["models"]], console)
    for model in result["models"]:
        console.print(f"{model['name']}: {model['decision']['sentence']}", highlight=False, markup=False)
    console.print(f"page: {out / 'index.html'}", highlight=False, markup=False, soft_wrap=True)
    return 0


def layer_numbers(text: str) -> tuple[int, ...] | None:
    """ "0,5,11" as numbers, ascending; "all" as None. Raises ValueError for anything else."""
    if text.strip() == "all":
        return None
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdigit() for word in words):
        raise ValueError(f"--layers {text}: write `all`, or numbers of blocks from 0 joined by commas, e.g. 0,5,11")
    return tuple(sorted({int(word) for word in words}))


def print_overview(rows: Sequence[Mapping[str, str]], console: Console) -> None:
    """A line for each model."""
    table = Table(title="artifacts after the last block, before the final norm", title_justify="left")
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
