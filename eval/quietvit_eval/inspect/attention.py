"""Where [CLS] and the registers look: attention maps of one block, of images and averaged over a data set.

The map of token t and head a is softmax_j(q_t . k_j / sqrt(d)) over *all* tokens, of which the patches' part is shown
("Vision Transformers Need Registers", figures 1 and 9; averages: figure 16). What is left over lies on [CLS] and
registers, so that maps of two models only compare beside these shares, which are told with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from quietvit.contracts import Extractor
from quietvit.data.sources import Source
from quietvit_eval.discovery.features import AttentionReader
from quietvit_eval.inspect.grids import CELL, Row, enlarged, heat, page, short
from quietvit_eval.inspect.sample import Looks, Outcome, Sample, Seen, panels_of, write_outcome
from quietvit_eval.pictures import Image
from quietvit_eval.views import normalised

GROUPS = ("CLS", "registers", "patches")
ACTION = "attention"


@dataclass(frozen=True)
class TokenAttention:
    """Attention of t tokens ([CLS], then every register), fp32 on the CPU."""

    maps: Float[Tensor, "B A t h w"]  # on the patches
    mass: Float[Tensor, "B A t 3"]  # shares on each of GROUPS; they sum to one

    @property
    def tokens(self) -> list[str]:
        """Names of the t tokens."""
        return ["CLS", *(f"register {i}" for i in range(self.maps.shape[2] - 1))]


@dataclass(frozen=True)
class AverageAttention:
    """Means over images, float64."""

    maps: Float[Tensor, "A t h w"]
    mass: Float[Tensor, "A t 3"]
    images: int


def attention_rows(q: Float[Tensor, "B A T d"], k: Float[Tensor, "B A T d"], num: int) -> Float[Tensor, "B A num T"]:
    """softmax(q_t . k_j / sqrt(d)) over all T tokens j, of the first `num` tokens t."""
    return torch.softmax(q[:, :, :num] @ k.mT / q.shape[-1] ** 0.5, dim=-1)


def read_attention(extractor: Extractor, images: Float[Tensor, "B 3 H W"], block: int = -1) -> TokenAttention:
    """Attention of [CLS] and registers in a block (from 0; -1 is the last), for normalised images in whole patches.

    Raises ValueError for a model that does not show its attention or has no token besides the patches, a block that is
    not there, and attention that is no finite number.
    """
    check_attention(extractor, block)
    assert isinstance(extractor, AttentionReader)
    q, k, _ = extractor.attention_inputs(images, block)
    h, w = images.shape[2] // extractor.stride, images.shape[3] // extractor.stride
    others = q.shape[2] - h * w
    if others < 1:
        raise ValueError(f"{type(extractor).__name__} has {q.shape[2]} tokens for {h} x {w} patches: none is a [CLS] "
                         "or a register that could look at them")  # fmt: skip
    rows = attention_rows(q, k, others).cpu()
    if not bool(rows.isfinite().all()):
        raise ValueError(f"the attention of block {block} holds values that are no finite numbers")
    mass = torch.stack([rows[..., 0], rows[..., 1:others].sum(-1), rows[..., others:].sum(-1)], dim=-1)
    return TokenAttention(rows[..., others:].unflatten(-1, (h, w)), mass)


def check_attention(extractor: Extractor, block: int) -> None:
    """Raises ValueError for a model that does not show its attention, and for a block that is not there."""
    if not isinstance(extractor, AttentionReader):
        raise ValueError(f"{type(extractor).__name__} does not show its attention: give it a method "
                         "attention_inputs(images, block) that returns queries, keys and values [B A T d], tokens "
                         "[cls | registers | patches]")  # fmt: skip
    check_block(extractor, block)


def check_block(extractor: Extractor, block: int) -> None:
    """Raises ValueError for a block that is not there."""
    if not -extractor.num_blocks <= block < extractor.num_blocks:
        num = extractor.num_blocks
        raise ValueError(f"there is no block {block}: this model has {num}, 0 to {num - 1}, or from the last down "
                         f"-1 to -{num}")  # fmt: skip


def average_attention(extractor: Extractor, sample: Sample, block: int) -> AverageAttention:
    """Means over all images of a sample. Raises ValueError for fewer than two readable images, and as
    `read_attention`."""
    maps, mass, count = torch.zeros(()), torch.zeros(()), 0
    for seen in sample.batches("attention, averaged"):
        one = read_attention(extractor, normalised(extractor, seen.pixels), block)
        maps = maps + one.maps.double().sum(0)
        mass = mass + one.mass.double().sum(0)
        count += len(seen.names)
    if count < 2:
        raise ValueError("an average over one image is that image: give more images, or leave the average out")
    return AverageAttention(maps / count, mass / count, count)


def likeness(maps: Float[Tensor, "B A t h w"]) -> Float[Tensor, "t t"]:
    """Correlation over patches between the maps (mean over heads) of two tokens, mean over images. Registers that were
    not trained long enough to part from each other have 1; a map that is even all over counts as 0."""
    flat = maps.double().mean(1).flatten(2)
    flat = F.normalize(flat - flat.mean(-1, keepdim=True), dim=-1)
    return (flat @ flat.mT).mean(0)


def inspect_attention(
    extractor: Extractor,
    source: Source,
    out: Path,
    *,
    looks: Looks,
    block: int = -1,
    average: int = 0,
    smooth: bool = False,
) -> Outcome:
    """Write attention maps of some images, mean over heads and by head, and their average over `average` images (0:
    none) as `attention*.png`, with all figures in attention.json.

    `smooth`: maps enlarged bilinearly, instead of as blocks. Raises ValueError as `read_attention`,
    `average_attention` and `Sample`; OSError as the file system does.
    """
    check_attention(extractor, block)
    if average == 1:
        raise ValueError("an average over one image is that image: ask for at least 2, or leave the average out")
    sample = Sample(extractor, source, looks)
    seen = sample.all("attention")
    parts = [
        read_attention(extractor, normalised(extractor, pixels), block)
        for pixels in seen.pixels.split(looks.batch_size)
    ]
    shown = TokenAttention(torch.cat([p.maps for p in parts]), torch.cat([p.mass for p in parts]))
    pictures = _pages(shown, seen, smooth)
    facts: dict[str, Any] = {"block": block % extractor.num_blocks, "data": sample.about(), "tokens": shown.tokens}
    alike = likeness(shown.maps)
    facts["likeness"] = alike
    facts["mass"] = {"images": len(seen.names), **_mass_facts(shown.mass.double().mean(0), shown.tokens)}
    facts["images"] = [
        {"name": name, "mass": {t: dict(zip(GROUPS, m.tolist(), strict=True))
                                for t, m in zip(shown.tokens, mass.mean(0), strict=True)}}
        for name, mass in zip(seen.names, shown.mass, strict=True)
    ]  # fmt: skip
    lines = _table(shown.mass.double().mean(0), shown.tokens, len(seen.names))
    if average:
        over = Sample(extractor, source, looks, average)
        mean = average_attention(extractor, over, block)
        pictures["attention_average"] = _average_page(mean, shown.tokens, smooth)
        facts["average"] = {
            "data": over.about(),
            "images": mean.images,
            "maps": dict(zip(shown.tokens, mean.maps.mean(0), strict=True)),
            **_mass_facts(mean.mass, shown.tokens),
        }
        lines = _table(mean.mass, shown.tokens, mean.images)
    if len(alike) > 2:
        between = alike[1:, 1:][~torch.eye(len(alike) - 1, dtype=torch.bool)]
        lines.append(f"maps of two registers have a correlation of {between.mean():.3f} on average (1: the same map)")
    return write_outcome(out, ACTION, extractor, facts, pictures, lines)


def _pages(shown: TokenAttention, seen: Seen, smooth: bool) -> dict[str, Image]:
    """A page of means over heads, and one for every token with all heads; a row for each image."""
    images, names = panels_of(seen.pixels), [short(name) for name in seen.names]
    heads = shown.maps.shape[1]
    note = "Each map from 0 (dark) to its own greatest value; below it, the share of attention that lies on patches."
    shares = shown.mass[..., 2]
    mean = shown.maps.mean(1)
    rows = [
        Row(name, [image, *(_panel(m, smooth) for m in maps)], ["", *(f"{s:.1%}" for s in share)])
        for name, image, maps, share in zip(names, images, mean, shares.mean(1), strict=True)
    ]
    pages = {ACTION: page(["image", *shown.tokens], rows, [f"Mean over {heads} heads.", note])}
    for t, token in enumerate(shown.tokens):
        rows = [
            Row(name, [image, *(_panel(m, smooth) for m in maps[:, t])], ["", *(f"{s:.1%}" for s in share[:, t])])
            for name, image, maps, share in zip(names, images, shown.maps, shares, strict=True)
        ]
        titles = ["image", *(f"head {a}" for a in range(heads))]
        pages[f"{ACTION}_heads_{token.replace(' ', '_').lower()}"] = page(titles, rows, [f"Of {token}, by head.", note])
    return pages


def _average_page(mean: AverageAttention, tokens: Sequence[str], smooth: bool) -> Image:
    cells = mean.maps[0, 0].numel()
    rows = []
    named = [("mean", mean.maps.mean(0)), *((f"head {a}", m) for a, m in enumerate(mean.maps))]
    for title, maps in named:
        even = maps.sum((1, 2), keepdim=True) / cells
        ratio = (maps / even.clamp_min(torch.finfo(torch.float64).tiny)).numpy()
        panels = [_coloured(r, float(r.min()), float(r.max()), smooth) for r in ratio]
        rows.append(Row(title, panels, [f"{r.min():.2f} to {r.max():.2f}" for r in ratio]))
    notes = [
        f"Mean over {mean.images:,} images. Each map from its least (dark) to its greatest value, written below:",
        "times what an even spread over the patches would be.",
    ]
    return page(list(tokens), rows, notes)


def _panel(values: Float[Tensor, "h w"], smooth: bool) -> Image:
    return _coloured(values.numpy(), 0.0, float(values.max()), smooth)


def _coloured(values: Float[np.ndarray, "h w"], low: float, high: float, smooth: bool) -> Image:
    return heat(enlarged(values, CELL, smooth=smooth), low=low, high=high)


def _mass_facts(mass: Float[Tensor, "A t 3"], tokens: Sequence[str]) -> dict[str, Any]:
    """Shares by token, mean over heads and by head."""
    return {
        "shares": {t: dict(zip(GROUPS, m.tolist(), strict=True)) for t, m in zip(tokens, mass.mean(0), strict=True)},
        "shares_by_head": {
            t: [dict(zip(GROUPS, head.tolist(), strict=True)) for head in mass[:, i]] for i, t in enumerate(tokens)
        },
    }


def _table(mass: Float[Tensor, "A t 3"], tokens: Sequence[str], images: int) -> list[str]:
    many = f"{images:,} images" if images > 1 else "1 image"
    lines = [f"where attention lies, mean over {many} and {len(mass)} heads:", f"{'from':12}" + "".join(
        f"{group:>12}" for group in GROUPS)]  # fmt: skip
    return [*lines, *(f"{t:12}" + "".join(f"{s:12.1%}" for s in m) for t, m in zip(tokens, mass.mean(0), strict=True))]
