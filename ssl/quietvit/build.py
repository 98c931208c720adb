"""The composition root: the only file that reads a whole RunConfig. It hands every constructor plain keywords."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import nn

from quietvit import dist, schedules
from quietvit.backbones import BACKBONES, Trunk, make_backbone
from quietvit.config.adopt import adopt, backbone_arguments
from quietvit.config.load import ConfigError, config_hash
from quietvit.config.resolve import Plan, check_sizes, plan
from quietvit.config.schema import HeadConfig, RunConfig
from quietvit.contracts import Batch
from quietvit.data.crops import BlurChoice, MultiCrop
from quietvit.data.loader import MultiCropBatches, make_batches
from quietvit.data.quarantine import BadImages
from quietvit.data.ram_cache import cached
from quietvit.data.sources import Source, open_source
from quietvit.files import write_text
from quietvit.methods import METHODS
from quietvit.optim import make_optimizer, parameter_groups
from quietvit.train import checkpoint
from quietvit.train.device import (
    GIB,
    MOST_IMAGES,
    Shapes,
    fitting_batch,
    free_memory,
    own_device,
    pick_device,
    pick_precision,
    shapes_of,
    step_memory,
)
from quietvit.train.environment import environment
from quietvit.train.guard import Guard, Rules
from quietvit.train.health import Probe
from quietvit.train.held_out import choose_held_out, val_split
from quietvit.train.loop import Training
from quietvit.train.parallel import parallelise, pick_strategy
from quietvit.weights.native import save_teacher
from quietvit.weights.start import Start, Triple, read_start


def build_training(config: RunConfig, run_dir: Path, console: Console) -> Training:
    """Put a run together: data, model, optimizer, probe. Prints what it is going to do.

    Raises ValueError (ConfigError among them) for settings that do not fit the data or the machine.
    """
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    torch.set_float32_matmul_precision("high")
    device = own_device(pick_device(config.train.device))
    strategy = pick_strategy(config.parallel.strategy)
    precision = pick_precision(config.train.precision, device)
    settings = config_hash(config)
    config, start = _read_start(config, run_dir)
    source = _open_source(config)
    torch.manual_seed(config.train.seed)
    start, begun = (None, None) if start is None else start.backbone(backbone_arguments(config.model, start.arguments))
    method = build_method(config, begun).to(device)
    backbone: Trunk = method.student["backbone"]
    shapes = step_shapes(config, method.student)
    batch_size, memory = _batch_size(config, shapes, device, precision, num_images=len(source), run_dir=run_dir)
    the_plan = plan(config, num_images=len(source), batch_size=batch_size, stride=backbone.stride)
    if dist.rank() == 0:
        write_text(run_dir / "environment.json", json.dumps(environment(device), indent=1))
        if start is not None:
            start.write(run_dir)
    bad_images = BadImages(run_dir, num_images=len(source), max_share=config.data.max_bad_share, rank=dist.rank())
    parameters = sum(p.numel() for p in backbone.parameters())
    engine = parallelise(
        method,
        strategy=strategy,
        checkpointing=config.parallel.checkpointing,
        compile_blocks=config.parallel.compile,
        device=device,
        precision=precision,
    )
    probe = _probe(config, source, device, precision)
    console.print(
        *_told(config, source, the_plan, start, parameters=parameters),
        f"on: {_place(device, strategy)}, {'bf16' if precision is torch.bfloat16 else 'fp32'}, about "
        f"{memory / GIB:.1f} GiB needed, {free_memory(device) / GIB:.1f} GiB free",
        sep="\n",
        highlight=False,
        soft_wrap=True,
    )
    return Training(
        run_dir=run_dir,
        method=method,
        optimizer=_optimizer(config, method),
        schedules=build_schedules(config, the_plan),
        batches=_batches(config, source, the_plan, device),
        steps=the_plan.steps,
        batch_size=batch_size,
        accumulate=config.train.accumulate,
        clip=config.optim.clip,
        seed=config.train.seed,
        device=device,
        precision=precision,
        probe=probe,
        health_every=config.health.every,
        gauge_every=config.health.gauge_every,
        checkpoint_every=config.checkpoint.every,
        keep=config.checkpoint.keep,
        max_bad_steps=config.train.max_bad_steps,
        bad_images=bad_images,
        save_teacher=partial(_save_teacher, config, settings, source, start),
        meta={"config_hash": settings, "batch_size": batch_size},
        embed_dim=backbone.embed_dim,
        prototypes=config.objective.head.num_prototypes,
        engine=engine,
        freeze_steps=the_plan.backbone_freeze_steps,
        guard=None if start is None else _guard(config, run_dir),
        background=config.checkpoint.background,
        timeout=config.parallel.timeout,
        console=console,
    )


def _read_start(config: RunConfig, run_dir: Path) -> tuple[RunConfig, Start | None]:
    """The model that the run begins with, if it does, and the config with what it takes over from that."""
    file, model = config.init.from_, config.model
    if file is None:
        return config, None
    alone = Path(file).expanduser()
    heads = model.num_heads if alone.is_file() and alone.suffix != ".safetensors" else None
    start = read_start(
        file,
        run_dir,
        resumed=bool(checkpoint.complete(run_dir)),
        num_heads=heads if model.backbone == "t2t_vit" else None,
    )
    sizes = BACKBONES[start.name].SIZES
    config = adopt(config, name=start.name, arguments=start.arguments, mean=start.mean, std=start.std, sizes=sizes)
    assert config.model.patch_size is not None
    check_sizes(config, stride=config.model.patch_size)
    return config, start


def _guard(config: RunConfig, run_dir: Path) -> Guard:
    init = config.init
    return Guard(
        run_dir,
        Rules(
            action=str(init.guard) if init.guard and config.health.images > 0 else "off",
            margin=init.guard_margin,
            patience=init.guard_patience,
            rewinds=init.guard_rewinds,
            lr_factor=init.guard_lr_factor,
        ),
    )


def _told(config: RunConfig, source: Source, the_plan: Plan, start: Start | None, *, parameters: int) -> Iterator[str]:
    """Lines that say what is going to be done."""
    model = config.model
    yield f"data: {source.name}"
    if start is not None:
        rest = the_plan.backbone_freeze_steps
        yield (
            f"begins with: {start.file} ({start.name}, weights {start.hash[:12]}; "
            f"{'; '.join(start.changes) or 'nothing changed'}). The heads are new"
            + (f"; for {rest} steps only they learn" if rest else "")
        )
        if config.health.images < 1 and config.init.guard not in ("off", False):
            yield "guard: health.images=0, so that forgetting cannot be seen"
    yield (
        f"model: {model.backbone} {model.size or f'{model.embed_dim} x {model.depth}'}, patch {model.patch_size}, "
        f"{model.num_registers} registers, {parameters / 1e6:.2f} M parameters"
    )
    yield (
        f"run: {the_plan.steps} steps of {the_plan.batch_size} images = {the_plan.passes:.1f} passes, "
        f"peak lr {the_plan.lr:.2g}"
    )


def _place(device: torch.device, strategy: str) -> str:
    processes = dist.world_size()
    return f"{device}" if processes == 1 else f"{processes} processes ({device.type}, {strategy})"


def _normalisation(config: RunConfig) -> tuple[Triple, Triple]:
    """Mean and standard deviation of the input, RGB in [0, 1]: given, default or taken over from a model by now."""
    mean, std = config.data.mean, config.data.std
    assert mean is not None
    assert std is not None
    return mean, std


def build_backbone(config: RunConfig) -> nn.Module:
    """The backbone of a config, freshly initialised from torch's current seed."""
    model = config.model
    arguments: dict[str, Any] = {
        "patch_size": model.patch_size,
        "image_size": model.image_size or config.crops.global_size,
        "num_registers": model.num_registers,
        "register_std": model.register_std,
        "layer_scale": model.layer_scale,
        "drop_path": model.drop_path,
        "drop_path_uniform": model.drop_path_uniform,
        "pos_interpolation": model.pos_interpolation,
        "pos_antialias": model.pos_antialias,
        "attention": model.attention,
        "init": model.init,
    }
    given = {
        "embed_dim": model.embed_dim,
        "depth": model.depth,
        "num_heads": model.num_heads,
        "ffn": model.ffn,
        "stem_attention": model.stem.attention,
        "token_dim": model.stem.token_dim,
        "recompute": model.stem.recompute or None,
    }
    arguments |= {k: v for k, v in given.items() if v is not None}
    return make_backbone(model.backbone or "vit", size=model.size, **arguments)


