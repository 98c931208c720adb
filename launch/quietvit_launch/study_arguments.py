"""The arguments of `study registers`. Only the standard library is imported here."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeAlias

from quietvit_launch.commands import at_least

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

EXAMPLES = """examples:
  quietvit study registers quickstart --seeds 0,1,2 --eval knn,linear --out studies/scenes
  quietvit study registers imagenet_short data.path=/data/imagenet --on slurm slurm.nodes=2 --out studies/imagenet \\
    --eval dinov2-imagenet-linear --eval 'dinov2-ade20k-linear --data /data/ADEChallengeData2016'
  quietvit study registers --runs runs/a runs/b --eval 'knn --limit-train 3000' --measure --out studies/old
  quietvit study registers quickstart --out studies/scenes --retrofit 'test-time registers=retrofits/seed0'
The same command goes on with what is not done yet; without --on slurm it trains one run after the other.
"""


def numbers(text: str) -> tuple[int, ...]:
    """A type for argparse: "0,1,4" as whole numbers from 0 on, ascending, none twice."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers: write 0,1,2")
    found = sorted({int(word) for word in words})
    if len(found) < len(words):
        raise argparse.ArgumentTypeError(f"{text!r} names a number twice")
    return tuple(found)


def add_study(commands: Commands, run: Callable[[argparse.Namespace], int]) -> None:
    """`quietvit study registers`."""
    study = commands.add_parser("study", help="one recipe with several numbers of registers, on one page")
    actions = study.add_subparsers(dest="action", required=True, metavar="ACTION")
    parser = actions.add_parser(
        "registers",
        help="train or take runs with 0, 1, 2, 4, 8, 16 registers; norms, attention, scores and cost of all",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="RECIPE key=value",
        help="name of a shipped recipe or a YAML file (none: only --runs are taken), and settings that replace its "
        "own; slurm.key: the job's",
    )
    parser.add_argument("--registers", type=numbers, help="how many (default: 0,1,2,4,8,16; of --runs alone: theirs)")
    parser.add_argument("--seeds", type=numbers, help="seeds of training (default: 0,1; of --runs alone: theirs)")
    parser.add_argument("--out", required=True, help="folder of the study: its runs, cards, figures and page")
    parser.add_argument(
        "--runs",
        nargs="+",
        action="extend",
        default=[],
        metavar="FOLDER",
        help="finished runs to take, or folders of them",
    )
    parser.add_argument(
        "--retrofit",
        action="append",
        default=[],
        metavar="NAME=MODEL",
        help="another model beside those without registers; may be repeated, one name for all seeds",
    )
    _add_looking(parser)
    parser.add_argument("--on", choices=("local", "slurm"), default="local", help="where to train (default: local)")
    parser.add_argument("--processes", type=at_least(1), metavar="N", help="local: so many processes (default: GPUs)")
    parser.add_argument("--slurm", metavar="FILE", help="slurm: settings of the jobs (default: the recipe `slurm`)")
    parser.add_argument("--dry-run", action="store_true", help="slurm: print the sbatch script, submit nothing")
    parser.add_argument("--page-only", action="store_true", help="train, score and look no more: write the page again")
    parser.set_defaults(run=run)


def _add_looking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--eval",
        action="append",
        metavar="TASKS",
        help="what to score, as `quietvit eval` takes it: tasks or a protocol, and in quotes more of its arguments; "
        "may be repeated (default: knn,linear; `none`: nothing)",
    )
    parser.add_argument("--data", help="data for --eval and for the held-out images (default: the recipe's own)")
    parser.add_argument("--no-controls", action="store_true", help="do not score the networks before training")
    parser.add_argument(
        "--images", type=at_least(2), default=500, help="held-out images for norms and attention (default: 500)"
    )
    parser.add_argument("--shown", type=at_least(1), default=4, help="of them on the page (default: 4)")
    parser.add_argument("--size", type=at_least(1), help="their side in pixels (default: the model's, 224 at the most)")
    parser.add_argument(
        "--measure", action="store_true", help="time training steps of all counts by turns, on this machine, now"
    )
    parser.add_argument("--rounds", type=at_least(2), default=15, help="of --measure (default: 15)")
    parser.add_argument("--device", default="auto", help="for looking and scoring (default: auto)")
