"""The images that an inspection looks at, and the files it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import UInt8
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import quietvit
from quietvit.contracts import BadSample, Extractor
from quietvit.data.decode import UnreadableImage
from quietvit.data.sources import Source
from quietvit.files import write_text
from quietvit_eval.extract import identity_of
from quietvit_eval.pictures import Image, write_png
from quietvit_eval.transform import EvalTransform, choose_transform, eval_size

DIGITS = 6  # significant ones, of numbers in JSON (ours: what fp32 holds)
NAMED = 12  # unreadable images that a result names (ours, as on cards)


@dataclass(frozen=True)
class Looks:
    """How images are read: some of a source, through one view."""

    images: int = 8  # ours: a page that fits a screen
    image_size: int | None = None  # pixels; None: the model's, 224 at the most (`eval_size`)
    seed: int = 0  # of the images drawn
    batch_size: int = 32
    workers: int = 0  # processes that read images; 0: this one
    console: Console | None = None  # progress is shown on it if it is a terminal; None: silence


@dataclass(frozen=True)
class Seen:
    """Images of one batch that could be read, square, with their names."""

    pixels: UInt8[Tensor, "b 3 S S"]
    names: tuple[str, ...]
    bad: tuple[BadSample, ...]


@dataclass(frozen=True)
class Outcome:
    """What an inspection wrote, and what it says about it."""

    result: Path
    pictures: tuple[Path, ...]
    lines: tuple[str, ...]


class _Views(Dataset[Seen]):
    def __init__(self, source: Source, indices: np.ndarray, view: EvalTransform) -> None:
        self.source, self.indices, self.view = source, indices, view

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Seen:
        index = int(self.indices[position])
        try:
            pixels = self.source.load(index, min_side=self.view.resize)
        except UnreadableImage as error:
            none = torch.empty(0, 3, self.view.image_size, self.view.image_size, dtype=torch.uint8)
            return Seen(none, (), (BadSample(error.name, error.reason),))
        return Seen(self.view(pixels)[None], (self.source.item_name(index),), ())


class Sample:
    """Images of a source, drawn with a seed and in the order of the source, as a model is to see them.

    Raises ValueError for a source without images, and for a size that is no multiple of the model's stride.
    """

    def __init__(self, extractor: Extractor, source: Source, looks: Looks, images: int | None = None) -> None:
        if not len(source):
            raise ValueError(f"{source.name} has no images to look at")
        self.source, self.looks = source, looks
        count = min(images or looks.images, len(source))
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(looks.seed))
        self.indices: np.ndarray = order[:count].sort().values.numpy()
        self.view = choose_transform(source, eval_size(extractor, looks.image_size))
        self._bad: tuple[BadSample, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, what: str) -> Iterator[Seen]:
        """The images, `looks.batch_size` at a time. Raises ValueError, once all were tried, if none can be read."""
        loader = DataLoader(
            _Views(self.source, self.indices, self.view),
            batch_size=self.looks.batch_size,
            num_workers=self.looks.workers,
            collate_fn=_together,
        )
        console, read, bad = self.looks.console, 0, []
        shown = console is not None and console.is_terminal
        with Progress(console=console, transient=True, disable=not shown) as progress:
            bar = progress.add_task(what, total=len(self))
            for seen in loader:
                read += len(seen.names)
                bad += seen.bad
                if seen.names:
                    yield cast(Seen, seen)
                progress.update(bar, advance=len(seen.names) + len(seen.bad))
        if not read:
            raise ValueError(f"none of the {len(self)} images drawn from {self.source.name} can be read; the first: "
                             f"{bad[0].name}: {bad[0].reason}")  # fmt: skip
        self._bad = tuple(bad)

    def all(self, what: str) -> Seen:
        """All images at once; for few of them. Raises as `batches`."""
        return _together(list(self.batches(what)))

    def about(self) -> dict[str, Any]:
        """For the result; ask once the images were read."""
        return {
            "name": self.source.name,
            "fingerprint": self.source.fingerprint(),
            "images": len(self) - len(self._bad),
            "seed": self.looks.seed,
            "view": asdict(self.view),
            "unreadable": len(self._bad),
            "unreadable_names": [bad.name for bad in self._bad[:NAMED]],
        }


def _together(parts: Sequence[Seen]) -> Seen:
    return Seen(
        torch.cat([p.pixels for p in parts]),
        tuple(name for p in parts for name in p.names),
        tuple(bad for p in parts for bad in p.bad),
    )


def panels_of(pixels: UInt8[Tensor, "b 3 S S"]) -> list[Image]:
    """Images as pictures hold them."""
    return [np.ascontiguousarray(p.permute(1, 2, 0).numpy()) for p in pixels]


def write_outcome(
    out: Path,
    action: str,
    extractor: Extractor,
    facts: Mapping[str, Any],
    pictures: Mapping[str, Image],
    lines: Sequence[str],
) -> Outcome:
    """`<out>/<action>.json` and a PNG for each of `pictures`, which are named for the action too.

    The JSON comes last, so that one that is there stands beside its pictures. Raises OSError as the file system does.
    """
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, picture in pictures.items():
        paths.append(out / f"{name}.png")
        write_png(paths[-1], picture)
    about = {"action": action, "quietvit": quietvit.__version__, "model": identity_of(extractor)}
    tree = {**about, **facts, "pictures": [path.name for path in paths]}
    write_text(out / f"{action}.json", json.dumps(_rounded(tree), indent=2) + "\n")
    return Outcome(out / f"{action}.json", tuple(paths), tuple(lines))


def _rounded(value: Any) -> Any:
    """Plain data of JSON, numbers to DIGITS, none where they are not finite."""
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    if isinstance(value, Tensor | np.ndarray):
        return _rounded(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None
    return value
