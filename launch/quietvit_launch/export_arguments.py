"""The arguments of `export`. Only the standard library is imported here."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from difflib import get_close_matches
from typing import TypeAlias

from quietvit_launch.commands import at_least
from quietvit_launch.eval_arguments import MODEL

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

# What can be told wrong before torch is imported is told from here; a test holds these against quietvit's own tables.
TARGETS = ("safetensors", "transformers", "timm", "onnx", "torch")
NORMALISATIONS = ("imagenet", "inception", "clip")
SIZE = re.compile(r"([1-9]\d*)(?:x([1-9]\d*))?")
EXAMPLES = """examples:
  quietvit export runs/photos --out photos
  quietvit export runs/photos --to transformers --license Apache-2.0 --out photos-transformers
  quietvit export runs/photos --to onnx --size 224 --size 224x448 --out photos-onnx
  quietvit export vit_base_patch16_augreg.safetensors --normalisation inception --out augreg
The folder is opened again and compared with the model before it gets its name; README.md in it is the model card.
"""


def image_size(text: str) -> tuple[int, int]:
    """A type for argparse: "224" or "224x448", height first, in pixels."""
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no image size: write 224, or 224x448 for height x width")
    return int(match[1]), int(match[2] or match[1])


def target_name(text: str) -> str:
    """A type for argparse: one of TARGETS."""
    if text not in TARGETS:
        near = get_close_matches(text, TARGETS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise argparse.ArgumentTypeError(f"unknown export target '{text}'; {hint}known: {', '.join(TARGETS)}")
    return text


def add_export(commands: Commands, run: Callable[[argparse.Namespace], int]) -> None:
    """`quietvit export`."""
    parser = commands.add_parser(
        "export",
        help="write a model for other tools, with a model card, checked by opening it again",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help=MODEL)
    parser.add_argument("--out", required=True, help="new folder")
    parser.add_argument(
        "--to",
        type=target_name,
        default="safetensors",
        metavar="TARGET",
        help=f"{', '.join(TARGETS)} (default: safetensors, quietvit's own folder with code for plain PyTorch)",
    )
    parser.add_argument(
        "--size",
        type=image_size,
        action="append",
        default=[],
        metavar="HxW",
        help="onnx and torch, whose graphs are of fixed size: image side, or height x width; may be repeated "
        "(default: the model's own)",
    )
    parser.add_argument(
        "--license", metavar="SPDX", help="licence for the card, e.g. Apache-2.0 (default: none chosen)"
    )
    parser.add_argument("--normalisation", choices=NORMALISATIONS, help="of weights whose file does not tell theirs")
    parser.add_argument(
        "--num-heads", type=at_least(1), metavar="N", help="attention heads of weights whose shapes do not tell them"
    )
    parser.set_defaults(run=run)
