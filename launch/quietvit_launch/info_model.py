"""`quietvit info FILE_OR_NAME`: one model, of a file or of a known size, with what it costs and where it comes from.

Only what needs no torch is imported here: a wrong name is told at once.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from inspect import signature
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from quietvit_launch.info import COUNTED, FORMS, PAPER_IMAGE_SIZE, PUBLISHED, WIDTH

__all__ = ["Cost", "Model", "Named", "count_costs", "describe", "find_name", "open_model", "run_model_info", "size_of"]

OWN_SIZES = ("nano", "micro")  # of both families, published by nobody
RELEASED = {"s": "small", "b": "base", "l": "large", "g": "giant"}
# What released weights differ in from our defaults: the table of 37 x 37 patches, and how it is resized.
DINOV2 = {"image_size": 518, "num_registers": 0, "pos_interpolation": "offset", "pos_antialias": False}
DINOV2_REGISTERS = {"image_size": 518, "num_registers": 4}
# What makes a size; whatever else a model has (registers, patches, positions, biases) can be chosen with any size.
SHAPE = ("embed_dim", "depth", "num_heads", "mlp_ratio", "ffn", "attention_layer", "dense_groups", "growth")
STEM_SHAPE = ("token_dim", "stem_attention")
MIB = 1024**2


@dataclass(frozen=True)
class Named:
    """A size of ours under one of its names; `arguments` beside those of the size."""

    family: str
    size: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Model:
    """What is described. `arguments` are all of make_backbone's; `provenance` is None for a name alone."""

    title: str
    family: str
    arguments: Mapping[str, Any]
    stride: int
    image_size: int
    normalisation: Mapping[str, Sequence[float]] | None = None
    provenance: Mapping[str, Any] | None = None
    weights_hash: str = ""


@dataclass(frozen=True)
class Cost:
    """Of one square image. `register_share`: by how much registers raise the multiply-adds of the same model without.

    `tokens` counts [CLS], registers and patches of `grid` x `grid`.
    """

    image_size: int
    grid: int
    tokens: int
    macs: int
    macs_without_registers: int
    register_share: float


def run_model_info(
    text: str,
    *,
    family: str | None = None,
    image_sizes: Sequence[int] | None = None,
    num_heads: int | None = None,
    form: str = "table",
) -> int:
    """Print what `describe` finds of the model called `text`, as "table" or "json". Raises as it and `open_model`."""
    told = describe(open_model(text, family=family, num_heads=num_heads), image_sizes)
    if form == "json":
        print(json.dumps(told, indent=2))
        return 0
    console = Console(width=max(Console().width, WIDTH), highlight=False)
    console.print(told["model"], style="bold", markup=False)
    console.print(_facts(told))
    console.print(_costs(told))
    for note in told["notes"]:
        console.print(f"Note: {note}.", width=WIDTH, markup=False)
    console.print(COUNTED, width=WIDTH)
    return 0


def find_name(text: str, family: str | None = None) -> Named | None:
    """The size that `text` names, in any case, `-` and `_` alike; None if it names none.

    "vit-small", "small" where only one family (or `family`) has it, and DINOv2's own names ("dinov2_vits14",
    "dinov2_vits14_reg"). Raises ValueError for a size of both families.
    """
    name = _plain(text)
    if name in (released := _released_names()):
        return released[name] if family in (None, released[name].family) else None
    sizes = [(f, s) for f, s in _sizes() if family in (None, f)]
    found = [(f, s) for f, s in sizes if name in (_plain(f"{f}-{s}"), _plain(s))]
    if len(found) > 1:
        raise ValueError(f"{text} is a size of {' and of '.join(f for f, _ in found)}: say "
                         f"{' or '.join(f'{f}-{s}' for f, s in found)}")  # fmt: skip
    return Named(*found[0], arguments={}) if found else None


