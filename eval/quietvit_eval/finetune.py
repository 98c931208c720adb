"""Task `finetune`: a linear head and the last blocks of the backbone, or all of it, trained on the train images.

A check of the features, not a measure of them: good ones should gain little (DINOv2 paper, section 7.1). The recipe is
DeiT III's for 224 pixels (Touvron et al. 2022; its repository's README_revenge), with these differences: 3-Augment,
which DeiT III pretrains with, instead of RandAugment; the head starts at zero, not pretrained, and has a rate of its
own; the test view is that of all tasks. The backbone of the extractor is left as it is: a copy is trained.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quietvit import dist
from quietvit.backbones import Trunk
from quietvit.contracts import Extractor, Features
from quietvit.data.sampler import batch_rng
from quietvit.optim import parameter_groups
from quietvit.weights.extractor import BackboneExtractor
from quietvit_eval.accuracy import scores_of_logits
from quietvit_eval.data import EvalData
from quietvit_eval.fit import Schedule, fit
from quietvit_eval.label_views import LabelBatch, RandomView, label_batches
from quietvit_eval.mixing import Mixed, mix
from quietvit_eval.resampling import PerImage
from quietvit_eval.result import Result
from quietvit_eval.views import normalised

AUGMENTS = ("three", "crops")
BATCH = 512  # DeiT III: 64 on each of 8 GPUs
# DeiT III, by the width of the base, large and huge models; narrower ones: none.
DROP_PATH = {768: 0.2, 1024: 0.45, 1280: 0.55}
WARMUP_FROM = 1e-6 / 1e-5  # DeiT: the warm-up begins at 1e-6
CHUNK = 8192  # test images scored at a time (ours: 33 MB at 1,000 classes)


@dataclass(frozen=True)
class FinetuneOptions:
    """Settings of the task; "D3" below: DeiT III's recipe. Raises ValueError for values that cannot be."""

    blocks: int | str = "all"  # how many last blocks are trained; 0: the head alone; "all": the stem too (D3)
    epochs: float = 20.0  # D3
    warmup_epochs: float = 5.0  # D3
    steps: int | None = None  # instead of epochs
    batch_size: int | None = None  # None: 512 as D3, but an eighth of the train images at the most (ours)
    lr: float = 1e-5  # D3; for a batch of 512, in proportion for others
    head_lr: float = 1e-3  # ours, whatever the batch: a head that starts at zero has further to go
    layer_decay: float = 1.0  # D3 has none; 0.65 to 0.9 in BEiT and MAE
    weight_decay: float = 0.1  # D3; not for biases, norms, tokens and positions
    label_smoothing: float = 0.1  # D3
    mixup: float = 0.8  # D3: Beta(0.8, 0.8); 0: none
    cutmix: float = 1.0  # D3: Beta(1, 1), half of the batches; 0: none
    augment: str = "three"  # ours, see above; "crops": random crops and flips only
    drop_path: float | None = None  # None: D3's, by the width: 0.2 from 768, 0.45 from 1024, 0.55 from 1280, else 0
    images_at_once: int = 64  # D3, on each GPU; a greater batch is computed in parts of so many, to bound memory

    def __post_init__(self) -> None:
        if self.blocks != "all" and (not isinstance(self.blocks, int) or self.blocks < 0):
            raise ValueError(f'finetune: blocks is a number from 0 or "all", not {self.blocks!r}')
        if self.augment not in AUGMENTS:
            raise ValueError(f"finetune: augment must be one of {', '.join(AUGMENTS)}, not {self.augment!r}")
        for name in ("epochs", "steps", "batch_size", "lr", "head_lr", "layer_decay", "images_at_once"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"finetune: {name} must be greater than 0, not {value}")
        for name in ("warmup_epochs", "weight_decay", "mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"finetune: {name} must be at least 0, not {getattr(self, name)}")
        for name in ("label_smoothing", "drop_path"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"finetune: {name} must be in [0, 1), not {value}")
        if self.steps is None and self.warmup_epochs > self.epochs:
            raise ValueError(f"finetune: {self.warmup_epochs} epochs of warm-up are more than all {self.epochs} epochs")


class Finetuned(nn.Module):
    """A backbone and a linear head on [CLS, mean patch] of its last block.

    `trained` holds the submodules whose parameters change: its state is all that must be kept.
    """

    def __init__(self, backbone: Trunk, num_classes: int, blocks: int | str, drop_path: float) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.head = nn.Linear(2 * backbone.embed_dim, num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        depth = backbone.num_blocks
        self.num_blocks = depth if blocks == "all" else int(blocks)
        first = depth - self.num_blocks
        backbone.drop_rates = [0.0] * first + [drop_path] * self.num_blocks  # D3: the same for all
        parts: dict[str, nn.Module] = {}
        if blocks == "all":
            parts["backbone"] = backbone
        elif self.num_blocks:
            parts = {"norm": backbone.norm, **{f"block{i}": backbone.blocks[i] for i in range(first, depth)}}
        for part in parts.values():
            part.requires_grad_(True)
        backbone.mask_token.requires_grad_(False)  # nothing is masked here
        if backbone.options.num_classes:
            backbone.head.requires_grad_(False)
        self.trained = nn.ModuleDict({**parts, "head": self.head})

    def forward(self, images: Float[Tensor, "b 3 S S"]) -> Float[Tensor, "b C"]:
        return cast(Tensor, self.head(pooled(self.backbone(images))))


def pooled(features: Features) -> Float[Tensor, "b 2*D"]:
    """[CLS | mean patch]."""
    return torch.cat([features.cls, features.patches.flatten(1, 2).mean(dim=1)], dim=1)


def make_optimizer(model: Finetuned, options: FinetuneOptions, scale: float) -> torch.optim.AdamW:
    """AdamW with layer-wise rates, times `scale`, for the backbone; the head has a rate of its own."""
    groups = []
    for module, lr in ((model.backbone, scale * options.lr), (model.head, options.head_lr)):
        for group in parameter_groups(
            {"": module},
            num_blocks=model.backbone.num_blocks,
            layer_decay=options.layer_decay if module is model.backbone else 1.0,
            patch_embed_lr_mult=1.0,
            decay_tokens=False,
        ):
            rates = {"lr": lr * group["lr_mult"], "weight_decay": options.weight_decay * group["wd_mult"]}
            groups.append({"params": group["params"], **rates})
    return torch.optim.AdamW(groups)


class FinetuneTask:
    """Top-1 and top-5 of the fine-tuned model on central views, after the last step: nothing is chosen."""

    blocks = 1
    target = "labels"
    splits = ("train", "test")
    options = FinetuneOptions

    def check(self, extractor: Extractor, num_classes: int, options: FinetuneOptions) -> None:
        """Raises ValueError for an extractor that quietvit did not make, or more blocks than there are."""
        _backbone_of(extractor, options)

    def run(self, extractor: Extractor, data: EvalData, options: FinetuneOptions) -> Result:
        """Raises ValueError as `check`, `label_batches` and `fit`."""
        own = _backbone_of(extractor, options)
        count = len(data.train.indices)
        batch_size = options.batch_size or _default_batch(count)
        steps = options.steps or max(1, math.ceil(options.epochs * count / batch_size))
        drop_path = options.drop_path if options.drop_path is not None else _drop_path(own.embed_dim)
        protocol = _protocol(options, batch_size, steps, drop_path)
        backbone = cast(Trunk, copy.deepcopy(own.backbone))
        model = Finetuned(backbone, data.num_classes, options.blocks, drop_path).to(own.device)
        details = {
            "train_images": count,
            "parameters": sum(p.numel() for p in model.parameters()),
            "parameters_trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }
        _train(model, own, data, options, batch_size=batch_size, steps=steps, facts=protocol)
        tuned = BackboneExtractor(model.backbone, own.meta, device=own.device, bf16=own.bf16)
        # Features of a model of its own: kept apart from the frozen one's, and not in the cache on disk.
        seen = replace(data.fresh(None), reading=replace(data.reading, store=None))
        test = seen.features(tuned, "test")
        data.note_unreadable("test", test.tokens.skipped)
        rows = test.tokens.values[:, -2:].flatten(1)
        with torch.no_grad():
            logits = torch.cat([model.head(x.to(own.device)).float().cpu() for x in rows.split(CHUNK)])
        scores, hits = scores_of_logits(logits, data.answers(test.tokens.indices))
        return Result(scores, "top1", protocol, details, PerImage(seen.names("test"), hits))


def _backbone_of(extractor: Extractor, options: FinetuneOptions) -> BackboneExtractor:
    if not isinstance(extractor, BackboneExtractor):
        raise ValueError(
            "task finetune trains the weights themselves, so it needs a model that quietvit loads (a run, a "
            f"teacher.safetensors, an official file), not {type(extractor).__name__}: knn and linear score its features"
        )
    if options.blocks != "all" and int(options.blocks) > extractor.num_blocks:
        raise ValueError(f'finetune: blocks={options.blocks}, but the model has {extractor.num_blocks}; or say "all"')
    return extractor


def _default_batch(count: int) -> int:
    world = dist.world_size()
    return max(1, min(BATCH, count // 8) // world) * world


def _drop_path(width: int) -> float:
    return max((rate for least, rate in DROP_PATH.items() if width >= least), default=0.0)


def _train(
    model: Finetuned,
    own: BackboneExtractor,
    data: EvalData,
    options: FinetuneOptions,
    *,
    batch_size: int,
    steps: int,
    facts: dict[str, Any],
) -> None:
    """Train in place; interrupted, it goes on later from the state kept in data.folder."""
    size = data.transform.image_size
    view = RandomView(size, three_augment=options.augment == "three")

    def loss_of(batch: LabelBatch, step: int) -> Tensor:
        mixed = mix(batch.images, batch.labels, batch_rng(data.seed, step), mixup=options.mixup, cutmix=options.cutmix)
        own_draws = np.random.SeedSequence((data.seed, step, dist.rank())).generate_state(1, np.uint64)
        return _loss(model, own, mixed, options, seed=int(own_draws[0] >> 1))

    def batches_from(first: int) -> Iterable[LabelBatch]:
        return label_batches(data, data.train, view, batch_size=batch_size, first=first, steps=steps)

    model.backbone.train()  # stochastic depth
    warmup = round(steps * min(1.0, options.warmup_epochs / options.epochs))
    fit(
        model.trained,
        loss_of,
        batches_from,
        make_optimizer(model, options, batch_size / BATCH),
        Schedule(steps, warmup, WARMUP_FROM, "cosine"),
        state=data.state_file("finetune", {**facts, "size": size, "parts": options.images_at_once}),
        console=data.reading.console,
        what="fine-tuning",
    )
    model.eval()


def _loss(
    model: Finetuned, own: BackboneExtractor, mixed: Mixed, options: FinetuneOptions, *, seed: int
) -> Float[Tensor, ""]:
    """Mean cross-entropy with the mixed labels. Of a batch of several parts, activations are computed again."""
    images, parts = normalised(own, mixed.images), options.images_at_once
    with _draws_from(seed, own.device), torch.autocast(own.device.type, torch.bfloat16, enabled=own.bf16):
        if len(images) <= parts:
            logits = model(images)
        else:
            logits = torch.cat([checkpoint(model, part, use_reentrant=False) for part in images.split(parts)])
    return mixed_cross_entropy(logits.float(), mixed, options.label_smoothing)


def mixed_cross_entropy(logits: Float[Tensor, "b C"], mixed: Mixed, smoothing: float) -> Float[Tensor, ""]:
    """share * H(first label) + (1 - share) * H(second label), both smoothed (Zhang et al. 2018, mixup)."""
    first, second = (
        F.cross_entropy(logits, labels.to(logits.device), label_smoothing=smoothing)
        for labels in (mixed.first, mixed.second)
    )
    return mixed.share * first + (1 - mixed.share) * second


@contextmanager
def _draws_from(seed: int, device: torch.device) -> Iterator[None]:
    """torch's random numbers start from `seed` inside; afterwards they go on as if nothing had been."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _protocol(options: FinetuneOptions, batch_size: int, steps: int, drop_path: float) -> dict[str, Any]:
    return {
        "name": "fine-tuning with a linear head on [CLS, mean patch], after DeiT III; weights after the last step",
        "blocks": options.blocks,
        "steps": steps,
        "warmup_share": options.warmup_epochs / options.epochs,
        "batch_size": batch_size,
        "lr": options.lr,
        "head_lr": options.head_lr,
        "layer_decay": options.layer_decay,
        "weight_decay": options.weight_decay,
        "label_smoothing": options.label_smoothing,
        "mixup": options.mixup,
        "cutmix": options.cutmix,
        "augment": options.augment,
        "drop_path": drop_path,
    }
