"""From what a recipe says (shares of the run, lr per 1024 images, passes) to what a run does. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from quietvit.config.load import OPEN, ConfigError, flatten
from quietvit.config.schema import RunConfig


@dataclass(frozen=True)
class Plan:
    """The run in absolute numbers."""

    steps: int
    batch_size: int
    passes: float  # over the data
    lr: float
    lr_warmup_steps: int
    freeze_steps: int  # of the prototypes
    backbone_freeze_steps: int  # in a run that begins with a model
    temp_warmup_steps: int
    image_size: int
    grid: tuple[int, int]  # patches of a global crop


def scaled_lr(lr: float, batch_size: int, rule: str) -> float:
    """Peak learning rate at this batch: lr * sqrt(b / 1024) (DINOv2) or lr * b / 256 (DINO).

    Raises ConfigError for another rule.
    """
    if rule == "sqrt_wrt_1024":
        return lr * math.sqrt(batch_size / 1024)
    if rule == "linear_wrt_256":
        return lr * batch_size / 256
    if rule == "none":
        return lr
    raise ConfigError(f"optim.scaling={rule!r}: choose sqrt_wrt_1024, linear_wrt_256 or none")


# What the tokens-to-token stem takes; its own tables need torch (nn/tokens_to_token.py).
STEM_ATTENTION = ("performer", "performer_official", "transformer")
STEM_PATCHES = (4, 8, 16)


def check(config: RunConfig) -> None:
    """All that can be known wrong before torch is imported. Raises ConfigError."""
    check_values(config)
    check_init(config)
    check_stem(config)
    if config.model.patch_size is not None:
        check_sizes(config, stride=config.model.patch_size)


def check_init(config: RunConfig) -> None:
    """Raises ConfigError for settings of `init` that cannot be, and for open ones in a run with fresh weights."""
    init = config.init
    if init.from_ is None:
        settings = flatten(config)
        if left := [f"{s}.{n}" for s, names in OPEN.items() for n in names if settings[f"{s}.{n}"] is None]:
            raise ConfigError(f"{left[0]}=null: give a value; only a model that a run begins with (init.from) has one")
        if init.freeze_steps is not None:
            raise ConfigError(
                f"init.freeze_steps={init.freeze_steps}: fresh weights have nothing to keep. Give the model to begin "
                "with (init.from=FILE), or leave it out"
            )
    elif not init.from_:
        raise ConfigError("init.from is empty: give a file or a folder, or leave it out")
    if init.guard not in ("stop", "rewind", "off", False):
        raise ConfigError(f"init.guard={init.guard!r}: choose stop, rewind, off")
    if not 0 < init.guard_lr_factor < 1:
        raise ConfigError(f"init.guard_lr_factor={init.guard_lr_factor}: a factor between 0 and 1")
    if not init.guard_margin >= 0:
        raise ConfigError(f"init.guard_margin={init.guard_margin}: points of k-NN, 0 or more")
    for name, count, least in (
        ("freeze_steps", init.freeze_steps, 0),
        ("guard_patience", init.guard_patience, 1),
        ("guard_rewinds", init.guard_rewinds, 0),
    ):
        if count is not None and count < least:
            raise ConfigError(f"init.{name}={count}: must be at least {least}")
    if config.train.steps is not None and config.train.steps > 0:
        _backbone_freeze(config, steps=config.train.steps, one_pass=0)


def check_sizes(config: RunConfig, *, stride: int) -> None:
    """Raises ConfigError when a crop is not a multiple of the patch, naming the nearest good sizes."""
    sizes = {"crops.global_size": config.crops.global_size}
    if config.crops.num_local:
        sizes["crops.local_size"] = config.crops.local_size
    if config.model.image_size is not None:
        sizes["model.image_size"] = config.model.image_size
    if config.health.size is not None:
        sizes["health.size"] = config.health.size
    for name, side in sizes.items():
        if side < stride or side % stride:
            below, above = side // stride * stride, -(-side // stride) * stride
            good = " or ".join(str(s) for s in sorted({below, above}) if s >= stride) or str(stride)
            raise ConfigError(f"{name}={side} is not a multiple of the patch ({stride} px): use {good}")


def check_stem(config: RunConfig) -> None:
    """Raises ConfigError for stem settings that no tokens-to-token stem has, or without such a stem."""
    model, stem = config.model, config.model.stem
    if model.backbone is None:  # as in the model that the run begins with
        return
    if model.backbone != "t2t_vit":
        given = [f"model.stem.{f.name}" for f in fields(stem) if getattr(stem, f.name) != f.default]
        if given:
            raise ConfigError(
                f"{given[0]} is a setting of t2t_vit, and model.backbone is {model.backbone}: add "
                "model.backbone=t2t_vit, or leave it out"
            )
        return
    if stem.attention is not None and stem.attention not in STEM_ATTENTION:
        raise ConfigError(f"model.stem.attention={stem.attention!r}: choose {', '.join(STEM_ATTENTION)}")
    if model.patch_size is not None and model.patch_size not in STEM_PATCHES:
        raise ConfigError(
            f"model.patch_size={model.patch_size}: a tokens-to-token stem has {', '.join(map(str, STEM_PATCHES))} "
            "(16 is T2T-ViT's own)"
        )


def check_values(config: RunConfig) -> None:
    """Raises ConfigError for values that no run can have."""
    choices = {
        "train.precision": (config.train.precision, ("auto", "fp32", "bf16")),
        "objective.centering": (config.objective.centering, ("sinkhorn_knopp", "softmax")),
        "crops.blur": (config.crops.blur, ("reference_as_run", "paper", "none")),
        "parallel.strategy": (config.parallel.strategy, ("auto", "none", "ddp", "fsdp")),
        "parallel.checkpointing": (config.parallel.checkpointing, ("none", "selective", "full")),
    }
    for name, (value, good) in choices.items():
        if value not in good:
            raise ConfigError(f"{name}={value!r}: choose {', '.join(good)}")
    shares = {
        "optim.warmup": config.optim.warmup,
        "optim.freeze_last_layer": config.optim.freeze_last_layer,
        "teacher.temp_warmup": config.teacher.temp_warmup,
        "masks.probability": config.masks.probability,
        "data.max_bad_share": config.data.max_bad_share,
    }
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ConfigError(f"{name}={share}: a share of the run or of the data, between 0 and 1")
    for name, count in {
        "train.accumulate": config.train.accumulate,
        "health.every": config.health.every,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
    }.items():
        if count < 1:
            raise ConfigError(f"{name}={count}: must be at least 1")
    if not config.parallel.timeout > 0:
        raise ConfigError(f"parallel.timeout={config.parallel.timeout}: seconds, more than 0")
    batch = config.train.batch_size
    if isinstance(batch, str) and batch != "auto":
        raise ConfigError(f"train.batch_size={batch!r}: a number, or auto")
    if isinstance(batch, int) and (batch < 2 or batch % config.train.accumulate):
        raise ConfigError(
            f"train.batch_size={batch} with train.accumulate={config.train.accumulate}: the batch must be at least 2 "
            "(KoLeo needs a neighbour) and a multiple of the number of micro-batches"
        )
    if (config.train.steps is None) == (config.train.passes is None):
        raise ConfigError(
            "give the length of the run as one of the two: train.steps=N train.passes=null, or train.passes=N "
            "train.steps=null"
        )


def plan(config: RunConfig, *, num_images: int, batch_size: int, stride: int) -> Plan:
    """Absolute numbers for a data set of `num_images` and a batch of `batch_size` images.

    Raises ConfigError when there are fewer images than one batch holds.
    """
    if num_images < batch_size:
        raise ConfigError(
            f"the data set holds {num_images} images, fewer than one batch of {batch_size}: "
            f"set train.batch_size={max(2, 1 << (num_images.bit_length() - 1))} or less, or add images"
        )
    train = config.train
    steps = train.steps if train.steps is not None else max(1, round((train.passes or 0.0) * num_images / batch_size))
    if steps < 1:
        raise ConfigError(f"train.steps={steps}: a run has at least one step")
    cells = config.crops.global_size // stride
    return Plan(
        steps=steps,
        batch_size=batch_size,
        passes=steps * batch_size / num_images,
        lr=scaled_lr(config.optim.lr, batch_size, config.optim.scaling),
        lr_warmup_steps=round(config.optim.warmup * steps),
        freeze_steps=round(config.optim.freeze_last_layer * steps),
        backbone_freeze_steps=_backbone_freeze(config, steps=steps, one_pass=-(-num_images // batch_size)),
        temp_warmup_steps=round(config.teacher.temp_warmup * steps),
        image_size=config.model.image_size or config.crops.global_size,
        grid=(cells, cells),
    )


def _backbone_freeze(config: RunConfig, *, steps: int, one_pass: int) -> int:
    asked = config.init.freeze_steps
    if config.init.from_ is None:
        return 0
    if asked is None:
        return min(one_pass, steps // 10)
    if asked >= steps:
        raise ConfigError(f"init.freeze_steps={asked}: of {steps} steps none is left for the backbone")
    return asked
