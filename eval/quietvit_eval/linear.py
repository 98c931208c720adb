"""Task `linear`: a grid of linear classifiers on frozen features, all trained at once (DINOv2's protocol).

Inputs are [CLS] of the last 1 or 4 blocks, with or without the mean patch of the last, and 13 learning rates each: 52
heads. DINOv2 trains them on random crops and flips of the train images (`views="crops"`). The default computes the
features once, from central views: it costs one pass over the images instead of ten, and scores somewhat lower.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from quietvit import dist
from quietvit.contracts import Extractor
from quietvit_eval.accuracy import scores_of_logits
from quietvit_eval.data import EvalData, Labelled
from quietvit_eval.head_grid import BLOCKS, LRS, HeadGroup, make_groups
from quietvit_eval.linear_crops import BATCH, STEPS, VIEW, train_on_crops
from quietvit_eval.resampling import PerImage
from quietvit_eval.result import Result

SMALL_STEP = 100_000_000  # products of a forward that one core does in a few milliseconds (ours)
EVAL_CHUNK = 1024  # rows scored at a time (ours)
SELECT = ("held_out", "val")
VIEWS = ("central", "crops")


@dataclass(frozen=True)
class LinearOptions:
    """Settings of the task. Raises ValueError for values that cannot be."""

    views: str = "central"  # ours: features are computed once; "crops": new random ones for every step (DINOv2)
    select: str = "held_out"  # CAPI: the head is chosen on train images held out; "val": on the test images (DINOv2)
    held_out: float = 0.1  # share of the train images; CAPI
    blocks: tuple[int, ...] = BLOCKS
    lrs: tuple[float, ...] = LRS
    # Images of a step over all processes. None: of central views 1024 as DINOv2 on 8 GPUs, but an eighth of the train
    # images at the most; of crops 128 for each process, as DINOv2.
    batch_size: int | None = None
    # None: 12,500 as DINOv2; of central views no more than 10 passes, as there, but 1,000 steps at the least (ours).
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.views not in VIEWS:
            raise ValueError(f"linear: views must be one of {', '.join(VIEWS)}, not {self.views!r}")
        if self.select not in SELECT:
            raise ValueError(f"linear: select must be one of {', '.join(SELECT)}, not {self.select!r}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"linear: held_out is a share of the train images between 0 and 1, not {self.held_out}")
        if not self.blocks or min(self.blocks) < 1 or not self.lrs:
            raise ValueError("linear: needs at least one number of blocks (from 1) and one learning rate")
        if max(self.blocks) > max(BLOCKS):
            raise ValueError(f"linear: features are kept of the last {max(BLOCKS)} blocks, not of {max(self.blocks)}")
        if min(self.lrs) <= 0:
            raise ValueError(f"linear: learning rates must be positive, got {min(self.lrs)}")
        for name in ("batch_size", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"linear: {name} must be at least 1, not {value}")


@dataclass(frozen=True)
class Rows:
    """Some rows of a feature array. They are gathered batch by batch: the array may be larger than memory."""

    features: Float[Tensor, "M F"]
    labels: Int[Tensor, " M"]
    chosen: Int[Tensor, " m"]

    def __len__(self) -> int:
        return len(self.chosen)

    def batch(self, positions: Int[Tensor, " B"], device: torch.device) -> tuple[Tensor, Tensor]:
        rows = self.chosen[positions]
        return self.features[rows].to(device), self.labels[rows].to(device)


def train_heads(
    groups: list[HeadGroup],
    rows: Rows,
    *,
    batch_size: int,
    steps: int,
    generator: torch.Generator,
) -> None:
    """SGD with momentum; rates lr * batch_size / 256, falling to 0 along a cosine; batches without replacement."""
    device = groups[0].weight.device
    base = [torch.tensor([h.lr for h in g.heads], device=device) * batch_size / 256 for g in groups]
    for step, positions in zip(range(steps), _batches(len(rows), batch_size, generator), strict=False):
        x, y = rows.batch(positions, device)
        for group, lrs in zip(groups, base, strict=True):
            group.step(x, y, lrs * (0.5 * (1 + math.cos(math.pi * step / steps))))


def _batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Int[Tensor, " B"]]:
    """Endless passes in new orders; the rest of a pass that fills no batch is dropped."""
    while True:
        yield from torch.randperm(count, generator=generator)[: count // batch_size * batch_size].split(batch_size)


def accuracies(groups: list[HeadGroup], rows: Rows) -> list[float]:
    """Top-1 of every head, in the order of the groups."""
    device = groups[0].weight.device
    right = [torch.zeros(len(g.heads), device=device) for g in groups]
    for positions in torch.arange(len(rows)).split(EVAL_CHUNK):
        x, y = rows.batch(positions, device)
        for group, total in zip(groups, right, strict=True):
            total += (group.logits(x).argmax(dim=-1) == y[:, None]).sum(dim=0)
    return [float(r) / len(rows) for total in right for r in total]


class LinearTask:
    """The grid: one head chosen, and its top-1 and top-5."""

    blocks = max(BLOCKS)
    target = "labels"
    splits = ("train", "test")
    options = LinearOptions

    def check(self, extractor: Extractor, num_classes: int, options: LinearOptions) -> None:
        """Every model can be scored."""

    def run(self, extractor: Extractor, data: EvalData, options: LinearOptions) -> Result:
        """Train all heads, choose one, score it on the test images. Raises ValueError if there is no image to hold out.

        With views="crops" also as `train_on_crops`.
        """
        generator = torch.Generator().manual_seed(data.seed)
        trained = (_train_on_crops if options.views == "crops" else _train)(extractor, data, options, generator)
        test = data.features(extractor, "test")
        groups = trained.groups
        found = accuracies(groups, trained.choose)
        best = max(range(len(found)), key=found.__getitem__)  # of equal ones the first: fewer blocks, lower rate
        scores, hits = scores_of_logits(_logits(groups, best, test), data.answers(test.tokens.indices))
        details = _details(groups, found, best, trained.count, len(trained.choose))
        return Result(scores, "top1", trained.protocol, details, PerImage(data.names("test"), hits))


@dataclass(frozen=True)
class Trained:
    """All heads, trained on `count` images; `choose`: what one of them is chosen on."""

    groups: list[HeadGroup]
    choose: Rows
    count: int
    protocol: dict[str, Any]


def _train(extractor: Extractor, data: EvalData, options: LinearOptions, generator: torch.Generator) -> Trained:
    """On stored features of central views."""
    train, test = data.features(extractor, "train"), data.features(extractor, "test")
    fit, choose = _choice_of_images(train, test, options, generator)
    batch_size = options.batch_size or max(1, min(1024, len(fit) // 8))
    batch_size = min(batch_size, len(fit))
    steps = options.steps or min(STEPS, max(1000, math.ceil(10 * len(fit) / batch_size)))
    groups = _groups(extractor, data, options, train, generator)
    with _few_threads(batch_size * sum(g.weight.numel() for g in groups)):
        train_heads(groups, fit, batch_size=batch_size, steps=steps, generator=generator)
    return Trained(groups, choose, len(fit), _protocol(options, batch_size, steps))


def _train_on_crops(
    extractor: Extractor, data: EvalData, options: LinearOptions, generator: torch.Generator
) -> Trained:
    """On new random views for every step; features are stored only of what heads are chosen on and scored on."""
    part, count = data.train, len(data.train.indices)
    test = data.features(extractor, "test")
    if options.select == "val":
        shown, choose = test, _all_rows(test)
    else:
        held, fitted = _held_out(count, options, generator)
        own = replace(data, train=replace(part, indices=part.indices[held], labels=part.labels[held]))
        shown = own.features(extractor, "train")
        data.note_unreadable("train", shown.tokens.skipped)
        choose = _all_rows(shown)
        part = replace(part, indices=part.indices[fitted], labels=part.labels[fitted])
    batch_size, steps = options.batch_size or BATCH * dist.world_size(), options.steps or STEPS
    groups = _groups(extractor, data, options, shown, generator)
    protocol = _protocol(options, batch_size, steps)
    train_on_crops(
        groups,
        extractor,
        data,
        part,
        num_blocks=shown.tokens.values.shape[1] - 1,
        batch_size=batch_size,
        steps=steps,
        facts={**protocol, "num_blocks": shown.tokens.values.shape[1] - 1, "size": data.transform.image_size},
    )
    return Trained(groups, choose, len(part.indices), protocol)


def _groups(
    extractor: Extractor, data: EvalData, options: LinearOptions, shown: Labelled, generator: torch.Generator
) -> list[HeadGroup]:
    return make_groups(
        shown.tokens.values.shape[1] - 1,
        extractor.embed_dim,
        data.num_classes,
        blocks=options.blocks,
        lrs=options.lrs,
        pooled=(False, True) if getattr(extractor, "has_patches", True) else (False,),
        generator=generator,
        device=data.device,
    )


_NAMES = {
    "central": 'linear grid on cached features of central views ("features")',
    "crops": "linear grid on features of random crops, new ones at every step",
}


def _protocol(options: LinearOptions, batch_size: int, steps: int) -> dict[str, Any]:
    return {
        "name": _NAMES[options.views],
        "train_views": {"central": "central, as the test images", "crops": VIEW}[options.views],
        "inputs": [f"last {n} blocks, {pool} mean patch" for n in options.blocks for pool in ("no", "with")],
        "lrs": list(options.lrs),
        "batch_size": batch_size,
        "steps": steps,
        "select": options.select,
        "choice": _CHOICE[options.select].format(share=options.held_out),
    }


@contextmanager
def _few_threads(products: int) -> Iterator[None]:
    """One CPU thread for steps of few products: on a busy machine two waited for each other 60 times as long (ours)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if products < SMALL_STEP else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_CHOICE = {
    "held_out": "head chosen on {share:.0%} of the train images, held out; not refit",
    "val": "head chosen on the test images themselves, as in the DINOv2 paper: optimistic",
}


