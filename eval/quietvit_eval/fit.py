"""Training a head on frozen features: schedule, gradient averaging, and resuming where it was interrupted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from quietvit import dist
from quietvit.files import write_atomically
from quietvit_eval.held_signals import held_signals

B = TypeVar("B")

SAVE_EVERY = 500  # steps between saves (ours: seconds of work on a GPU, minutes on a CPU)
ONE_CYCLE_END = 1 / 25_000  # of the rate: DINOv3's div_factor 25 times its final_div_factor 1,000
ONE_CYCLE_BETAS = (0.85, 0.95)  # DINOv3
OPTIMIZER = "optimizer/"  # prefix of the optimizer's tensors in a state file


@dataclass(frozen=True)
class Schedule:
    """The rate's factor by step: a warm-up that multiplies a decay (as the OpenMMLab tool boxes have it)."""

    steps: int
    warmup_steps: int = 0
    warmup_factor: float = 1e-6  # what the warm-up begins with
    decay: str = "poly"  # "poly": linear to 0; "cosine": to 0 along a cosine; "one_cycle": DINOv3's depth; "none"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.warmup_steps < 0:
            raise ValueError(f"steps must be at least 1 and warmup_steps at least 0, got {self}")
        if self.decay not in ("poly", "cosine", "one_cycle", "none"):
            raise ValueError(f"decay is one_cycle, poly, cosine or none, not {self.decay!r}")

    def factor(self, step: int) -> float:
        """Of the rate at `step`, counted from 0."""
        done = step / self.steps
        if self.decay == "one_cycle":
            return self._one_cycle(step)
        decay = {"poly": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "none": 1.0}[self.decay]
        if step >= self.warmup_steps:
            return decay
        return decay * (1 - (1 - step / self.warmup_steps) * (1 - self.warmup_factor))

    def _one_cycle(self, step: int) -> float:
        """warmup_factor + step / warmup_steps times a cosine over all steps, then that cosine down to 1 / 25,000."""
        if step < self.warmup_steps:
            return self.warmup_factor + step / self.warmup_steps * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return ONE_CYCLE_END + (1 - ONE_CYCLE_END) * 0.5 * (1 + math.cos(math.pi * (step + 1) / self.steps))

    def beta1(self, step: int) -> float | None:
        """What AdamW's first beta is at `step`; None: as it was given.

        "one_cycle" has 0 during the warm-up and then 0.85, rising to 0.95 along a cosine (DINOv3's scheduler).
        """
        if self.decay != "one_cycle":
            return None
        if step < self.warmup_steps:
            return 0.0
        done = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        low, high = ONE_CYCLE_BETAS
        return high + (low - high) * 0.5 * (1 + math.cos(math.pi * done))


def fit(
    head: nn.Module,
    loss_of: Callable[[B, int], Tensor],
    batches_from: Callable[[int], Iterable[B]],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    *,
    clip: float | None = None,
    state: Path | None = None,
    save_every: int = SAVE_EVERY,
    console: Console | None = None,
    what: str = "head",
) -> list[float]:
    """Train `head` for schedule.steps steps; returns the losses of the steps taken now.

    Args:
        loss_of: the loss of a batch at a step; gradients are averaged over ranks.
        batches_from: the batches from a step on.
        clip: greatest L2 norm of the gradient.
        state: file that keeps weights, buffers and optimizer; if it is there, training goes on from it, and a finished
            one is taken as it is. On Ctrl-C and SIGTERM the step underway is finished and the state saved first; a
            step that fails is taken back and the state saved as well.

    Raises ValueError if the loss is not finite, or if `state` does not fit the head.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    first = 0 if state is None else load_state(state, head, optimizer)
    losses: list[float] = []
    step, between_steps = first, True
    head.train()
    with _progress(console) as progress:
        bar = progress.add_task(what, total=schedule.steps, completed=first, loss=math.nan)
        try:
            for batch in batches_from(first) if first < schedule.steps else ():
                with held_signals():
                    for group, rate in zip(optimizer.param_groups, rates, strict=True):
                        group["lr"] = rate * schedule.factor(step)
                        if (beta1 := schedule.beta1(step)) is not None:
                            group["betas"] = (beta1, group["betas"][1])
                    losses.append(_gradients(head, loss_of, batch, optimizer, clip, step))
                    between_steps = False
                    optimizer.step()
                    step, between_steps = step + 1, True
                progress.update(bar, completed=step, loss=losses[-1])
                if state is not None and step % save_every == 0:
                    save_state(state, head, optimizer, step)
        finally:
            if state is not None and step > first and between_steps:
                save_state(state, head, None if step >= schedule.steps else optimizer, step)
    head.eval()
    return losses


def _gradients(
    head: nn.Module,
    loss_of: Callable[[B, int], Tensor],
    batch: B,
    optimizer: torch.optim.Optimizer,
    clip: float | None,
    step: int,
) -> float:
    """Put the mean gradient over ranks into the head; returns the loss. If that fails, the head is as it was before:
    its forward moves running statistics."""
    kept = [buffer.clone() for buffer in head.buffers()]
    try:
        loss = loss_of(batch, step)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ValueError(f"the loss of the head is {value} at step {step}: a smaller rate (lr) may help")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for p in head.parameters() if p.grad is not None]
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad = dist.sum_over_ranks(parameter.grad) / dist.world_size()
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
    except BaseException:
        for buffer, before in zip(head.buffers(), kept, strict=True):
            buffer.copy_(before)
        raise
    return value


def _progress(console: Console | None) -> Progress:
    shown = console is not None and console.is_terminal and dist.rank() == 0
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} steps"))
    return Progress(
        *columns, TextColumn("loss {task.fields[loss]:.3f}"), TimeRemainingColumn(),
        console=console, transient=True, disable=not shown,
    )  # fmt: skip


def save_state(path: Path, head: nn.Module, optimizer: torch.optim.Optimizer | None, step: int) -> None:
    """Write weights, buffers and (unless it is done) the optimizer; rank 0 only."""
    if dist.rank() != 0:
        return
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in head.state_dict().items()}
    if optimizer is not None:
        for number, values in optimizer.state_dict()["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"{OPTIMIZER}{number}/{name}"] = value.detach().cpu().contiguous().clone()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: save_file(tensors, file, metadata={"step": str(step)}))


def load_state(path: Path, head: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore what `save_state` wrote; returns the steps done, 0 if there is no file or it is damaged.

    Raises ValueError if its tensors are not those of this head.
    """
    if not path.is_file():
        return 0
    try:
        with safe_open(path, "pt") as file:
            step = int(file.metadata()["step"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return 0
    weights = {name: value for name, value in tensors.items() if not name.startswith(OPTIMIZER)}
    try:
        head.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold this head: {error}. Remove it to train anew") from error
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(OPTIMIZER):
            number, key = name.removeprefix(OPTIMIZER).split("/")
            state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step