def open_model(text: str, *, family: str | None = None, num_heads: int | None = None) -> Model:
    """The model at a path, else of a name. A path that is there comes first: `./small` and `small` may both exist.

    Raises ValueError with the nearest names and files for what is neither, and as `quietvit.load` for a file.
    """
    path = Path(text).expanduser()
    if path.exists():
        if family is not None:
            raise ValueError(f"{text} says itself of which family it is: leave --backbone out")
        return _from_file(path, num_heads)
    named = find_name(text, family)
    if named is None:
        raise ValueError(_unknown(text, path, family))
    if num_heads is not None:
        raise ValueError(f"{text} is the name of a size, which says how many heads it has: leave --num-heads out")
    return _from_name(named)


def describe(model: Model, image_sizes: Sequence[int] | None = None) -> dict[str, Any]:
    """Everything `info` says of a model, as plain data. `image_sizes` None: the model's own, and 224 if it is larger.

    Raises ValueError for a size that is no multiple of the patch, with the nearest that are.
    """
    from quietvit.backbones.cost import count_parameters

    sizes = list(dict.fromkeys(image_sizes or _own_sizes(model)))
    for side in sizes:
        _check_side(side, model.stride)
    arguments = dict(model.arguments)
    parameters = count_parameters(model.family, **arguments)
    without = count_parameters(model.family, **{**arguments, "num_registers": 0})
    size = size_of(model.family, arguments)
    published = PUBLISHED[model.family].get(size)
    return {
        "model": model.title,
        "backbone": model.family,
        "size": size,
        "image_size": model.image_size,
        "arguments": arguments,
        "positions": _positions(model),
        "parameters": {
            "all": parameters,
            "of_registers": parameters - without,
            "register_share": parameters / without - 1,
        },
        "weights_bytes": {"fp32": 4 * parameters, "bf16": 2 * parameters},
        "costs": [asdict(cost) for cost in count_costs(model.family, arguments, sizes)],
        "normalisation": model.normalisation,
        "provenance": model.provenance,
        "weights_hash": model.weights_hash,
        "published": asdict(published) if published else None,
        "notes": _notes(model),
        "counted": COUNTED,
    }


def count_costs(family: str, arguments: Mapping[str, Any], image_sizes: Iterable[int]) -> list[Cost]:
    """Multiply-adds with and without registers of the backbone with all of `arguments` but their image_size."""
    from quietvit.backbones.cost import count_macs

    shape = {k: v for k, v in arguments.items() if k != "image_size"}
    costs = []
    for side in image_sizes:
        macs = count_macs(family, image_size=side, **shape)
        without = (
            count_macs(family, image_size=side, **{**shape, "num_registers": 0}) if shape["num_registers"] else macs
        )
        grid = side // shape["patch_size"]
        tokens = 1 + shape["num_registers"] + grid * grid
        costs.append(Cost(side, grid, tokens, macs, without, macs / without - 1))
    return costs


def size_of(family: str, arguments: Mapping[str, Any]) -> str:
    """The size of ours that has the shape of `arguments`, which are complete; "" if none has."""
    from quietvit.backbones import BACKBONES

    own = _shape(arguments)
    return next(
        (s for s in BACKBONES[family].SIZES if _shape(_complete(family, BACKBONES[family].SIZES[s])) == own), ""
    )


# ---- names


def _plain(text: str) -> str:
    return text.strip().lower().replace("_", "-")


def _sizes() -> list[tuple[str, str]]:
    return [(family, size) for family, published in PUBLISHED.items() for size in (*OWN_SIZES, *published)]


def _released_names() -> dict[str, Named]:
    names: dict[str, Named] = {}
    for letter, size in RELEASED.items():
        forms: Mapping[str, Mapping[str, Any]] = {"": DINOV2, "-reg": DINOV2_REGISTERS, "-reg4": DINOV2_REGISTERS}
        names |= {f"dinov2-vit{letter}14{end}": Named("vit", size, form) for end, form in forms.items()}
    return names


