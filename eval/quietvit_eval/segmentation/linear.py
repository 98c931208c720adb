"""Task `segmentation`: a linear head on frozen patch features, trained on crops and scored by sliding windows.

The defaults are DINOv2's linear recipe for ADE20K, as released for mmsegmentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from quietvit import dist
from quietvit.contracts import Extractor
from quietvit_eval.blocks import check_blocks
from quietvit_eval.dense_data.pairs import CLASSES
from quietvit_eval.fit import Schedule, fit
from quietvit_eval.pair_data import PairBatch, PairData
from quietvit_eval.result import Result
from quietvit_eval.segmentation.augment import TrainView
from quietvit_eval.segmentation.head import SegmentationHead, pixel_loss
from quietvit_eval.segmentation.scoring import check_names, score
from quietvit_eval.segmentation.sliding import WholeView, classes_of
from quietvit_eval.views import feature_maps

NAME = "segmentation"


@dataclass(frozen=True)
class SegmentationOptions:
    """Settings of the task. Defaults: DINOv2's linear head on ADE20K, if nothing else is said."""

    blocks: int | tuple[int, ...] = 1  # the last n, or the listed ones, numbered from 0 (+ms: the last 4)
    norm: bool = True  # through the final norm
    short_side: int = 512  # of the image, in pixels, before random scaling (+ms: 640)
    crop: int = 512  # side of a training crop in pixels (+ms: 640)
    ratio: tuple[float, float] = (0.5, 2.0)  # of random scaling (+ms: 1 to 3)
    max_share: float = 0.75  # crops of which one class fills this share are drawn again
    flip: bool = True
    photometric: bool = True
    batch_size: int = 16  # crops a step, over all processes (DINOv2: 8 GPUs with 2 each)
    steps: int = 40_000
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4  # DINOv3: 1e-3
    warmup_steps: int = 1500
    decay: str = "poly"  # DINOv3: "cosine"
    dropout: float = 0.0  # of whole channels, before the norm (DINOv3: 0.1)
    average: str = "all"  # the loss over all pixels of a batch; "valid": over those that count
    window: int | None = None  # side of a test window in pixels; None: crop
    stride: int = 341  # between test windows, in pixels (+ms: 320)
    scales: tuple[float, ...] = (1.0,)  # of test images (+ms: 1, 1.32, 1.73, 2.28, 3)
    flip_test: bool = False  # test images mirrored too (+ms: yes)
    keep_padding: bool = False  # True: the misplaced maps of DINOv2 (see `to_pixels`)
    pictures: int = 8  # test images whose predictions are drawn (ours)

    def __post_init__(self) -> None:
        for name in ("short_side", "crop", "batch_size", "steps", "stride"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        _require(self.blocks != () and (isinstance(self.blocks, tuple) or self.blocks >= 1), "blocks: name one or more")
        _require(len(self.ratio) == 2 and 0 < self.ratio[0] <= self.ratio[1], f"ratio is two numbers, got {self.ratio}")
        _require(0 < self.max_share <= 1, f"max_share must be above 0 and at most 1, got {self.max_share}")
        _require(0 <= self.dropout < 1, f"dropout must be at least 0 and below 1, got {self.dropout}")
        _require(self.lr > 0 and self.weight_decay >= 0, "lr must be above 0 and weight_decay at least 0")
        _require(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), f"betas are two, got {self.betas}")
        _require(self.average in ("all", "valid"), f"average is all or valid, not {self.average!r}")
        _require(len(self.scales) > 0 and min(self.scales) > 0, f"scales are above 0, got {self.scales}")
        _require(self.pictures >= 0, f"pictures must be at least 0, got {self.pictures}")
        self.schedule()
        _require(
            self.warmup_steps < self.steps,
            f"a warm-up of {self.warmup_steps} steps leaves none of the {self.steps} at the full rate: set "
            f"warmup_steps too, e.g. to {self.steps * 1500 // 40_000} (the recipe's share)",
        )
        window = self.crop if self.window is None else self.window
        _require(window >= 1, f"window must be at least 1, got {self.window}")
        _require(self.stride <= window, f"a stride of {self.stride} leaves gaps between windows of {window} pixels")

    def schedule(self) -> Schedule:
        """Of the rate."""
        return Schedule(self.steps, self.warmup_steps, decay=self.decay)

    def at(self, image_size: int | None) -> SegmentationOptions:
        """For a side asked for by the user: it replaces short_side and crop; window and stride scale as the crop."""
        if image_size is None:
            return self
        scale = image_size / self.crop
        window = None if self.window is None else max(1, round(self.window * scale))
        stride = max(1, min(round(self.stride * scale), image_size if window is None else window))
        return replace(self, short_side=image_size, crop=image_size, window=window, stride=stride)

    def which(self, num_blocks: int) -> tuple[int, ...]:
        """Indices of the blocks, of a model that has `num_blocks`. Raises ValueError for more than there are."""
        return listed_blocks(self.blocks, num_blocks)


