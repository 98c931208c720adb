"""Task `segmentation-patches`: the cheap probe. Each patch is a sample, its class that of most of its pixels.

The protocol is CAPI's (arXiv 2502.08769, released evaluation): nothing is cropped and no head is trained by steps. Its
scores are not comparable to those of `segmentation`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Int16, Int64, UInt8
from torch import Tensor

from quietvit import dist
from quietvit.contracts import Extractor
from quietvit_eval.blocks import check_blocks
from quietvit_eval.dense_data.pairs import CLASSES, IGNORE
from quietvit_eval.pair_data import Pair, PairData
from quietvit_eval.result import Result
from quietvit_eval.segmentation.augment import nearest, resized
from quietvit_eval.segmentation.linear import listed_blocks
from quietvit_eval.segmentation.metrics import count_pixels, scores_of_counts
from quietvit_eval.segmentation.patch_models import (
    COSINE,
    L2,
    Logistic,
    Neighbours,
    PatchModel,
    fit_logistic,
    knn_predictions,
)
from quietvit_eval.segmentation.scoring import MAIN, check_names, score
from quietvit_eval.views import feature_maps

NAME = "segmentation-patches"
CS = tuple(float(c) for c in 10.0 ** np.linspace(-6, 5, 8))  # CAPI


@dataclass(frozen=True)
class SegmentationPatchesOptions:
    """Settings of the task. Defaults: CAPI, if nothing else is said."""

    method: str = "knn"  # or "logistic"
    side: int = 224  # to which images are squashed, in pixels
    blocks: int | tuple[int, ...] = 1  # the last n, or the listed ones, numbered from 0
    norm: bool = True  # through the final norm
    ks: tuple[int, ...] = (1, 3, 10, 30)
    metrics: tuple[str, ...] = (COSINE, L2)
    cs: tuple[float, ...] = CS  # inverse weights of the penalty
    max_iter: int = 1000  # of L-BFGS (DINOv2's logistic regression)
    held_out: float = 0.1  # share of the train images on which a setting is chosen
    max_patches: int = 100_000  # train patches, as many from each image (ours: k-NN in minutes on a few cores)
    pictures: int = 8  # test images whose predictions are drawn (ours)

    def __post_init__(self) -> None:
        _require(self.method in ("knn", "logistic"), f"method is knn or logistic, not {self.method!r}")
        _require(self.side >= 1, f"side must be at least 1, got {self.side}")
        _require(self.blocks != () and (isinstance(self.blocks, tuple) or self.blocks >= 1), "blocks: name one or more")
        _require(len(self.ks) > 0 and min(self.ks) >= 1, f"ks are at least 1, got {self.ks}")
        _require(
            len(self.metrics) > 0 and set(self.metrics) <= {COSINE, L2},
            f"metrics are {COSINE} and {L2}, got {self.metrics}",
        )
        _require(len(self.cs) > 0 and min(self.cs) > 0, f"cs are above 0, got {self.cs}")
        _require(self.max_iter >= 1, f"max_iter must be at least 1, got {self.max_iter}")
        _require(0 < self.held_out < 1, f"held_out must lie between 0 and 1, got {self.held_out}")
        _require(self.max_patches >= 1, f"max_patches must be at least 1, got {self.max_patches}")
        _require(self.pictures >= 0, f"pictures must be at least 0, got {self.pictures}")


def _require(true: bool, said: str) -> None:
    if not true:
        raise ValueError(f"{NAME}: {said}")


@dataclass(frozen=True)
class Bank:
    """Train patches with a class, image after image."""

    features: Float[Tensor, "M D"]
    labels: Int[Tensor, " M"]
    rows: Int[Tensor, " M"]  # the train image that each comes from

    def part(self, chosen: Tensor) -> Bank:
        """The patches where `chosen` is True."""
        return Bank(self.features[chosen], self.labels[chosen], self.rows[chosen])


class SegmentationPatchesTask:
    """mIoU, mAcc and aAcc of classified patches."""

    target = CLASSES
    options = SegmentationPatchesOptions

    def check(self, extractor: Extractor, num_classes: int, options: SegmentationPatchesOptions) -> None:
        """Raises ValueError for blocks that the model cannot give, or fewer than two classes."""
        check_blocks(extractor, listed_blocks(options.blocks, extractor.num_blocks), norm=options.norm)
        _require(num_classes >= 2, f"there must be at least 2 classes to tell apart, got {num_classes}")

    def run(self, extractor: Extractor, data: PairData, options: SegmentationPatchesOptions) -> Result:
        """Choose a setting on held-out train images, fit it to all of them, score it on the test images.

        Raises ValueError for splits of unlike classes, a side that is not whole patches, too few train images, train
        patches without a class or of one only, and as `score`.
        """
        check_names(data.train.source.class_names, data.test.source.class_names)
        options = replace(options, side=data.image_size or options.side)
        _check_side(options.side, extractor.stride)
        reader = _Reader(extractor, data, options)
        bank = reader.bank()
        table = choose(bank, options, data.num_classes, data.seed)
        best = dist.gather_objects(max(table, key=lambda row: row["chosen_by"]))[0]  # of equal ones the first
        model = _fitted(bank, best, options, data.num_classes)

        def classify(image: UInt8[np.ndarray, "H W 3"]) -> Int64[np.ndarray, "H W"]:
            maps = reader.features([image])[0]
            classes = model(maps.flatten(0, 1)).reshape(maps.shape[:2])
            at_pixels: Int64[np.ndarray, "H W"] = nearest(classes, image.shape[:2])
            return at_pixels

        details = {"setting": best, "settings": table, "train_patches": len(bank.labels)}
        if isinstance(model, Logistic):
            details["converged"] = model.converged
        return score(
            data, classify, task=NAME, protocol=_protocol(options, reader.quota), details=details,
            pictures=options.pictures,
        )  # fmt: skip


def _check_side(side: int, stride: int) -> None:
    if side % stride:
        below = side // stride * stride
        near = f"{below} or {below + stride}" if below else f"{stride}"
        raise ValueError(f"{NAME}: a side of {side} pixels is not whole patches of {stride}: use {near}")


class _Reader:
    """Reads images as squares of patches."""

    def __init__(self, extractor: Extractor, data: PairData, options: SegmentationPatchesOptions) -> None:
        self.extractor, self.data, self.options = extractor, data, options
        self.which = listed_blocks(options.blocks, extractor.num_blocks)
        self.quota = options.max_patches // len(data.train)  # patches of an image
        if self.quota == 0:
            raise ValueError(
                f"{NAME}: max_patches {options.max_patches} is less than one of each of the {len(data.train)} train "
                "images: raise it, or limit the train images"
            )

    @torch.no_grad()
    def features(self, images: list[UInt8[np.ndarray, "H W 3"]]) -> Float[Tensor, "b h w D"]:
        """Of squashed images, on the device of the task."""
        side = self.options.side
        pixels = torch.from_numpy(np.stack([resized(image, (side, side)) for image in images])).permute(0, 3, 1, 2)
        maps = feature_maps(self.extractor, pixels, self.which, norm=self.options.norm)
        return maps.permute(0, 2, 3, 1).to(self.data.device).float()

    def bank(self) -> Bank:
        """Patches of the train images, those of all ranks, in the order of the images. Raises ValueError if none has a
        class."""
        parts = [
            self._patches(pairs) for pairs in _groups(self.data.pairs("train", NAME), self.data.reading.batch_size)
        ]
        width = self.extractor.embed_dim * len(self.which)
        own = [
            torch.cat([part[i] for part in parts]) if parts else torch.empty((0, width) if i == 0 else (0,))
            for i in range(3)
        ]
        features = _gathered(own[0].to(self.data.device))
        labels, rows = (torch.cat(dist.gather_objects(values.long().cpu())) for values in own[1:])
        if not len(labels):
            raise ValueError(
                f"no patch of the {len(self.data.train)} train images of {self.data.train.source.name} has a class"
            )
        order = torch.argsort(rows, stable=True)
        return Bank(features[order.to(features.device)], labels[order], rows[order])

    def _patches(self, pairs: list[Pair]) -> tuple[Tensor, Tensor, Tensor]:
        maps = self.features([pair.image for pair in pairs]).flatten(1, 2)
        features, labels, rows = [], [], []
        for pair, of_image in zip(pairs, maps, strict=True):
            side = self.options.side
            classes = patch_classes(nearest(pair.target, (side, side)), self.extractor.stride).ravel()
            known = np.flatnonzero(classes != IGNORE)
            if len(known) > self.quota:
                rng = np.random.default_rng((self.data.seed, pair.row))
                known = np.sort(rng.choice(known, self.quota, replace=False))
            features.append(of_image[torch.from_numpy(known).to(of_image.device)])
            labels.append(torch.from_numpy(classes[known]).long())
            rows.append(torch.full((len(known),), pair.row))
        return torch.cat(features), torch.cat(labels), torch.cat(rows)


def _groups(pairs: Iterator[Pair], size: int) -> Iterator[list[Pair]]:
    group: list[Pair] = []
    for pair in pairs:
        group.append(pair)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


@torch.no_grad()
def _gathered(own: Float[Tensor, "m D"]) -> Float[Tensor, "M D"]:
    """Rows of all ranks in rank order, however many each holds."""
    counts = dist.gather_objects(len(own))
    if len(counts) == 1:
        return own
    padded = torch.cat([own, own.new_zeros(max(counts) - len(own), own.shape[1])])
    parts = dist.gather_rows(padded).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def patch_classes(target: Int16[np.ndarray, "S S"], patch: int) -> Int16[np.ndarray, "h w"]:
    """The commonest class of every patch, of equal ones the lowest; IGNORE where none of its pixels has one."""
    grid = len(target) // patch
    pixels = target.reshape(grid, patch, grid, patch).transpose(0, 2, 1, 3).reshape(grid * grid, -1).astype(np.int64)
    num = max(int(target.max()) + 1, 1)
    cells = np.arange(grid * grid)[:, None] * num + pixels
    counts = np.bincount(cells[pixels != IGNORE], minlength=grid * grid * num).reshape(grid * grid, num)
    classes = np.where(counts.any(axis=1), counts.argmax(axis=1), IGNORE)
    return classes.reshape(grid, grid).astype(np.int16)


def choose(bank: Bank, options: SegmentationPatchesOptions, num_classes: int, seed: int) -> list[dict[str, Any]]:
    """Every setting with its mIoU over the patches of held-out train images, fitted to the others.

    Raises ValueError with fewer than two images.
    """
    images = bank.rows.unique()
    if len(images) < 2:
        raise ValueError(f"{NAME}: at least 2 train images with classes are needed, to choose a setting on one")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    count = min(len(images) - 1, max(1, round(options.held_out * len(images))))
    held = torch.isin(bank.rows, images[order[:count]])
    rest, queries = bank.part(~held), bank.part(held)
    table: list[dict[str, Any]] = []

    def judge(setting: dict[str, Any], classes: Int64[np.ndarray, " Q"]) -> None:
        counts = count_pixels(classes[None], queries.labels.numpy()[None], num_classes)
        table.append({**setting, "chosen_by": scores_of_counts(*counts)[MAIN]})

    if options.method == "knn":
        for metric in options.metrics:
            neighbours = Neighbours(rest.features, rest.labels, metric, num_classes)
            for k, classes in knn_predictions(neighbours, queries.features, options.ks).items():
                judge({"metric": metric, "k": k}, classes)
    else:
        for c in options.cs:
            judge({"C": c}, fit_logistic(rest.features, rest.labels, c, options.max_iter)(queries.features))
    return table


def _fitted(bank: Bank, setting: dict[str, Any], options: SegmentationPatchesOptions, num_classes: int) -> PatchModel:
    if options.method == "knn":
        return Neighbours(bank.features, bank.labels, setting["metric"], num_classes).model(setting["k"])
    return fit_logistic(bank.features, bank.labels, setting["C"], options.max_iter)


def _protocol(options: SegmentationPatchesOptions, quota: int) -> dict[str, Any]:
    idle = {"knn": ("cs", "max_iter"), "logistic": ("ks", "metrics")}[options.method]
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(options).items() if k not in idle}
    del settings["pictures"]
    return {
        "name": "patches of squashed images classified one by one",
        **settings,
        "patches_of_an_image": f"at most {quota}, drawn with the seed",
        "choice": f"setting chosen on {options.held_out:.0%} of the train images, held out; then fitted to all",
    }
