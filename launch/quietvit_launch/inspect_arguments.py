"""The arguments of `inspect` and its actions. Only the standard library is imported here."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from quietvit_launch.commands import at_least
from quietvit_launch.eval_arguments import MODEL, above_zero

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

ARTIFACTS_EXAMPLES = """examples:
  quietvit inspect artifacts --model runs/photos --data ~/photos
  quietvit inspect artifacts --model dinov2_vitl14_pretrain.pth --model dinov2_vitl14_reg4_pretrain.pth \\
    --data /data/imagenet --size 518
  quietvit inspect artifacts --model runs/photos --data ~/photos --checkpoints --no-probes
"""


MAPS_EXAMPLES = """examples:
  quietvit inspect attention --model runs/photos --data ~/photos --images 6 --average 500
  quietvit inspect pca --model dinov2_vits14_reg4_pretrain.pth --data ~/photos/dogs --size 448
  quietvit inspect features --model T2T_ViT_14.pth.tar --data ~/photos --images 200
"""
MATCH_EXAMPLES = """examples:
  quietvit inspect match left.jpg right.jpg --model runs/photos
  quietvit inspect match left.jpg right.jpg --model dinov2_vits14_reg4_pretrain.pth --foreground --ratio 0.9
"""


@dataclass(frozen=True)
class Action:
    """A row of ACTIONS: `quietvit inspect NAME`."""

    help: str
    add: Callable[[argparse.ArgumentParser], None]  # its arguments
    run: str  # "module:function" of quietvit_launch, imported when the action is run
    examples: str = ""


def add_inspect(commands: Commands, run: Callable[[argparse.Namespace], int]) -> None:
    """`quietvit inspect ACTION`; `run` is given the arguments of any action."""
    inspect = commands.add_parser("inspect", help="look into a frozen model: artifacts, attention, feature maps")
    actions = inspect.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, action in ACTIONS.items():
        parser = actions.add_parser(
            name, help=action.help, epilog=action.examples, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        action.add(parser)
        parser.set_defaults(run=run)


def add_running(parser: argparse.ArgumentParser) -> None:
    """--size, --device, --bf16, --batch-size, --seed, --out: for every action that runs a model."""
    parser.add_argument("--size", type=at_least(1), help="image side in pixels (default: the model's, 224 at the most)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--bf16", action="store_true", help="run the model in bfloat16 on CUDA")
    parser.add_argument("--batch-size", type=at_least(1), default=32, help="images at a time (default: 32)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of whatever is drawn (default: 0)")
    parser.add_argument("--out", help="folder for what is written (default: <model folder>/inspect/<action>)")


def add_images(parser: argparse.ArgumentParser, *, images: int) -> None:
    """--data, --kind, --data-option, --split, --images, --workers: for every action that reads a data set."""
    parser.add_argument("--data", required=True, help="a folder, a tar, a list, or `scenes`")
    parser.add_argument("--kind", default="auto", help="layout of --data (default: found out from the path)")
    parser.add_argument(
        "--data-option",
        action="append",
        default=[],
        metavar="key=value",
        help="what a layout asks for, e.g. num_images=500; may be repeated",
    )
    parser.add_argument("--split", help="part of the data set (default: val if it has one, else all of it)")
    parser.add_argument(
        "--images", type=at_least(1), default=images, help=f"so many of them at the most, drawn (default: {images})"
    )
    parser.add_argument("--workers", type=at_least(0), default=0, help="processes that read images (default: 0)")


def _artifacts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, action="append", help=f"{MODEL}, or file.py:name; may be repeated, to compare"
    )
    add_images(parser, images=1000)
    add_running(parser)
    parser.add_argument(
        "--layers", default="all", help="blocks of which norms are read, from 0, e.g. 0,5,11 (default: all)"
    )
    parser.add_argument("--probe-layer", type=int, default=-1, help="block whose tokens are probed (default: the last)")
    parser.add_argument(
        "--checkpoints", action="store_true", help="also every checkpoint of a run: when artifacts came"
    )
    parser.add_argument("--no-probes", action="store_true", help="leave out the probes of what tokens know")
    parser.add_argument("--label", default="class", help="label set of the data for the probe on one token")
    parser.add_argument("--draws", type=at_least(1), default=3, help="of one token from each image (default: 3)")


def _maps(parser: argparse.ArgumentParser, *, images: int = 8) -> None:
    parser.add_argument("--model", required=True, help=f"{MODEL}, or file.py:name, an Extractor of your own")
    add_images(parser, images=images)
    add_running(parser)


def _layer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layer", type=int, default=-1, metavar="BLOCK", help="from 0 (default: -1, the last)")


def _smooth(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--smooth", action="store_true", help="enlarge maps bilinearly (default: patches are blocks)")


def _attention(parser: argparse.ArgumentParser) -> None:
    _maps(parser)
    _layer(parser)
    parser.add_argument(
        "--average", type=at_least(0), default=0, metavar="N", help="also average the maps over N images (default: 0)"
    )
    _smooth(parser)


def _pca(parser: argparse.ArgumentParser) -> None:
    _maps(parser)
    _layer(parser)
    parser.add_argument("--no-foreground", action="store_true", help="colour all patches, background too")
    parser.add_argument(
        "--whiten",
        action="store_true",
        help="colours from -3 to +3 standard deviations of each component (default: between percentiles)",
    )
    _smooth(parser)


def _features(parser: argparse.ArgumentParser) -> None:
    _maps(parser, images=64)
    parser.add_argument("--shown", type=at_least(1), default=2, help="images with a page of maps (default: 2)")
    parser.add_argument("--layers", metavar="BLOCKS", help="rows of a page, e.g. 0,5,11 (default: 8, evenly spread)")
    parser.add_argument("--channels", type=at_least(1), default=12, help="maps in a row (default: 12)")
    parser.add_argument(
        "--order", choices=("first", "varied"), default="first", help="the first, or those that vary most"
    )


def _match(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="an image file")
    parser.add_argument("b", metavar="B", help="another")
    parser.add_argument("--model", required=True, help=f"{MODEL}, or file.py:name, an Extractor of your own")
    parser.add_argument(
        "--size", type=at_least(1), help="longer side in pixels (default: twice the model's, 448 at the most)"
    )
    _layer(parser)
    parser.add_argument("--foreground", action="store_true", help="only patches that PCA tells from the background")
    parser.add_argument("--ratio", type=above_zero, help="most distance over the next best one (default: any)")
    parser.add_argument(
        "--spacing", type=at_least(1), default=2, help="least distance of two matches in patches (default: 2)"
    )
    parser.add_argument("--most", type=at_least(1), default=60, help="matches kept, the best (default: 60)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--bf16", action="store_true", help="run the model in bfloat16 on CUDA")
    parser.add_argument("--out", help="folder for what is written (default: <model folder>/inspect/match)")


ACTIONS: Mapping[str, Action] = {
    "artifacts": Action(
        "norms of all tokens by block, a verdict on outliers, where they sit and what they know, as one page",
        _artifacts,
        "inspecting:run_artifacts",
        ARTIFACTS_EXAMPLES,
    ),
    "attention": Action(
        "maps of where [CLS] and the registers look, of some images and averaged over many",
        _attention,
        "inspecting_maps:run_attention",
        MAPS_EXAMPLES,
    ),
    "pca": Action(
        "patch features as colours, the foreground told by the first component",
        _pca,
        "inspecting_maps:run_pca",
        MAPS_EXAMPLES,
    ),
    "features": Action(
        "channels of every block as grey maps, and how many of them are dead",
        _features,
        "inspecting_maps:run_features",
        MAPS_EXAMPLES,
    ),
    "match": Action(
        "patches of two images that correspond, as lines and as pixel coordinates",
        _match,
        "inspecting_maps:run_match",
        MATCH_EXAMPLES,
    ),
}
