"""The arguments of `eval` and `protocols`. Only the standard library is imported here."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeAlias

from quietvit_launch.commands import at_least

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

MODEL = "run folder, teacher.safetensors, or weights of DINOv2, T2T-ViT, timm, open_clip or transformers on disk"
EVAL_EXAMPLES = """examples:
  quietvit eval knn,linear --model runs/photos --data ~/labelled --random-init --pixels
  quietvit eval dinov2-imagenet-linear --model dinov2_vits14_reg4_pretrain.pth --data /data/imagenet --bf16
  quietvit eval knn --model runs/photos --data /data/imagenet --test-data /data/imagenetv2 --class-map index
  quietvit eval dinov2-ade20k-linear --model runs/photos --data /data/ADEChallengeData2016
  quietvit eval segmentation steps=500 crop=128 short_side=128 --model runs/photos --data ~/masks --kind folders \\
    --data-option num_classes=11 --data-option ignore=11
  quietvit eval depth eval_crop=none --model runs/photos --data ~/rgbd --kind folders --data-option scale=1000
  quietvit eval discovery select=held_out --model runs/photos --data /data/VOCdevkit/VOC2007 --random-init --pixels
  quietvit eval knn --model my_model.py:make --data ~/labelled
  torchrun --nproc-per-node 8 -m quietvit_launch.cli eval linear views=crops --model runs/photos --data /data/imagenet
The same command resumes an interrupted evaluation. Protocols: `quietvit protocols`.
"""


def above_zero(text: str) -> float:
    """A type for argparse: numbers above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def add_eval(commands: Commands, run: Callable[[argparse.Namespace], int]) -> None:
    """`quietvit eval`."""
    parser = commands.add_parser(
        "eval",
        help="judge frozen features: classes of images or of pixels, depth, objects; or follow a published protocol",
        epilog=EVAL_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "tasks",
        help="a protocol (see `quietvit protocols`), or tasks joined by commas: knn, linear, logistic, finetune, "
        "classifier (the head that weights came with); segmentation, segmentation-patches; depth; discovery (LOST)",
    )
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="options of the task; of several tasks, task.key=value"
    )
    parser.add_argument("--model", required=True, help=f"{MODEL}, or file.py:name, an Extractor of your own")
    _add_data(parser)
    parser.add_argument("--size", type=at_least(1), help="image side in pixels (default: the task's rule)")
    parser.add_argument("--limit-train", type=at_least(1), help="use this many training images at the most")
    parser.add_argument("--limit-test", type=at_least(1), help="use this many test images at the most")
    parser.add_argument("--random-init", action="store_true", help="also score the same model before training")
    parser.add_argument("--pixels", action="store_true", help="also score raw pixels (knn, linear, discovery)")
    parser.add_argument(
        "--select",
        choices=("held_out", "val"),
        help="short for linear.select: the head chosen on a held-out part of train (default), or on the test data as "
        "in the DINOv2 paper",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--bf16", action="store_true", help="run the model in bfloat16 on CUDA")
    parser.add_argument("--batch-size", type=at_least(1), default=64, help="images at a time (default: 64)")
    parser.add_argument("--workers", type=at_least(0), default=0, help="processes that read images (default: 0)")
    parser.add_argument("--cache", metavar="FOLDER", help="where features of labelled images are kept")
    parser.add_argument("--memory", type=above_zero, metavar="GB", help="memory for features; more of them on disk")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--out", help="folder for the result cards (default: <model folder>/eval)")
    parser.set_defaults(run=run)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="a folder, a tar, a list, or `scenes`")
    parser.add_argument("--kind", default="auto", help="layout of --data (default: found out from the path)")
    parser.add_argument(
        "--data-option",
        action="append",
        default=[],
        metavar="key=value",
        help="what a layout asks for, e.g. num_classes=11; may be repeated",
    )
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--test-split", help="default: val; of --test-data: val if it has that, else all of it")
    parser.add_argument("--test-data", metavar="PATH", help="where the test images lie, if not in --data")
    parser.add_argument("--test-kind", metavar="KIND", help="layout of --test-data (default: that of --kind)")
    parser.add_argument("--label", default="class", help="label set to predict (default: class)")
    parser.add_argument(
        "--class-map", metavar="FILE", help="which train class each test class is; `index`: folders named by number"
    )
    parser.add_argument("--real-labels", metavar="FILE", help="ReaL's real.json, for ImageNet's validation images")


def add_protocols(commands: Commands, run: Callable[[argparse.Namespace], int]) -> None:
    """`quietvit protocols`."""
    parser = commands.add_parser("protocols", help="list the evaluation protocols, or print one with all its settings")
    parser.add_argument("name", nargs="?")
    parser.set_defaults(run=run)