def _unknown(text: str, path: Path, family: str | None) -> str:
    names = [f"{f}-{s}" for f, s in _sizes() if family in (None, f)]
    released = [name.replace("-", "_") for name, named in _released_names().items() if family in (None, named.family)]
    plain = {_plain(name): name for name in (*names, *(s for _, s in _sizes()), *released)}
    near = [plain[n] for n in difflib.get_close_matches(_plain(text), plain, n=3, cutoff=0.6)]
    beside = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    files = [str(path.parent / n) for n in difflib.get_close_matches(path.name, beside, n=3, cutoff=0.6)]
    told = (("names", near), ("files", files))
    nearest = "".join(f"; nearest {what}: {', '.join(found)}" for what, found in told if found)
    where = "" if path.parent.is_dir() else f" (there is no folder {path.parent})"
    return (
        f"there is no file or folder {text}{where}, and no size of that name{nearest}. `quietvit info` lists all sizes"
    )


# ---- models


def _from_name(named: Named) -> Model:
    from quietvit.backbones import BACKBONES

    arguments = _complete(named.family, {**BACKBONES[named.family].SIZES[named.size], **named.arguments})
    return Model(f"{named.family}-{named.size}", named.family, arguments, arguments["patch_size"],
                 arguments["image_size"])  # fmt: skip


def _from_file(path: Path, num_heads: int | None) -> Model:
    from quietvit.weights import load
    from quietvit.weights.family import UnknownNormalisation

    known = True
    try:
        model = load(path, "cpu", num_heads=num_heads)
    except UnknownNormalisation:
        known = False
        model = load(path, "cpu", num_heads=num_heads, mean=(0, 0, 0), std=(1, 1, 1))
    backbone, identity = model.meta["backbone"], model.identity()
    provenance = dict(identity["provenance"])
    if not known:  # the last note is about what stands in for it
        provenance["notes"] = provenance["notes"][:-1]
    return Model(
        title=str(path),
        family=backbone["name"],
        arguments=_complete(backbone["name"], backbone["arguments"]),
        stride=model.stride,
        image_size=model.image_size,
        normalisation=model.meta["normalisation"] if known else None,
        provenance=provenance,
        weights_hash=identity["hash"],
    )


