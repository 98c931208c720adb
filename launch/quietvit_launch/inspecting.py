"""The command `inspect`: arguments to calls of quietvit_eval.inspect."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from quietvit_launch.evaluation import check_eval_model
from quietvit_launch.inspect_arguments import ACTIONS
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
    """`quietvit inspect artifacts`: result.json, pictures and a page."""
    raise ValueError("inspect artifacts is being written")
