"""`inspect attention`, `pca`, `features` and `match`: arguments to calls of quietvit_eval.inspect."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from quietvit_launch.evaluation import check_eval_model
from quietvit_launch.inspecting import open_images, open_model, out_folder

if TYPE_CHECKING:
    from quietvit_eval.inspect.sample import Outcome


def run_attention(args: argparse.Namespace) -> int:
    """`quietvit inspect attention`."""

    def inspect(*given: Any, **shared: Any) -> Outcome:
        from quietvit_eval.inspect.attention import inspect_attention

        return inspect_attention(*given, **shared, block=args.layer, average=args.average, smooth=args.smooth)

    return _on_images(args, inspect)


def run_pca(args: argparse.Namespace) -> int:
    """`quietvit inspect pca`."""

    def inspect(*given: Any, **shared: Any) -> Outcome:
        from quietvit_eval.inspect.pca import inspect_pca

        foreground = not args.no_foreground
        return inspect_pca(
            *given, **shared, block=args.layer, foreground=foreground, whiten=args.whiten, smooth=args.smooth
        )

    return _on_images(args, inspect)


def run_features(args: argparse.Namespace) -> int:
    """`quietvit inspect features`."""
    layers = None if args.layers is None else parse_layers(args.layers)

    def inspect(*given: Any, **shared: Any) -> Outcome:
        from quietvit_eval.inspect.channels import inspect_features

        return inspect_features(
            *given, **shared, shown=args.shown, layers=layers, channels=args.channels, order=args.order
        )

    return _on_images(args, inspect)


def run_match(args: argparse.Namespace) -> int:
    """`quietvit inspect match A B`."""
    out = out_folder(args, args.model)
    first, second = (Path(text).expanduser() for text in (args.a, args.b))
    for path in (first, second):
        if not path.is_file():
            raise ValueError(f"there is no image file {path}")
    from quietvit_eval.inspect.match import MatchOptions, inspect_match

    options = MatchOptions(args.size, args.layer, args.foreground, args.ratio, args.spacing, args.most)
    return _told(inspect_match(open_model(args.model, args), first, second, out, options))


def parse_layers(text: str) -> list[int]:
    """ "0,5,11" as numbers. Raises ValueError for anything else."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"--layers {text!r}: write the numbers of blocks, from 0, joined by commas: 0,5,11")
    return sorted({int(word) for word in words})


def _on_images(args: argparse.Namespace, inspect: Callable[..., Outcome]) -> int:
    """Call `inspect(extractor, source, out, looks=...)` with what the arguments name, and print what it tells."""
    check_eval_model(args.model)
    source, out = open_images(args), out_folder(args, args.model)
    from quietvit_eval.inspect.sample import Looks

    looks = Looks(args.images, args.size, args.seed, args.batch_size, args.workers, Console())
    return _told(inspect(open_model(args.model, args), source, out, looks=looks))


def _told(outcome: Outcome) -> int:
    for line in outcome.lines:
        print(line)
    for path in (*outcome.pictures, outcome.result):
        print(f"wrote {path}")
    return 0