def build_method(config: RunConfig, backbone: nn.Module | None = None) -> Any:
    """The row of METHODS that the config names, with student, teacher and heads. `backbone` None: a fresh one."""
    objective = config.objective
    if objective.method not in METHODS:
        raise ValueError(f"objective.method={objective.method!r}: choose {', '.join(METHODS)}")

    def head(settings: HeadConfig) -> dict[str, Any]:
        return {
            "num_prototypes": settings.num_prototypes,
            "hidden_dim": settings.hidden_dim,
            "bottleneck_dim": settings.bottleneck_dim,
            "num_layers": settings.num_layers,
            "weight_norm": settings.weight_norm,
            "init": settings.init,
        }

    return METHODS[objective.method](
        lambda: build_backbone(config) if backbone is None else backbone,
        head=head(objective.head),
        ibot_head=head(objective.ibot_head) if objective.separate_heads else None,
        centering=objective.centering,
        sinkhorn_iterations=objective.sinkhorn_iterations,
        center_momentum=objective.center_momentum,
        student_temp=objective.student_temp,
        dino_weight=objective.dino_weight,
        ibot_weight=objective.ibot_weight,
        koleo_weight=objective.koleo_weight,
        ibot_denominator=objective.ibot_denominator,
        koleo_crops=objective.koleo_crops,
        koleo_across_ranks=objective.koleo_across_ranks,
        mean=_normalisation(config)[0],
        std=_normalisation(config)[1],
    )


