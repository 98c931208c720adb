"""What changes over a run, as pure functions of the iteration. No torch, no state: resuming needs nothing from here.

Forms and figures: DINOv2 (arXiv 2304.07193) and its released recipes; DINOv3's variants are options of the same
curve.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Cosine", "Linear", "Schedules", "StepValues"]


@dataclass(frozen=True)
class Cosine:
    """Rest at zero, then a linear warm-up to `start`, then half a cosine down (or up) to `final`.

    With n cosine steps, step i of them has the value final + (start - final) (1 + cos(pi i / n)) / 2; from
    `total_steps` on the value is `final`. The peak comes twice: as the last warm-up step and as the first of the
    cosine (DINOv2).

    Raises ValueError if rest and warm-up are longer than the run.
    """

    start: float
    final: float
    total_steps: int
    warmup_steps: int = 0
    warmup_start: float = 0.0  # DINOv2: the learning rate rises from zero
    freeze_steps: int = 0
    repeat_peak: bool = True  # DINOv2; False: warm-up stops one step short of the peak
    closed: bool = False  # DINOv2; True: the last step already has the final value (DINOv3)
    truncation: float = 0.0  # DINOv3, `closed` only: cut a cosine longer by this share, stretched to end at `final`

    def __post_init__(self) -> None:
        if self.freeze_steps + self.warmup_steps > self.total_steps:
            raise ValueError(
                f"{self.freeze_steps} resting and {self.warmup_steps} warm-up steps do not fit into a run of "
                f"{self.total_steps} steps: shorten the warm-up or lengthen the run"
            )
        if self.truncation and not self.closed:
            raise ValueError("truncation is defined for closed=True only")

    def at(self, step: int) -> float:
        """Value at iteration `step`, counted from 0."""
        if step >= self.total_steps:
            return self.final
        if step < self.freeze_steps:
            return 0.0
        step -= self.freeze_steps
        if step < self.warmup_steps:
            return _ramp(self.warmup_start, self.start, step, self.warmup_steps, closed=self.repeat_peak)
        share = self._cosine(step - self.warmup_steps, self.total_steps - self.freeze_steps - self.warmup_steps)
        return self.final + (self.start - self.final) * share

    def _cosine(self, step: int, num_steps: int) -> float:
        """Share of the way still to go, from 1 to 0."""
        if not self.closed:
            return 0.5 * (1.0 + math.cos(math.pi * step / num_steps))
        last = max(int((1.0 + self.truncation) * num_steps) - 1, 1)
        lowest = math.cos(math.pi * (num_steps - 1) / last)
        return 1.0 if num_steps == 1 else (math.cos(math.pi * step / last) - lowest) / (1.0 - lowest)


@dataclass(frozen=True)
class Linear:
    """From `start` to `final` in `num_steps` steps, both ends included, then constant (DINO's teacher
    temperature)."""

    start: float
    final: float
    num_steps: int

    def at(self, step: int) -> float:
        """Value at iteration `step`, counted from 0."""
        if step >= self.num_steps:
            return self.final
        return _ramp(self.start, self.final, step, self.num_steps, closed=True)


def _ramp(start: float, final: float, step: int, num_steps: int, *, closed: bool) -> float:
    """`num_steps` equally spaced values; a closed ramp has `final` as its last one."""
    intervals = num_steps - 1 if closed else num_steps
    return start + (final - start) * step / intervals if intervals else start


@dataclass(frozen=True)
class StepValues:
    """Everything that a training step takes from the schedules."""

    lr: float
    last_layer_lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float


@dataclass(frozen=True)
class Schedules:
    """The five curves of a run. The prototypes (last layers) rest for the first `last_layer_freeze_steps` steps."""

    lr: Cosine
    weight_decay: Cosine
    momentum: Cosine
    teacher_temp: Linear
    last_layer_freeze_steps: int

    def at(self, step: int) -> StepValues:
        """Values of iteration `step`, counted from 0."""
        lr = self.lr.at(step)
        return StepValues(
            lr=lr,
            last_layer_lr=0.0 if step < self.last_layer_freeze_steps else lr,
            weight_decay=self.weight_decay.at(step),
            momentum=self.momentum.at(step),
            teacher_temp=self.teacher_temp.at(step),
        )
