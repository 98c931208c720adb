"""What a task is given: labelled train and test images, and their features once somebody asks for them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from quietvit import dist
from quietvit.contracts import BadSample, Extractor
from quietvit.data.sources import Source
from quietvit_eval.accuracy import Answers
from quietvit_eval.extract import Reading, Tokens, extract
from quietvit_eval.label_maps import file_hash, map_hash, read_class_map, read_real_labels
from quietvit_eval.transform import EvalTransform

SHOWN = 12  # names of unreadable images that a card lists (ours)


@dataclass(frozen=True)
class Split:
    """The labelled images of one source that take part."""

    source: Source
    indices: np.ndarray  # int64 [M], ascending
    labels: np.ndarray  # int64 [M], numbered as the train split's classes
    candidates: np.ndarray | None = None  # int64 [c], ascending: the only classes that may be answered; None: all
    accepted: np.ndarray | None = None  # int64 [M A], every right class, padded with -1 (ReaL); None: the label alone
    rules: dict[str, Any] = field(default_factory=dict)  # how its images are judged, for the protocol


@dataclass(frozen=True)
class Labelled:
    """Features with the labels of the rows that could be read."""

    tokens: Tokens
    labels: Int[Tensor, " M"]

    @property
    def cls(self) -> Float[Tensor, "M D"]:
        return self.tokens.cls


@dataclass(frozen=True)
class EvalData:
    """Train and test split of one label set, seen through one transform, for one extractor."""

    train: Split
    test: Split
    label: str
    class_names: list[str]
    transform: EvalTransform
    blocks: int  # the most that any task asks for: features are extracted once for all
    reading: Reading
    seed: int
    device: torch.device  # where tasks compute
    model_hash: str | None = None  # of the extractor; None: it cannot tell, and nothing is resumed
    folder: Path | None = None  # for the state of interrupted training; None: nowhere
    _cache: dict[str, Labelled] = field(default_factory=dict, init=False, repr=False)
    _skipped: dict[str, dict[str, BadSample]] = field(default_factory=dict, init=False, repr=False)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def fresh(self, model_hash: str | None) -> EvalData:
        """The same for another extractor."""
        return replace(self, model_hash=model_hash)

    def names(self, split: str) -> list[str]:
        """Of the images that `features` has rows for; ask once they are there."""
        part = {"train": self.train, "test": self.test}[split]
        return [part.source.item_name(int(i)) for i in self._cache[split].tokens.indices]

    def features(self, extractor: Extractor, split: str) -> Labelled:
        """Features of "train" or "test", extracted at the first call. Always ask with the same extractor.

        Splits share the memory that `reading` allows.
        """
        if split not in self._cache:
            held = sum(known.tokens.values.nbytes for known in self._cache.values() if not known.tokens.mapped)
            part: Split = {"train": self.train, "test": self.test}[split]
            blocks = min(self.blocks, extractor.num_blocks)
            tokens = extract(
                extractor,
                part.source,
                part.indices,
                self.transform,
                blocks=blocks,
                reading=replace(self.reading, memory=self.reading.memory - held),
                what=f"features of {len(part.indices):,} {split} images",
            )
            rows = np.searchsorted(part.indices, tokens.indices.numpy())
            self._cache[split] = Labelled(tokens, torch.from_numpy(part.labels[rows]))
        return self._cache[split]

    def answers(self, indices: Int[Tensor, " Q"]) -> Answers:
        """What is right for these test images, numbered as in their source."""
        rows = np.searchsorted(self.test.indices, indices.numpy())
        return Answers(
            torch.from_numpy(self.test.labels[rows]),
            self.num_classes,
            None if self.test.candidates is None else torch.from_numpy(self.test.candidates),
            None if self.test.accepted is None else torch.from_numpy(self.test.accepted[rows]),
        )

    def note_unreadable(self, split: str, bad: Sequence[BadSample]) -> None:
        """Images of "train" or "test" that a task met while it read them itself, without `features`."""
        self._skipped.setdefault(split, {}).update({b.name: b for b in bad})

    def state_file(self, task: str, facts: Mapping[str, Any]) -> Path | None:
        """Where what is trained by these facts is kept, meanwhile and afterwards; None if it cannot be."""
        if self.folder is None or self.model_hash is None:
            return None
        images = hashlib.sha256(self.train.indices.tobytes() + self.train.labels.tobytes()).hexdigest()
        parts = [self.model_hash, self.seed, self.train.source.fingerprint(), images, dict(facts)]
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
        return self.folder / "heads" / f"{task}-{key}.safetensors"

    def about(self, splits: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The named splits, for the card; ask once they were read."""
        return {
            name: {
                "name": part.source.name,
                "fingerprint": part.source.fingerprint(),
                "images": len(part.indices),
                **self._unreadable(name),
            }
            for name, part in (("train", self.train), ("test", self.test))
            if name in splits
        }

    def _unreadable(self, split: str) -> dict[str, Any]:
        """What could not be read: of the features' rows, or else what tasks noted, on all ranks."""
        if split in self._cache:
            names = [bad.name for bad in self._cache[split].tokens.skipped]
        else:
            names = sorted({name for noted in dist.gather_objects(self._skipped.get(split, {})) for name in noted})
        return {"unreadable": len(names), "unreadable_names": names[:SHOWN]}