def build_schedules(config: RunConfig, the_plan: Plan) -> schedules.Schedules:
    """The five curves of a run, in steps."""
    steps = the_plan.steps
    optim, teacher = config.optim, config.teacher
    return schedules.Schedules(
        lr=schedules.Cosine(the_plan.lr, optim.min_lr, steps, warmup_steps=the_plan.lr_warmup_steps),
        weight_decay=schedules.Cosine(*optim.weight_decay, steps),
        momentum=schedules.Cosine(*teacher.momentum, steps),
        teacher_temp=schedules.Linear(*teacher.temp, the_plan.temp_warmup_steps),
        last_layer_freeze_steps=the_plan.freeze_steps,
    )


def _open_source(config: RunConfig) -> Source:
    data = config.data
    source = open_source(data.source, data.path, split=data.split, **data.options)
    return cached(source, min_side=build_crops(config).min_side, max_mb=data.ram_cache_mb)


def _optimizer(config: RunConfig, method: Any) -> torch.optim.Optimizer:
    optim = config.optim
    groups = parameter_groups(
        method.trainable(),
        num_blocks=int(method.student["backbone"].num_blocks),
        layer_decay=optim.layer_decay,
        patch_embed_lr_mult=optim.patch_embed_lr_mult,
        decay_tokens=optim.decay_tokens,
    )
    return make_optimizer(groups, betas=optim.betas)


def build_crops(config: RunConfig) -> MultiCrop:
    """The augmentation of a config."""
    crops = config.crops
    return MultiCrop(
        global_size=crops.global_size,
        local_size=crops.local_size,
        num_local=crops.num_local,
        global_scale=crops.global_scale,
        local_scale=crops.local_scale,
        color_strength=crops.color_strength,
        jitter_prob=crops.color_probability,
        grayscale_prob=crops.grayscale_probability,
        solarize_prob=crops.solarize_probability,
        flip_prob=crops.flip_probability,
        blur=cast(BlurChoice, crops.blur),
        blur_kernel=crops.blur_kernel,
        blur_sigma=crops.blur_sigma,
    )


