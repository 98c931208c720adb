"""Channels of patch tokens as grey maps, block by block, and how many of them are dead.

T2T-ViT (arXiv 2101.11986, figure 2) compares such maps of a ResNet, a ViT and a T2T-ViT and finds maps of
ViT with zero or too large values. Here this is counted, over all images and positions, of one layer at a time:

    spread   standard deviation of a channel
    usual    the median spread of the channels that vary at all
    dead     spread at most DEAD times the usual one: zero, or the same everywhere
    loud     root mean square more than LOUD times the median root mean square of the layer's other channels

Tokens are those before the final norm, registers and [CLS] left out. A model that gives only its last blocks after the
final norm is read there, and the result says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from quietvit.backbones import Trunk
from quietvit.contracts import Extractor
from quietvit.data.sources import Source
from quietvit_eval.blocks import BlockReader, read_blocks
from quietvit_eval.inspect.grids import CELL, Row, framed, grey, page
from quietvit_eval.inspect.sample import Looks, Outcome, Sample, panels_of, write_outcome
from quietvit_eval.pictures import Image
from quietvit_eval.views import normalised

ACTION = "features"
DEAD = 0.01  # ours: a hundredth of what is usual shows as one grey
LOUD = 10.0  # ours: the registers paper's outlier tokens are about ten times the others
ROUNDING = 1e-6  # spread over the layer's greatest root mean square that fp32 makes of a constant (ours)
MOST_ROWS = 8  # layers on a page, unless they are named (ours)
DEAD_FRAME, LOUD_FRAME = (213, 94, 0), (0, 114, 178)  # Okabe and Ito's vermillion and blue
ORDERS = ("first", "varied")

Layers = dict[str, Float[Tensor, "B h w C"]]  # by name: "patch embedding", "soft split 1", "block 0"


class Moments:
    """Mean and spread of every channel, of values that come in parts (Chan et al. 1979), float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros(())

    def add(self, values: Float[Tensor, "*n C"]) -> None:
        """Take in more positions."""
        x = values.flatten(0, -2).double()
        mean = x.mean(0)
        total = self.count + len(x)
        self.squares = self.squares + (x - mean).square().sum(0) + (mean - self.mean).square() * (
            self.count * len(x) / total
        )  # fmt: skip
        self.mean = self.mean + (mean - self.mean) * (len(x) / total)
        self.count = total

    @property
    def spread(self) -> Float[Tensor, " C"]:
        """Standard deviation, of the positions seen."""
        return (self.squares / self.count).sqrt()

    @property
    def size(self) -> Float[Tensor, " C"]:
        """Root mean square."""
        return (self.mean.square() + self.squares / self.count).sqrt()


@dataclass(frozen=True)
class ChannelReport:
    """What is wrong with the channels of one layer: see the head of this file."""

    spread: Float[Tensor, " C"]
    usual: float  # 0 where no channel varies
    dead: list[int]
    loud: list[int]

    @property
    def dead_share(self) -> float:
        return len(self.dead) / len(self.spread)


def judge_channels(moments: Moments) -> ChannelReport:
    """Which channels of a layer are dead, and which are loud."""
    spread, size = moments.spread, moments.size
    varying = spread > ROUNDING * size.max()
    usual = float(spread[varying].median()) if bool(varying.any()) else 0.0
    dead = ~varying | (spread <= DEAD * usual)
    nonzero = size[size > 0]
    loud = size > LOUD * (nonzero.median() if len(nonzero) else 0.0)
    return ChannelReport(spread, usual, dead.nonzero()[:, 0].tolist(), loud.nonzero()[:, 0].tolist())


def read_layers(extractor: Extractor, images: Float[Tensor, "B 3 H W"]) -> Layers:
    """Patch features of the stem and of every block that can be read, on the CPU, in the order of the pass.

    Of a dense trunk a block has the channels written so far. Models of others have no stem that is known.
    """
    trunk = getattr(extractor, "backbone", None)
    layers = _stem(trunk, images, extractor.stride) if isinstance(trunk, Trunk) else {}
    first = trunk.first_readable_block if isinstance(trunk, Trunk) else 0
    which = range(first, extractor.num_blocks)
    states = read_blocks(extractor, images, which, norm=not isinstance(extractor, BlockReader))
    for block, features in zip(which, states, strict=True):
        width = getattr(trunk.blocks[block], "out_dim", None) if isinstance(trunk, Trunk) else None
        layers[f"block {block}"] = features.patches[..., :width].float().cpu()
    return layers


@torch.no_grad()
def _stem(trunk: Trunk, images: Float[Tensor, "B 3 H W"], stride: int) -> Layers:
    """What soft splits give after their attention, and the tokens of the stem, without position."""
    found: dict[str, Tensor] = {}
    stages = {name: m for name, m in trunk.named_modules() if name.startswith("tokens_to_token.attention")}
    stages = {name: m for name, m in stages.items() if name.count(".") == 1}
    with _outputs(stages, found):
        tokens, grid = trunk.tokenize(images.to(trunk.cls_token.device), None)
    layers: Layers = {}
    for i, name in enumerate(stages, 1):
        cells = found[name].shape[1] / (grid[0] * grid[1])
        side = round(cells**0.5)
        layers[f"soft split {i}"] = found[name].unflatten(1, (grid[0] * side, grid[1] * side)).float().cpu()
    layers["stem" if stages else "patch embedding"] = tokens.unflatten(1, grid).float().cpu()
    return layers


