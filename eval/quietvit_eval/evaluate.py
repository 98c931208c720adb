"""`evaluate`: a model, its controls, some tasks, one data set -> result cards."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from rich.console import Console

import quietvit
from quietvit.contracts import Extractor
from quietvit.data.sources import Source, open_source
from quietvit.train.environment import hardware
from quietvit.weights.extractor import BackboneExtractor, load, random_like
from quietvit_eval.accuracy import standard_error
from quietvit_eval.cards import Card, write_card
from quietvit_eval.classifier import head_of
from quietvit_eval.data import EvalData, choose_splits
from quietvit_eval.extract import Reading
from quietvit_eval.pixels import PixelExtractor
from quietvit_eval.report import print_cards
from quietvit_eval.task import find_task, make_options
from quietvit_eval.transform import choose_transform, eval_size


@dataclass(frozen=True)
class DataSpec:
    """Which images: a row of DATASETS, its path, and which splits are train and test."""

    kind: str = "auto"
    path: str | None = None
    train_split: str = "train"
    test_split: str = "val"
    options: Mapping[str, Any] = field(default_factory=dict)  # keywords of the source

    def open(self) -> tuple[Source, Source]:
        """Train and test source. Raises ValueError as `open_source`."""
        splits = (self.train_split, self.test_split)
        train, test = (open_source(self.kind, self.path, split=split, **self.options) for split in splits)
        return train, test


@runtime_checkable
class Identified(Protocol):
    """An extractor that can say which weights it holds; its "hash" stands on the card."""

    def identity(self) -> dict[str, Any]: ...


def evaluate(
    model: str | Path | Extractor,
    tasks: Sequence[str],
    data_spec: DataSpec | tuple[Source, Source],
    *,
    label: str = "class",
    random_init: bool = False,
    pixels: bool = False,
    image_size: int | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    device: str = "auto",
    bf16: bool = False,
    batch_size: int = 64,
    workers: int = 0,
    out_dir: str | Path | None = None,
    console: Console | None = None,
) -> list[Card]:
    """Score a frozen model by each of `tasks` (rows of TASKS), and with it the controls asked for.

    Args:
        model: what `quietvit.load` takes, or an extractor.
        data_spec: where the images are, or an open (train, test) pair of sources.
        label: label set of the sources.
        random_init: also score the same architecture with the weights it started from.
        pixels: also score raw pixels.
        image_size: side to score at; None: the training size, 224 at the most.
        limit_train, limit_test: use at most so many images, drawn with `seed`.
        options: settings per task, e.g. {"linear": {"select": "val"}}; see KnnOptions, LinearOptions.
        out_dir: cards are written there as they are made; None: nowhere.
        console: shows progress and the tables; None: silence.

    Raises ValueError for an unknown task, option or label set, or data or a model that a task cannot score; as
    `quietvit.load` for the model.
    """
    settings = _settings(tasks, options or {})
    extractor = load(model, device, bf16=bf16) if isinstance(model, str | Path) else model
    sources = data_spec.open() if isinstance(data_spec, DataSpec) else data_spec
    train, test, names = choose_splits(*sources, label, limit_train=limit_train, limit_test=limit_test, seed=seed)
    if heads := [name for name in settings if find_task(name).needs_head]:
        head_of(extractor, len(names))
        if pixels:
            raise ValueError(f"raw pixels have no head for task {heads[0]} to score: leave one of the two out")
    transform = choose_transform(train.source, eval_size(extractor, image_size))
    folder = None if out_dir is None else Path(out_dir)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    data = EvalData(
        train,
        test,
        label,
        names,
        transform,
        max(find_task(name).blocks for name in settings),
        Reading(batch_size, workers, console, folder),
        seed,
        _task_device(extractor),
    )
    cards = []
    for subject, candidate in _subjects(extractor, random_init, pixels, data.transform.image_size):
        identity = {"path": str(model)} if subject == "model" and isinstance(model, str | Path) else {}
        for card in _score(subject, candidate, identity_of(candidate) | identity, replace(data), settings):
            cards.append(card)
            if folder is not None:
                write_card(card, folder)
    if console is not None:
        print_cards(cards, console)
    return cards


def _task_device(extractor: Extractor) -> torch.device:
    """Where tasks compute: with the model on CUDA, else on the CPU (MPS lacks parts of what k-NN needs)."""
    device = getattr(extractor, "device", torch.device("cpu"))
    return device if device.type == "cuda" else torch.device("cpu")


def _settings(tasks: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    if not tasks:
        raise ValueError("no task to run")
    if idle := [name for name in options if name not in tasks]:
        raise ValueError(f"options for task {idle[0]!r}, which is not among those to run: {', '.join(tasks)}")
    return {name: make_options(name, options.get(name, {})) for name in tasks}


def _subjects(
    extractor: Extractor, random_init: bool, pixels: bool, image_size: int
) -> Iterator[tuple[str, Extractor]]:
    if random_init and not isinstance(extractor, BackboneExtractor):
        raise ValueError("the random-init control needs a model whose architecture quietvit can rebuild")
    yield "model", extractor
    if random_init and isinstance(extractor, BackboneExtractor):
        yield "random-init", random_like(extractor)
    if pixels:
        yield "pixels", PixelExtractor(extractor, image_size)


def identity_of(extractor: Extractor) -> dict[str, Any]:
    """What a card says about a model; a hash of None for extractors that cannot tell."""
    if isinstance(extractor, Identified):
        return extractor.identity()
    return {"hash": None, "class": type(extractor).__name__}


def _score(
    subject: str, extractor: Extractor, identity: dict[str, Any], data: EvalData, settings: Mapping[str, Any]
) -> Iterator[Card]:
    """One card per task. `data` is this extractor's own: it caches features."""
    for name, options in settings.items():
        began = time.monotonic()
        task = find_task(name)
        result = task.run(extractor, data, options)
        about = data.about(task.splits)
        yield Card(
            task=name,
            subject=subject,
            scores=result.scores,
            main=result.main,
            standard_error=standard_error(
                result.scores[result.main], about["test"]["images"] - about["test"]["unreadable"]
            ),
            model=identity,
            data=about,
            label=data.label,
            num_classes=data.num_classes,
            protocol={**result.protocol, "image_size": data.transform.image_size, "view": asdict(data.transform)},
            details=result.details,
            seed=data.seed,
            environment={
                "quietvit": quietvit.__version__,
                "torch": torch.__version__,
                "hardware": hardware(data.device),
            },
            seconds=round(time.monotonic() - began, 3),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
