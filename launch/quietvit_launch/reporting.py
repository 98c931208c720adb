"""The commands `report` and `protocols`: what runs, cards and recipes say."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

WIDTH = 110  # columns of a file or a pipe
PAGE = "report.html"
NAMED = 5  # runs that an error names


def run_report(args: argparse.Namespace) -> int:
    """`quietvit report RUN`: one page about a run. Raises ValueError for a folder that is none."""
    from quietvit_launch.jobs import ask, find_runs, look

    folder = Path(args.folder).expanduser()
    out = folder / PAGE if args.out is None else Path(args.out).expanduser()
    out = out / PAGE if out.is_dir() else out
    if folder.is_dir() and not (folder / "config.yaml").exists() and (runs := list(find_runs(folder))):
        more = f" and {len(runs) - NAMED} more" if len(runs) > NAMED else ""
        raise ValueError(f"{folder} holds runs, and a page is about one: {', '.join(map(str, runs[:NAMED]))}{more}")
    from quietvit_eval.run_report.folder import State
    from quietvit_eval.run_report.page import write_run_report

    row = look(folder, ask([folder]))
    console = wide_console()
    path = write_run_report(
        folder, out, state=State(row.state, row.message, row.steps), images=args.images, console=console
    )
    console.print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)", highlight=False, markup=False, soft_wrap=True)
    return 0


def run_compare(args: argparse.Namespace) -> int:
    """`quietvit report compare`: pairs of cards, their differences, and cards that cannot be compared."""
    if (args.b is None) == (args.against is None):
        raise ValueError("compare takes two paths A and B, or one path and --against random-init (or pixels)")
    from quietvit_eval.compare import compare_cards, couples_of, couples_within
    from quietvit_eval.report import print_comparisons

    a = Path(args.a).expanduser()
    if args.b is None:
        cards, couples = couples_within(a, args.against)
    else:
        cards, couples = couples_of(a, Path(args.b).expanduser())
    found = [compare_cards(x, y, cards, seed=args.seed, num=args.draws) for x, y in couples.alike]
    if args.format == "json":
        tree = {"comparisons": [asdict(c) for c in found], "refused": couples.refused}
        print(json.dumps(tree, indent=2))
        return 0
    console = wide_console()
    print_comparisons(found, console)
    for text in couples.refused:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    return 0


def run_show(args: argparse.Namespace) -> int:
    """`quietvit report show`: cards as tables."""
    from quietvit_eval.cards import find_cards
    from quietvit_eval.report import print_cards

    found = {path: card for text in args.paths for path, card in find_cards(Path(text).expanduser()).items()}
    if args.format == "json":
        print(json.dumps({str(path): asdict(card) for path, card in found.items()}, indent=2))
        return 0
    print_cards(list(found.values()), wide_console())
    return 0


def run_protocols(args: argparse.Namespace) -> int:
    """`quietvit protocols`: their names and first lines, or one with all its settings."""
    from quietvit_eval.protocols import load_protocol, protocols, to_yaml

    if args.name:
        print(to_yaml(load_protocol(args.name)), end="")
        return 0
    for name in protocols():
        print(f"{name:26} {load_protocol(name).about}")
    return 0


def wide_console() -> Console:
    """A terminal as it is; a file or a pipe wide enough for tables."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, WIDTH))
