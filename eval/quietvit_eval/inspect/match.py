"""Patches of two images that correspond: mutual nearest neighbours by cosine, as in DINOv2's figure 10.

1. each patch of A has a nearest patch in B, and each of B one in A, by the cosine of their features (of equal ones
   the first in reading order); a pair that is nearest both ways is a match
2. optional, both patches are foreground, by the first principal component of the two images together (pca.py)
3. optional ratio test (Lowe 2004, section 7.1): the distance of the unit vectors, over that to the nearest patch of
   B outside of the 3 x 3 around the match, is at most `ratio`. Neighbours of a match look like it and do not count
4. best first, a match is kept if no better one lies within `spacing` - 1 patches of it, in A or in B
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image as Pillow
from PIL import ImageDraw
from torch import Tensor

from quietvit.contracts import Extractor
from quietvit.data.decode import UnreadableImage, decode_file
from quietvit_eval.blocks import read_blocks
from quietvit_eval.inspect.attention import check_block
from quietvit_eval.inspect.grids import fitted
from quietvit_eval.inspect.pca import check_varied, find_foreground
from quietvit_eval.inspect.sample import Outcome, write_outcome
from quietvit_eval.pictures import INK, MARGIN, PAPER, Image
from quietvit_eval.transform import MOST
from quietvit_eval.views import normalised

ACTION = "match"
CHUNK = 1024  # patches of A that meet all of B at a time (ours)
HEIGHT, WIDEST = 480, 900  # pixels of a picture of one image (ours)

Grid = tuple[int, int]


@dataclass(frozen=True)
class MatchOptions:
    """How matches are chosen; all defaults are ours but `foreground`'s sense, see the head of this file."""

    size: int | None = None  # pixels of the longer side that the model sees; None: twice the model's, 448 at the most
    block: int = -1
    foreground: bool = False
    ratio: float | None = None  # in (0, 1]; None: no ratio test. Lowe has 0.8 for SIFT
    spacing: int = 2  # patches; 1: every match stays
    most: int = 60  # matches kept, the best

    def __post_init__(self) -> None:
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"the ratio must be above 0 and 1 at the most, not {self.ratio:g}")
        if self.spacing < 1 or self.most < 1:
            raise ValueError(f"spacing and the number of matches must be 1 or more, not {self.spacing} and {self.most}")


@dataclass(frozen=True)
class Matches:
    """Pairs of patches, best first."""

    a: Int[Tensor, " n"]  # row-major patches of A
    b: Int[Tensor, " n"]
    cosine: Float[Tensor, " n"]
    ratio: Float[Tensor, " n"]  # distance over the next best distance; 1 where there is no other patch

    def __len__(self) -> int:
        return len(self.a)

    def only(self, keep: Bool[Tensor, " n"]) -> Matches:
        """Those that are marked."""
        return Matches(self.a[keep], self.b[keep], self.cosine[keep], self.ratio[keep])


def mutual_matches(a: Float[Tensor, "h w D"], b: Float[Tensor, "i j D"]) -> Matches:
    """Step 1, and the ratio that step 3 asks for; by cosine, then in reading order of A."""
    first, second = (F.normalize(x.flatten(0, 1).float(), dim=1) for x in (a, b))
    places = torch.arange(len(second))
    rows, columns = places // b.shape[1], places % b.shape[1]
    there, cosine, other = [], [], []
    back_value = torch.full((len(second),), -torch.inf)
    back = torch.zeros(len(second), dtype=torch.int64)
    for start in range(0, len(first), CHUNK):
        similar = first[start : start + CHUNK] @ second.T
        best = similar.amax(1)
        nearest = (similar == best[:, None]).int().argmax(1)  # the first of equal ones
        reverse = similar.amax(0)
        better = reverse > back_value
        back = torch.where(better, start + (similar == reverse).int().argmax(0), back)
        back_value = torch.maximum(back_value, reverse)
        around = (rows - rows[nearest][:, None]).abs().le(1) & (columns - columns[nearest][:, None]).abs().le(1)
        there.append(nearest)
        cosine.append(best)
        other.append(similar.masked_fill(around, -torch.inf).amax(1))
    nearest, values, others = torch.cat(there), torch.cat(cosine), torch.cat(other)
    mutual = (back[nearest] == torch.arange(len(first))).nonzero()[:, 0]
    ratio = _distance(values) / _distance(others).clamp_min(torch.finfo(torch.float32).tiny)
    ratio = torch.where(others.isinf(), 1.0, ratio)
    order = mutual[values[mutual].argsort(descending=True, stable=True)]
    return Matches(order, nearest[order], values[order], ratio[order])