def _batches(
    config: RunConfig, source: Source, the_plan: Plan, device: torch.device
) -> Callable[[int], Iterator[Batch]]:
    steps = MultiCropBatches(
        source,
        build_crops(config),
        seed=config.train.seed,
        batch_size=the_plan.batch_size,
        patch_grid=the_plan.grid,
        mask_probability=config.masks.probability,
        mask_ratio=config.masks.ratio,
        rank=dist.rank(),
        world_size=dist.world_size(),
    )
    return make_batches(steps, total_steps=the_plan.steps, workers=config.data.workers, device=device)


def step_shapes(config: RunConfig, student: nn.ModuleDict) -> Shapes:
    """What decides the memory of a step of this config."""
    crops, objective = config.crops, config.objective
    patch_head = objective.ibot_head if objective.separate_heads else objective.head
    return shapes_of(
        cast(Trunk, student["backbone"]),
        parameters=sum(p.numel() for p in student.parameters()),
        global_size=crops.global_size,
        local_size=crops.local_size,
        num_local=crops.num_local,
        masked_share=config.masks.probability * sum(config.masks.ratio) / 2,
        prototypes=objective.head.num_prototypes,
        patch_prototypes=patch_head.num_prototypes,
    )


def _batch_size(
    config: RunConfig,
    shapes: Shapes,
    device: torch.device,
    precision: torch.dtype,
    *,
    num_images: int,
    run_dir: Path,
) -> tuple[int, int]:
    """Images per step over all ranks, and the estimated bytes that a step takes on each.

    Raises ConfigError for a batch that the ranks and their micro-batches cannot share evenly.
    """
    accumulate, size, ranks = config.train.accumulate, 2 if precision is torch.bfloat16 else 4, dist.world_size()
    batch = config.train.batch_size
    if isinstance(batch, str):
        # A resumed run keeps the batch it began with, however much memory is free now.
        own = fitting_batch(
            shapes,
            free_memory(device),
            bytes_per_value=size,
            accumulate=accumulate,
            most=min(MOST_IMAGES, num_images // ranks),
        )
        batch = _batch_of_checkpoint(run_dir) or ranks * min(dist.gather_objects(own))
    if batch % (ranks * accumulate):
        raise ConfigError(
            f"train.batch_size={batch} cannot be shared evenly by {ranks} processes with train.accumulate={accumulate}"
            f": use a multiple of {ranks * accumulate}"
        )
    own = batch // ranks // accumulate
    return batch, step_memory(shapes, own, bytes_per_value=size, accumulate=accumulate)


def _batch_of_checkpoint(run_dir: Path) -> int | None:
    found = checkpoint.complete(run_dir)
    if not found:
        return None
    size = json.loads((found[-1] / "state.json").read_text(encoding="utf-8")).get("batch_size")
    return None if size is None else int(size)


def _save_teacher(
    config: RunConfig,
    settings: str,
    source: Source,
    start: Start | None,
    folder: Path,
    backbone: nn.Module,
    step: int,
) -> None:
    mean, std = _normalisation(config)
    save_teacher(
        folder,
        backbone,
        mean=mean,
        std=std,
        image_size=config.model.image_size or config.crops.global_size,
        provenance={
            "step": step,
            "seed": config.train.seed,
            "config_hash": settings,
            "data": source.name,
            "data_fingerprint": source.fingerprint(),
            "num_images": len(source),
            "objective": config.objective.method,
            **({} if start is None else {"init": start.about()}),
        },
        backbone_name=config.model.backbone or "vit",
    )


def _probe(config: RunConfig, source: Source, device: torch.device, precision: torch.dtype) -> Probe | None:
    health = config.health
    if health.images < 1:
        return None
    held_out = choose_held_out(
        source,
        val_split(config.data.source, config.data.path, config.data.split, config.data.options),
        label=health.label,
        num_images=health.images,
        num_bank=health.bank,
        size=health.size or config.crops.global_size,
        seed=config.train.seed,
    )
    return Probe(held_out, *_normalisation(config), device, precision, health.neighbours)
