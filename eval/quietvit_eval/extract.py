"""Features of a data set: images through a frozen model, in batches, into one array of bounded memory.

Arrays live in memory, or in an entry of a feature store that is mapped. The processes of a group share such an entry,
so all of them must run on one machine; each fills its own slice of the images.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import quietvit
from quietvit import dist
from quietvit.contracts import BadSample, Extractor
from quietvit.data.decode import UnreadableImage
from quietvit.data.sources import Source
from quietvit_eval.feature_store import MISSING, THERE, FeatureStore, Filling, Place, key_of
from quietvit_eval.transform import EvalTransform

GIB = 1024**3
MEMORY = 4 * GIB  # ours: ImageNet's test split of a ViT-L with 4 blocks takes 1 GB
RETRIED = 64  # images found unreadable by an earlier command that are tried again (ours)
FORMAT = "quietvit-features-1"  # one number more when features of the same facts change

T = TypeVar("T")


@runtime_checkable
class Identified(Protocol):
    """An extractor that can say which weights it holds; its "hash" stands on the card."""

    def identity(self) -> dict[str, Any]: ...


def identity_of(extractor: Extractor) -> dict[str, Any]:
    """What a card says about a model; a hash of None for extractors that cannot tell."""
    if isinstance(extractor, Identified):
        return extractor.identity()
    return {"hash": None, "class": type(extractor).__name__}


@dataclass(frozen=True)
class Tokens:
    """What a frozen model says about M images, fp32 on the CPU. Rows of unreadable images are left out.

    Values may be mapped from a file that cannot be written: never change them in place.
    """

    values: Float[Tensor, "M n+1 D"]  # [CLS] of the last n blocks, earliest first; then the mean patch of the last
    indices: Int[Tensor, " M"]  # which images of the source, in the order asked for
    skipped: tuple[BadSample, ...]
    mapped: bool = False  # from a file: it takes no memory that the system could not have back

    @property
    def cls(self) -> Float[Tensor, "M D"]:
        """[CLS] of the last block, after the final norm."""
        return self.values[:, -2]


@dataclass(frozen=True)
class Reading:
    """How images are read and where their features are kept; none of this changes a score."""

    batch_size: int = 64  # ours: fills a GPU at 224 pixels, and fits a small one
    workers: int = 0  # 0: in this process
    console: Console | None = None  # progress is shown on it if it is a terminal; None: silence
    scratch: Path | None = None  # folder for features that are neither kept nor fit the memory; None: the system's
    memory: int = MEMORY  # bytes of features held in memory
    store: FeatureStore | None = None  # where features are kept for the next command; None: nowhere


@dataclass(frozen=True)
class _Read:
    images: list[UInt8[Tensor, "3 S S"]]
    positions: list[int]  # among the images asked for
    bad: dict[int, BadSample]  # by position


class _Views(Dataset[_Read]):
    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray, transform: EvalTransform) -> None:
        self.source, self.indices, self.transform = source, indices, transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> _Read:
        try:
            pixels = self.source.load(int(self.indices[position]), min_side=self.transform.resize)
        except UnreadableImage as error:
            return _Read([], [], {position: BadSample(error.name, error.reason)})
        return _Read([self.transform(pixels)], [position], {})


def _join(parts: list[_Read]) -> _Read:
    images, positions = [i for p in parts for i in p.images], [i for p in parts for i in p.positions]
    return _Read(images, positions, {k: v for p in parts for k, v in p.bad.items()})


Parts = Generator[tuple[_Read, Float[Tensor, "m n+1 D"]], None, None]


@dataclass(frozen=True)
class _Request:
    """Which features of which images."""

    extractor: Extractor
    source: Source
    indices: np.ndarray  # int64 [M]
    transform: EvalTransform
    blocks: int
    reading: Reading
    what: str

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.indices), self.blocks + 1, self.extractor.embed_dim

    @property
    def bytes(self) -> int:
        return 4 * self.shape[0] * self.shape[1] * self.shape[2]

    def batches(self) -> list[range]:
        """Positions of all images. Every process and every attempt makes the same batches, hence the same bits."""
        size, count = self.reading.batch_size, len(self.indices)
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def run(self, batches: Sequence[range], done: int = 0) -> Parts:
        """What was read for each batch, and its features. `done`: images not to be shown as work to do."""
        loader = DataLoader(
            _Views(self.source, self.indices, self.transform),
            batch_sampler=cast(Any, batches),  # a range of positions does as well as a list
            num_workers=self.reading.workers,
            collate_fn=_join,
        )
        extractor = self.extractor
        device = getattr(extractor, "device", torch.device("cpu"))  # bytes travel there, a quarter of what floats would
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) * 255 for v in (extractor.mean, extractor.std))
        with _progress(self.reading.console) as progress:
            bar = progress.add_task(self.what, total=done + sum(len(b) for b in batches), completed=done)
            for part in loader:
                rows = torch.empty(0, *self.shape[1:])
                if part.images:
                    images = (torch.stack(part.images).to(device).float() - mean) / std
                    features = extractor.last_blocks(images, self.blocks)
                    tokens = [f.cls for f in features] + [features[-1].patches.flatten(1, 2).mean(dim=1)]
                    rows = torch.stack(tokens, dim=1).float().cpu()
                yield part, rows
                progress.update(bar, advance=len(part.positions) + len(part.bad))


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} images/s")


def _progress(console: Console | None) -> Progress:
    shown = console is not None and console.is_terminal and dist.rank() == 0
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,}/{task.total:,}"))
    return Progress(*columns, _Speed(), TimeRemainingColumn(), console=console, transient=True, disable=not shown)


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
    request = _Request(extractor, source, np.asarray(indices), transform, blocks, reading, what)
    for part, rows in request.run(request.batches()):
        yield Tokens(rows, torch.from_numpy(request.indices[part.positions]), tuple(part.bad.values()))


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

    With a store, and an extractor whose identity has a hash, features are kept there: they are taken from it if they
    are complete, for as many blocks or more, and otherwise extracted, going on where an earlier attempt was cut off.
    Images that an earlier attempt could not read are tried again. Without, they are held in memory or, beyond
    reading.memory and in a process group, in a file that is removed. All processes of a group get all rows.

    Raises ValueError if no image can be read; OSError at once if the disk has no room for the features.
    """
    request = _Request(extractor, source, np.asarray(indices, dtype=np.int64), transform, blocks, reading, what)
    if len(request.indices) == 0:
        raise ValueError(f"no image of {source.name} was asked for")
    alone = dist.world_size() == 1
    key = None if reading.store is None else _key(request)
    if reading.store is not None and key is not None:
        store, about = reading.store, _about(request)
        place = _told(lambda: _kept_place(request, store, key, about))
        if place is not None:
            return _in_store(request, store, place, about, keep=True)
    if alone and request.bytes <= reading.memory:
        return _in_memory(request)
    count, _, width = request.shape
    other = FeatureStore(reading.scratch or Path(tempfile.gettempdir()), 0)
    place = _told(lambda: other.temporary(images=count, blocks=blocks, width=width))
    return _in_store(request, other, place, {}, keep=False)


