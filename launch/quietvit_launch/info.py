"""The command `quietvit info`: every size of both families, its parameters and multiply-adds beside published figures.

One model alone is quietvit_launch/info_model.py's. Only what needs no torch is imported here.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from inspect import signature
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

__all__ = ["PUBLISHED", "Published", "Row", "check_image_size", "make_row", "make_rows", "published_form", "run_info"]

PAPER_IMAGE_SIZE = 224  # of every published figure below
WIDTH = 120  # columns that the tables need
COUNTED = (
    "Parameters: everything that is saved, frozen tables included. MACs: multiply-adds of one image in linear layers, "
    "convolutions and matrix products, those of attention included; norms, softmax and activations are left out."
)
FORMS = {
    "vit": "Published: tiny as in DeiT (patch 16, no registers, 1000 classes); small to giant as the released DINOv2 "
    "models with 4 registers (position table of 37 x 37 patches, no classes).",
    "t2t_vit": "Published: no registers, sinusoid positions, 1000 classes, as its authors' code builds it.",
}
TRAINED = "Trained here: our defaults, patches of {patch}, 4 registers, learned positions and no classes."


@dataclass(frozen=True)
class Published:
    """What others say of a size, at 224 pixels. `parameters` and `macs` are quoted as printed; "" where none is given.

    `official` is the exact number of parameters in the authors' code or released weights.
    """

    official: int
    parameters: str
    macs: str = ""
    note: str = ""


PUBLISHED: Mapping[str, Mapping[str, Published]] = {
    # tiny: DeiT does not print multiply-adds; PVT does for it (arXiv 2102.12122, comparison on ImageNet). Exact count:
    # timm's deit_tiny_patch16_224. The others: README of the DINOv2 code; exact counts: the released reg4 weights,
    # whose position table has 37 x 37 patches. We know of no publication with their multiply-adds at 224 pixels.
    "vit": {
        "tiny": Published(5_717_416, "5.7 M", "1.3 G"),
        "small": Published(22_058_112, "21 M"),
        "base": Published(86_583_552, "86 M"),
        "large": Published(304_372_736, "300 M"),
        "giant": Published(1_136_486_912, "1,100 M"),
    },
    # 7 to t-24: README of the T2T-ViT code. The others: T2T-ViT paper, table 6. Exact counts: the constructors of the
    # code (commit 0f63dc9), whose frozen tables are parameters.
    "t2t_vit": {
        "7": Published(4_310_222, "4.3 M", "1.1 G"),
        "10": Published(5_889_230, "5.9 M", "1.5 G"),
        "12": Published(6_941_902, "6.9 M", "1.8 G"),
        "14": Published(21_545_550, "21.5 M", "4.8 G"),
        "19": Published(39_177_422, "39.2 M", "8.5 G"),
        "24": Published(64_105_934, "64.1 M", "13.8 G"),
        "t-14": Published(21_541_070, "21.5 M", "6.1 G"),
        "t-19": Published(39_172_942, "39.2 M", "9.8 G"),
        "t-24": Published(64_101_454, "64.1 M", "15.0 G"),
        "14-wide": Published(
            25_156_302,
            "25.1 M",
            "5.0 G",
            "the paper has 5.0 G in table 6 and 5.4 G in table 7 for four blocks of width 768; the layers of the "
            "authors' code add up to what we count, in between",
        ),
        "14-resnext": Published(21_545_550, "21.5 M", "4.8 G"),
        "14-se": Published(21_803_598, "21.9 M", "4.9 G"),
        "16-ghost": Published(
            16_253_262, "16.3 M", "3.7 G", "the paper's table has 14 blocks, the code 16, which give its 16.3 M"
        ),
        "dense": Published(
            23_647_062,
            "23.7 M",
            "5.5 G",
            "19 blocks and 3 transitions; the layers of the authors' code add up to what we count, 4 % less than the "
            "paper's figure: we do not know what else that holds",
        ),
    },
}


@dataclass(frozen=True)
class Row:
    """One size. Counts of the published form are None where nobody published one, or it cannot take the image size."""

    size: str
    patch: int  # of the published form, as width, depth and heads
    width: str
    depth: int
    heads: int
    parameters: int | None
    official_parameters: int | None
    paper_parameters: str
    macs: int | None
    paper_macs: str
    trained_parameters: int
    trained_macs: int
    note: str


def run_info(args: argparse.Namespace) -> int:
    """What `quietvit info` was asked for: one model, or the tables. Raises ValueError for what cannot be counted.

    An unknown family or model is told without torch.
    """
    if args.backbone is not None and args.backbone not in PUBLISHED:
        raise ValueError(f"unknown backbone '{args.backbone}': choose from {', '.join(PUBLISHED)}")
    if args.model is not None:
        from quietvit_launch.info_model import run_model_info

        return run_model_info(
            args.model, family=args.backbone, image_sizes=args.image_size, num_heads=args.num_heads, form=args.format
        )
    if args.num_heads is not None:
        raise ValueError("--num-heads is for a file of weights: name one")
    if len(sizes := args.image_size or [PAPER_IMAGE_SIZE]) > 1:
        raise ValueError("the tables are for one --image-size; several are for a model: name one")
    return _print_tables(args.backbone, sizes[0], args.format)


def _print_tables(backbone: str | None, image_size: int, form: str) -> int:
    names = list(PUBLISHED) if backbone is None else [backbone]
    check_image_size(names, image_size)
    if form == "json":
        rows = {name: [asdict(row) for row in make_rows(name, image_size)] for name in names}
        print(json.dumps({"image_size": image_size, "counted": COUNTED, "backbones": rows}, indent=2))
        return 0
    # Numbers stay whole in a pipe and in a narrow window: lines that are too long are the terminal's to break.
    console = Console(width=max(Console().width, WIDTH), highlight=False)
    for name in names:
        rows_of_name = make_rows(name, image_size)
        console.print(f"{name} at {image_size} px", style="bold")
        console.print(_table(rows_of_name, image_size))
        for row in rows_of_name:
            if row.note and image_size == PAPER_IMAGE_SIZE:
                console.print(f"{row.size}: {row.note}.", width=WIDTH)
        console.print(FORMS[name], TRAINED.format(patch=_default_patch(name)), "", width=WIDTH, sep="\n")
    console.print(COUNTED, width=WIDTH)
    return 0


def check_image_size(names: Iterable[str], image_size: int) -> None:
    """Raises ValueError, with the nearest sizes that all can take, unless every named family takes `image_size`."""
    patches = {name: _default_patch(name) for name in names}
    unable = [name for name, patch in patches.items() if image_size % patch]
    if not unable:
        return
    step = math.lcm(*patches.values())
    below = image_size // step * step
    why = " and ".join(f"{name} takes multiples of {patches[name]}" for name in unable)
    use = f"--image-size {below} or {below + step}" if below else f"--image-size {step}"
    able = "".join(f", or --backbone {name}" for name in patches if name not in unable)
    raise ValueError(f"--image-size {image_size}: {why}; use {use}{able}")


def published_form(name: str, size: str) -> dict[str, Any]:
    """Arguments of make_backbone that make the published architecture out of a size of ours."""
    from quietvit.backbones.t2t_vit import OFFICIAL, T2T_SIZES

    if name == "t2t_vit":
        transformer = T2T_SIZES[size].get("stem_attention") == "transformer"
        stem = "transformer" if transformer else "performer_official"
        return {**OFFICIAL, "stem_attention": stem, "num_classes": 1000}
    if size == "tiny":
        return {"patch_size": 16, "num_registers": 0, "layer_scale": 0.0, "num_classes": 1000}
    return {"image_size": 518}


def make_rows(name: str, image_size: int) -> list[Row]:
    """The rows of a family, in the order of its SIZES."""
    from quietvit.backbones import BACKBONES

    return [make_row(name, size, image_size) for size in BACKBONES[name].SIZES]


def make_row(name: str, size: str, image_size: int) -> Row:
    """Count one size. Raises ValueError if it cannot take `image_size`."""
    from quietvit.backbones import BACKBONES
    from quietvit.backbones.cost import count_macs, count_parameters

    patch = _default_patch(name)
    shape = BACKBONES[name].SIZES[size]
    published = PUBLISHED[name].get(size)
    parameters = macs = None
    if published is not None:
        form = published_form(name, size)
        patch = form.get("patch_size", patch)
        # DeiT and T2T-ViT have no mask token.
        without = ("mask_token",) if "num_classes" in form else ()
        parameters = count_parameters(name, size=size, without=without, **form)
        if image_size % patch == 0:
            macs = count_macs(name, size=size, **{**form, "image_size": image_size})
    width = shape["embed_dim"]
    return Row(
        size=size,
        patch=patch,
        width=f"{width}-{_last_width(name, size)}" if "dense_groups" in shape else str(width),
        depth=shape["depth"],
        heads=shape["num_heads"],
        parameters=parameters,
        official_parameters=published.official if published else None,
        paper_parameters=published.parameters if published else "",
        macs=macs,
        paper_macs=published.macs if published and image_size == PAPER_IMAGE_SIZE else "",
        trained_parameters=count_parameters(name, size=size, image_size=image_size),
        trained_macs=count_macs(name, size=size, image_size=image_size),
        note=published.note if published else "",
    )


def _default_patch(name: str) -> int:
    from quietvit.backbones import BACKBONES

    return int(signature(BACKBONES[name]).parameters["patch_size"].default)


def _last_width(name: str, size: str) -> int:
    import torch

    from quietvit.backbones import make_backbone

    with torch.device("meta"):
        return make_backbone(name, size=size).embed_dim


def _table(rows: Iterable[Row], image_size: int) -> Table:
    at_paper_size = image_size == PAPER_IMAGE_SIZE
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("\nsize", no_wrap=True)
    headers = ["\npatch", "\nwidth", "\ndepth", "\nheads", "published\nparameters", "authors'\ncode"]
    headers += ["paper\nM", "MACs\nG"] + (["paper\nG"] if at_paper_size else [])
    headers += ["trained here\nparameters", "MACs\nG"]
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for r in rows:
        cells = [str(r.patch), r.width, str(r.depth), str(r.heads), _count(r.parameters), _count(r.official_parameters)]
        cells += [_figure(r.paper_parameters), _giga(r.macs)] + ([_figure(r.paper_macs)] if at_paper_size else [])
        table.add_row(r.size, *cells, _count(r.trained_parameters), _giga(r.trained_macs))
    return table


def _figure(printed: str) -> str:
    """ "4.8 G" without its unit, which the header has."""
    return printed.partition(" ")[0]


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _giga(number: int | None) -> str:
    return "" if number is None else f"{number / 1e9:.2f}"