def _choice_of_images(
    train: Labelled, test: Labelled, options: LinearOptions, generator: torch.Generator
) -> tuple[Rows, Rows]:
    """What heads are trained on, and what one is chosen on."""
    if options.select == "val":
        return _all_rows(train), _all_rows(test)
    held, fitted = (torch.from_numpy(r) for r in _held_out(len(train.labels), options, generator))
    features = train.tokens.values.flatten(1)
    return Rows(features, train.labels, fitted), Rows(features, train.labels, held)


def _all_rows(part: Labelled) -> Rows:
    return Rows(part.tokens.values.flatten(1), part.labels, torch.arange(len(part.labels)))


def _held_out(
    count: int, options: LinearOptions, generator: torch.Generator
) -> tuple[Int64[np.ndarray, " h"], Int64[np.ndarray, " f"]]:
    """Rows that a head is chosen on, and the others; ascending, so that an array on disk is read forwards."""
    if count < 2:
        raise ValueError("a linear probe needs at least 2 train images")
    order = torch.randperm(count, generator=generator).numpy()
    held = min(count - 1, max(1, round(options.held_out * count)))
    return np.sort(order[:held]), np.sort(order[held:])


def _logits(groups: list[HeadGroup], best: int, test: Labelled) -> Float[Tensor, "Q C"]:
    """Of one head, for the test images."""
    per_group = len(groups[0].heads)
    group, column = groups[best // per_group], best % per_group
    device = group.weight.device
    rows = test.tokens.values.flatten(1)
    return torch.cat([group.logits(x.to(device))[:, column].cpu() for x in rows.split(EVAL_CHUNK)])


def _details(groups: list[HeadGroup], found: list[float], best: int, fitted: int, chosen_on: int) -> dict[str, Any]:
    heads = [h for g in groups for h in g.heads]
    rates = sorted({h.lr for h in heads})
    table = [
        {"blocks": h.blocks, "avgpool": h.avgpool, "lr": h.lr, "chosen_by": a}
        for h, a in zip(heads, found, strict=True)
    ]
    return {
        "head": table[best],
        "at_edge_of_lrs": len(rates) > 1 and heads[best].lr in (rates[0], rates[-1]),  # a wider grid might score higher
        "heads": table,
        "trained_on": fitted,
        "chosen_on": chosen_on,
    }
