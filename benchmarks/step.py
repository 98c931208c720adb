"""One training step: where its milliseconds go, how much memory it takes, and what the estimate said.

    python benchmarks/step.py                                      the cases of SMALL, each in a process of its own
    python benchmarks/step.py RECIPE [key=value ...] [--steps N]   one recipe, on whatever device it picks
    python benchmarks/step.py --gpu-all                            CUDA: attention rows, then whole steps of GPU_CASES
    ... --json OUT                                                 write the results, and a table beside them (.md)

Parts are timed around the library's own calls, with a synchronisation on each side on CUDA; the whole step is timed
without any of that. On the CPU milliseconds are processor time of all threads, so that a busy machine disturbs them
little. Batches are made in this process, so `data` is what one worker needs for a batch. Memory is the peak above what
was in use before the model was built: resident on the CPU, allocated on CUDA.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch
from rich.console import Console

from quietvit import build, optim
from quietvit.config.load import load_config
from quietvit.contracts import Batch
from quietvit.files import write_text
from quietvit.nn.attention import ATTENTION
from quietvit.train.accumulate import split
from quietvit.train.device import peak_memory, pick_device, step_memory
from quietvit.train.environment import environment, hardware
from quietvit.train.loop import Training, running_buffers
from quietvit.train.step import seed_step, train_step

SHORT = (  # DINOv2's short recipe, on rendered images
    "model.layer_scale=1e-5",
    "model.drop_path=0.3",
    "model.patch_size=16",
    "model.image_size=224",
    "crops.global_size=224",
    "crops.local_size=96",
    "crops.num_local=8",
    "crops.blur_kernel=9",
    "data.options.image_size=256",
    "data.ram_cache_mb=0",
    "objective.head.hidden_dim=2048",
    "objective.head.bottleneck_dim=256",
)
SMALL: dict[str, tuple[str, ...]] = {
    "quickstart": (),
    "ViT-S/16, 2 x 224 + 8 x 96, batch 8, K 4096": (
        *SHORT,
        "model.size=small",
        "train.batch_size=8",
        "objective.head.num_prototypes=4096",
    ),
}
GPU_CASES: dict[str, tuple[str, ...]] = {
    f"ViT-{size[0].upper()}/16, 2 x 224 + 8 x 96, batch {batch}, K 65536, {precision}, {attention}": (
        *SHORT,
        f"model.size={size}",
        f"train.batch_size={batch}",
        f"train.precision={precision}",
        f"model.attention={attention}",
        "objective.head.num_prototypes=65536",
    )
    for size, batch in (("small", 64), ("large", 32))
    for precision, attention in (("fp32", "sdpa"), ("bf16", "sdpa"), ("bf16", "varlen"), ("bf16", "xformers"))
}
PARTS = (
    "data",
    "to device",
    "normalise",
    "teacher",
    "teacher heads",
    "centering",
    "student",
    "heads",
    "losses",
    "backward",
    "optimizer",
    "EMA",
    "rest",
)
MIB = 1024**2


def clock(device: torch.device) -> float:
    """Seconds: processor time of this process on the CPU, else wall-clock."""
    return time.process_time() if device.type == "cpu" else time.perf_counter()


class Stopwatch:
    """Seconds by part; a part inside another one is not counted twice."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._inner = [0.0]  # per open part: seconds of the parts inside it

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return clock(self.device)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside as `name`."""
        start = self._now()
        self._inner.append(0.0)
        yield
        took = self._now() - start
        self.seconds[name] += took - self._inner.pop()
        self._inner[-1] += took

    def around(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        """`call`, timed as `name`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return call(*args, **kwargs)

        return timed

    @contextmanager
    def watching(self, training: Training) -> Iterator[None]:
        """Time the calls that make up a step, for as long as this is open."""
        method: Any = training.method
        calls: list[tuple[Any, str, str]] = [
            (method, "normalise", "normalise"),
            (method, "_center", "centering"),
            (method, "study", "losses"),  # what is left of it: backbone and heads have their own parts
            (method, "follow", "EMA"),
            (method.teacher["backbone"], "forward", "teacher"),
            (method.student["backbone"], "forward", "student"),
            (torch.Tensor, "backward", "backward"),
            (optim, "clip_by_module", "optimizer"),
            (optim, "apply_schedule", "optimizer"),
            (training.optimizer, "step", "optimizer"),
        ]
        for model, part in ((method.teacher, "teacher heads"), (method.student, "heads")):
            calls += [(head, "forward", part) for key, head in model.items() if key != "backbone"]
        with ExitStack() as stack:
            for owner, name, part in calls:
                stack.enter_context(patch.object(owner, name, self.around(getattr(owner, name), part)))
            yield


