"""What a frozen model shows of itself while it looks at images: norms by block, tokens of one block, its stem.

The images of one inspection are read again for every pass: nothing is kept but what a pass asks for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from quietvit.backbones import Trunk
from quietvit.contracts import BadSample, Extractor, Features
from quietvit.data.decode import UnreadableImage
from quietvit.data.sources import Source
from quietvit.nn.packing import Groups, unpack
from quietvit.weights.extractor import BackboneExtractor
from quietvit_eval.blocks import BlockReader, read_blocks
from quietvit_eval.transform import EvalTransform, choose_transform, eval_size

AT_ONCE = 4  # blocks whose tokens are held together, of extractors that cannot be observed (ours)


@dataclass(frozen=True)
class TokenNorms:
    """Norms after one block, before the final norm, fp32 on the model's device."""

    cls: Float[Tensor, " b"]
    registers: Float[Tensor, "b R"]
    patches: Float[Tensor, "b N"]


@dataclass(frozen=True)
class ImageSet:
    """The images of one inspection: which of a source, seen how. Rows number them from 0."""

    source: Source
    indices: Int64[np.ndarray, " M"]  # ascending
    transform: EvalTransform
    batch_size: int = 32  # ours: fills a GPU at 518 pixels
    workers: int = 0  # processes that read images; 0: this one
    console: Console | None = None
    bad: tuple[BadSample, ...] = field(default=())  # unreadable ones, not among `indices`

    def __len__(self) -> int:
        return len(self.indices)

    def without(self, bad: Sequence[tuple[int, BadSample]]) -> ImageSet:
        """The same without the unreadable rows. Raises ValueError if nothing is left."""
        if len(bad) == len(self.indices):
            first = bad[0][1] if bad else None
            said = f"; the first: {first.name}: {first.reason}" if first else ""
            raise ValueError(f"none of the {len(self)} images of {self.source.name} can be read{said}")
        left = np.delete(self.indices, [row for row, _ in bad])
        return replace(self, indices=left, bad=(*self.bad, *(sample for _, sample in bad)))


@dataclass(frozen=True)
class Seen:
    """One batch of images as they are read; rows of those that cannot be are in `bad`."""

    rows: Int64[np.ndarray, " b"]
    images: UInt8[Tensor, "b 3 S S"]
    bad: tuple[tuple[int, BadSample], ...]


def choose_images(
    source: Source,
    extractor: Extractor,
    *,
    limit: int,
    seed: int,
    image_size: int | None = None,
    batch_size: int = 32,
    workers: int = 0,
    console: Console | None = None,
) -> ImageSet:
    """At most `limit` images of the source, drawn with `seed`, at the size that the model is scored at.

    Every extractor gets the same images. Raises ValueError for a source without images, or a size that is no multiple
    of the model's stride.
    """
    if len(source) == 0:
        raise ValueError(f"{source.name} has no images")
    indices = np.arange(len(source))
    if limit < len(source):
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).numpy()
        indices = np.sort(order[:limit])
    transform = choose_transform(source, eval_size(extractor, image_size))
    return ImageSet(source, indices, transform, batch_size, workers, console)


class _Views(Dataset[tuple[int, "Tensor | BadSample"]]):
    def __init__(self, images: ImageSet, rows: Int64[np.ndarray, " m"]) -> None:
        self.source, self.transform, self.rows = images.source, images.transform, rows
        self.indices = images.indices

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> tuple[int, Tensor | BadSample]:
        row = int(self.rows[position])
        try:
            pixels = self.source.load(int(self.indices[row]), min_side=self.transform.resize)
        except UnreadableImage as error:
            return row, BadSample(error.name, error.reason)
        return row, self.transform(pixels)


def _join(parts: list[tuple[int, Tensor | BadSample]]) -> Seen:
    good = [(row, view) for row, view in parts if isinstance(view, Tensor)]
    bad = tuple((row, sample) for row, sample in parts if isinstance(sample, BadSample))
    images = torch.stack([view for _, view in good]) if good else torch.empty(0, 3, 0, 0, dtype=torch.uint8)
    return Seen(np.array([row for row, _ in good], np.int64), images, bad)


