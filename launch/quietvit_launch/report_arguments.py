"""The arguments of `report`. Only the standard library is imported here."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TypeAlias

from quietvit_launch.commands import at_least

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Run: TypeAlias = Callable[[argparse.Namespace], int]

ACTIONS = ("run", "compare", "show")
EXAMPLES = """examples:
  quietvit report runs/photos
  quietvit report runs/photos --images 8 --out photos.html
  quietvit report compare runs/a runs/b
  quietvit report show runs/a runs/b
"""
COMPARE_EXAMPLES = """examples:
  quietvit report compare runs/a runs/b
  quietvit report compare runs/a/eval/knn_class_model_1a2b3c4d.json runs/b/eval/knn_class_model_5e6f7a8b.json
  quietvit report compare runs/a --against random-init
"""


def with_action(words: Sequence[str]) -> list[str]:
    """Words of the command line, with the action `run` where `report` is followed by a run instead of an action.

    A word that resembles an action, and is no folder, is left for argparse to complain of.
    """
    if len(words) < 2 or words[0] != "report" or words[1] in (*ACTIONS, "-h", "--help"):
        return list(words)
    if get_close_matches(words[1], ACTIONS, n=1, cutoff=0.7) and not Path(words[1]).exists():
        return list(words)
    return ["report", "run", *words[1:]]


def add_report(commands: Commands, run: Run, compare: Run, show: Run) -> None:
    """`quietvit report RUN`, `quietvit report compare` and `quietvit report show`."""
    report = commands.add_parser(
        "report",
        help="a page about a run; or compare result cards, or show them as tables",
        usage="quietvit report RUN [--out FILE] [--images N]\n       quietvit report {compare,show} ...",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = report.add_subparsers(dest="action", required=True, metavar="ACTION", prog="quietvit report")
    _add_run(actions, run)
    comparing = actions.add_parser(
        "compare",
        help="two models: differences of their scores with 95 %% intervals; unlike protocols are refused",
        epilog=COMPARE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    comparing.add_argument("a", metavar="A", help="a card, a folder of cards or a run folder")
    comparing.add_argument(
        "b", metavar="B", nargs="?", help="likewise; each card of A is compared with its counterpart"
    )
    comparing.add_argument("--against", metavar="CONTROL", help="instead of B: A's models against its own control")
    comparing.add_argument("--draws", type=at_least(1), default=1000, help="of the bootstrap (default: 1000)")
    comparing.add_argument("--seed", type=at_least(0), default=0, help="of the bootstrap (default: 0)")
    comparing.add_argument("--format", choices=("table", "json"), default="table")
    comparing.set_defaults(run=compare)
    showing = actions.add_parser("show", help="print cards, each protocol in a table of its own")
    showing.add_argument("paths", nargs="+", metavar="PATH", help="cards, folders of cards or run folders")
    showing.add_argument("--format", choices=("table", "json"), default="table")
    showing.set_defaults(run=show)


def _add_run(actions: Commands, run: Run) -> None:
    parser = actions.add_parser(
        "run",
        help="one HTML page about a run, finished or not: warnings, curves, maps, scores, settings (the word `run` may "
        "be left out)",
    )
    parser.add_argument("folder", metavar="RUN", help="run folder")
    parser.add_argument("--out", metavar="FILE", help="the page, or a folder for it (default: RUN/report.html)")
    parser.add_argument(
        "--images",
        type=at_least(0),
        default=4,
        metavar="N",
        help="images with maps over training, 16 at the most, 0: none (default: 4)",
    )
    parser.set_defaults(run=run)
