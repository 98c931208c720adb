"""Test-time registers for a model: its register neurons found on images, and as few of them moved as will do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from quietvit.data.sources import Source
from quietvit.weights.extractor import BackboneExtractor
from quietvit.weights.retrofit import RegisterNeurons, add_test_time_registers, find_register_neurons
from quietvit_eval.inspect.layers import measure
from quietvit_eval.inspect.tokens import ImageSet, choose_images, look_at
from quietvit_eval.views import normalised

# Ours; the released configurations of arXiv 2506.08010 move 10 neurons of OpenCLIP-B and 50 of DINOv2-L.
STEPS = (1, 2, 5, 10, 20, 50, 100)
CLEARED = 0.1  # of the outliers, that may be left above the old cutoff for a step to do (ours)
USELESS = 0.5  # ... and with more than these left there is no retrofit (ours)


@dataclass(frozen=True)
class RetrofitOptions:
    """Settings of `retrofit`. Raises ValueError for values that cannot be."""

    registers: int = 1  # added; the paper finds one to be enough
    neurons: int | None = None  # moved; None: the first of STEPS that does
    block: int = -1  # after which outliers are told; DINOv2-L's last block flattens them: -2 in the paper's settings
    last_block: int | None = None  # looked into; None: the one after which outliers begin
    images: int = 500  # the paper's code
    image_size: int | None = None  # None: the model's, 224 at the most
    seed: int = 0
    batch_size: int = 32
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("registers", "images", "batch_size", "neurons"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, not {value}")


@dataclass(frozen=True)
class Trial:
    """What is left of the outliers when so many neurons are moved."""

    neurons: int
    kind: str  # the verdict on norms after the block where outliers were told
    share: float  # of outliers by that verdict, in [0, 1]
    left: float  # patches above the cutoff of the model as it was, as a share of what it had there


@dataclass(frozen=True)
class Retrofit:
    """A model with test-time registers, and how it was come by."""

    model: BackboneExtractor
    found: RegisterNeurons
    chosen: Trial
    trials: tuple[Trial, ...]
    images: ImageSet


@dataclass(frozen=True)
class _Batches:
    """The images of a set as a model wants them, as often as they are asked for."""

    extractor: BackboneExtractor
    images: ImageSet
    what: str

    def __iter__(self) -> Iterator[Float[Tensor, "b 3 S S"]]:
        for seen in look_at(self.images, what=self.what):
            if len(seen.rows):
                yield normalised(self.extractor, seen.images)


def retrofit(
    extractor: BackboneExtractor, source: Source, options: RetrofitOptions, *, console: Console | None = None
) -> Retrofit:
    """Find the register neurons and add registers that they act in.

    If the number of neurons is left open, STEPS are tried until a step leaves no outliers and at most CLEARED of the
    patches that were above the cutoff; if none does, the one that leaves fewest is taken.

    Raises ValueError as `find_register_neurons`, for data without readable images, and if moving neurons leaves more
    than USELESS of the outliers: they have another origin then.
    """
    images = choose_images(
        source, extractor, limit=options.images, seed=options.seed, image_size=options.image_size,
        batch_size=options.batch_size, workers=options.workers, console=console,
    )  # fmt: skip
    images = images.without([bad for seen in look_at(images, what="reading images") for bad in seen.bad])
    batches = _Batches(extractor, images, "register neurons")
    found = find_register_neurons(extractor, batches, block=options.block, last=options.last_block)
    steps = STEPS if options.neurons is None else (options.neurons,)
    there = len(found.ranked(max(steps)))
    if not there:
        raise ValueError("no hidden unit acts more strongly in outliers than elsewhere: there is nothing to move")
    trials, best = [], None
    for count in dict.fromkeys(min(step, there) for step in steps):
        model = add_test_time_registers(extractor, found.top(count), options.registers)
        trial = _try(model, found, images, count)
        trials.append(trial)
        if best is None or trial.left < best[0].left:
            best = trial, model
        if trial.kind == "none" and trial.left <= CLEARED:
            break
    assert best is not None
    if best[0].left > USELESS:
        raise ValueError(_useless(trials, best[0], found))
    return Retrofit(best[1], found, best[0], tuple(trials), images)


def _try(model: BackboneExtractor, found: RegisterNeurons, images: ImageSet, count: int) -> Trial:
    norms, _ = measure(model, images, [found.block], probed=found.block, what=f"{count} neurons moved")
    verdict = norms.verdict(found.block)
    above = int((norms.at_probed > found.verdict.cutoff).sum())
    share = verdict.share if verdict.kind == "outliers" else 0.0
    return Trial(count, verdict.kind, share, above / found.outliers)


def _useless(trials: Sequence[Trial], best: Trial, found: RegisterNeurons) -> str:
    tried = ", ".join(str(trial.neurons) for trial in trials)
    return (
        f"moving {tried} hidden units of blocks 0 to {len(found.at_outliers) - 1} leaves {best.left:.0%} of the "
        "outliers or more: it is not a few units that make them. Look into later blocks (last_block), or add registers "
        "by further training"
    )
