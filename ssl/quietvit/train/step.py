"""The whole training step on one screen: values in, values out, no logging inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from quietvit import dist, optim
from quietvit.contracts import Batch, Targets
from quietvit.schedules import StepValues
from quietvit.train.warmup import drop_gradients


class Method(Protocol):
    """What the loop knows of a pretraining method (a row of METHODS)."""

    loss_weights: dict[str, float]

    def teach(self, batches: Sequence[Batch], *, temp: float) -> list[Targets]:
        """Targets of the whole effective batch, one Targets per micro-batch."""
        ...

    def study(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        """Named scalar losses of one micro-batch."""
        ...

    def follow(self, momentum: float) -> None:
        """Move the teacher towards the student."""
        ...

    def trainable(self) -> dict[str, nn.Module]:
        """The student's submodules, each clipped on its own."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What a step did, the same on all ranks: losses are means over them.

    `broken` names the terms that were not finite; if there are any, nothing was changed.
    """

    losses: dict[str, float]
    grad_norms: dict[str, float]
    broken: tuple[str, ...]
    targets: list[Targets]  # of this rank
    stop: bool = False  # some rank was asked to stop


class Engine(Protocol):
    """How the student's losses are computed over ranks (quietvit.train.parallel)."""

    @property
    def study(self) -> Callable[[Batch, Targets], dict[str, Tensor]]: ...

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]: ...


def seed_step(seed: int, step: int) -> None:
    """Seed torch for one step, so that stochastic depth is a function of (seed, step, rank) and a resumed run repeats
    it."""
    torch.manual_seed((seed * 1_000_003 + step + dist.rank() * 1_000_000_000_039) % (1 << 63))


def train_step(
    method: Method,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    at: StepValues,
    *,
    clip: float,
    device: torch.device,
    precision: torch.dtype,
    state: Mapping[str, Tensor],
    engine: Engine,
    resting: Sequence[nn.Module] = (),
    stop: Callable[[], bool] = bool,
    at_place: Callable[[str], None] = lambda place: None,
) -> Outcome:
    """One optimizer step over the micro-batches of one effective batch (DINOv2; order of training.md 4.0).

    `state` are the method's own running buffers (centers): they go back to what they were when the step is skipped.
    Parameters of the modules in `resting` are not updated (quietvit.train.warmup).
    `stop()` is asked at the end of the step: the outcome says whether any rank would, so that all leave together.
    `at_place` is told "teacher", "student" and "step" as they begin.
    """
    before = {name: value.clone() for name, value in state.items()}
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision is torch.bfloat16)
    at_place("teacher")
    with autocast:
        targets = method.teach(batches, temp=at.teacher_temp)
    at_place("student")
    sums: dict[str, Tensor] = {}
    for number, (batch, target) in enumerate(zip(batches, targets, strict=True), start=1):
        with engine.accumulating(last=number == len(batches)):
            with autocast:
                losses = engine.study(batch, target)
            total = torch.stack([method.loss_weights[k] * v / len(batches) for k, v in losses.items()]).sum()
            total.backward()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.detach() / len(batches)
    at_place("step")
    norms = optim.clip_by_module(method.trainable(), max_norm=clip)
    names = [*sums, *norms]
    wishes = torch.tensor(float(stop()), device=device)
    values = torch.stack([*(v.detach().float() for v in (*sums.values(), *norms.values())), wishes])
    values = dist.sum_over_ranks(values) / dist.world_size()  # what is not finite anywhere is finite nowhere
    names = [*names, "stop"]
    numbers = dict(zip(names, values.tolist(), strict=True))  # the step's only synchronisation
    finite = dict(zip(names, values.isfinite().tolist(), strict=True))
    broken = tuple(f"loss {k}" for k in sums if not finite[k]) or tuple(
        f"gradient of {k}" for k in norms if not finite[k]
    )
    if broken:
        for name, value in state.items():
            value.copy_(before[name])
    else:
        drop_gradients(resting)
        optim.apply_schedule(optimizer, lr=at.lr, last_layer_lr=at.last_layer_lr, weight_decay=at.weight_decay)
        optimizer.step()
        method.follow(at.momentum)
    optimizer.zero_grad(set_to_none=True)
    return Outcome({k: numbers[k] for k in sums}, {k: numbers[k] for k in norms}, broken, targets, numbers["stop"] > 0)
