"""What a dense task is given: images with targets per pixel, in training batches and one after the other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from quietvit import dist
from quietvit.contracts import BadSample
from quietvit.data.decode import UnreadableImage
from quietvit.data.sampler import SampleOrder, replacement, sample_rng
from quietvit_eval.dense_data.pairs import PairSource, Target
from quietvit_eval.extract import Reading

SHOWN = 12  # names of unreadable pairs that a card lists (ours)
MAX_ATTEMPTS = 20  # replacements tried for one unreadable pair (ours)

Image = UInt8[np.ndarray, "H W 3"]
# Image, target and random numbers -> image and target of one fixed size, as training wants them.
Augment = Callable[[Image, Target, np.random.Generator], tuple[Image, Target]]
T = TypeVar("T")


@dataclass(frozen=True)
class PairBatch:
    """Pixels are bytes; targets int64 (classes, IGNORE) or float32 (metres, 0 unknown). Rows of this rank only."""

    images: UInt8[Tensor, "b 3 S S"]
    targets: Int[Tensor, "b S S"] | Float[Tensor, "b S S"]


@dataclass(frozen=True)
class Pair:
    """One image at its own size. `row`: its place among the images of the split."""

    row: int
    name: str
    image: Image
    target: Target


@dataclass(frozen=True)
class PairSplit:
    """The pairs of a source that take part."""

    source: PairSource
    indices: np.ndarray  # int64 [M], ascending

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class PairData:
    """Train and test pairs, for one extractor."""

    train: PairSplit
    test: PairSplit
    image_size: int | None  # asked for by the user; None: the task's own rule
    reading: Reading
    seed: int
    device: torch.device  # where heads are trained
    model_hash: str | None  # None: the extractor cannot tell; nothing is resumed then
    folder: Path | None  # for pictures and the state of interrupted work; None: nowhere
    _skipped: dict[str, list[BadSample]] = field(default_factory=dict, init=False, repr=False)

    @property
    def label(self) -> str:
        return self.train.source.kind

    @property
    def num_classes(self) -> int:
        return len(self.train.source.class_names)

    def batches(self, augment: Augment, *, batch_size: int, first: int, steps: int) -> Iterator[PairBatch]:
        """The training batches of steps `first` .. `steps` - 1, which depend on the seed and the step alone.

        An unreadable pair is replaced by another one. Raises ValueError if ranks cannot share a batch evenly, or if
        next to no pair can be read.
        """
        world = dist.world_size()
        if batch_size % world:
            raise ValueError(f"a batch of {batch_size} pairs cannot be shared evenly by {world} processes")
        order = SampleOrder(len(self.train), self.seed)
        rows = range(dist.rank(), batch_size, world)
        keys = [[order.sample_at(step * batch_size + row) for row in rows] for step in range(first, steps)]
        loader = DataLoader(
            _Augmented(self.train, augment, self.seed),
            batch_sampler=keys,
            num_workers=self.reading.workers,
            collate_fn=_join,
        )
        for batch, bad in loader:
            known = self._skipped.setdefault("train", [])
            known.extend(b for b in bad if b not in known)
            yield batch

    def pairs(self, split: str, what: str) -> Iterator[Pair]:
        """This rank's share of the readable pairs of "train" or "test", each whole, with a progress bar."""
        part: PairSplit = {"train": self.train, "test": self.test}[split]
        rows = list(range(dist.rank(), len(part), dist.world_size()))
        loader = DataLoader(_Whole(part), batch_size=None, sampler=rows, num_workers=self.reading.workers)
        items: Iterator[Pair | BadSample] = iter(loader)
        if self.reading.console is not None and self.reading.console.is_terminal:
            items = iter(track(loader, what, total=len(rows), console=self.reading.console, transient=True))
        known = self._skipped.setdefault(split, [])
        for item in items:
            if isinstance(item, Pair):
                yield item
            elif item not in known:
                known.append(item)

    def merged(self, found: Mapping[int, T], split: str = "test") -> dict[int, T]:
        """What all ranks found for their rows of a split, in order. Raises ValueError if there is nothing."""
        whole = {row: value for part in dist.gather_objects(dict(found)) for row, value in part.items()}
        if not whole:
            bad = self._skipped.get(split, [])
            first = f"; the first: {bad[0].name}: {bad[0].reason}" if bad else ""
            part = {"train": self.train, "test": self.test}[split]
            raise ValueError(f"none of the {len(part)} pairs of {part.source.name} can be read{first}")
        return dict(sorted(whole.items()))

    def state_file(self, task: str, facts: Mapping[str, Any]) -> Path | None:
        """Where a head for these facts is kept while it is trained and afterwards; None if it cannot be."""
        if self.folder is None or self.model_hash is None:
            return None
        parts = [self.model_hash, self.seed, self.train.source.fingerprint(), self.train.indices.tolist(), dict(facts)]
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
        return self.folder / "heads" / f"{task}-{key}.safetensors"

    def about(self, splits: Sequence[str] = ("train", "test")) -> dict[str, dict[str, Any]]:
        """These splits, for the card; ask once the task is done."""
        out = {}
        for name in splits:
            part: PairSplit = {"train": self.train, "test": self.test}[name]
            skipped = {b.name for some in dist.gather_objects(self._skipped.get(name, [])) for b in some}
            out[name] = {
                "name": part.source.name,
                "fingerprint": part.source.fingerprint(),
                "images": len(part),
                "unreadable": len(skipped),
                "unreadable_names": sorted(skipped)[:SHOWN],
            }
        return out

    def fresh(self, model_hash: str | None) -> PairData:
        """The same for another extractor."""
        return replace(self, model_hash=model_hash)


