"""The arguments of `info`. Only the standard library is imported here."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeAlias

from quietvit_launch.commands import at_least

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

INFO_EXAMPLES = """examples:
  quietvit info
  quietvit info vit-small --image-size 224 --image-size 518
  quietvit info dinov2_vitl14_reg
  quietvit info runs/photos --format json
"""


def add_info(commands: Commands, run: Callable[[argparse.Namespace], int]) -> None:
    """`quietvit info`."""
    parser = commands.add_parser(
        "info",
        help="describe a model or a size: architecture, parameters, multiply-adds, provenance; without one, list all",
        epilog=INFO_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="FILE_OR_NAME",
        help="a run folder, a file or folder of weights; or a name: vit-small, t2t_vit-14, small, dinov2_vits14_reg",
    )
    parser.add_argument("--backbone", metavar="NAME", help="only this family: vit or t2t_vit (default: both)")
    parser.add_argument(
        "--image-size",
        type=at_least(1),
        action="append",
        metavar="PIXELS",
        help="image side; of a model, may be repeated (default: 224, and of a model the one it was made for)",
    )
    parser.add_argument("--num-heads", type=at_least(1), metavar="N", help="for files that do not tell their heads")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.set_defaults(run=run)
