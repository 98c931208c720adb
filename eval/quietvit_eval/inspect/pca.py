"""Patch features as colours, by a fixed recipe: PCA over all images, the foreground told by its first component.

DINOv2 paper, figure 1; what it leaves open is decided here:

    1. PCA of all patch tokens (after the final norm) of all images together; scores of the first component
    2. its sign: the border of images is background, so patches at a border of their grid score below 0 on average
    3. foreground: score above 0
    4. a second PCA, of the foreground patches of all images together, three components
    5. each from its 1st to its 99th percentile over these patches becomes red, green, blue; background is black

The sign of every other component: its greatest loading is positive. Nothing is drawn at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from quietvit.contracts import Extractor
from quietvit.data.sources import Source
from quietvit_eval.blocks import read_blocks
from quietvit_eval.inspect.attention import check_block
from quietvit_eval.inspect.grids import CELL, Row, around_zero, enlarged, page, short
from quietvit_eval.inspect.sample import Looks, Outcome, Sample, Seen, panels_of, write_outcome
from quietvit_eval.views import normalised

ACTION = "pca"
CLIP = 0.01  # share of patches beyond each end of a colour's scale (ours: outliers do not set it)
SIGMAS = 3.0  # of a whitened component that fill the scale; registers paper, appendix H
LEAST_SPREAD = 1e-5  # standard deviation of features over their size, below which they are one vector (ours)
CHUNK = 4096  # patches at a time in float64 (ours)


@dataclass(frozen=True)
class Components:
    """Principal components, the largest first, float64."""

    mean: Float[Tensor, " D"]
    directions: Float[Tensor, "k D"]  # of unit length
    variances: Float[Tensor, " k"]  # of the scores, divided by the number of rows less one
    total: float  # variance of all D

    def scores(self, features: Float[Tensor, "*n D"]) -> Float[Tensor, "*n k"]:
        """Coordinates of features along the components."""
        return (features.double() - self.mean) @ self.directions.T

    def explained(self) -> list[float]:
        """The share of the variance that each component has; zeros where there is none."""
        return [v / self.total if self.total else 0.0 for v in self.variances.tolist()]


@dataclass(frozen=True)
class Foreground:
    """What the first component says of every patch; positive is foreground."""

    components: Components
    scores: list[Float[Tensor, "h w"]]

    @property
    def masks(self) -> list[Bool[Tensor, "h w"]]:
        return [s > 0 for s in self.scores]


def principal_components(features: Float[Tensor, "M D"], count: int) -> Components:
    """The first `count` (D at the most) of the covariance of M rows; the greatest loading of each is positive.

    Raises ValueError for fewer than two rows.
    """
    if len(features) < 2:
        raise ValueError(f"principal components of {len(features)} patches: there must be at least two")
    mean = features.double().mean(0)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for rows in features.split(CHUNK):
        centred = rows.double() - mean
        covariance += centred.T @ centred
    covariance /= len(features) - 1
    variances, vectors = torch.linalg.eigh(covariance)
    directions = vectors.T.flip(0)[:count]
    greatest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    kept = variances.flip(0)[:count].clamp_min(0)
    return Components(mean, directions * torch.where(greatest < 0, -1.0, 1.0), kept, float(covariance.trace()))


def find_foreground(maps: Sequence[Float[Tensor, "h w D"]]) -> Foreground:
    """Steps 1 to 3, of feature maps of any grids.

    Where border and middle score alike, or all patches are at a border, the sign is that of the greatest loading.
    Raises ValueError for features that are the same everywhere.
    """
    features = torch.cat([m.flatten(0, 1) for m in maps])
    check_varied(features)
    first = principal_components(features, 1)
    scores = [first.scores(m)[..., 0] for m in maps]
    border = torch.cat([s[at_border(*s.shape)] for s in scores]).mean()
    if border > 0 and not all(bool(at_border(*s.shape).all()) for s in scores):
        first = Components(first.mean, -first.directions, first.variances, first.total)
        scores = [-s for s in scores]
    return Foreground(first, scores)


def at_border(h: int, w: int) -> Bool[Tensor, "h w"]:
    """Patches in the first or last row or column."""
    mask = torch.ones(h, w, dtype=torch.bool)
    mask[1:-1, 1:-1] = False
    return mask


def check_varied(features: Float[Tensor, "M D"]) -> None:
    """Raises ValueError for features that are no finite numbers, or the same everywhere."""
    if not bool(features.isfinite().all()):
        raise ValueError("the model gives features that are no finite numbers")
    x = features.double()
    if len(x) < 2 or float(x.var(0).sum()) <= LEAST_SPREAD**2 * float(x.square().sum(1).mean()):
        raise ValueError("these patches all have the same features: there is nothing to see in them. Has the model "
                         "collapsed, or are the images of one colour?")  # fmt: skip


def component_scores(
    maps: Sequence[Float[Tensor, "h w D"]], masks: Sequence[Bool[Tensor, "h w"]] | None
) -> tuple[Components, list[Float[Tensor, "h w 3"]]]:
    """Step 4: three components of the patches in `masks` (None: of all), and the scores of every patch.

    Raises ValueError if fewer than two patches are in the masks.
    """
    chosen = [m.flatten(0, 1) if masks is None else m[masks[i]] for i, m in enumerate(maps)]
    features = torch.cat(chosen)
    if len(features) < 2:
        every = sum(m[..., 0].numel() for m in maps)
        raise ValueError(f"the foreground step leaves {len(features)} of {every} patches: go without it, or show more "
                         "images")  # fmt: skip
    components = principal_components(features, 3)
    return components, [components.scores(m) for m in maps]


def colours(
    scores: Sequence[Float[Tensor, "h w k"]],
    masks: Sequence[Bool[Tensor, "h w"]] | None,
    *,
    whiten: Float[Tensor, " k"] | None = None,
) -> list[Float[np.ndarray, "h w 3"]]:
    """Step 5: scores as RGB in [0, 1], black outside of `masks`.

    `whiten`: variances of the components, to have each from -3 to +3 of its standard deviations instead of between
    percentiles (registers paper, appendix H). A component without any spread is 0.5 everywhere.
    """
    inside = torch.cat([s.flatten(0, 1) if masks is None else s[masks[i]] for i, s in enumerate(scores)]).numpy()
    if whiten is None:
        low, high = np.quantile(inside, [CLIP, 1 - CLIP], axis=0)
    else:
        high = SIGMAS * whiten.sqrt().numpy()
        low = -high
    spread = high > low
    out = []
    for i, s in enumerate(scores):
        scaled = ((s.numpy() - low) / np.where(spread, high - low, 1)).clip(0, 1)
        rgb = np.full((*s.shape[:2], 3), 0.5)
        rgb[..., : s.shape[-1]] = np.where(spread, scaled, 0.5)
        out.append(rgb if masks is None else np.where(masks[i].numpy()[..., None], rgb, 0.0))
    return out


def patch_maps(extractor: Extractor, sample: Sample, block: int) -> tuple[Seen, list[Float[Tensor, "h w D"]]]:
    """Images of a sample and their patch features after a block (-1: the last) and the final norm, on the CPU."""
    seen = sample.all("features")
    which = [block % extractor.num_blocks]
    maps: list[Tensor] = []
    for pixels in seen.pixels.split(sample.looks.batch_size):
        features = read_blocks(extractor, normalised(extractor, pixels), which, norm=True)[0]
        maps += features.patches.float().cpu()
    return seen, maps


def inspect_pca(
    extractor: Extractor,
    source: Source,
    out: Path,
    *,
    looks: Looks,
    block: int = -1,
    foreground: bool = True,
    whiten: bool = False,
    smooth: bool = False,
) -> Outcome:
    """Write pca.png, a row for each image: the image, its first component from -3 to +3 standard deviations, and RGB;
    and pca.json with what the components explain and which share of each image is foreground.

    `foreground` False leaves steps 1 to 3 out. `whiten`: colours as in the registers paper, see `colours`. `smooth`:
    enlarged bilinearly. Raises ValueError for a block that is not there, features that are the same everywhere, and as
    `Sample` and `component_scores`; OSError as the file system does.
    """
    check_block(extractor, block)
    sample = Sample(extractor, source, looks)
    seen, maps = patch_maps(extractor, sample, block)
    first = find_foreground(maps)
    masks = first.masks if foreground else None
    components, scores = component_scores(maps, masks)
    shown = colours(scores, masks, whiten=components.variances if whiten else None)
    most = SIGMAS * float(first.components.variances[0].sqrt())
    rows = []
    for name, image, score, rgb in zip(seen.names, panels_of(seen.pixels), first.scores, shown, strict=True):
        component = around_zero(enlarged(score.numpy(), CELL, smooth=smooth), most=most)
        coloured = (enlarged(rgb, CELL, smooth=smooth) * 255).round().clip(0, 255).astype(np.uint8)
        rows.append(Row(short(name), [image, component, coloured]))
    shares = [float(mask.double().mean()) for mask in first.masks]
    facts: dict[str, Any] = {
        "block": block % extractor.num_blocks,
        "data": sample.about(),
        "recipe": {"foreground": foreground,
                   "colours": f"+-{SIGMAS:g} sigma" if whiten else f"percentiles, {CLIP:g} cut off at each end",
                   "signs": "foreground: border below 0 on average; others: greatest loading positive"},
        "first_component": {"explained": first.components.explained()[0]},
        "components": {"patches": sum(int(m.sum()) for m in masks) if masks else sum(m[..., 0].numel() for m in maps),
                       "explained": components.explained()},
        "images": [{"name": name, "foreground": share} for name, share in zip(seen.names, shares, strict=True)],
    }  # fmt: skip
    explained = ", ".join(f"{e:.1%}" for e in components.explained())
    of = "foreground patches" if foreground else "patches"
    lines = [f"red, green and blue explain {explained} of the variance of {facts['components']['patches']:,} {of}"]
    if foreground:
        lines.append(f"foreground: {sum(shares) / len(shares):.1%} of the patches, by the first component, which "
                     f"explains {first.components.explained()[0]:.1%}")  # fmt: skip
    note = f"1st component: orange above 0{', the foreground' if foreground else ''}, blue below."
    picture = page(["image", "1st component", "RGB"], rows, [note])
    return write_outcome(out, ACTION, extractor, facts, {ACTION: picture}, lines)
