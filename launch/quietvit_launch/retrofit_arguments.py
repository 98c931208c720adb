"""The arguments of `retrofit`. Only the standard library is imported here."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeAlias

from quietvit_launch.commands import at_least
from quietvit_launch.eval_arguments import MODEL
from quietvit_launch.inspect_arguments import add_images

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

EXAMPLES = """examples:
  quietvit retrofit dinov2_vitl14_pretrain.pth --data ~/photos --block -2 --out dinov2_vitl14_tt
  quietvit inspect artifacts --model dinov2_vitl14_pretrain.pth --model dinov2_vitl14_tt --data ~/photos
A model without outliers is left alone. Registers by further training instead: quietvit train continue_dinov2
init.from=MODEL model.num_registers=4 data.path=PATH --out RUN
"""


def add_retrofit(commands: Commands, run: Callable[[argparse.Namespace], int]) -> None:
    """`quietvit retrofit MODEL`."""
    parser = commands.add_parser(
        "retrofit",
        help="give a model that has outlier tokens registers without training it (arXiv 2506.08010)",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help=MODEL)
    add_images(parser, images=500)
    parser.add_argument("--out", required=True, help="new folder for the model, which every command takes")
    parser.add_argument("--registers", type=at_least(1), default=1, metavar="N", help="added tokens (default: 1)")
    parser.add_argument(
        "--neurons", type=at_least(1), metavar="N", help="hidden units moved (default: as few as will do, 100 at most)"
    )
    parser.add_argument(
        "--block", type=int, default=-1, help="block after which outliers are told, from 0 (default: -1, the last)"
    )
    parser.add_argument(
        "--last-block",
        type=int,
        metavar="BLOCK",
        help="the last whose units are looked into (default: the one after which outliers begin)",
    )
    parser.add_argument("--size", type=at_least(1), help="image side in pixels (default: the model's, 224 at the most)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=at_least(1), default=32, help="images at a time (default: 32)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the images drawn (default: 0)")
    parser.set_defaults(run=run)