def _in_memory(request: _Request) -> Tokens:
    values = torch.empty(request.shape)
    found: list[int] = []
    bad: list[BadSample] = []
    with closing(request.run(request.batches())) as parts:
        for part, rows in parts:
            values[len(found) : len(found) + len(rows)] = rows
            found += part.positions
            bad += part.bad.values()
    if not found:
        raise _nothing(request, bad)
    return Tokens(values[: len(found)], torch.from_numpy(request.indices[found]), tuple(bad))


def _in_store(request: _Request, store: FeatureStore, place: Place, about: Mapping[str, Any], *, keep: bool) -> Tokens:
    """Of an entry that rank 0 holds: filled if need be, mapped by all."""
    try:
        if not place.complete():
            _fill(request, place)
            _told(lambda: _finish(request, store, place, about))
        readable = np.flatnonzero(place.state() == THERE)
        values, skipped = place.mapped(request.blocks), tuple(place.unreadable().values())
        dist.gather_objects(None)  # all have it mapped
    except BaseException:
        store.release(place)
        raise
    if dist.rank() == 0:
        if keep:
            store.share(place)
        else:
            store.discard(place)
    return Tokens(values, torch.from_numpy(request.indices[readable]), skipped, mapped=True)


def _kept_place(request: _Request, store: FeatureStore, key: str, about: Mapping[str, Any]) -> Place | None:
    count, _, width = request.shape

    def stale(unreadable: Iterable[int]) -> bool:
        """Whether an image can be read that could not be once."""
        views = _Views(request.source, request.indices, request.transform)
        return any(views[position].images for position in list(unreadable)[:RETRIED])

    found = store.find(key, images=count, blocks=request.blocks, width=width, stale=stale)
    return found or store.claim(key, images=count, blocks=request.blocks, width=width, about=about)


