"""What registers cost: parameters and multiply-adds, counted and by the formula; training steps, timed by turns."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quietvit.backbones.cost import count_macs, count_parameters
from quietvit.build import build_training
from quietvit.config.schema import RunConfig
from quietvit.contracts import Batch
from quietvit.train.accumulate import split
from quietvit.train.environment import hardware
from quietvit.train.loop import Training, running_buffers
from quietvit.train.metrics import read_metrics
from quietvit.train.step import seed_step, train_step

ROUNDS = 15  # timed steps of each count (ours: medians of their ratios settle to about one part in a hundred)
MIB = 1024**2


def formula_ratio(tokens: int, registers: int, dim: int) -> float:
    """Multiply-adds of a block with registers over those without: with T tokens (patches and [CLS]) of width D,
    (24 D (T + R) + 4 (T + R)^2) / (24 D T + 4 T^2), for an MLP four times as wide."""
    with_registers = tokens + registers
    return (24 * dim * with_registers + 4 * with_registers**2) / (24 * dim * tokens + 4 * tokens**2)


def counted(spec: Mapping[str, Any], config: RunConfig, counts: Sequence[int], image_size: int) -> dict[str, Any]:
    """Parameters, and multiply-adds of an image of `image_size` and of a training step's forward passes.

    `spec`: name and arguments of the backbone, as in a teacher's description; the crops are those of `config`. A step
    sends the global crops through student and teacher and the local ones through the student. The ratios are over the
    same backbone without registers.
    """
    name, arguments, crops = spec["name"], dict(spec["arguments"]), config.crops

    def of(registers: int, side: int) -> int:
        return count_macs(name, **{**arguments, "num_registers": registers, "image_size": side})

    def row(registers: int) -> dict[str, Any]:
        passes = 4 * of(registers, crops.global_size) + crops.num_local * of(registers, crops.local_size)
        return {
            "registers": registers,
            "parameters": count_parameters(name, **{**arguments, "num_registers": registers}),
            "macs": of(registers, image_size),
            "train_macs": passes,
        }

    without, stride, dim = row(0), int(arguments["patch_size"]), int(arguments["embed_dim"])
    tokens = {side: 1 + (side // stride) ** 2 for side in (image_size, crops.global_size, crops.local_size)}
    rows = []
    for registers in counts:
        one = without if registers == 0 else row(registers)
        ratios = {f"{key}_over_0": one[key] / without[key] for key in ("macs", "train_macs")}
        rows.append({**one, **ratios, "formula_over_0": formula_ratio(tokens[image_size], registers, dim)})
    return {
        "image_size": image_size,
        "tokens": tokens[image_size],
        "crop_tokens": {"global": tokens[crops.global_size], "local": tokens[crops.local_size]},
        "embed_dim": dim,
        "counts": rows,
    }


def measured(config: RunConfig, counts: Sequence[int], *, rounds: int = ROUNDS) -> dict[str, Any]:
    """Training steps with each number of registers by turns, on the same batch, in this process on one device.

    In every round each count takes one step, in an order that is drawn; ratios are to the least count in the same
    round, so that what else the machine does falls on all alike. Seconds are wall-clock on a GPU and the processor time
    of all threads on a CPU. Memory: on CUDA the most that was allocated, elsewhere the most bytes of tensors that were
    alive at once in a step, with weights and the optimizer's state. All counts are held at once. Raises ValueError as
    `build_training`.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainings = {count: _training(config, count, Path(folder) / str(count)) for count in counts}
    batch = next(trainings[counts[0]].batches(0))
    device = trainings[counts[0]].device
    for training in trainings.values():
        _advance(training, 0, batch)  # the first step makes the optimizer's state
    peaks = {count: _peak(training, batch) for count, training in trainings.items()}
    order, draw = list(counts), random.Random(0)
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    for step in range(2, 2 + rounds):
        draw.shuffle(order)
        for count in order:
            start = _clock(device)
            _advance(trainings[count], step, batch)
            seconds[count].append(_clock(device) - start)
    base = seconds[min(counts)]
    rows = []
    for count in counts:
        step_s = statistics.median(seconds[count])
        ratios = [own / other for own, other in zip(seconds[count], base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        rows.append(
            {
                "registers": count,
                "step_s": step_s,
                "images_per_s": batch.num_images / step_s,
                "ratio": {"median": middle, "low": low, "high": high},
                "peak_mib": peaks[count] / MIB,
            }
        )
    return {
        "rounds": rounds,
        "batch_size": batch.num_images,
        "clock": "processor time" if device.type == "cpu" else "wall-clock",
        "hardware": hardware(device),
        "against": min(counts),
        "counts": rows,
    }


def noted_speed(run: Path) -> float | None:
    """Median of the images a second that a run wrote down while it trained, its first tenth left out; None without."""
    speeds = [r["images_per_s"] for r in read_metrics(run / "metrics.jsonl") if r.get("images_per_s") is not None]
    kept = [float(str(speed)) for speed in speeds[len(speeds) // 10 :]]
    return statistics.median(kept) if kept else None


def _training(config: RunConfig, registers: int, folder: Path) -> Training:
    folder.mkdir()
    alone = replace(
        config,
        model=replace(config.model, num_registers=registers),
        data=replace(config.data, workers=0, ram_cache_mb=0),
        health=replace(config.health, images=0, gauge_every=0),
        parallel=replace(config.parallel, strategy="none"),
    )
    return build_training(alone, folder, Console(quiet=True))


def _advance(training: Training, step: int, batch: Batch) -> None:
    """One step as the loop takes it."""
    seed_step(training.seed, step)
    train_step(
        training.method,  # type: ignore[arg-type]
        training.optimizer,
        split(batch.to(training.device), training.accumulate),
        training.schedules.at(min(step, training.steps - 1)),
        clip=training.clip,
        device=training.device,
        precision=training.precision,
        state=running_buffers(training.method),
        engine=training.engine,
    )


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def _peak(training: Training, batch: Batch) -> int:
    """Bytes of one training at the height of a step, its own weights and state among them."""
    own = _resident(training)
    held = int(sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in own}.values()))
    if training.device.type == "cuda":
        before = torch.cuda.memory_allocated(training.device)
        torch.cuda.reset_peak_memory_stats(training.device)
        _advance(training, 1, batch)
        return held + int(torch.cuda.max_memory_allocated(training.device)) - before
    with LiveTensors(own) as live:
        _advance(training, 1, batch)
    return held + int(live.peak)


def _resident(training: Training) -> list[Tensor]:
    states = [v for state in training.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return [*training.method.parameters(), *training.method.buffers(), *states]


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors that operations make inside this context, for as long as anything holds them.

    `peak` is the most at once. `known` tensors are not counted, nor what operations use and free inside themselves.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size