def choose_pairs(source: PairSource, limit: int | None, seed: int) -> PairSplit:
    """At most `limit` pairs, drawn with `seed`. Raises ValueError for an empty source or a limit below 1."""
    if len(source) == 0:
        raise ValueError(f"{source.name} holds no pairs")
    if limit is None or limit >= len(source):
        return PairSplit(source, np.arange(len(source)))
    if limit < 1:
        raise ValueError(f"a limit of {limit} images leaves nothing to score: use at least 1")
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).numpy()
    return PairSplit(source, np.sort(order[:limit]))


class _Augmented(Dataset[tuple[Image, Target, list[BadSample]]]):
    def __init__(self, part: PairSplit, augment: Augment, seed: int) -> None:
        self.part, self.augment, self.seed = part, augment, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Image, Target, list[BadSample]]:
        row, pass_ = key
        bad: list[BadSample] = []
        candidate = row
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                image, target = self.part.source.load(int(self.part.indices[candidate]))
            except UnreadableImage as error:
                bad.append(BadSample(error.name, error.reason))
                candidate = replacement(len(self.part), self.seed, row, pass_, attempt)
                continue
            return *self.augment(image, target, sample_rng(self.seed, row, pass_)), bad
        raise ValueError(
            f"{MAX_ATTEMPTS} pairs in a row of {self.part.source.name} cannot be read; the last: "
            f"{bad[-1].name}: {bad[-1].reason}"
        )


class _Whole(Dataset[Pair | BadSample]):
    def __init__(self, part: PairSplit) -> None:
        self.part = part

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, row: int) -> Pair | BadSample:
        index = int(self.part.indices[row])
        try:
            image, target = self.part.source.load(index)
        except UnreadableImage as error:
            return BadSample(error.name, error.reason)
        return Pair(row, self.part.source.item_name(index), image, target)


def _join(items: list[tuple[Image, Target, list[BadSample]]]) -> tuple[PairBatch, list[BadSample]]:
    images = torch.from_numpy(np.stack([i for i, _, _ in items])).permute(0, 3, 1, 2).contiguous()
    targets = torch.from_numpy(np.stack([t for _, t, _ in items]))
    if not targets.is_floating_point():
        targets = targets.long()
    return PairBatch(images, targets), [b for _, _, bad in items for b in bad]