@contextmanager
def _outputs(modules: Mapping[str, nn.Module], into: dict[str, Tensor]) -> Iterator[None]:
    """While open, what each module returns is kept in `into` under its name."""
    handles = [
        module.register_forward_hook(lambda _m, _given, output, name=name: into.__setitem__(name, output))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def inspect_features(
    extractor: Extractor,
    source: Source,
    out: Path,
    *,
    looks: Looks,
    shown: int = 2,
    layers: Sequence[int] | None = None,
    channels: int = 12,
    order: str = "first",
) -> Outcome:
    """Write a page of maps for each of `shown` images (features_1.png ...), and the channels of every layer, counted
    over all images, to features.json.

    `layers`: blocks on the pages (None: 8 rows, stem and last block among them); `channels`: so many maps of a layer,
    its "first" or its most "varied" ones. Raises ValueError for a block or order that is not there, and as `Sample`;
    OSError as the file system does.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, not {order!r}")
    sample = Sample(extractor, source, looks)
    moments: dict[str, Moments] = {}
    kept: list[tuple[str, Image, Layers]] = []
    for seen in sample.batches("channels"):
        values = read_layers(extractor, normalised(extractor, seen.pixels))
        if not moments:
            chosen = _on_page(list(values), layers)
        for name, maps in values.items():
            if not bool(maps.isfinite().all()):
                raise ValueError(f"{name} gives values that are no finite numbers")
            moments.setdefault(name, Moments()).add(maps)
        for i, (name, image) in enumerate(zip(seen.names, panels_of(seen.pixels), strict=True)):
            if len(kept) < shown:
                kept.append((name, image, {layer: values[layer][i : i + 1].clone() for layer in chosen}))
    reports = {name: judge_channels(m) for name, m in moments.items()}
    pictures = {
        f"{ACTION}_{i}": _page(name, image, maps, reports, channels, order)
        for i, (name, image, maps) in enumerate(kept, 1)
    }
    norm = not isinstance(extractor, BlockReader)
    facts: dict[str, Any] = {
        "data": sample.about(),
        "shown": [name for name, _, _ in kept],
        "final_norm": norm,
        "definition": {"dead": f"spread at most {DEAD:g} of the usual one",
                       "loud": f"root mean square over {LOUD:g} times the median"},
        "layers": [
            {"name": name, "channels": len(r.spread), "dead_share": r.dead_share, "dead": r.dead, "loud": r.loud,
             "usual_spread": r.usual, "spread": r.spread}
            for name, r in reports.items()
        ],
    }  # fmt: skip
    return write_outcome(out, ACTION, extractor, facts, pictures, _table(reports, facts["data"]["images"], norm))


def _on_page(names: Sequence[str], layers: Sequence[int] | None) -> list[str]:
    """Which layers have rows on a page. Raises ValueError for one that is not there."""
    if layers is not None:
        wanted = [f"block {i}" for i in layers]
        if missing := [name for name in wanted if name not in names]:
            blocks = [name for name in names if name.startswith("block ")]
            raise ValueError(f"there is no {missing[0]} to be read: this model has {blocks[0]} to {blocks[-1]}")
        return wanted
    rows = np.linspace(0, len(names) - 1, min(MOST_ROWS, len(names))).round().astype(int)
    return [names[i] for i in rows]


def _page(
    name: str, image: Image, maps: Layers, reports: Mapping[str, ChannelReport], channels: int, order: str
) -> Image:
    rows = []
    for layer, values in maps.items():
        report = reports[layer]
        count = min(channels, len(report.spread))
        picked = list(range(count)) if order == "first" else report.spread.argsort(descending=True)[:count].tolist()
        panels = [_panel(values[0, :, :, c].numpy(), c, report) for c in picked]
        title = f"{layer}\n{len(report.dead)} of {len(report.spread)} dead"
        rows.append(Row(title, [image, *panels], ["", *(f"{c}" for c in picked)]))
    notes = [
        f"{name}. Each map from its least (black) to its greatest value (white); below it, the number of its channel.",
        "Framed orange: dead, the same value everywhere; blue: loud, far larger than the others.",
    ]
    return page(["image"], rows, notes, cell=CELL // 2)


def _panel(values: Float[np.ndarray, "h w"], channel: int, report: ChannelReport) -> Image:
    dead = channel in report.dead
    low, high = (0.0, 0.0) if dead else (float(values.min()), float(values.max()))
    factor = max(1, -(-CELL // 2 // values.shape[0]))
    panel = np.repeat(np.repeat(grey(values, low=low, high=high), factor, axis=0), factor, axis=1)
    if dead:
        return framed(panel, DEAD_FRAME)
    return framed(panel, LOUD_FRAME) if channel in report.loud else panel


def _table(reports: Mapping[str, ChannelReport], images: int, norm: bool) -> list[str]:
    lines = [f"channels of patch tokens {'after' if norm else 'before'} the final norm, over {images:,} images:"]
    lines.append(f"{'layer':18}{'channels':>9}{'dead':>8}{'share':>8}{'loud':>7}{'usual spread':>14}")
    for name, r in reports.items():
        lines.append(f"{name:18}{len(r.spread):9,}{len(r.dead):8,}{r.dead_share:8.1%}{len(r.loud):7,}{r.usual:14.3g}")
    return lines
