"""Task `depth`: a head on frozen features that gives every pixel its metres (DINOv2, section 7.4; DINOv3)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quietvit.contracts import Extractor
from quietvit.data.decode import UnreadableImage
from quietvit_eval.blocks import check_blocks
from quietvit_eval.dense_data.pairs import METRES
from quietvit_eval.depth.augment import DepthAugment
from quietvit_eval.depth.losses import gradient_loss, sig_loss
from quietvit_eval.depth.metrics import aligned, depth_scores, scored_pixels
from quietvit_eval.depth.options import TEST_ONLY, DepthOptions, at_size
from quietvit_eval.depth.pictures import draw_depth
from quietvit_eval.depth.predict import DepthModel, chosen_blocks, make_head
from quietvit_eval.fit import Schedule, fit
from quietvit_eval.pair_data import SHOWN, Pair, PairBatch, PairData, PairSplit
from quietvit_eval.resampling import PerImage
from quietvit_eval.result import Result

LOOKS = 20  # pairs tried before training until one of a split can be read (ours)


@dataclass(frozen=True)
class Found:
    """What was found on one test image; no scores if none of its pixels counts."""

    name: str
    scores: dict[str, float] | None
    picture: str | None


class DepthTask:
    """Errors of predicted depth, each the mean over test images; the headline is the RMSE in metres."""

    target = METRES
    options = DepthOptions

    def check(self, extractor: Extractor, num_classes: int, options: DepthOptions) -> None:
        """Raises ValueError if the extractor cannot give these blocks, or has no width for the head."""
        check_blocks(extractor, chosen_blocks(extractor, options), norm=options.norm)
        with torch.device("meta"):
            make_head(extractor, options, 0)

    def run(self, extractor: Extractor, data: PairData, options: DepthOptions) -> Result:
        """Train the head on the train pairs, score it on the test pairs.

        Raises ValueError for pairs that are no depth, whose sides do not fit the crops, or without any depth to score,
        and as `fit` and `PairData` do.
        """
        settings = at_size(options, data.image_size, extractor.stride)
        _check_pairs(data, settings)
        model = DepthModel(
            extractor,
            make_head(extractor, settings, data.seed),
            settings,
            device=data.device,
            most=data.reading.batch_size,
        )
        protocol = _protocol(options, data)
        facts = {**settings.as_protocol(leave_out=TEST_ONLY), "blocks": model.blocks}
        state = data.state_file("depth", facts)
        losses = train(model, data, state)
        found = data.merged({pair.row: self._score(model, data, pair, state) for pair in data.pairs("test", "depth")})
        scored = {row: f for row, f in found.items() if f.scores is not None}
        if not scored:
            raise ValueError(
                f"no pixel of {data.test.source.name} can be scored: none has a depth between {settings.min_depth:g} "
                f"and {settings.max_depth:g} m inside eval_crop={settings.eval_crop}"
            )
        names = next(iter(scored.values())).scores or {}
        values = {name: np.array([(f.scores or {})[name] for f in scored.values()]) for name in names}
        blank = [f.name for f in found.values() if f.scores is None]
        details = {
            "blocks": model.blocks,
            "crop": list(settings.crop),
            "resize": settings.resize,
            "head_parameters": sum(p.numel() for p in model.head.parameters()),
            "steps_now": len(losses),  # fewer than the protocol's if it was resumed
            "last_loss": losses[-1] if losses else None,
            "images_without_depth": len(blank),  # left out of every mean
            "images_without_depth_names": blank[:SHOWN],
            "pictures": [f.picture for f in found.values() if f.picture is not None],
        }
        per_image = PerImage([f.name for f in scored.values()], values)
        means = {name: float(v.mean()) for name, v in values.items()}
        return Result(means, "rmse", protocol, details, per_image, higher_is_better=False)

    def _score(self, model: DepthModel, data: PairData, pair: Pair, state: Path | None) -> Found:
        options = model.options
        valid = scored_pixels(
            pair.target, min_depth=options.min_depth, max_depth=options.max_depth, crop=options.eval_crop
        )
        predicted = model.predict(pair.image)
        if valid.any() and options.align:
            predicted = aligned(predicted, pair.target, valid).clip(options.min_depth, options.max_depth)
        scores = depth_scores(predicted, pair.target, valid) if valid.any() else None
        picture = None
        if data.folder is not None and pair.row in _shown(len(data.test), options.pictures):
            folder = "depth" if state is None else state.stem
            picture = f"pictures/{folder}/{pair.row:05d}.png"
            said = "nothing to score" if scores is None else f"RMSE {scores['rmse']:.3f} m"
            draw_depth(data.folder / picture, pair.image, pair.target, predicted, valid, f"{pair.name}    {said}")
        return Found(pair.name, scores, picture)


def train(model: DepthModel, data: PairData, state: Path | None) -> list[float]:
    """Train the head by SigLoss and the gradient loss; the losses of the steps taken now."""
    o = model.options
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=o.lr, betas=o.betas, weight_decay=o.weight_decay)
    schedule = Schedule(o.steps, o.warmup_steps, o.warmup_factor, o.decay)
    augment = DepthAugment(o)

    def batches_from(first: int) -> Iterable[PairBatch]:
        return data.batches(augment, batch_size=o.batch_size, first=first, steps=o.steps)

    def loss_of(batch: PairBatch, step: int) -> Tensor:
        target = batch.targets.to(data.device)
        valid = (target > 0) & (target <= o.max_depth)
        depth = model.depth(batch.images)
        loss = sig_loss(depth, target, valid, warm_up=step < o.sig_warmup)
        if o.gradient_weight:
            loss = loss + o.gradient_weight * gradient_loss(depth, target, valid)
        return loss

    return fit(
        model.head, loss_of, batches_from, optimizer, schedule,
        clip=o.clip, state=state, console=data.reading.console, what=f"{o.head} depth head",
    )  # fmt: skip


def _protocol(options: DepthOptions, data: PairData) -> dict[str, object]:
    protocol = {"name": f"depth, {options.head} head", **options.as_protocol(), "image_size": data.image_size}
    if data.image_size is not None:
        protocol |= {"resize": data.image_size, "crop": "a square of 416/480 of the image size, in whole patches"}
    return protocol


def _check_pairs(data: PairData, options: DepthOptions) -> None:
    for split in (data.train, data.test):
        if split.source.kind != METRES:
            raise ValueError(f"{split.source.name} holds {split.source.kind}, but the task depth needs {METRES}")
    first = _first_readable(data.train)
    if first is not None:
        image, _ = DepthAugment(options).framed(*first)
        if any(side < crop for side, crop in zip(image.shape[:2], options.crop, strict=True)):
            raise ValueError(
                f"a training crop of {options.crop[0]} x {options.crop[1]} does not fit into images of "
                f"{image.shape[0]} x {image.shape[1]} ({data.train.source.name}): set crop, resize or an image size"
            )
    second = _first_readable(data.test)
    if second is not None:
        scored_pixels(second[1], min_depth=options.min_depth, max_depth=options.max_depth, crop=options.eval_crop)


def _first_readable(split: PairSplit) -> tuple[np.ndarray, np.ndarray] | None:
    for index in split.indices[:LOOKS]:
        try:
            return split.source.load(int(index))
        except UnreadableImage:
            continue
    return None


def _shown(count: int, pictures: int) -> set[int]:
    """Rows at even distances, the first and the last among them."""
    return {math.floor(row + 0.5) for row in np.linspace(0, count - 1, min(pictures, count))}