def _distance(cosine: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Of unit vectors."""
    return (2 - 2 * cosine).clamp_min(0).sqrt()


def spaced(matches: Matches, grids: tuple[Grid, Grid], spacing: int) -> Matches:
    """Step 4. Distances are the greater of those in rows and in columns."""
    taken = [torch.zeros(grid, dtype=torch.bool) for grid in grids]
    keep = torch.zeros(len(matches), dtype=torch.bool)
    for i, pair in enumerate(zip(matches.a.tolist(), matches.b.tolist(), strict=True)):
        places = [divmod(patch, grid[1]) for patch, grid in zip(pair, grids, strict=True)]
        if any(bool(mask[place]) for mask, place in zip(taken, places, strict=True)):
            continue
        keep[i] = True
        for mask, (row, column) in zip(taken, places, strict=True):
            top, left = max(0, row - spacing + 1), max(0, column - spacing + 1)
            mask[top : row + spacing, left : column + spacing] = True
    return matches.only(keep)


def choose_matches(
    a: Float[Tensor, "h w D"], b: Float[Tensor, "i j D"], options: MatchOptions
) -> tuple[Matches, dict[str, int]]:
    """All steps, and how many matches each of them left. Raises ValueError for features that are no finite numbers or
    the same everywhere."""
    check_varied(torch.cat([a.flatten(0, 1), b.flatten(0, 1)]))
    grids = ((a.shape[0], a.shape[1]), (b.shape[0], b.shape[1]))
    matches = mutual_matches(a, b)
    left = {"mutual": len(matches)}
    if options.foreground:
        masks = [mask.flatten() for mask in find_foreground([a, b]).masks]
        matches = matches.only(masks[0][matches.a] & masks[1][matches.b])
        left["foreground"] = len(matches)
    if options.ratio is not None:
        matches = matches.only(matches.ratio <= options.ratio)
        left["ratio"] = len(matches)
    matches = spaced(matches, grids, options.spacing)
    left["spaced"] = len(matches)
    matches = matches.only(torch.arange(len(matches)) < options.most)
    left["kept"] = len(matches)
    return matches, left


def centres(patches: Int[Tensor, " n"], grid: Grid, size: tuple[int, int]) -> Float[np.ndarray, "n 2"]:
    """Middles of patches (row-major) as x, y in pixels of an image of (height, width); its corner is 0, 0."""
    rows, columns = patches.numpy() // grid[1], patches.numpy() % grid[1]
    return np.stack([(columns + 0.5) / grid[1] * size[1], (rows + 0.5) / grid[0] * size[0]], axis=1)


def whole_patches(image: UInt8[np.ndarray, "H W 3"], stride: int, size: int) -> UInt8[np.ndarray, "h*P w*P 3"]:
    """The image with its longer side nearest to `size` pixels and both sides in whole patches, at least one.

    Its shape changes by half a patch at the most; nothing is cut off or added. Bicubic, antialiased.
    """
    scale = size / max(image.shape[:2])
    height, width = (max(1, round(side * scale / stride)) * stride for side in image.shape[:2])
    if (height, width) == image.shape[:2]:
        return image
    return np.asarray(Pillow.fromarray(image).resize((width, height), Pillow.Resampling.BICUBIC))


def read_map(extractor: Extractor, image: UInt8[np.ndarray, "H W 3"], options: MatchOptions) -> Float[Tensor, "h w D"]:
    """Patch features of an image after a block and the final norm, on the CPU. Without a size: at its own."""
    view = whole_patches(image, extractor.stride, options.size or max(image.shape[:2]))
    x = normalised(extractor, torch.tensor(view).permute(2, 0, 1)[None])
    features = read_blocks(extractor, x, [options.block % extractor.num_blocks], norm=True)[0]
    return features.patches[0].float().cpu()


def inspect_match(extractor: Extractor, first: Path, second: Path, out: Path, options: MatchOptions) -> Outcome:
    """Write match.png, both images with lines between patches that match, and match.json, with the matches in pixels
    of the images as they are stored (x to the right, y down, from the upper left corner).

    Finding none is a result, and said. Raises ValueError for an image that cannot be read, a block that is not there,
    and as `choose_matches`; OSError as the file system does.
    """
    check_block(extractor, options.block)
    if options.size is None:
        options = replace(options, size=min(2 * extractor.image_size, 2 * MOST))
    images = [_open(path) for path in (first, second)]
    maps = [read_map(extractor, image, options) for image in images]
    matches, left = choose_matches(maps[0], maps[1], options)
    grids = [(m.shape[0], m.shape[1]) for m in maps]
    points = [
        centres(patches, grid, (image.shape[0], image.shape[1]))
        for patches, grid, image in zip((matches.a, matches.b), grids, images, strict=True)
    ]
    facts: dict[str, Any] = {
        "images": [
            {"name": path.name, "width": image.shape[1], "height": image.shape[0], "grid": grid}
            for path, image, grid in zip((first, second), images, grids, strict=True)
        ],
        "options": asdict(options),
        "counts": left,
        "matches": [
            {"a": p, "b": q, "cosine": c, "ratio": r}
            for p, q, c, r in zip(*points, matches.cosine.tolist(), matches.ratio.tolist(), strict=True)
        ],
    }
    steps = ", ".join(f"{count:,} {name}" for name, count in left.items())
    said = f"{len(matches)} matches: {steps}"
    if not len(matches):
        said = f"no matches ({steps}): the images have nothing in common for this model, or ask for less"
    return write_outcome(out, ACTION, extractor, facts, {ACTION: draw_matches(images, points)}, [said])


def draw_matches(images: Sequence[Image], points: Sequence[Float[np.ndarray, "n 2"]]) -> Image:
    """Two images side by side, a line for each pair of points (x, y in pixels of the images).

    The hue of a line is the direction of its end in A, seen from the middle of A, so that mixed-up lines stand out.
    """
    scales = [min(HEIGHT / i.shape[0], WIDEST / i.shape[1]) for i in images]
    panels = [fitted(i, max(1, round(i.shape[0] * s))) for i, s in zip(images, scales, strict=True)]
    width, height = sum(p.shape[1] for p in panels) + 3 * MARGIN, max(p.shape[0] for p in panels) + 2 * MARGIN
    sheet = Pillow.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    ends = []
    left = MARGIN
    for panel, image, xy in zip(panels, images, points, strict=True):
        sheet.paste(Pillow.fromarray(panel), (left, MARGIN))
        ends.append(xy * [panel.shape[1] / image.shape[1], panel.shape[0] / image.shape[0]] + [left, MARGIN])
        left += panel.shape[1] + MARGIN
    middle = [images[0].shape[1] / 2, images[0].shape[0] / 2]
    for start, stop, away in zip(*ends, points[0] - middle, strict=True):
        colour = _hue(float(np.arctan2(away[1], away[0])))
        draw.line([*start, *stop], INK, 3)
        draw.line([*start, *stop], colour, 1)
        for x, y in (start, stop):
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], colour, INK)
    return np.asarray(sheet)


def _hue(angle: float) -> tuple[int, int, int]:
    hsv = np.array([[[int((angle / (2 * np.pi) % 1) * 180) % 180, 255, 255]]], np.uint8)
    r, g, b = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0].tolist()
    return r, g, b


def _open(path: Path) -> Image:
    try:
        return decode_file(path, str(path))
    except UnreadableImage as error:
        raise ValueError(f"{error.name} is not an image that can be read: {error.reason}") from error