def choose_splits(
    train: Source,
    test: Source,
    *,
    label: str,
    limit_train: int | None,
    limit_test: int | None,
    seed: int,
    class_map: str | Path | None = None,
    real_labels: Path | None = None,
) -> tuple[Split, Split, list[str]]:
    """The labelled images of both sources, at most so many of each (drawn with `seed`), and the class names.

    Test classes are matched to train classes by name, since a folder that lacks a class numbers the others differently,
    or as `class_map` says (`read_class_map`). Where the test set names fewer classes than train, they alone may be
    answered. With `real_labels` (`read_real_labels`) test images count by these, and those without any are left out.

    Raises ValueError if a source lacks the label set or labelled images, or test has classes that train has not; as
    `read_class_map` and `read_real_labels`.
    """
    train_names, test_names = _class_names(train, label), _class_names(test, label)
    test_labels = np.asarray(test.labels[label])
    present = [test_names[i] for i in np.unique(test_labels[test_labels >= 0])]
    rules: dict[str, Any] = {}
    if class_map is None:
        renumber = _match_by_name(train, test, train_names, test_names, present)
    else:
        renumber = read_class_map(class_map, test_names, present, train_names)
        rules["class_map"] = map_hash(renumber, test_names, train_names)
    named = class_map is not None or bool(test.classes.get(label))  # else even the number of classes is a guess
    candidates = np.unique(renumber[renumber >= 0]) if named else np.arange(len(train_names))
    alone = len(candidates) < len(train_names)
    rules["candidates"] = f"{len(candidates)} of {len(train_names)} classes, those of the test set" if alone else "all"
    labels = np.append(renumber, -1)[test_labels]  # the last is where -1 points
    accepted = None
    if real_labels is not None:
        labels, accepted, dropped = _real(test, labels, real_labels, len(train_names))
        rules["real_labels"] = {
            "file": file_hash(real_labels),
            "rule": "right if among ReaL's labels of the image; no mean per class, as an image may have several",
            "images_without": dropped,
        }
    return (
        _split(train, np.asarray(train.labels[label]), limit_train, seed),
        replace(
            _split(test, labels, limit_test, seed + 1, accepted), candidates=candidates if alone else None, rules=rules
        ),
        train_names,
    )


def _match_by_name(
    train: Source, test: Source, train_names: list[str], test_names: list[str], present: list[str]
) -> Int64[np.ndarray, " T"]:
    """The train class of each test class; -1 for one without images that train has not."""
    numbers = {name: i for i, name in enumerate(train_names)}
    if unknown := [name for name in present if name not in numbers]:
        hint = "; a class map can say which train classes they are"
        raise ValueError(
            f"{len(unknown)} classes of {test.name} are not in {train.name}: {', '.join(unknown[:12])}{hint}"
        )
    return np.array([numbers.get(name, -1) for name in test_names], np.int64)


def _real(
    test: Source, labels: np.ndarray, path: Path, num_classes: int
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, "n A"], int]:
    """Labels, -1 now for images without a label of ReaL; ReaL's, for all images of the source; how many had none."""
    rows = np.flatnonzero(labels >= 0)
    found = read_real_labels(path, [test.item_name(int(i)) for i in rows], num_classes)
    accepted = np.full((len(labels), found.shape[1]), -1, np.int64)
    accepted[rows] = found
    none = (found < 0).all(axis=1)
    if none.all():
        raise ValueError(f"ReaL has no label for any of the {len(rows)} images of {test.name}")
    labels = labels.copy()
    labels[rows[none]] = -1
    return labels, accepted, int(none.sum())


def _class_names(source: Source, label: str) -> list[str]:
    if label not in source.labels:
        there: Mapping[str, Any] = source.labels
        known = ", ".join(there) or "none"
        raise ValueError(f"{source.name} has no label set {label!r}; its label sets: {known}")
    names = source.classes.get(label)
    return list(names) if names else [str(i) for i in range(int(np.max(source.labels[label], initial=-1)) + 1)]


def _split(
    source: Source, labels: np.ndarray, limit: int | None, seed: int, accepted: np.ndarray | None = None
) -> Split:
    indices = np.flatnonzero(labels >= 0)
    if len(indices) == 0:
        raise ValueError(f"{source.name} has no labelled images")
    if limit is not None and limit < len(indices):
        if limit < 1:
            raise ValueError(f"a limit of {limit} images leaves nothing to score: use at least 1")
        order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed)).numpy()
        indices = np.sort(indices[order[:limit]])
    chosen = None if accepted is None else accepted[indices]
    return Split(source, indices, labels[indices].astype(np.int64), accepted=chosen)
