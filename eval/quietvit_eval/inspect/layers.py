"""Norms of all tokens by block over a set of images, the verdict on each block, and which tokens count as high."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64

from quietvit.contracts import BadSample, Extractor
from quietvit.features.norms import BINS, BINS_PER_OCTAVE, OCTAVES, NormHistogram, NormVerdict
from quietvit_eval.inspect.tokens import ImageSet, look_at, norms_by_block
from quietvit_eval.views import normalised

SHOWN_PER_OCTAVE = 16  # bins of the histograms that are written and drawn: 4.4 % wide (ours)
# Of the tokens, where no outliers are found: "a fixed top 2-3 % quantile"; DINOv2-g has 2.37 % outliers (registers
# paper, section 2.1).
STAND_IN = 0.02


@dataclass(frozen=True)
class Threshold:
    """Which patch tokens of the probed block are compared with the rest: norms above `value`."""

    kind: str  # "outliers", "suspicious": the cutoff of a second mode; "stand-in": the highest 2 %, no outliers at all
    value: float  # norm; inf where all norms are equal
    names: tuple[str, str]  # of the tokens above it and of the others

    @property
    def found(self) -> bool:
        """Whether there is a second mode above it."""
        return self.kind != "stand-in"


@dataclass
class LayerNorms:
    """Histograms of norms after each of `blocks`, before the final norm, over M images; norms of the probed block."""

    blocks: tuple[int, ...]
    probed: int
    grid: tuple[int, int]
    patches: NormHistogram
    cls: NormHistogram
    registers: tuple[NormHistogram, ...]  # one for each register
    at_probed: Float32[np.ndarray, "M N"]

    def verdict(self, block: int) -> NormVerdict:
        """On the patch tokens after `block`."""
        return self.patches.judge(self.blocks.index(block))

    def about(self) -> list[dict[str, Any]]:
        """Each block for result.json: the verdict, and the norms of [CLS] and of each register."""
        return [
            {
                "block": block,
                "patches": asdict(self.patches.judge(row)),
                "cls": spread_of(self.cls, row),
                "registers": [spread_of(histogram, row) for histogram in self.registers],
            }
            for row, block in enumerate(self.blocks)
        ]


def measure(
    extractor: Extractor, images: ImageSet, blocks: Sequence[int], *, probed: int, what: str
) -> tuple[LayerNorms, ImageSet]:
    """Norms by block, and the images without those that cannot be read.

    `blocks` ascending from 0, `probed` among them. Memory: histograms, and one norm for each patch token of the probed
    block. Raises ValueError as `norms_by_block`, and if no image can be read.
    """
    kept: list[Float32[np.ndarray, "b N"]] = []
    bad: list[tuple[int, BadSample]] = []
    found: LayerNorms | None = None
    for seen in look_at(images, what=what):
        bad += seen.bad
        if not len(seen.rows):
            continue
        norms = norms_by_block(extractor, normalised(extractor, seen.images), blocks)
        if found is None:
            side = images.transform.image_size // extractor.stride
            device, count = norms[probed].cls.device, len(blocks)
            registers = tuple(NormHistogram(count, device=device) for _ in range(norms[probed].registers.shape[1]))
            patches, cls = NormHistogram(count, device=device), NormHistogram(count, device=device)
            none = np.empty((0, side * side), np.float32)
            found = LayerNorms(tuple(blocks), probed, (side, side), patches, cls, registers, none)
        for row, block in enumerate(blocks):
            found.patches.add(norms[block].patches, row)
            found.cls.add(norms[block].cls, row)
            for number, histogram in enumerate(found.registers):
                histogram.add(norms[block].registers[:, number], row)
        kept.append(norms[probed].patches.cpu().numpy())
    images = images.without(bad)
    assert found is not None
    found.at_probed = np.concatenate(kept)
    return found, images


def threshold_of(norms: LayerNorms) -> Threshold:
    """The cutoff between the modes of the probed block; without a second mode the norm that STAND_IN exceed.

    Raises ValueError if norms are not finite.
    """
    verdict = norms.verdict(norms.probed)
    if verdict.kind == "not finite":
        raise ValueError(f"block {norms.probed}: {verdict.reason}; a model that gives these cannot be looked into")
    if verdict.kind == "none":
        value = float(np.quantile(norms.at_probed, 1 - STAND_IN))
        return Threshold("stand-in", value, (f"highest {100 * STAND_IN:.0f} %", "rest"))
    return Threshold(verdict.kind, verdict.cutoff, ("outliers" if verdict.bimodal else "upper mode", "normal"))


def is_high(norms: LayerNorms, threshold: Threshold) -> Bool[np.ndarray, "M N"]:
    """Which patch tokens of the probed block lie above the threshold."""
    high: Bool[np.ndarray, "M N"] = norms.at_probed > threshold.value
    return high


def share_of(verdict: NormVerdict) -> float:
    """Share of outliers: 0 for what is only suspicious, nan where norms are not finite."""
    return 0.0 if verdict.kind == "suspicious" else verdict.share


def spread_of(histogram: NormHistogram, row: int) -> dict[str, float | None]:
    """Median and 5 % and 95 % quantiles of norms, to the width of a bin (1.1 %); None where nothing was counted."""
    counts = histogram.counts[row, :BINS].cpu().numpy()
    return {name: _quantile(counts, share) for name, share in (("median", 0.5), ("low", 0.05), ("high", 0.95))}


def _quantile(counts: Int64[np.ndarray, " bins"], share: float) -> float | None:
    upto = counts.cumsum()
    if not upto[-1]:
        return None
    place = int(np.searchsorted(upto, share * upto[-1]))
    inside = (share * upto[-1] - (upto[place] - counts[place])) / counts[place]
    return float(2 ** (OCTAVES[0] + (place + inside) / BINS_PER_OCTAVE))


def coarse(histograms: Sequence[NormHistogram]) -> tuple[list[float], list[list[list[int]]]]:
    """Edges (norms, one more than bins) and counts [histogram][block][bin] in bins wide enough to draw.

    The bins reach as far as any of the histograms has norms.
    """
    width = BINS_PER_OCTAVE // SHOWN_PER_OCTAVE
    counts = torch.stack([h.counts[:, :BINS].cpu() for h in histograms])
    summed = counts.unflatten(-1, (BINS // width, width)).sum(-1)
    there = summed.sum((0, 1)).nonzero().flatten()
    if not len(there):
        return [], [[[] for _ in row] for row in summed]
    first, last = int(there[0]), int(there[-1]) + 1
    edges = [2 ** (OCTAVES[0] + i / SHOWN_PER_OCTAVE) for i in range(first, last + 1)]
    return edges, summed[..., first:last].tolist()


# ---- words


def sentence(verdict: NormVerdict, block: int, *, last: bool) -> str:
    """The decision on one block, in plain words."""
    where = f"After block {block}, the last," if last else f"After block {block}"
    share = f"{100 * verdict.share:.2f} % of the patch tokens"
    if verdict.kind == "not finite":
        return f"{where} norms are not finite: {verdict.reason}."
    if verdict.kind == "outliers":
        return (
            f"{where} there are outliers: {share} have norms above {verdict.cutoff:.3g}"
            f", {verdict.ratio:.1f} times those of the others."
        )
    if verdict.kind == "suspicious":
        return (
            f"{where} {share} form a second mode {verdict.ratio:.1f} times above the "
            "others: too near to be called outliers, as it may also come from what is in the pictures."
        )
    if math.isnan(verdict.max_over_median):
        return f"{where} no norm is above zero."
    return (
        f"{where} there are no outliers: the norms of the patch tokens have one mode. The greatest is "
        f"{verdict.max_over_median:.1f} times the median, excess kurtosis of the log norms {verdict.kurtosis:+.1f}."
    )


def across_blocks(blocks: Sequence[int], verdicts: Sequence[NormVerdict]) -> str:
    """Which blocks have outliers, in plain words."""
    having = [block for block, verdict in zip(blocks, verdicts, strict=True) if verdict.bimodal]
    if not having:
        return "No block that was read has outliers."
    if having == list(blocks):
        return "All blocks that were read have outliers."
    first = next(b for b in reversed(blocks) if b not in having)
    tail = [b for b in having if b > first]
    if tail == having:
        return f"They begin after block {tail[0]} and stay to the end."
    ranges = ", ".join(str(b) for b in having)
    return f"Blocks with outliers: {ranges}" + ("." if tail else "; they are gone after the last block.")