def advance(training: Training, step: int, batch: Batch, watch: Stopwatch) -> float:
    """One step as the loop takes it, in seconds."""
    start = clock(training.device)
    with watch.part("rest"):
        with watch.part("to device"):
            micro = split(batch.to(training.device), training.accumulate)
        seed_step(training.seed, step)
        outcome = train_step(
            training.method,  # type: ignore[arg-type]
            training.optimizer,
            micro,
            training.schedules.at(step),
            clip=training.clip,
            device=training.device,
            precision=training.precision,
            state=running_buffers(training.method),
            engine=training.engine,
        )
    assert not outcome.broken, outcome.broken
    return clock(training.device) - start


def measure(recipe: str, overrides: Sequence[str], steps: int) -> dict[str, Any]:
    """Build a run as `quietvit train` does and take `steps` of it twice: as they are, and with the stopwatch.

    Two batches are made and used by turns.
    """
    config = load_config(recipe, [*overrides, "health.images=0", "data.workers=0", f"train.steps={1 + 2 * steps}"])
    before: list[int] = []
    build_method = build.build_method

    def noting_memory(*args: Any) -> Any:
        device = pick_device(config.train.device)
        cuda = device.type == "cuda"
        before.append(torch.cuda.memory_allocated(device) if cuda else psutil.Process().memory_info().rss)
        return build_method(*args)

    with tempfile.TemporaryDirectory() as folder, patch.object(build, "build_method", noting_memory):
        training = build.build_training(config, Path(folder), Console(stderr=True))
    micro = training.batch_size // training.accumulate
    value_size = 2 if training.precision is torch.bfloat16 else 4
    estimate = step_memory(
        build.step_shapes(config, training.method.student),  # type: ignore[arg-type]
        micro,
        bytes_per_value=value_size,
        accumulate=training.accumulate,
    )
    idle, watch = Stopwatch(torch.device("cpu")), Stopwatch(training.device)
    source = training.batches(0)
    with watch.part("data"):
        batches = [next(source), next(source)]
    advance(training, 0, batches[0], idle)  # first calls set things up
    walls = [advance(training, 1 + i, batches[i % 2], idle) for i in range(steps)]
    peak = peak_memory(training.device) - before[0]
    with watch.watching(training):
        for i in range(steps):
            advance(training, 1 + steps + i, batches[i % 2], watch)
    parts = {k: 1000 * v / (len(batches) if k == "data" else steps) for k, v in watch.seconds.items()}
    step_s = statistics.median(walls)
    return {
        "recipe": recipe,
        "overrides": list(overrides),
        "batch_size": training.batch_size,
        "accumulate": training.accumulate,
        "precision": "bf16" if value_size == 2 else "fp32",
        "steps": steps,
        "step_ms": 1000 * step_s,
        "step_ms_min_max": [1000 * min(walls), 1000 * max(walls)],
        "images_per_s": training.batch_size / step_s,
        "parts_ms": parts,
        "memory_mib": peak / MIB,
        "estimated_mib": estimate / MIB,
        "estimate_over_measured": estimate / peak,
        "clock": "processor time" if training.device.type == "cpu" else "wall-clock",
    }


