"""Task `classifier`: the supervised head that came with a model's weights, on central views. Nothing is trained.

T2T-ViT reports central crops of 0.9 of the resized image at the size it was trained at; here the view is that of all
tasks (256/224, which is 0.875, and 224 pixels at the most unless another size is asked for).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from quietvit.contracts import Extractor
from quietvit_eval.accuracy import scores_of_logits
from quietvit_eval.data import EvalData
from quietvit_eval.resampling import PerImage
from quietvit_eval.result import Result

CHUNK = 8192  # images scored at a time (ours: 33 MB at 1,000 classes)


@runtime_checkable
class Classifier(Protocol):
    """What an extractor also is if it has a supervised head (`num_classes` is 0 if it has none)."""

    num_classes: int

    def classify(self, cls: Float[Tensor, "B D"]) -> Float[Tensor, "B classes"]: ...


def head_of(extractor: Extractor, num_classes: int) -> Classifier:
    """The extractor as a Classifier of `num_classes`. Raises ValueError if it has no head, or one of another size."""
    if not isinstance(extractor, Classifier) or not extractor.num_classes:
        raise ValueError(
            "task classifier scores the supervised head that came with a model's weights, and this model has none: "
            "knn and linear score its features"
        )
    if extractor.num_classes != num_classes:
        raise ValueError(
            f"the model's head tells {extractor.num_classes} classes apart, but the data have {num_classes}: task "
            "classifier needs the classes that the head was trained on, all of them, in the order of their sorted names"
        )
    return extractor


@dataclass(frozen=True)
class ClassifierOptions:
    """It has no settings."""


class ClassifierTask:
    """Top-1 and top-5 of the model's own head. Class i of the data is row i of the head: class folders are sorted."""

    blocks = 1
    target = "labels"
    splits = ("test",)
    options = ClassifierOptions

    def check(self, extractor: Extractor, num_classes: int, options: ClassifierOptions) -> None:
        """Raises ValueError if the model has no head, or one for another number of classes."""
        head_of(extractor, num_classes)

    def run(self, extractor: Extractor, data: EvalData, options: ClassifierOptions) -> Result:
        """Raises ValueError if the model has no head, or one for another number of classes."""
        head = head_of(extractor, data.num_classes)
        test = data.features(extractor, "test")
        logits = torch.cat([head.classify(cls).cpu() for cls in test.cls.split(CHUNK)])
        scores, found = scores_of_logits(logits, data.answers(test.tokens.indices))
        protocol = {"name": "the model's own supervised head, on [CLS]"}
        return Result(scores, "top1", protocol, {}, PerImage(data.names("test"), found))
