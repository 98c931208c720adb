"""Every setting of a run, with its default and where the default comes from. Pure data: no torch here.

Sources named in the comments: [D2] DINOv2 (arXiv 2304.07193), [Reg] Vision Transformers Need Registers
(arXiv 2309.16588), "short recipe" = DINOv2's released ImageNet-1k ViT-L/16 configuration, "ours" = chosen here.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class StemConfig:
    """The tokens-to-token stem of t2t_vit; a ViT has none of these."""

    attention: str | None = None  # "performer" or "transformer"; None: what the size says
    token_dim: int | None = None  # width inside the stem; None: what the size says (T2T-ViT: 64)
    recompute: bool = False  # hold less of the stem for the backward pass and compute it twice


@dataclass(frozen=True)
class ModelConfig:
    """The backbone. None in a run that begins with a model (`init.from`): as that model has it."""

    backbone: str | None = "vit"  # a row of BACKBONES: vit, t2t_vit
    size: str | None = "small"  # a row of the backbone's size table: `quietvit info` prints them
    embed_dim: int | None = None  # None: what the size says
    depth: int | None = None
    num_heads: int | None = None
    ffn: str | None = None  # "mlp" or "swiglu"; None: what the size says
    patch_size: int | None = 16  # short recipe
    image_size: int | None = None  # side of the position grid in pixels; None: the global crop
    num_registers: int | None = 4  # [Reg] Fig. 8: one removes artifacts, four are best on dense tasks
    register_std: float = 1e-6  # of new registers; [D2]'s code, where short runs leave them alike. DINOv3: 0.02
    layer_scale: float | None = 1e-5  # short recipe; 0 leaves it out
    drop_path: float = 0.3  # short recipe
    drop_path_uniform: bool = True  # short recipe
    pos_interpolation: str | None = "size"  # [Reg] App. A and its released models; "offset": the original models
    pos_antialias: bool | None = True  # [Reg] App. A: without it the position table gets stripes
    attention: str = "auto"  # a row of ATTENTION, or "auto"
    stem: StemConfig = field(default_factory=StemConfig)
    init: str = "trunc_normal"  # short recipe; "xavier" (ours, not compared): larger weights for tiny models


@dataclass(frozen=True)
class InitConfig:
    """What a run begins with: fresh weights, or a model (`init.from=FILE`), whose heads are always new.

    What the recipe leaves open in `model` and in `data.mean`, `data.std` is then taken from that model.
    """

    from_: str | None = None  # "from" in a recipe: whatever quietvit.weights.load reads; None: fresh weights
    # Steps in which only the heads learn. None: one pass over the data, as lightly-train does when it starts from
    # weights, but a tenth of the run at the most (ours: short runs are to learn too).
    freeze_steps: int | None = None
    # When the model forgets what it knew: "stop", "rewind" to when it did not, or "off" (which YAML reads as false).
    guard: str | bool = "stop"
    # Points of k-NN below the start that are too many (ours). The health probe's 500 images have a standard error of
    # 2.2 points at worst, the difference of two models on the same images less; those who ask for help lost tens.
    guard_margin: float = 5.0
    guard_patience: int = 2  # looks in a row below it (ours: one can be chance, or the jolt when the backbone wakes)
    guard_rewinds: int = 3  # then it stops (ours: at the factor below an eighth of the learning rate did not do)
    guard_lr_factor: float = 0.5  # on the rest of the learning rate's curve at each rewind: DINOv2 issue 143 halves it


@dataclass(frozen=True)
class HeadConfig:
    """A projection head: MLP, L2-normalised bottleneck, prototypes."""

    num_prototypes: int = 65536  # short recipe
    hidden_dim: int = 2048  # short recipe
    bottleneck_dim: int = 256  # short recipe
    num_layers: int = 3  # short recipe
    weight_norm: str = (
        "frozen"  # DINO and iBOT freeze the length of the prototypes; "trained" is DINOv2's, "none" DINOv3's
    )
    init: str = "trunc_normal"  # short recipe


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised."""

    method: str = "dinov2"  # a row of METHODS
    dino_weight: float = 1.0  # short recipe
    ibot_weight: float = 1.0  # short recipe
    koleo_weight: float = 0.1  # short recipe
    centering: str = "sinkhorn_knopp"  # [D2] section 4; the short recipe has "softmax". Steadier at small batches
    sinkhorn_iterations: int = 3  # [D2] section 4
    center_momentum: float = 0.9  # DINO; read by centering "softmax"
    student_temp: float = 0.1  # short recipe
    ibot_denominator: str = "all_crops"  # reference; "masked_crops" is the iBOT paper's sum (twice as large)
    koleo_crops: str = "both"  # reference code; "first" is the text of [D2]
    koleo_across_ranks: bool = False  # neighbours on each GPU alone, as [D2]; true: among the images of all
    separate_heads: bool = False  # short recipe; the long ones have True
    head: HeadConfig = field(default_factory=HeadConfig)
    ibot_head: HeadConfig = field(default_factory=HeadConfig)  # read if separate_heads


