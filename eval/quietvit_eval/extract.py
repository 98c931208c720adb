"""Features of a data set: images through a frozen model, in batches, into one array of bounded memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from quietvit.contracts import BadSample, Extractor
from quietvit.data.decode import UnreadableImage
from quietvit.data.sources import Source
from quietvit_eval.transform import EvalTransform

RAM_BYTES = 4 * 1024**3  # ours: greater arrays live in a file that is gone when the process ends


@dataclass(frozen=True)
class Tokens:
    """What a frozen model says about M images, fp32 on the CPU. Rows of unreadable images are left out."""

    values: Float[Tensor, "M n+1 D"]  # [CLS] of the last n blocks, earliest first; then the mean patch of the last
    indices: Int[Tensor, " M"]  # which images of the source
    skipped: tuple[BadSample, ...]

    @property
    def cls(self) -> Float[Tensor, "M D"]:
        """[CLS] of the last block, after the final norm."""
        return self.values[:, -2]


@dataclass(frozen=True)
class Reading:
    """How images are read; none of this changes a score."""

    batch_size: int = 64  # ours: fills a GPU at 224 pixels, and fits a small one
    workers: int = 0  # 0: in this process
    console: Console | None = None  # progress is shown on it if it is a terminal; None: silence
    scratch: Path | None = None  # folder for arrays too large for memory; None: the system's


@dataclass(frozen=True)
class _Read:
    images: list[UInt8[Tensor, "3 S S"]]
    indices: list[int]
    bad: list[BadSample]


class _Views(Dataset[_Read]):
    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray, transform: EvalTransform) -> None:
        self.source, self.indices, self.transform = source, indices, transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> _Read:
        index = int(self.indices[position])
        try:
            image = self.transform(self.source.load(index, min_side=self.transform.resize))
        except UnreadableImage as error:
            return _Read([], [], [BadSample(error.name, error.reason)])
        return _Read([image], [index], [])


def _join(parts: list[_Read]) -> _Read:
    return _Read(
        [i for p in parts for i in p.images], [i for p in parts for i in p.indices], [b for p in parts for b in p.bad]
    )


def stream(
    extractor: Extractor,
    source: Source,
    indices: Sequence[int] | np.ndarray,
    transform: EvalTransform,
    *,
    blocks: int,
    reading: Reading,
    what: str = "features",
) -> Iterator[Tokens]:
    """`Tokens` of one batch after the other, in the order of `indices`; `blocks` as in `extract`."""
    loader = DataLoader(
        _Views(source, indices, transform), reading.batch_size, num_workers=reading.workers, collate_fn=_join
    )
    device = getattr(extractor, "device", torch.device("cpu"))  # bytes travel there, a quarter of what floats would
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) * 255 for v in (extractor.mean, extractor.std))
    batches: Iterator[_Read] = iter(loader)
    if reading.console is not None and reading.console.is_terminal:
        batches = iter(track(loader, what, console=reading.console, transient=True))
    for batch in batches:
        if not batch.images:
            yield Tokens(
                torch.empty(0, blocks + 1, extractor.embed_dim), torch.empty(0, dtype=torch.int64), tuple(batch.bad)
            )
            continue
        features = extractor.last_blocks((torch.stack(batch.images).to(device).float() - mean) / std, blocks)
        rows = [f.cls for f in features] + [features[-1].patches.flatten(1, 2).mean(dim=1)]
        yield Tokens(torch.stack(rows, dim=1).float().cpu(), torch.tensor(batch.indices), tuple(batch.bad))


def extract(
    extractor: Extractor,
    source: Source,
    indices: Sequence[int] | np.ndarray,
    transform: EvalTransform,
    *,
    blocks: int,
    reading: Reading,
    what: str = "features",
) -> Tokens:
    """`Tokens` of the listed images: [CLS] of the last `blocks` blocks and the mean patch of the last.

    Raises ValueError if no image can be read.
    """
    values = _allocate((len(indices), blocks + 1, extractor.embed_dim), reading.scratch)
    found: list[Tensor] = []
    skipped: list[BadSample] = []
    count = 0
    for part in stream(extractor, source, indices, transform, blocks=blocks, reading=reading, what=what):
        values[count : count + len(part.values)] = part.values
        count += len(part.values)
        found.append(part.indices)
        skipped.extend(part.skipped)
    if count == 0:
        first = f"; the first: {skipped[0].name}: {skipped[0].reason}" if skipped else ""
        raise ValueError(f"none of the {len(indices)} images of {source.name} can be read{first}")
    return Tokens(values[:count], torch.cat(found), tuple(skipped))


def _allocate(shape: tuple[int, int, int], scratch: Path | None) -> Float[Tensor, "M n+1 D"]:
    """Memory, or beyond RAM_BYTES a mapped file without a name, which the system drops with the process."""
    size = shape[0] * shape[1] * shape[2]
    if 4 * size <= RAM_BYTES:
        return torch.empty(shape)
    with tempfile.NamedTemporaryFile(prefix=".features-", dir=scratch) as file:
        os.posix_fallocate(file.fileno(), 0, 4 * size)  # a full disk is an error now, not a crash later
        return torch.from_file(file.name, shared=True, size=size, dtype=torch.float32).view(shape)
