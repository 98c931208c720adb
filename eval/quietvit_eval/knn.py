"""Task `knn`: weighted k-NN on [CLS], the bank being all train images without augmentation (DINOv2's protocol)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from quietvit.contracts import Extractor
from quietvit.features.knn import KS, TEMP, knn_scores
from quietvit_eval.accuracy import Answers, hits_of, mean_per_class
from quietvit_eval.data import EvalData
from quietvit_eval.few_shot import draw_per_class
from quietvit_eval.resampling import PerImage
from quietvit_eval.result import Result

HEADLINE_K = 20  # DINO; fixed, because the best k of a list is chosen on the test images
BLOCK = 8192  # queries whose class scores are held at a time (ours: 33 MB per k at 1,000 classes)


@dataclass(frozen=True)
class KnnOptions:
    """Settings of the task. Raises ValueError for values that cannot be."""

    ks: tuple[int, ...] = KS
    temp: float = TEMP
    per_class: tuple[int, ...] = ()  # few-shot: banks of so many images of each class, besides the full bank (DINOv2)
    tries: int = 3  # of few-shot, drawn with the seeds 0, 1, ... as in DINOv2 (their number is ours)

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1 or not self.temp > 0:
            raise ValueError("knn: needs at least one k, all from 1, and a temp above 0")
        if any(n < 1 for n in self.per_class) or self.tries < 1:
            raise ValueError("knn: per_class lists numbers of images from 1, and tries is 1 at the least")


class KnnTask:
    """k-NN top-1 and top-5."""

    blocks = 1
    target = "labels"
    splits = ("train", "test")
    options = KnnOptions

    def check(self, extractor: Extractor, num_classes: int, options: KnnOptions) -> None:
        """Every model can be scored."""

    def run(self, extractor: Extractor, data: EvalData, options: KnnOptions) -> Result:
        """Scores "top1@k" for each k up to the size of the bank; at the headline k top-5 and mean per class too.

        Few-shot: "top1@k/nper", the mean over tries with n images of each class, for each k up to n, and for n itself.
        """
        train, test = data.features(extractor, "train"), data.features(extractor, "test")
        answers = data.answers(test.tokens.indices)
        ks = sorted({min(k, len(train.labels)) for k in options.ks})
        k = HEADLINE_K if HEADLINE_K in ks else ks[-1]
        wanted = [(1, k) for k in ks] + [(top, k) for top in answers.tops if top > 1]
        search = Search(test.cls, answers, options.temp, data.device)
        hits = search.hits(train.cls, train.labels, ks, wanted)
        by_image: dict[str, np.ndarray] = {f"top{top}@{near}": h.numpy() for (top, near), h in hits.items()}
        details: dict[str, Any] = {"bank": len(train.labels)}
        protocol: dict[str, Any] = {
            "name": "k-NN on [CLS] of the last block",
            "ks": ks,
            "temp": options.temp,
            "headline_k": k,
        }
        if options.per_class:
            protocol |= {"per_class": list(options.per_class), "tries": options.tries}
            few = few_shot_hits(search, train.cls, train.labels, options)
            by_image |= {name: h.mean(axis=0) for name, h in few.items()}
            details["std"] = {name: float(h.mean(axis=1).std()) for name, h in few.items()}
        scores = {name: float(h.mean()) for name, h in by_image.items()}
        if answers.accepted is None:
            scores[f"mean_per_class@{k}"] = mean_per_class(hits[1, k], answers.labels, data.num_classes)
        return Result(scores, f"top1@{k}", protocol, details, PerImage(data.names("test"), by_image))


@dataclass(frozen=True)
class Search:
    """Test images that are looked up in banks."""

    queries: Float[Tensor, "Q D"]
    answers: Answers
    temp: float
    device: torch.device

    def hits(
        self,
        bank: Float[Tensor, "M D"],
        labels: Int[Tensor, " M"],
        ks: Sequence[int],
        wanted: Sequence[tuple[int, int]],
    ) -> dict[tuple[int, int], Bool[Tensor, " Q"]]:
        """For each wanted (top, k) whether a right class is among the `top` best by k neighbours."""
        found: dict[tuple[int, int], list[Tensor]] = {pair: [] for pair in wanted}
        for start in range(0, len(self.queries), BLOCK):
            rows = slice(start, start + BLOCK)
            queries, answers = self.queries[rows].to(self.device), self.answers.part(rows, self.device)
            scores = knn_scores(bank, labels, queries, ks=ks, temp=self.temp, num_classes=answers.num_classes)
            for (top, near), parts in found.items():
                # A class without any vote is no candidate: its place in the top 5 would come from its number alone.
                votes = scores[near].masked_fill(scores[near] == 0, -math.inf)
                parts.append(hits_of(votes, answers, top).cpu())
        return {pair: torch.cat(parts) for pair, parts in found.items()}


def few_shot_ks(ks: Sequence[int], per_class: int) -> list[int]:
    """DINOv2: those up to the number of images of a class, and that number."""
    return sorted({k for k in (*ks, per_class) if k <= per_class})


def few_shot_hits(
    search: Search, bank: Float[Tensor, "M D"], labels: Int[Tensor, " M"], options: KnnOptions
) -> dict[str, Bool[np.ndarray, "tries Q"]]:
    """By name of a score, "top1@k/nper"."""
    out: dict[str, np.ndarray] = {}
    for count in options.per_class:
        ks = few_shot_ks(options.ks, count)
        draws = [draw_per_class(labels, count, seed) for seed in range(options.tries)]
        found = [search.hits(bank[rows], labels[rows], ks, [(1, k) for k in ks]) for rows in draws]
        out |= {f"top1@{k}/{count}per": np.stack([hits[1, k].numpy() for hits in found]) for k in ks}
    return out