@dataclass(frozen=True)
class MaskConfig:
    """Block masks on the student's global crops."""

    probability: float = 0.5  # share of crops with a mask; short recipe
    ratio: tuple[float, float] = (0.1, 0.5)  # least and greatest share of masked patches; short recipe


@dataclass(frozen=True)
class DataConfig:
    """Which images."""

    source: str = "auto"  # a row of DATASETS, or "auto": found out from the path
    path: str | None = None
    split: str = "train"
    options: dict[str, str | int | float | bool] = field(
        default_factory=dict
    )  # keywords of the source, e.g. num_images
    # -1: as many as there are cores to spare, 8 at the most; none when training on the CPU itself, where they take the
    # cores from the model (benchmarks/results/workers-2026-11-21.md)
    workers: int = -1
    ram_cache_mb: int = 1024  # decoded images are kept in memory if they all fit in this (ours)
    max_bad_share: float = 0.01  # stop when more of the images than this cannot be read (ours)
    mean: tuple[float, float, float] | None = (0.485, 0.456, 0.406)  # ImageNet, RGB in [0, 1]; None: as in ModelConfig
    std: tuple[float, float, float] | None = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class CropsConfig:
    """Multi-crop augmentation; [D2] and the short recipe unless noted."""

    global_size: int = 224
    local_size: int = 96
    num_local: int = 8
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.32)
    color_strength: float = 1.0  # multiplies brightness .4, contrast .4, saturation .2, hue .1
    color_probability: float = 0.8
    grayscale_probability: float = 0.2
    solarize_probability: float = 0.2
    flip_probability: float = 0.5
    blur: str = "reference_as_run"  # released models saw 0 / .9 / .5; "paper" is 1 / .1 / .5; "none"
    blur_kernel: int = 9
    blur_sigma: tuple[float, float] = (0.1, 2.0)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW; short recipe unless noted."""

    lr: float = 0.004  # at a batch of 1024 images, scaled by `scaling`
    scaling: str = "sqrt_wrt_1024"  # or "linear_wrt_256", or "none"
    min_lr: float = 1e-6
    warmup: float = 0.1  # share of the run with rising learning rate
    weight_decay: tuple[float, float] = (0.04, 0.4)  # first and last, cosine
    decay_tokens: bool = True  # decay tokens and position table too, as the reference does
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 3.0  # L2 norm per submodule
    layer_decay: float = 0.9
    patch_embed_lr_mult: float = 0.2
    freeze_last_layer: float = 0.01  # share of the run with prototypes at rest


@dataclass(frozen=True)
class TeacherConfig:
    """The EMA teacher; short recipe."""

    momentum: tuple[float, float] = (0.992, 1.0)  # first and last, cosine
    temp: tuple[float, float] = (0.04, 0.07)  # first and last, linear
    temp_warmup: float = 0.3  # share of the run in which the temperature rises


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch, machine."""

    steps: int | None = None  # length in optimizer steps, or ...
    passes: float | None = None  # ... in passes over the data; exactly one of the two
    batch_size: int | str = "auto"  # images per step in all; "auto": greatest power of two that fits, 64 at most (ours)
    accumulate: int = 1  # micro-batches per step; teacher targets are always those of the whole batch
    precision: str = "auto"  # "fp32", "bf16", or "auto": bf16 where the hardware is fast at it
    device: str = "auto"  # "cpu", "cuda", "mps", or "auto"
    threads: int | None = None  # torch's CPU threads; None: all cores
    seed: int = 0
    max_bad_steps: int = 10  # non-finite steps in a row before the run stops (ours)


@dataclass(frozen=True)
class ParallelConfig:
    """How one run spreads over several processes, and what a step trades for memory."""

    strategy: str = "auto"  # "none", "ddp", "fsdp"; "auto": none alone, else ddp
    checkpointing: str = "none"  # of activations: "none", "selective", "full"
    compile: bool = False  # torch.compile of each block
    timeout: float = 600.0  # seconds without a step before a run ends, naming the rank that is missing (PyTorch: 600)


@dataclass(frozen=True)
class HealthConfig:
    """What is watched while it trains."""

    every: int = 500  # steps between two looks (ours: under 1 % of the time at real sizes)
    images: int = 500  # held-out images looked at (ours)
    bank: int = 2000  # labelled training images for the online k-NN (ours)
    label: str = "class"  # label set for the online k-NN, where there is one
    neighbours: int = 20  # DINO's figure
    size: int | None = None  # side of the images looked at; None: the global crop
    # Steps between two readings of the artifact gauge, and at the last step; 0: none. Ours: under 1 % of the time
    # (benchmarks/results/gauge-2026-11-21.json).
    gauge_every: int = 100


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept."""

    every: int = 1000  # steps (ours)
    keep: int = 3  # DINOv2
    background: bool = False  # written while training goes on, from a copy in memory (with a process group only)


@dataclass(frozen=True)
class RunConfig:
    """A whole run. Only quietvit.build reads it; everybody else is handed plain keywords."""

    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    crops: CropsConfig = field(default_factory=CropsConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
