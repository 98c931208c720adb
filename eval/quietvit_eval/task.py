"""The TASKS table. A new task is a file with a class like these, plus one line here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Protocol

from quietvit.contracts import Extractor
from quietvit_eval.classifier import ClassifierTask
from quietvit_eval.depth.task import DepthTask
from quietvit_eval.discovery.task import DiscoveryTask
from quietvit_eval.finetune import FinetuneTask
from quietvit_eval.knn import KnnTask
from quietvit_eval.linear import LinearTask
from quietvit_eval.logistic import LogisticTask
from quietvit_eval.result import Result
from quietvit_eval.segmentation.linear import SegmentationTask
from quietvit_eval.segmentation.patches import SegmentationPatchesTask


class Task(Protocol):
    """Scores a frozen model. It never knows whose model the extractor is.

    Tasks whose target is "labels" are LabelTasks and get an EvalData; the others get a PairData.
    """

    @property
    def target(self) -> str:
        """What it predicts: "labels" of images, for every pixel "classes" or "metres", or "boxes" of objects."""
        ...

    @property
    def options(self) -> type[Any]:
        """A frozen dataclass: its settings, each with a default. Raises ValueError for values that cannot be."""
        ...

    def check(self, extractor: Extractor, num_classes: int, options: Any) -> None:
        """Raises ValueError, before any work is done, if the extractor cannot be scored by this task."""
        ...

    def run(self, extractor: Extractor, data: Any, options: Any) -> Result:
        """Train on data.train if need be, score on data.test. Raises ValueError for data that cannot be scored."""
        ...


class LabelTask(Task, Protocol):
    """A task on labelled images."""

    @property
    def blocks(self) -> int:
        """Of how many last blocks it wants features."""
        ...

    @property
    def splits(self) -> tuple[str, ...]:
        """Which of "train" and "test" it reads; its card tells about those."""
        ...


LABEL_TASKS: Mapping[str, LabelTask] = {
    "knn": KnnTask(),
    "linear": LinearTask(),
    "logistic": LogisticTask(),
    "finetune": FinetuneTask(),
    "classifier": ClassifierTask(),
}
PIXEL_TASKS: Mapping[str, Task] = {
    "segmentation": SegmentationTask(),
    "segmentation-patches": SegmentationPatchesTask(),
    "depth": DepthTask(),
}
BOX_TASKS: Mapping[str, Task] = {"discovery": DiscoveryTask()}
TASKS: Mapping[str, Task] = {**LABEL_TASKS, **PIXEL_TASKS, **BOX_TASKS}


def make_options(name: str, given: Mapping[str, Any]) -> Any:
    """The options of task `name`, with those given. Raises ValueError for a task or an option that is not there."""
    task = find_task(name)
    known = [f.name for f in fields(task.options)]
    if unknown := [key for key in given if key not in known]:
        raise ValueError(f"task {name} has no option {unknown[0]!r}; {_nearest(unknown[0], known)}")
    return task.options(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def find_task(name: str) -> Task:
    """A row of TASKS. Raises ValueError naming the nearest."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; {_nearest(name, list(TASKS))}")
    return TASKS[name]


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return (f"nearest: {near[0]}; " if near else "") + f"there are: {', '.join(known)}"