def attention_rows(device: torch.device, *, batch: int = 32, repeats: int = 20) -> list[dict[str, Any]]:
    """Milliseconds of forward and backward of every ATTENTION row on the packed crops of `batch` images.

    ViT-S/16 and ViT-L/16 heads, 2 x 224 + 8 x 96, four registers; a row that cannot run says why.
    """
    groups = ((2 * batch, 201), (8 * batch, 41))
    tokens = sum(images * length for images, length in groups)
    results = []
    for heads, head_dim in ((6, 64), (16, 64)):
        for dtype in (torch.bfloat16, torch.float32):
            for name, row in ATTENTION.items():
                label = {"heads": heads, "head_dim": head_dim, "dtype": str(dtype).removeprefix("torch."), "row": name}
                able, reason = row.available(device, dtype, head_dim)
                if not able:
                    results.append({**label, "unavailable": reason})
                    continue
                qkv = torch.randn(tokens, 3, heads, head_dim, device=device, dtype=dtype, requires_grad=True)
                results.append({**label, "ms": 1000 * _forward_backward(row.attend, qkv, groups, repeats)})
    return results


def _forward_backward(attend: Callable[..., Any], qkv: torch.Tensor, groups: Any, repeats: int) -> float:
    def once() -> float:
        watch = Stopwatch(qkv.device)
        with watch.part("rest"):
            attend(qkv, groups).sum().backward()
        qkv.grad = None
        return watch.seconds["rest"]

    once()
    return statistics.median(once() for _ in range(repeats))


def in_a_process(overrides: Sequence[str], steps: int) -> dict[str, Any]:
    """`measure` of quickstart with overrides in a fresh process, whose peak memory is its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "case.json"
        command = [sys.executable, __file__, "quickstart", *overrides, "--steps", str(steps), "--json", str(out)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            return {"recipe": "quickstart", "overrides": list(overrides), "failed": last}
        case: dict[str, Any] = json.loads(out.read_text())["cases"]["quickstart"]
        return case


def as_text(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [f"One training step. {report['date']}, {report['hardware']}, torch {report['torch']}, {report['git']}."]
    for name, case in report["cases"].items():
        if "failed" in case:
            lines += ["", f"**{name}**: did not run: {case['failed']}"]
            continue
        low, high = case["step_ms_min_max"]
        lines += [
            "",
            f"**{name}** ({case['precision']}, {case['batch_size']} images in {case['accumulate']} micro-batches, "
            f"{case['steps']} steps): {case['step_ms']:.0f} ms ({low:.0f} - {high:.0f}) of {case['clock']} "
            f"without data, {case['images_per_s']:.1f} images/s. Memory {case['memory_mib']:.0f} MiB, estimated "
            f"{case['estimated_mib']:.0f} MiB ({case['estimate_over_measured']:.2f} of it).",
            "",
            "| part | ms | share |",
            "|---|---|---|",
        ]
        total = sum(ms for part, ms in case["parts_ms"].items() if part != "data")
        for part, ms in case["parts_ms"].items():
            lines.append(f"| {part} | {ms:.1f} | {'-' if part == 'data' else f'{ms / total:.0%}'} |")
    if "attention" in report:
        lines += ["", "| heads x width | dtype | row | forward + backward, ms |", "|---|---|---|---|"]
        for row in report["attention"]:
            value = f"{row['ms']:.2f}" if "ms" in row else row["unavailable"]
            lines.append(f"| {row['heads']} x {row['head_dim']} | {row['dtype']} | {row['row']} | {value} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="a shipped recipe or a YAML file; none: the cases of SMALL")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=3, help="steps per measurement")
    parser.add_argument("--gpu-all", action="store_true", help="attention rows and GPU_CASES; needs CUDA")
    parser.add_argument("--json", type=Path, help="write the results here, and as tables beside it (.md)")
    args = parser.parse_intermixed_args()
    device = pick_device("cuda" if args.gpu_all else "auto")
    about = environment(device)
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(device),
        "torch": torch.__version__,
        "git": about["git"],
        "packages": about["packages"],
    }
    if args.recipe:
        report["cases"] = {args.recipe: measure(args.recipe, args.overrides, args.steps)}
    else:
        cases = GPU_CASES if args.gpu_all else SMALL
        report["cases"] = {name: in_a_process(overrides, args.steps) for name, overrides in cases.items()}
    if args.gpu_all:
        report["attention"] = attention_rows(device)
    text = as_text(report)
    print(text)
    if args.json is not None:
        write_text(args.json, json.dumps(report, indent=1) + "\n")
        write_text(args.json.with_suffix(".md"), text)


if __name__ == "__main__":
    main()
