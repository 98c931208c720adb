"""The loop: batches in, checkpoints, metrics and a line to look at out. It knows only the method's protocol."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from quietvit import dist
from quietvit.backbones import Trunk
from quietvit.contracts import Batch
from quietvit.data.quarantine import BadImages
from quietvit.schedules import Schedules
from quietvit.train import checkpoint, state
from quietvit.train.accumulate import split
from quietvit.train.gauge import ArtifactGauge, Episodes
from quietvit.train.guard import ForgottenError, Guard
from quietvit.train.health import Probe, TargetGauge, verdicts
from quietvit.train.metrics import MetricsLog, NoMetrics, read_metrics
from quietvit.train.parallel import Engine
from quietvit.train.progress import Progress
from quietvit.train.signals import StopRequest
from quietvit.train.step import Method, Outcome, seed_step, train_step
from quietvit.train.watch import Watch


class TrainingStoppedError(RuntimeError):
    """The run cannot go on; the message is the verdict."""


@dataclass
class Training:
    """All parts of a run, put together by quietvit.build."""

    run_dir: Path
    method: nn.Module  # also a Method
    optimizer: torch.optim.Optimizer
    schedules: Schedules
    batches: Callable[[int], Iterator[Batch]]  # from a step on
    steps: int
    batch_size: int
    accumulate: int
    clip: float
    seed: int
    device: torch.device
    precision: torch.dtype
    probe: Probe | None
    health_every: int
    checkpoint_every: int
    keep: int
    max_bad_steps: int
    bad_images: BadImages
    save_teacher: Callable[[Path, nn.Module, int], None]  # folder, backbone, step
    meta: Mapping[str, object]  # goes into every checkpoint
    embed_dim: int
    prototypes: int
    engine: Engine
    freeze_steps: int = 0  # so long only the heads learn (quietvit.train.warmup)
    guard: Guard | None = None  # of a run that begins with a model
    gauge_every: int = 0  # steps between two readings of the artifact gauge; 0: none
    background: bool = False  # checkpoints are written while training goes on
    timeout: float = 600.0  # seconds without progress before a run of several processes ends (PyTorch's for NCCL)
    console: Console = field(default_factory=Console)


@dataclass(frozen=True)
class Finished:
    """How a run ended: after all its steps, or at a signal with everything saved."""

    step: int
    steps: int
    signum: int | None
    seconds: float


def run(training: Training) -> Finished:
    """Train from the newest checkpoint of the run folder (or from the start) to the end or to a signal.

    Raises TrainingStoppedError after `max_bad_steps` non-finite steps in a row or by the forgetting guard,
    TooManyUnreadable, CheckpointError, and LostRankError when another process is gone.
    """
    with contextlib.closing(training.engine), Watch(training.timeout) as watch:
        finished = None
        while finished is None:
            try:
                finished = _run(training, watch)
            except ForgottenError as verdict:
                watch.at("start")
                _rewind(training, str(verdict))
        watch.at("end")
        dist.barrier()  # nobody takes the group away while another still needs it
        return finished


def _run(training: Training, watch: Watch) -> Finished:
    saved = _resume(training)
    start = saved or 0
    guard = training.guard
    if start >= training.steps:
        _say(training, f"already finished: {start} of {training.steps} steps are done in {training.run_dir}")
        return Finished(start, training.steps, None, 0.0)
    began = time.monotonic()
    images = training.batch_size
    first = dist.rank() == 0
    with (
        StopRequest() as stop,
        # Without a checkpoint nothing is kept, the look at step 0 neither: it comes again.
        MetricsLog(training.run_dir, resume_step=start if start else -1) if first else NoMetrics() as log,
        Progress(training.console, steps=training.steps, start=start, images_per_step=images) as progress,
        contextlib.closing(
            checkpoint.Writer(training.run_dir, keep=training.keep, background=training.background)
        ) as writer,
    ):
        loop = _Loop(training, log, progress, watch)
        if start == 0:
            watch.at("health")
            loop.look(0, {})
            if saved is None and guard is not None and guard.measures:
                watch.at("checkpoint")
                _save(training, writer, 0)
                saved = 0
        step = start
        batches = training.batches(start)
        leave = dist.anywhere(bool(stop), training.device)
        while step < training.steps and not leave:
            leave = loop.advance(step, batches, stop=lambda: bool(stop))
            step += 1
            writer.settle()
            if step == training.steps or step % training.checkpoint_every == 0:
                watch.at("checkpoint")
                _save(training, writer, step)
                saved = step
        if leave and step < training.steps:
            if saved != step:
                watch.at("checkpoint")
                _save(training, writer, step)
            progress.say(f"{stop.name}: saved at step {step} of {training.steps}; the same command resumes")
    if guard is not None and step == training.steps and (figures := guard.finish()):
        _say(training, figures)
    signum = (stop.signum or int(signal.SIGTERM)) if leave and step < training.steps else None
    return Finished(step, training.steps, signum, time.monotonic() - began)


class _Loop:
    """What is carried from step to step."""

    def __init__(self, training: Training, log: MetricsLog | NoMetrics, progress: Progress, watch: Watch) -> None:
        self.t = training
        self.watch = watch
        self.log = log
        self.progress = progress
        self.gauge = TargetGauge()
        self.bad_in_a_row = 0
        self.skipped = 0
        self.window: list[tuple[float, float]] = []  # (seconds of a step, seconds of it spent waiting for data)
        self.health: dict[str, float] = {}
        self.method: Method = training.method  # type: ignore[assignment]
        backbone: Trunk = training.method.teacher["backbone"]  # type: ignore[index,assignment]
        self.artifacts = ArtifactGauge(backbone, every=training.gauge_every, steps=training.steps)
        self.episodes = Episodes(training.run_dir, num_registers=backbone.num_registers)
        if dist.rank() == 0:
            self.episodes.replay(read_metrics(training.run_dir / "metrics.jsonl"))
        self.notes: list[str] = []  # for the progress line

    def advance(self, step: int, batches: Iterator[Batch], *, stop: Callable[[], bool]) -> bool:
        """One step: batch `step` (counted from 0) becomes weights of step + 1. Returns whether a rank wants to stop."""
        t = self.t
        self.watch.at("data", step + 1)
        before = time.monotonic()
        batch = next(batches)
        waited = time.monotonic() - before
        t.bad_images.add(batch.bad)
        micro = split(batch.to(t.device), t.accumulate)
        seed_step(t.seed, step)
        at = t.schedules.at(step)
        if t.guard is not None:
            at = replace(at, lr=at.lr * t.guard.lr_factor, last_layer_lr=at.last_layer_lr * t.guard.lr_factor)
        with self.artifacts.watching(step + 1):
            outcome = train_step(
                self.method,
                t.optimizer,
                micro,
                at,
                clip=t.clip,
                device=t.device,
                precision=t.precision,
                state=running_buffers(t.method),
                engine=t.engine,
                resting=[self.method.trainable()["backbone"]] if step < t.freeze_steps else (),
                stop=stop,
                at_place=self.watch.at,
            )
        self.window = [*self.window[-49:], (time.monotonic() - before, waited)]
        seconds = sum(s for s, _ in self.window)
        share = sum(w for _, w in self.window) / seconds
        speed = len(self.window) * t.batch_size / seconds
        values = {f"loss/{k}": v for k, v in outcome.losses.items()}
        values["loss/total"] = sum(self.method.loss_weights[k] * v for k, v in outcome.losses.items())
        values |= {f"grad_norm/{k}": v for k, v in outcome.grad_norms.items()}
        values |= {"lr": at.lr, "weight_decay": at.weight_decay, "momentum": at.momentum, "temp": at.teacher_temp}
        values |= {"images_per_s": round(speed, 2), "data_wait": round(share, 4)}
        values["images"] = float((step + 1) * t.batch_size)
        if outcome.broken:
            self.bad_in_a_row += 1
            self.skipped += 1
            values["skipped"] = float(self.skipped)
        else:
            self.bad_in_a_row = 0
            self.gauge.add(outcome.targets)
        self.log.write(step + 1, values)
        if outcome.broken:
            self._tell_skipped(step, outcome)
        shown = {k.removeprefix("loss/"): v for k, v in values.items() if k.startswith("loss/")}
        if self.artifacts.due(step + 1):
            self.watch.at("health")
            self.read_artifacts(step + 1)
        self.progress.update(step + 1, shown | self.health, notes=self.notes, wait_share=share, images_per_s=speed)
        if step + 1 == t.freeze_steps:
            self.progress.say(f"step {step + 1}: from here on the backbone learns too")
        if self._is_looked_at(step + 1):
            self.watch.at("health")
            self.look(step + 1, self.gauge.read())
        return outcome.stop

    def _is_looked_at(self, step: int) -> bool:
        t = self.t
        guarded = t.guard is not None and t.guard.measures and step % t.checkpoint_every == 0
        return step % t.health_every == 0 or step == t.steps or guarded

    def read_artifacts(self, step: int) -> None:
        """What the gauge counted in the step: figures to the log, what began or ended to the screen."""
        values = self.artifacts.read()
        self.log.write(step, values)
        self.notes = [f"artifacts {100 * values['artifacts/share']:.1f} %"]
        if dist.rank() == 0:
            for sentence in self.episodes.add(step, values):
                self.progress.say(f"  {sentence}")

    def look(self, step: int, values: dict[str, float]) -> None:
        """The health check: held-out images through the teacher, figures to the log, sentences to the screen."""
        if self.t.probe is not None:
            backbone: nn.Module = self.t.method.teacher["backbone"]  # type: ignore[index,assignment]
            values = values | self.t.probe.look(backbone)
        if not values:
            return
        self.log.write(step, {f"health/{k}": v for k, v in values.items()})
        self.health = {k: v for k, v in values.items() if k in ("knn", "rank")}
        parts = "  ".join(f"{k} {v:.3g}" for k, v in values.items())
        self.progress.say(f"health at step {step}: {parts}")
        for sentence in verdicts(
            values, embed_dim=self.t.embed_dim, prototypes=self.t.prototypes, progress=step / self.t.steps
        ):
            self.progress.say(f"  warning: {sentence}")
        self._judge(step, values)

    def _judge(self, step: int, values: dict[str, float]) -> None:
        """Ask the forgetting guard, if there is one. Raises ForgottenError."""
        if self.t.guard is None:
            return
        try:
            for sentence in self.t.guard.judge(step, values, last=step == self.t.steps):
                self.progress.say(f"  {sentence}")
        finally:
            if figures := self.t.guard.figures():
                self.log.write(step, figures)

    def _tell_skipped(self, step: int, outcome: Outcome) -> None:
        terms = ", ".join(outcome.broken)
        self.progress.say(f"step {step + 1} skipped, nothing changed: not finite: {terms}")
        if self.bad_in_a_row >= self.t.max_bad_steps:
            raise TrainingStoppedError(
                f"stopped at step {step + 1}: {self.bad_in_a_row} steps in a row were not finite ({terms}). The "
                "weights are those from before the first of them; the newest checkpoint is good. Try half of optim.lr, "
                "train.precision=fp32, or look at the images of the last batches"
            )


def running_buffers(method: nn.Module) -> dict[str, Tensor]:
    """The method's own running statistics (centers), not those of student or teacher."""
    return {n: b for n, b in method.named_buffers() if not n.startswith(("student.", "teacher."))}


