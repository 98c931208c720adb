"""`evaluate`: a model, its controls, some tasks, one data set -> result cards."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import quietvit
from quietvit import dist
from quietvit.contracts import Extractor
from quietvit.data.index_cache import cache_folder
from quietvit.data.sources import Source, open_source
from quietvit.train.environment import hardware
from quietvit.weights.extractor import BackboneExtractor, load, random_like
from quietvit_eval.cards import Card, write_card
from quietvit_eval.data import EvalData, choose_splits
from quietvit_eval.dense_data.pairs import PairSource, open_pairs
from quietvit_eval.discovery.features import PatchColours
from quietvit_eval.extract import GIB, Reading, identity_of
from quietvit_eval.feature_store import FeatureStore, open_store
from quietvit_eval.pair_data import PairData, choose_pairs
from quietvit_eval.pixels import PixelExtractor
from quietvit_eval.report import print_cards
from quietvit_eval.resampling import standard_error
from quietvit_eval.result import Result
from quietvit_eval.task import LABEL_TASKS, find_task, make_options
from quietvit_eval.transform import choose_transform, eval_size

LABELS = "labels"  # the target of tasks on labelled images


@dataclass(frozen=True)
class DataSpec:
    """Which images: a row of DATASETS (or of PAIR_SETS, for targets per pixel), its path, and the two splits."""

    kind: str = "auto"
    path: str | None = None
    train_split: str = "train"
    test_split: str = "val"
    options: Mapping[str, Any] = field(default_factory=dict)  # keywords of the source

    def open(self, target: str = LABELS) -> tuple[Any, Any]:
        """Train and test: Sources for labels, else PairSources. Raises ValueError as `open_source`, `open_pairs`."""
        if target == LABELS:
            return self._both(lambda split: open_source(self.kind, self.path, split=split, **self.options))
        return self._both(lambda split: open_pairs(target, self.kind, self.path, split=split, **self.options))

    def _both(self, opened: Callable[[str], Any]) -> tuple[Any, Any]:
        return opened(self.train_split), opened(self.test_split)


def evaluate(
    model: str | Path | Extractor,
    tasks: Sequence[str],
    data_spec: DataSpec | tuple[Source, Source] | tuple[PairSource, PairSource],
    *,
    label: str = "class",
    class_map: str | Path | None = None,
    real_labels: str | Path | None = None,
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
    memory_gb: float = 4.0,
    feature_cache: str | Path | None = None,
    feature_cache_gb: float = 50.0,
    out_dir: str | Path | None = None,
    console: Console | None = None,
) -> list[Card]:
    """Score a frozen model by each of `tasks` (rows of TASKS), and with it the controls asked for.

    Tasks of one call have one kind of target: labels of images, classes or metres of pixels, or boxes. In a process
    group each rank takes a share of the images, all return the same cards and rank 0 writes them; its processes must
    run on one machine, since they share files of features.

    Args:
        model: what `quietvit.load` takes, or an extractor.
        data_spec: where the images are, or an open (train, test) pair of sources.
        label: label set of the sources, for tasks on labels.
        class_map: which train class each test class is, for test sets with other class names: a file, or "index" for
            folders named by train indices as ImageNet-V2's (`quietvit_eval.label_maps`); None: the one of that name.
        real_labels: ReaL's real.json, to judge ImageNet's validation images by; None: by their folders.
        random_init: also score the same architecture with the weights it started from.
        pixels: also score raw pixels (knn, linear; discovery: colours of patches).
        image_size: side to score at (discovery: the longer one, at the most); None: the task's rule. For labels, the
            training size, 224 at the most.
        limit_train, limit_test: use at most so many images, drawn with `seed`.
        options: settings per task, e.g. {"linear": {"select": "val"}}; see KnnOptions and its like.
        batch_size: images that the model sees at a time, for tasks on labels.
        workers: processes that read images; 0: this one.
        memory_gb: GiB of features of labelled images that are held in memory; more lie in a file. Default: ours.
        feature_cache: folder where features of labelled images are kept for other tasks and commands; None:
            `features` in the user's cache folder (`quietvit.data.index_cache`). Features of extractors that have no
            hash are never kept.
        feature_cache_gb: GiB that this folder may hold; those used longest ago are removed. 0: nothing is kept.
            Default: ours; ImageNet seen by a ViT-L with 4 blocks takes 25.
        out_dir: cards are written there as they are made, and what is needed to resume; None: nowhere.
        console: shows progress and the tables; None: silence.

    Raises ValueError for an unknown task, option or label set, or data or a model that a task cannot score; as
    `quietvit.load` for the model. OSError if the disk has no room for the features.
    """
    settings = _settings(tasks, options or {})
    target = _target_of(settings, labels_only=class_map is not None or real_labels is not None, pixels=pixels)
    extractor = load(model, device, bf16=bf16) if isinstance(model, str | Path) else model
    sources = data_spec.open(target) if isinstance(data_spec, DataSpec) else data_spec
    store = _store(feature_cache, feature_cache_gb) if target == LABELS else None
    reading = Reading(batch_size, workers, console, _folder(out_dir), _bytes(memory_gb, "memory_gb"), store)
    limits = (limit_train, limit_test)
    data: EvalData | PairData
    if target == LABELS:
        maps = (class_map, None if real_labels is None else Path(real_labels))
        data = _label_data(sources, extractor, settings, reading, label, image_size, limits, seed, maps)
    else:
        data = _pair_data(sources, extractor, reading, image_size, limits, seed)
    for name, chosen in settings.items():
        find_task(name).check(extractor, data.num_classes, chosen)
    subjects = _subjects(extractor, random_init, data if pixels else None)
    return _all_cards(subjects, str(model) if isinstance(model, str | Path) else None, data, settings)


PIXEL_CONTROLS = {"knn", "linear", "discovery"}


def _label_data(
    sources: tuple[Any, Any],
    extractor: Extractor,
    settings: Mapping[str, Any],
    reading: Reading,
    label: str,
    image_size: int | None,
    limits: tuple[int | None, int | None],
    seed: int,
    maps: tuple[str | Path | None, Path | None],
) -> EvalData:
    _expect(sources, Source)
    train, test, names = choose_splits(
        *sources,
        label=label,
        limit_train=limits[0],
        limit_test=limits[1],
        seed=seed,
        class_map=maps[0],
        real_labels=maps[1],
    )
    transform = choose_transform(train.source, eval_size(extractor, image_size))
    blocks = max(LABEL_TASKS[name].blocks for name in settings)
    return EvalData(
        train, test, label, names, transform, blocks, reading, seed, _task_device(extractor), folder=reading.scratch
    )


def _pair_data(
    sources: tuple[Any, Any],
    extractor: Extractor,
    reading: Reading,
    image_size: int | None,
    limits: tuple[int | None, int | None],
    seed: int,
) -> PairData:
    _expect(sources, PairSource)
    train, test = (choose_pairs(s, limit, seed + i) for i, (s, limit) in enumerate(zip(sources, limits, strict=True)))
    return PairData(train, test, image_size, reading, seed, _task_device(extractor), None, reading.scratch)


def _all_cards(
    subjects: Iterator[tuple[str, Extractor]],
    path: str | None,
    data: EvalData | PairData,
    settings: Mapping[str, Any],
) -> list[Card]:
    """Cards of all subjects, written and printed by the first rank. `path`: of the model, if it came from one."""
    cards, folder, console = [], data.reading.scratch, data.reading.console
    for subject, candidate in subjects:
        identity = identity_of(candidate)
        if subject == "model" and path is not None:
            identity |= {"path": path}
        for card, result in _score(subject, candidate, identity, data.fresh(identity["hash"]), settings):
            cards.append(card)
            if folder is not None and dist.rank() == 0:
                write_card(card, folder, result.per_image)
    if console is not None and dist.rank() == 0:
        print_cards(cards, console)
    return cards


def _folder(path: str | Path | None) -> Path | None:
    if path is None:
        return None
    Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def _bytes(gib: float, name: str) -> int:
    if not 0 <= gib < math.inf:
        raise ValueError(f"{name} is a number of GiB from 0 on, not {gib}")
    return int(gib * GIB)


def _store(folder: str | Path | None, gib: float) -> FeatureStore | None:
    size = _bytes(gib, "feature_cache_gb")
    if size == 0:
        return None
    where = cache_folder() / "features" if folder is None else Path(folder).expanduser()
    return open_store(where, size, asked_for=folder is not None)


def _target_of(settings: Mapping[str, Any], *, labels_only: bool, pixels: bool) -> str:
    """What all tasks predict. Raises ValueError if it is not the same, or cannot go with what else was asked for."""
    targets = {find_task(name).target: name for name in settings}
    if len(targets) > 1:
        said = " and ".join(f"{name} needs {target}" for target, name in targets.items())
        raise ValueError(f"one command scores tasks of one kind, but {said}: run them one after the other")
    target = next(iter(targets))
    if labels_only and target != LABELS:
        raise ValueError("class maps and ReaL's labels are for tasks on labelled images")
    if pixels and not set(settings) <= PIXEL_CONTROLS:
        raise ValueError(f"raw pixels are a control of {', '.join(sorted(PIXEL_CONTROLS))} only")
    return target


def _expect(sources: tuple[Any, Any], kind: Any) -> None:
    for source in sources:
        if not isinstance(source, kind):
            raise ValueError(f"{getattr(source, 'name', source)!r} is no {kind.__name__}: it cannot serve these tasks")


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
    extractor: Extractor, random_init: bool, pixels: EvalData | PairData | None
) -> Iterator[tuple[str, Extractor]]:
    if random_init and not isinstance(extractor, BackboneExtractor):
        raise ValueError("the random-init control needs a model whose architecture quietvit can rebuild")
    yield "model", extractor
    if random_init and isinstance(extractor, BackboneExtractor):
        yield "random-init", random_like(extractor)
    if isinstance(pixels, EvalData):
        yield "pixels", PixelExtractor(extractor, pixels.transform.image_size)
    elif pixels is not None:
        yield "pixels", PatchColours(extractor)


def _score(
    subject: str,
    extractor: Extractor,
    identity: dict[str, Any],
    data: EvalData | PairData,
    settings: Mapping[str, Any],
) -> Iterator[tuple[Card, Result]]:
    """One card per task. `data` is this extractor's own: it caches features."""
    for name, options in settings.items():
        began = time.monotonic()
        task = find_task(name)
        if subject != "model":
            task.check(extractor, data.num_classes, options)
        result = task.run(extractor, data, options)
        if isinstance(data, EvalData):
            about = data.about(LABEL_TASKS[name].splits)
            view = {"image_size": data.transform.image_size, "view": asdict(data.transform), **data.test.rules}
        else:
            about, view = data.about(result.splits), {}
        card = Card(
            task=name,
            subject=subject,
            scores=result.scores,
            main=result.main,
            higher_is_better=result.higher_is_better,
            standard_error=standard_error(result.per_image, result.main),
            model=identity,
            data=about,
            label=data.label,
            num_classes=data.num_classes,
            protocol={**result.protocol, **view},
            details=result.details,
            seed=data.seed,
            environment={
                "quietvit": quietvit.__version__,
                "torch": torch.__version__,
                "hardware": hardware(data.device),
                "processes": dist.world_size(),
            },
            seconds=round(time.monotonic() - began, 3),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        yield card, result
