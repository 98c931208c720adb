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
from jaxtyping import Float, Int
from torch import Tensor

from quietvit import dist
from quietvit.contracts import BadSample, Extractor
from quietvit.data.sources import Source
from quietvit_eval.extract import Reading, Tokens, extract
from quietvit_eval.transform import EvalTransform

SHOWN = 12  # names of unreadable images that a card lists (ours)


@dataclass(frozen=True)
class Split:
    """The labelled images of one source that take part."""

    source: Source
    indices: np.ndarray  # int64 [M], ascending
    labels: np.ndarray  # int64 [M], numbered as the train split's classes


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
        """Features of "train" or "test", extracted at the first call. Always ask with the same extractor."""
        if split not in self._cache:
            part: Split = {"train": self.train, "test": self.test}[split]
            blocks = min(self.blocks, extractor.num_blocks)
            tokens = extract(
                extractor,
                part.source,
                part.indices,
                self.transform,
                blocks=blocks,
                reading=self.reading,
                what=f"features of {len(part.indices):,} {split} images",
            )
            rows = np.searchsorted(part.indices, tokens.indices.numpy())
            self._cache[split] = Labelled(tokens, torch.from_numpy(part.labels[rows]))
        return self._cache[split]

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
    train: Source, test: Source, *, label: str, limit_train: int | None, limit_test: int | None, seed: int
) -> tuple[Split, Split, list[str]]:
    """The labelled images of both sources, at most so many of each (drawn with `seed`), and the class names.

    Test classes are matched to train classes by name, since a folder that lacks a class numbers the others differently.
    Raises ValueError if a source lacks the label set or labelled images, or test has classes that train has not.
    """
    train_names = _class_names(train, label)
    numbers = {name: i for i, name in enumerate(train_names)}
    test_names = _class_names(test, label)
    test_labels = np.asarray(test.labels[label])
    present = [test_names[i] for i in np.unique(test_labels[test_labels >= 0])]
    if unknown := [name for name in present if name not in numbers]:
        raise ValueError(f"{len(unknown)} classes of {test.name} are not in {train.name}: {', '.join(unknown[:12])}")
    renumber = np.array([numbers.get(name, -1) for name in test_names] + [-1])  # the last row is where -1 points
    return (
        _split(train, np.asarray(train.labels[label]), limit_train, seed),
        _split(test, renumber[test_labels], limit_test, seed + 1),
        train_names,
    )


def _class_names(source: Source, label: str) -> list[str]:
    if label not in source.labels:
        there: Mapping[str, Any] = source.labels
        known = ", ".join(there) or "none"
        raise ValueError(f"{source.name} has no label set {label!r}; its label sets: {known}")
    names = source.classes.get(label)
    return list(names) if names else [str(i) for i in range(int(np.max(source.labels[label], initial=-1)) + 1)]


def _split(source: Source, labels: np.ndarray, limit: int | None, seed: int) -> Split:
    indices = np.flatnonzero(labels >= 0)
    if len(indices) == 0:
        raise ValueError(f"{source.name} has no labelled images")
    if limit is not None and limit < len(indices):
        if limit < 1:
            raise ValueError(f"a limit of {limit} images leaves nothing to score: use at least 1")
        order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed)).numpy()
        indices = np.sort(indices[order[:limit]])
    return Split(source, indices, labels[indices].astype(np.int64))