def _resume(training: Training) -> int | None:
    """Step of the checkpoint the run goes on from; None: it starts."""
    found = checkpoint.find(training.run_dir)
    if found is None:
        return None
    if training.guard is not None and "guard" in found.meta:
        training.guard.resume(found.meta["guard"])
        if (said := training.guard.stopped_before()) is not None:
            raise TrainingStoppedError(f"this run was stopped at its last look: {said}")
    training.optimizer.state.clear()  # after a rewind it may hold moments that the checkpoint has none of
    tensors = state.room_for(training.method, training.optimizer, found.shapes)
    checkpoint.read(found, tensors)
    state.restore(training.method, training.optimizer, tensors)
    _say(training, f"resuming {training.run_dir} from step {found.step} of {training.steps}")
    return found.step


def _say(training: Training, message: str) -> None:
    training.console.print(message, highlight=False, soft_wrap=True)  # a path cut in two cannot be copied


def _rewind(training: Training, verdict: str) -> None:
    """What the guard does when the model has forgotten. Raises TrainingStoppedError if that is the end."""
    assert training.guard is not None
    figures = training.guard.table()
    done = training.guard.rewind()
    if done is None:
        raise TrainingStoppedError(training.guard.stop(verdict))
    _say(training, f"{verdict}\n{figures}\n{done}")


def _save(training: Training, writer: checkpoint.Writer, step: int) -> None:
    backbone: nn.Module = training.method.teacher["backbone"]  # type: ignore[index,assignment]
    meta = training.meta
    if training.guard is not None:
        best = training.guard.best_step
        meta = {**meta, "guard": training.guard.saving(step)}
        writer.kept = frozenset({best, training.guard.best_step})  # the old one until the new one is complete
    writer.save(
        step,
        state.gather(training.method, training.optimizer),
        meta,
        save_teacher=lambda folder: training.save_teacher(folder, backbone, step),
    )