TEST_ONLY = ("window", "stride", "scales", "flip_test", "pictures")  # what a trained head does not depend on


def listed_blocks(blocks: int | tuple[int, ...], num_blocks: int) -> tuple[int, ...]:
    """The last n blocks, or those listed, as indices. Raises ValueError for more than there are."""
    if isinstance(blocks, tuple):
        return blocks
    if blocks > num_blocks:
        raise ValueError(f"the last {blocks} blocks asked for; the model has {num_blocks}")
    return tuple(range(num_blocks - blocks, num_blocks))


def _require(true: bool, said: str) -> None:
    if not true:
        raise ValueError(f"{NAME}: {said}")


class SegmentationTask:
    """mIoU, mAcc and aAcc of a linear head."""

    target = CLASSES
    options = SegmentationOptions

    def check(self, extractor: Extractor, num_classes: int, options: SegmentationOptions) -> None:
        """Raises ValueError for blocks that the model cannot give, or fewer than two classes."""
        check_blocks(extractor, options.which(extractor.num_blocks), norm=options.norm)
        _require(num_classes >= 2, f"there must be at least 2 classes to tell apart, got {num_classes}")

    def run(self, extractor: Extractor, data: PairData, options: SegmentationOptions) -> Result:
        """Train the head, or go on with one that was interrupted; score it.

        Raises ValueError for splits of unlike classes, and as `PairData.batches`, `fit` and `score`.
        """
        check_names(data.train.source.class_names, data.test.source.class_names)
        options = options.at(data.image_size)
        protocol = _protocol(options)
        head = train_head(extractor, data, options)
        view = WholeView(
            short_side=options.short_side,
            window=options.crop if options.window is None else options.window,
            stride=options.stride,
            scales=options.scales,
            flip=options.flip_test,
            keep_padding=options.keep_padding,
            chunk=data.reading.batch_size,
        )
        which = options.which(extractor.num_blocks)

        @torch.no_grad()
        def scores(windows: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b K gh gw"]:
            out: Tensor = head(feature_maps(extractor, windows, which, norm=options.norm).to(data.device).float())
            return out

        details = {"blocks": list(which), "channels": head.conv.in_channels}
        return score(
            data,
            lambda image: classes_of(scores, image, view, extractor.stride),
            task=NAME,
            protocol=protocol,
            details=details,
            pictures=options.pictures,
        )


def train_head(extractor: Extractor, data: PairData, options: SegmentationOptions) -> SegmentationHead:
    """A head fitted to data.train, in eval mode. `options` as after `at`."""
    which = options.which(extractor.num_blocks)
    head = SegmentationHead(
        extractor.embed_dim * len(which),
        data.num_classes,
        dropout=options.dropout,
        generator=torch.Generator().manual_seed(data.seed),
    ).to(data.device)
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=options.lr, betas=options.betas, weight_decay=options.weight_decay
    )
    view = TrainView(
        options.short_side, options.crop, options.ratio, options.max_share, options.flip, options.photometric,
        extractor.mean,
    )  # fmt: skip

    def loss_of(batch: PairBatch, step: int) -> Tensor:
        with torch.no_grad():
            parts = batch.images.split(data.reading.batch_size)
            maps = torch.cat([feature_maps(extractor, part, which, norm=options.norm) for part in parts])
        with _drawn_for(step, data):
            logits = head(maps.to(data.device).float())
        return pixel_loss(
            logits, batch.targets.to(data.device), extractor.stride,
            average=options.average, keep_padding=options.keep_padding,
        )  # fmt: skip

    fit(
        head,
        loss_of,
        lambda first: data.batches(view, batch_size=options.batch_size, first=first, steps=options.steps),
        optimizer,
        options.schedule(),
        state=data.state_file(NAME, {k: v for k, v in _protocol(options).items() if k not in TEST_ONLY}),
        console=data.reading.console,
        what=f"{NAME} head",
    )
    return head


@contextmanager
def _drawn_for(step: int, data: PairData) -> Iterator[None]:
    """Torch's random numbers (dropout's) depend on seed, step and rank, so that a resumed head is the same."""
    devices = [data.device] if data.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed((data.seed * 1_000_003 + step) * 4099 + dist.rank())
        yield


def _protocol(options: SegmentationOptions) -> dict[str, Any]:
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(options).items() if k != "pictures"}
    settings["window"] = options.crop if options.window is None else options.window
    return {"name": "linear segmentation head on frozen patch features", **settings}