def _complete(family: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`arguments` with the defaults of all others."""
    from quietvit.backbones import BACKBONES
    from quietvit.backbones.trunk import TrunkOptions

    stem = signature(BACKBONES[family]).parameters.values()
    own = {p.name: p.default for p in stem if p.kind is p.KEYWORD_ONLY}
    return {**own, **{f.name: f.default for f in fields(TrunkOptions) if f.default is not MISSING}, **arguments}


def _shape(arguments: Mapping[str, Any]) -> dict[str, Any]:
    shape = {key: arguments[key] for key in (*SHAPE, *STEM_SHAPE) if key in arguments}
    if "stem_attention" in shape:  # the Performer is one layer in two spellings
        shape["stem_attention"] = shape["stem_attention"].removesuffix("_official")
    return shape


def _own_sizes(model: Model) -> list[int]:
    small = [PAPER_IMAGE_SIZE] if model.image_size > PAPER_IMAGE_SIZE and not PAPER_IMAGE_SIZE % model.stride else []
    return [*small, model.image_size]


def _check_side(side: int, stride: int) -> None:
    if side % stride:
        below = side // stride * stride
        use = f"{below} or {below + stride}" if below else f"{stride}"
        raise ValueError(f"--image-size {side}: this model takes multiples of {stride}; use --image-size {use}")


def _positions(model: Model) -> str:
    a, grid = model.arguments, model.image_size // model.stride
    if a["positions"] == "sinusoid":
        return "sinusoids over the sequence, computed for any image size"
    rule = f"at scales with an offset of {a['pos_offset']:g}" if a["pos_interpolation"] == "offset" else "to the size"
    how = "with" if a["pos_antialias"] else "without"
    return f"learned for {grid} x {grid} patches; for others resized {rule}, bicubic {how} antialiasing"


def _notes(model: Model) -> list[str]:
    """What to know before features are used."""
    a, notes = model.arguments, []
    if model.provenance is not None and model.normalisation is None:
        notes.append(
            "nothing tells which normalisation its images had: give mean and std to quietvit.load, or --normalisation "
            "to quietvit export"
        )
    if a["positions"] == "learned" and a["pos_interpolation"] == "offset":
        notes.append(
            "positions of other image sizes are resized with an offset, so the grid is slightly shrunk: right for "
            "weights made that way (DINOv2 without registers), and for no others"
        )
    elif a["positions"] == "learned" and not a["pos_antialias"]:
        notes.append(
            "positions are resized without antialiasing: on grids smaller than the table's, maps may show stripes "
            '("Vision Transformers Need Registers", appendix A)'
        )
    if not a["num_registers"]:
        notes.append(
            "no registers: in large models that were trained for long, a few patches may hold artifacts instead of "
            'what they show ("Vision Transformers Need Registers", section 2)'
        )
    return notes


# ---- tables


def _facts(told: Mapping[str, Any]) -> Table:
    a, parameters, weights = told["arguments"], told["parameters"], told["weights_bytes"]
    layer_scale = "with" if a["layer_scale"] else "without"
    dense = f", dense groups {a['dense_groups']} growing by {a['growth']}" if a["dense_groups"] else ""
    kinds = f", {a['attention_layer']} attention" if a["attention_layer"] != "plain" else ""
    kinds += f", {a['activation']}" if a["activation"] != "gelu" else ""
    kinds += ", a norm before them" if a["pre_norm"] else ""
    size = f", size {told['size']}" if told["size"] else ", of no size that has a name here"
    facts = {
        "backbone": f"{told['backbone']}{size}",
        "blocks": f"{a['depth']} of width {a['embed_dim']}{dense}, {a['num_heads']} heads, {a['ffn']} of ratio "
        f"{a['mlp_ratio']:g}{kinds}, {layer_scale} layer scale",
        "patches": f"{a['patch_size']} px; made for images of {told['image_size']} px",
        "positions": told["positions"],
        "registers": str(a["num_registers"]),
        "classes": str(a["num_classes"] or "none"),
        "parameters": f"{parameters['all']:,}; {parameters['of_registers']:,} of them in registers "
        f"({_percent(parameters['register_share'])} more)",
        "weights": f"{weights['fp32'] / MIB:,.1f} MiB in fp32, {weights['bf16'] / MIB:,.1f} MiB in bf16",
        **_origin(told),
    }
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", max_width=WIDTH - max(map(len, facts)) - 2)
    for name, fact in facts.items():
        table.add_row(name, Text(fact))
    return table


def _origin(told: Mapping[str, Any]) -> dict[str, str]:
    facts = {}
    if told["normalisation"] is not None:
        facts["normalisation"] = "; ".join(
            f"{k} {', '.join(f'{x:g}' for x in v)}" for k, v in told["normalisation"].items()
        )
    if told["provenance"] is not None:
        facts["provenance"] = "\n".join(f"{k}: {_flat(v)}" for k, v in told["provenance"].items()) or "untold"
        facts["weights hash"] = told["weights_hash"]
    published = told["published"]
    if published is not None:
        macs = f", {published['macs']} MACs at {PAPER_IMAGE_SIZE} px" if published["macs"] else ""
        note = f"; {published['note']}" if published["note"] else ""
        facts["published"] = (
            f"{published['parameters']} parameters{macs}; {published['official']:,} in the authors' code or weights"
            f"{note}. Forms: {FORMS[told['backbone']].removeprefix('Published: ')}"
        )
    return facts


def _flat(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _costs(told: Mapping[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    headers = ("image\npx", "\npatches", "\ntokens", "MACs\nG", "without\nregisters", "registers\nadd")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for cost in (Cost(**c) for c in told["costs"]):
        macs = (f"{m / 1e9:.2f}" for m in (cost.macs, cost.macs_without_registers))
        table.add_row(str(cost.image_size), f"{cost.grid} x {cost.grid}", f"{cost.tokens:,}", *macs,
                      _percent(cost.register_share))  # fmt: skip
    return table


def _percent(share: float) -> str:
    """Two digits that count: 1.70 %, 0.0071 %."""
    digits = 2 if share >= 0.001 or not share else 1 - math.floor(math.log10(100 * share))
    return f"{100 * share:.{digits}f} %"
