"""Task `knn`: weighted k-NN on [CLS], the bank being all train images without augmentation (DINOv2's protocol)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from quietvit.contracts import Extractor
from quietvit.features.knn import KS, TEMP, knn_scores
from quietvit_eval.accuracy import mean_per_class, top_k_hits
from quietvit_eval.data import EvalData
from quietvit_eval.resampling import PerImage
from quietvit_eval.result import Result

HEADLINE_K = 20  # DINO; fixed, because the best k of a list is chosen on the test images
BLOCK = 8192  # queries whose class scores are held at a time (ours: 33 MB per k at 1,000 classes)


@dataclass(frozen=True)
class KnnOptions:
    """Settings of the task."""

    ks: tuple[int, ...] = KS
    temp: float = TEMP


class KnnTask:
    """k-NN top-1 and top-5."""

    blocks = 1
    target = "labels"
    splits = ("train", "test")
    options = KnnOptions

    def check(self, extractor: Extractor, num_classes: int, options: KnnOptions) -> None:
        """Every model can be scored."""

    def run(self, extractor: Extractor, data: EvalData, options: KnnOptions) -> Result:
        """Scores "top1@k" for each k up to the size of the bank; at the headline k top-5 and mean per class too."""
        train, test = data.features(extractor, "train"), data.features(extractor, "test")
        ks = sorted({min(k, len(train.labels)) for k in options.ks})
        k = HEADLINE_K if HEADLINE_K in ks else ks[-1]
        wanted = [(1, k) for k in ks] + ([(5, k)] if data.num_classes > 5 else [])
        hits: dict[tuple[int, int], list[torch.Tensor]] = {pair: [] for pair in wanted}
        for start in range(0, len(test.labels), BLOCK):
            queries = test.cls[start : start + BLOCK].to(data.device)
            labels = test.labels[start : start + BLOCK].to(data.device)
            scores = knn_scores(
                train.cls, train.labels, queries, ks=ks, temp=options.temp, num_classes=data.num_classes
            )
            for (top, near), found in hits.items():
                # A class without any vote is no candidate: its place in the top 5 would come from its number alone.
                votes = scores[near].masked_fill(scores[near] == 0, -math.inf)
                found.append(top_k_hits(votes, labels, top).cpu())
        whole = {pair: torch.cat(parts) for pair, parts in hits.items()}
        shares = {f"top{top}@{near}": float(h.double().mean()) for (top, near), h in whole.items()}
        shares[f"mean_per_class@{k}"] = mean_per_class(whole[1, k], test.labels, data.num_classes)
        protocol = {"name": "k-NN on [CLS] of the last block", "ks": ks, "temp": options.temp, "headline_k": k}
        by_image = {f"top{top}@{near}": h.numpy() for (top, near), h in whole.items()}
        return Result(
            shares, f"top1@{k}", protocol, {"bank": len(train.labels)}, PerImage(data.names("test"), by_image)
        )