def _fill(request: _Request, place: Place) -> None:
    """This process's slice of what is missing. Returns once all processes are done."""
    state = np.asarray(place.state())
    missing = [batch for batch in request.batches() if (state[batch.start : batch.stop] == MISSING).any()]
    done = int((state != MISSING).sum())
    dist.gather_objects(None)  # all have seen the same state
    rank, world = dist.rank(), dist.world_size()
    own = missing[len(missing) * rank // world : len(missing) * (rank + 1) // world]
    if own:
        with closing(Filling(place, rank)) as filling, closing(request.run(own, done if world == 1 else 0)) as parts:
            for part, rows in parts:
                filling.write(part.positions, rows.numpy(), part.bad)
    dist.gather_objects(None)


def _finish(request: _Request, store: FeatureStore, place: Place, about: Mapping[str, Any]) -> None:
    if not (place.state() == THERE).any():
        bad = list(place.unreadable().values())
        store.discard(place)
        raise _nothing(request, bad)
    place.finish(about)


def _nothing(request: _Request, bad: Sequence[BadSample]) -> ValueError:
    first = f"; the first: {bad[0].name}: {bad[0].reason}" if bad else ""
    return ValueError(f"none of the {len(request.indices)} images of {request.source.name} can be read{first}")


def _told(make: Callable[[], T]) -> T:
    """What rank 0 makes, or its error, on all ranks."""
    if dist.world_size() == 1:
        return make()
    outcome: T | Exception | None = None
    if dist.rank() == 0:
        try:
            outcome = make()
        except Exception as error:
            outcome = error
    outcome = dist.gather_objects(outcome)[0]
    if isinstance(outcome, Exception):
        raise outcome
    return cast(T, outcome)


def _key(request: _Request) -> str | None:
    """Of everything that decides the features but the number of blocks; None if the model cannot tell its weights.

    The kind of device is part of it, since the last bits differ; provenance and path are not.
    """
    extractor, identity = request.extractor, identity_of(request.extractor)
    if identity.get("hash") is None:
        return None
    view = asdict(request.transform)
    view.pop("rule")
    return key_of(
        {
            "format": FORMAT,
            "quietvit": quietvit.__version__,
            "class": type(extractor).__name__,
            "model": {k: v for k, v in identity.items() if k not in ("provenance", "path")},
            "shape": [extractor.num_blocks, extractor.embed_dim],
            "normalisation": [list(extractor.mean), list(extractor.std)],
            "device": getattr(extractor, "device", torch.device("cpu")).type,
            "data": request.source.fingerprint(),
            "indices": hashlib.sha256(request.indices.tobytes()).hexdigest(),
            "view": view,
        }
    )


def _about(request: _Request) -> dict[str, Any]:
    return {
        "what": request.what,
        "layout": "values.f32: fp32 [image, block or mean patch, channel]; images of which state.u8 is 1, in order",
        "model": identity_of(request.extractor),
        "data": request.source.name,
        "fingerprint": request.source.fingerprint(),
        "view": asdict(request.transform),
        "shape": list(request.shape),
        "bytes": request.bytes,
        "quietvit": quietvit.__version__,
    }