def look_at(images: ImageSet, rows: Int64[np.ndarray, " m"] | None = None, *, what: str) -> Iterator[Seen]:
    """All images, or the given rows, in order and in batches; progress is shown as `what`."""
    rows = np.arange(len(images)) if rows is None else rows
    loader = DataLoader(
        _Views(images, rows), batch_size=images.batch_size, num_workers=images.workers, collate_fn=_join
    )
    console = images.console
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,}/{task.total:,}"))
    shown = console is not None and console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not shown) as progress:
        bar = progress.add_task(what, total=len(rows))
        for seen in loader:
            yield seen
            progress.update(bar, advance=len(seen.rows) + len(seen.bad))


@torch.no_grad()
def norms_by_block(
    extractor: Extractor, images: Float[Tensor, "b 3 H W"], blocks: Sequence[int]
) -> dict[int, TokenNorms]:
    """Norms of all tokens after each of `blocks` (from 0, ascending), before the final norm.

    Of quietvit's own backbones no block's tokens are kept. Raises ValueError for blocks that are not there, and for an
    extractor that cannot show its blocks before the final norm, which would flatten all norms.
    """
    check_shown(extractor, blocks)
    if isinstance(extractor, BackboneExtractor):
        return _observed(extractor, images, set(blocks))
    found = {}
    for start in range(0, len(blocks), AT_ONCE):
        some = blocks[start : start + AT_ONCE]
        for block, features in zip(some, read_blocks(extractor, images, some, norm=False), strict=True):
            parts = (features.cls, features.registers, features.patches.flatten(1, 2))
            found[block] = TokenNorms(*(torch.linalg.vector_norm(part.float(), dim=-1) for part in parts))
    return found


def _observed(
    extractor: BackboneExtractor, images: Float[Tensor, "b 3 H W"], blocks: set[int]
) -> dict[int, TokenNorms]:
    backbone = extractor.backbone
    assert isinstance(backbone, Trunk)
    first, found = 1 + backbone.num_registers, {}

    def see(block: int, tokens: Tensor, groups: Groups) -> None:
        if block in blocks:
            norms = torch.linalg.vector_norm(unpack(tokens, groups)[0].float(), dim=-1)
            found[block] = TokenNorms(norms[:, 0], norms[:, 1:first], norms[:, first:])

    with backbone.observing(see):
        extractor(images)
    return found


def check_shown(extractor: Extractor, blocks: Sequence[int]) -> None:
    """Raises ValueError as `norms_by_block` would, before any work is done."""
    num = extractor.num_blocks
    if not blocks or list(blocks) != sorted(set(blocks)) or blocks[0] < 0 or blocks[-1] >= num:
        raise ValueError(f"blocks {list(blocks)} asked for; the model has {num}, numbered from 0, to be named in order")
    if not isinstance(extractor, BlockReader):
        raise ValueError(
            f"{type(extractor).__name__} gives its features only after the final norm, which flattens all norms to "
            "about the same: give it a method blocks(images, which, norm=...), and artifacts can be looked for"
        )


def tokens_of(extractor: Extractor, images: Float[Tensor, "b 3 H W"], block: int) -> Features:
    """Features of one block (from 0) through the final norm: what is used of a frozen model, and what is probed."""
    return read_blocks(extractor, images, [block], norm=True)[0]


@torch.no_grad()
def stem_tokens(extractor: Extractor, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b h w D"] | None:
    """Patch tokens at the output of the patch embedding (tokens-to-token: of its last split), before any position.

    None for extractors that are not quietvit's own, which do not show their stem.
    """
    if not isinstance(extractor, BackboneExtractor):
        return None
    assert isinstance(extractor.backbone, Trunk)
    tokens, grid = extractor.backbone.tokenize(images.to(extractor.device), None)
    stem: Tensor = tokens.float().unflatten(1, grid)
    return stem
