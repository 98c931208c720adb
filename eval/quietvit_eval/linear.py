"""Task `linear`: a grid of linear classifiers on frozen features, all trained at once (DINOv2's protocol).

Inputs are [CLS] of the last 1 or 4 blocks, with or without the mean patch of the last, and 13 learning rates each: 52
heads. Unlike DINOv2 (random crops and flips of the train images) the features are computed once, from central views:
protocol "features". It costs one pass over the images instead of ten, and scores somewhat lower.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from quietvit.contracts import Extractor
from quietvit_eval.accuracy import scores_of_logits
from quietvit_eval.data import EvalData, Labelled
from quietvit_eval.resampling import PerImage
from quietvit_eval.result import Result

# DINOv2, for a batch of 256
LRS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
BLOCKS = (1, 4)  # DINOv2
MOMENTUM = 0.9  # DINOv2; no weight decay
INIT_STD = 0.01  # DINOv2; biases start at 0
SMALL_STEP = 100_000_000  # products of a forward that one core does in a few milliseconds (ours)
EVAL_CHUNK = 1024  # rows scored at a time (ours)
SELECT = ("held_out", "val")


@dataclass(frozen=True)
class LinearOptions:
    """Settings of the task. Raises ValueError for values that cannot be."""

    select: str = "held_out"  # CAPI: the head is chosen on train images held out; "val": on the test images (DINOv2)
    held_out: float = 0.1  # share of the train images; CAPI
    blocks: tuple[int, ...] = BLOCKS
    lrs: tuple[float, ...] = LRS
    batch_size: int | None = None  # None: 1024 as DINOv2 on 8 GPUs, but an eighth of the train images at the most
    steps: int | None = None  # None: 10 passes as DINOv2, but 1,000 steps at the least (ours) and 12,500 at the most

    def __post_init__(self) -> None:
        if self.select not in SELECT:
            raise ValueError(f"linear: select must be one of {', '.join(SELECT)}, not {self.select!r}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"linear: held_out is a share of the train images between 0 and 1, not {self.held_out}")
        if not self.blocks or min(self.blocks) < 1 or not self.lrs:
            raise ValueError("linear: needs at least one number of blocks (from 1) and one learning rate")


@dataclass(frozen=True)
class Head:
    """One classifier of the grid. `lr` is for a batch of 256 images."""

    blocks: int
    avgpool: bool
    lr: float


@dataclass
class HeadGroup:
    """All heads with the same input: H learning rates side by side in one matrix, so a step is one product each way."""

    columns: slice  # of the flattened tokens [CLS_1 .. CLS_n | mean patch]
    heads: list[Head]
    weight: Float[Tensor, "W H C"]
    bias: Float[Tensor, "H C"]
    momenta: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.momenta = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]

    def logits(self, x: Float[Tensor, "B F"]) -> Float[Tensor, "B H C"]:
        """Of all heads; `x` are whole rows of features."""
        return (x[:, self.columns] @ self.weight.flatten(1)).view(len(x), *self.bias.shape) + self.bias

    def step(self, x: Float[Tensor, "B F"], labels: Int[Tensor, " B"], lrs: Float[Tensor, " H"]) -> None:
        """One SGD step on the sum over heads of the mean cross-entropy. Its gradient is softmax minus one-hot."""
        error = torch.softmax(self.logits(x), dim=-1)
        error.sub_(F.one_hot(labels, error.shape[-1])[:, None]).div_(len(x))
        gradients = ((x[:, self.columns].T @ error.flatten(1)).view_as(self.weight), error.sum(dim=0))
        for value, momentum, gradient in zip((self.weight, self.bias), self.momenta, gradients, strict=True):
            momentum.mul_(MOMENTUM).add_(gradient)
            value.addcmul_(momentum, lrs[:, None], value=-1)


def make_groups(
    num_blocks: int,
    embed_dim: int,
    num_classes: int,
    *,
    blocks: Sequence[int] = BLOCKS,
    lrs: Sequence[float] = LRS,
    pooled: Sequence[bool] = (False, True),
    generator: torch.Generator,
    device: torch.device,
) -> list[HeadGroup]:
    """The grid, for features of the last `num_blocks` blocks and the mean patch. Heads of one group start alike.

    `pooled`: without and with the mean patch; pixels are one vector an image and have the first only.
    """
    width = embed_dim
    groups = []
    for n in sorted({min(n, num_blocks) for n in blocks}):
        for avgpool in pooled:
            columns = slice((num_blocks - n) * width, (num_blocks + int(avgpool)) * width)
            start = torch.randn(columns.stop - columns.start, 1, num_classes, generator=generator) * INIT_STD
            groups.append(
                HeadGroup(
                    columns,
                    [Head(n, avgpool, lr) for lr in lrs],
                    start.repeat(1, len(lrs), 1).to(device),
                    torch.zeros(len(lrs), num_classes, device=device),
                )
            )
    return groups


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
        """Train all heads, choose one, score it on the test images. Raises ValueError with one train image."""
        train, test = data.features(extractor, "train"), data.features(extractor, "test")
        generator = torch.Generator().manual_seed(data.seed)
        fit, choose = _choice_of_images(train, test, options, generator)
        batch_size = options.batch_size or max(1, min(1024, len(fit) // 8))
        batch_size = min(batch_size, len(fit))
        steps = options.steps or min(12_500, max(1000, math.ceil(10 * len(fit) / batch_size)))
        groups = make_groups(
            train.tokens.values.shape[1] - 1,
            extractor.embed_dim,
            data.num_classes,
            blocks=options.blocks,
            lrs=options.lrs,
            pooled=(False, True) if getattr(extractor, "has_patches", True) else (False,),
            generator=generator,
            device=data.device,
        )
        with _few_threads(batch_size * sum(g.weight.numel() for g in groups)):
            train_heads(groups, fit, batch_size=batch_size, steps=steps, generator=generator)
        found = accuracies(groups, choose)
        best = max(range(len(found)), key=found.__getitem__)  # of equal ones the first: fewer blocks, lower rate
        scores, hits = scores_of_logits(_logits(groups, best, test), test.labels, data.num_classes)
        protocol = {
            "name": 'linear grid on cached features of central views ("features")',
            "inputs": [f"last {n} blocks, {pool} mean patch" for n in options.blocks for pool in ("no", "with")],
            "lrs": list(options.lrs),
            "batch_size": batch_size,
            "steps": steps,
            "select": options.select,
            "choice": _CHOICE[options.select].format(share=options.held_out),
        }
        details = _details(groups, found, best, len(fit), len(choose))
        return Result(scores, "top1", protocol, details, PerImage(data.names("test"), hits))


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
    features, count = train.tokens.values.flatten(1), len(train.labels)
    if count < 2:
        raise ValueError("a linear probe needs at least 2 train images")
    if options.select == "val":
        return (
            Rows(features, train.labels, torch.arange(count)),
            Rows(test.tokens.values.flatten(1), test.labels, torch.arange(len(test.labels))),
        )
    order = torch.randperm(count, generator=generator)
    held = min(count - 1, max(1, round(options.held_out * count)))
    # Ascending, so that an array on disk is read forwards.
    return (
        Rows(features, train.labels, order[held:].sort().values),
        Rows(features, train.labels, order[:held].sort().values),
    )


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
