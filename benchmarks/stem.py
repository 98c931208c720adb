"""The tokens-to-token stem against the plain patch stem: time and memory of forward and backward, and what bounds them.

    python benchmarks/stem.py              CPU, fp32
    python benchmarks/stem.py --quick      the same in under four minutes on 2 cores: fewer rounds, less at 512 px
    python benchmarks/stem.py --gpu-all    CUDA, fp32 (TF32) and bf16 autocast, and the attention kernels by name
    ... --json OUT                         default: benchmarks/results/stem-<date>-<hardware>.json; a .md beside it

Stems: patches; Performer and transformer in the tokens-to-token stem, each also with `recompute`. They work on the
crops of a training step, the global ones (224, 512) also with masks, which local crops never have. Whole backbones show
the share of the stem: T2T-14 and a ViT with the same trunk, and the nano models of the recipes quickstart and cifar10.

The contestants take turns (A B C A B C ...); a ratio is the median over rounds of its time over the patch stem's in the
same round, with the least and the greatest. CPU time is processor time of all threads, so that a busy machine disturbs
it little; CUDA time is wall-clock between synchronisations. Memory is the peak above what was allocated before the
forward pass: on CUDA by its allocator; on the CPU the running sum of every allocation and release that torch's profiler
records, which is exact and repeatable where the resident size of a process is neither (buffers inside oneDNN and MKL
are not torch's and not counted). "n x n" is the transformer stem with its attention matrix held in memory.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from stem_tables import NAIVE, PATCH, as_text  # beside this file, as is step
from step import clock
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from quietvit.backbones import Trunk, make_backbone
from quietvit.backbones.t2t_vit import T2T_SIZES
from quietvit.files import write_text
from quietvit.train.device import free_memory, pick_device
from quietvit.train.environment import environment, hardware

RESULTS = Path(__file__).parent / "results"
STEMS: Mapping[str, Mapping[str, Any]] = {
    "performer": {"stem_attention": "performer"},
    "performer, recompute": {"stem_attention": "performer", "recompute": True},
    "transformer": {"stem_attention": "transformer"},
    "transformer, recompute": {"stem_attention": "transformer", "recompute": True},
}
MASKED_SHARE = 0.3  # of the patches: the middle of the recipes' 0.1 to 0.5; the cost does not depend on it
TURN = 0.05  # seconds that a turn lasts at least, by repeating it


@dataclass(frozen=True)
class Crops:
    """Images of one size, with or without masks."""

    side: int
    count: int
    masked: bool = False

    def __str__(self) -> str:
        return f"{self.count} x {self.side} px{' masked' if self.masked else ''}"


@dataclass(frozen=True)
class Scale:
    """A trunk and the crops of its training step."""

    name: str
    size: str  # a row of T2T_SIZES; the ViT beside it has the same trunk
    patch_size: int
    image_size: int
    global_size: int
    local_size: int
    num_local: int
    batch: int  # images of a step on the CPU
    gpu_batch: int
    large_size: int | None = None
    trunk: tuple[tuple[str, Any], ...] = ()

    def backbones(self) -> dict[str, Trunk]:
        """The ViT and the T2T-ViTs, by their stem."""
        trunk = {**T2T_SIZES[self.size], **dict(self.trunk), "image_size": self.image_size}
        token_dim = {"token_dim": trunk.pop("token_dim", 64)}
        torch.manual_seed(0)
        made = {PATCH: make_backbone("vit", patch_size=self.patch_size, **trunk)}
        for stem, options in STEMS.items():
            made[stem] = make_backbone("t2t_vit", patch_size=self.patch_size, **trunk, **token_dim, **options)
        return made

    def step(self, batch: int) -> tuple[Crops, ...]:
        """What the student sees of `batch` images."""
        return Crops(self.global_size, 2 * batch, masked=True), Crops(self.local_size, self.num_local * batch)

    def alone(self, batch: int) -> list[tuple[Crops, ...]]:
        """Crops of one size."""
        single = [Crops(self.global_size, 2 * batch, m) for m in (False, True)]
        single.append(Crops(self.local_size, self.num_local * batch))
        if self.large_size is not None:
            single += [Crops(self.large_size, max(1, batch // 4), m) for m in (False, True)]
        return [(crops,) for crops in single]


SCALES = (
    Scale("T2T-14 and a ViT with its trunk (384/14/6/3), patch 16", "14", 16, 224, 224, 96, 8, 1, 32, large_size=512),
    Scale("nano as in quickstart, patch 8", "nano", 8, 64, 48, 24, 4, 32, 256, trunk=(("layer_scale", 0.0),)),
    Scale("nano as in cifar10, patch 4", "nano", 4, 32, 24, 12, 4, 32, 256, trunk=(("layer_scale", 0.0),)),
)


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds until `seconds` are over, but `least` to `most` of them."""

    seconds: float
    least: int
    most: int
    quick: bool = False


@dataclass(frozen=True)
class Bench:
    """Where and in which precision."""

    device: torch.device
    precision: str  # "fp32" or "bf16" (autocast)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return clock(self.device)


def make_step(backbone: Trunk, crops: Sequence[Crops], bench: Bench, *, whole: bool) -> Callable[[], None]:
    """Forward and backward of the stem, or of the whole backbone, on random images."""
    generator = torch.Generator().manual_seed(0)
    images, masks = [], []
    for group in crops:
        images.append(torch.randn(group.count, 3, group.side, group.side, generator=generator).to(bench.device))
        shape = (group.count, (group.side // backbone.stride) ** 2)
        hidden = torch.rand(shape, generator=generator) < MASKED_SHARE
        masks.append(hidden.to(bench.device) if group.masked else None)

    def step() -> None:
        with bench.autocast():
            if whole:
                outputs = backbone.tokens(images, masks)
            else:
                outputs = [backbone.tokenize(x, mask)[0] for x, mask in zip(images, masks, strict=True)]
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
        backbone.zero_grad(set_to_none=True)

    return step


# ---- memory


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Greatest number of bytes allocated during `step`, above those before it."""
    if device.type == "cuda":
        step()  # cuBLAS takes its workspace, and the kernels are loaded
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        record.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    assert changes, "the profiler recorded no allocation"
    held = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        held += size
        peak = max(peak, held)
    return peak


def naive_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(q k' scale) v with the n x n matrix in memory."""
    logits = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -math.inf)
    return logits.softmax(-1) @ v


def naive_peaks(
    backbone: Trunk, cases: Sequence[dict[str, Any]], groups: Sequence[Crops], bench: Bench, effort: Effort
) -> None:
    """Add to each case (of crops of one size, the small ones first) the memory of the stem with n x n attention.

    It is estimated where it would take more than half of the free memory, or `quick` forbids: what n x n takes beyond
    SDPA grows with the images and the fourth power of their side.
    """
    beyond: dict[bool, tuple[Crops, float]] = {}  # masked -> crops, bytes beyond SDPA
    for case, crops in zip(cases, groups, strict=True):
        sdpa = case["rows"].get("transformer", {}).get("bytes")
        if sdpa is None:
            continue
        if crops.masked in beyond:
            known, extra = beyond[crops.masked]
            estimate = sdpa + extra * crops.count / known.count * (crops.side / known.side) ** 4
            if effort.quick or estimate > free_memory(bench.device) / 2:
                case["rows"][NAIVE] = {"bytes": estimate, "estimated": True}
                continue
        step = make_step(backbone, [crops], bench, whole=False)
        with patch.object(F, "scaled_dot_product_attention", naive_attention):
            case["rows"][NAIVE] = row = attempt(lambda step=step: {"bytes": peak_bytes(step, bench.device)})  # type: ignore[misc]
        if "bytes" in row:
            beyond.setdefault(crops.masked, (crops, row["bytes"] - sdpa))


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` returns, or that it did not fit into the GPU's memory."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        failed = {"failed": "does not fit"}
    torch.cuda.empty_cache()  # out here: the exception holds on to the tensors of its frames
    return failed


# ---- time


def contest(steps: Mapping[str, Callable[[], None]], bench: Bench, effort: Effort) -> dict[str, dict[str, Any]]:
    """Memory of each step, then time in turns. The pass that measures memory is the first and warms up, too."""
    rows: dict[str, dict[str, Any]] = {}
    repeats: dict[str, int] = {}
    for name, step in steps.items():
        began = time.perf_counter()
        rows[name] = attempt(lambda step=step: {"bytes": peak_bytes(step, bench.device)})  # type: ignore[misc]
        if "failed" not in rows[name]:
            slow = bench.device.type == "cpu" and time.perf_counter() - began > 20 * TURN
            repeats[name] = 1 if slow else math.ceil(TURN / timed(step, 2, bench))
    times: dict[str, list[float]] = {name: [] for name in repeats}
    began, rounds = time.perf_counter(), 0
    while rounds < effort.least or (rounds < effort.most and time.perf_counter() - began < effort.seconds):
        for name, count in repeats.items():
            times[name].append(timed(steps[name], count, bench))
        rounds += 1
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times[PATCH], strict=True)]
        rows[name] |= {
            "ms": 1000 * statistics.median(seconds),
            "ms_min_max": [1000 * min(seconds), 1000 * max(seconds)],
            "ratio": statistics.median(ratios),
            "ratio_min_max": [min(ratios), max(ratios)],
            "memory_ratio": rows[name]["bytes"] / rows[PATCH]["bytes"],
            "rounds": rounds,
            "repeats": repeats[name],
        }
    return rows


def timed(step: Callable[[], None], count: int, bench: Bench) -> float:
    """Seconds of one of `count` steps."""
    start = bench.now()
    for _ in range(count):
        step()
    return (bench.now() - start) / count


def measure_scale(scale: Scale, bench: Bench, effort: Effort) -> Iterator[dict[str, Any]]:
    """The stems on crops of one size, the stems and the whole backbones on the crops of a step: one case each."""
    batch = scale.batch if bench.device.type == "cpu" else scale.gpu_batch
    backbones = {name: backbone.to(bench.device) for name, backbone in scale.backbones().items()}
    alone, whole_step = scale.alone(batch), scale.step(batch)
    jobs = [*((crops, False) for crops in alone), (whole_step, False), (whole_step, True)]
    cases = []
    for crops, whole in jobs:
        skipped = effort.quick and crops[0].side == scale.large_size
        steps = {
            name: make_step(backbone, crops, bench, whole=whole)
            for name, backbone in backbones.items()
            if not (skipped and (name == "transformer, recompute" or (name == "transformer" and crops[0].masked)))
        }
        case = {
            "scale": scale.name,
            "part": "whole backbone" if whole else "stem",
            "crops": " + ".join(map(str, crops)),
            "images": sum(c.count for c in crops),
            "precision": bench.precision,
            "rows": contest(steps, bench, effort),
        }
        print(f"{case['scale']}: {case['part']}, {case['crops']}, {case['precision']}", file=sys.stderr)
        cases.append(case)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    square = [(case, crops[0]) for case, (crops, _) in zip(cases, jobs, strict=True) if len(crops) == 1]
    if scale.large_size is not None:
        some = [(case, c) for case, c in square if c.side in (scale.global_size, scale.large_size)]
        naive_peaks(backbones["transformer"], [c for c, _ in some], [c for _, c in some], bench, effort)
    yield from cases


# ---- which kernel


def kernel_rows(bench: Bench, *, side: int, images: int) -> list[dict[str, Any]]:
    """Attention of the transformer stem's first stage, with and without a mask: what SDPA chooses, and each backend."""
    tokens, width = (side // 4) ** 2, 64
    dtype = torch.bfloat16 if bench.precision == "bf16" else torch.float32
    qkv = torch.randn(images, 1, tokens, 3 * width, device=bench.device, dtype=dtype, requires_grad=True)
    visible = (torch.rand(images, 1, 1, tokens, device=bench.device) >= MASKED_SHARE).contiguous()
    backends = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
    rows = []
    for mask in (None, visible):

        def step(mask: Tensor | None = mask) -> None:
            q, k, v = qkv.chunk(3, dim=-1)
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=147**-0.5).sum().backward()
            qkv.grad = None

        about = {"side": side, "images": images, "precision": bench.precision, "masked": mask is not None}
        rows.append({**about, "backend": "chosen", "kernel": sdpa_operator(step), **attention_cost(step, bench)})
        for name in backends:
            with only(getattr(SDPBackend, name)):
                rows.append({**about, "backend": name, **attention_cost(step, bench)})
    return rows


@contextmanager
def only(backend: SDPBackend) -> Iterator[None]:
    """SDPA with this backend alone, without its warnings about why the others are not used."""
    with warnings.catch_warnings(), sdpa_kernel([backend]):
        warnings.simplefilter("ignore")
        yield


def attention_cost(step: Callable[[], None], bench: Bench) -> dict[str, Any]:
    """Milliseconds and peak bytes of `step`, or why there are none."""
    try:
        held = peak_bytes(step, bench.device)
        return {"bytes": held, "ms": 1000 * statistics.median(timed(step, 1, bench) for _ in range(5))}
    except torch.OutOfMemoryError:
        reason = "does not fit"
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0].split(". ")[0]  # the rest says what else might be tried
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    return {"failed": reason}


def sdpa_operator(step: Callable[[], None]) -> str:
    """The operator that scaled_dot_product_attention hands its arguments to, as torch's profiler names it."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as record:
        step()
    names = {e.key.removeprefix("aten::") for e in record.key_averages() if "scaled_dot_product" in e.key}
    inner = sorted(n for n in names if n.startswith("_") and "backward" not in n.lower())
    return ", ".join(inner) or "not found"


# ---- everything


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under four minutes on 2 cores")
    parser.add_argument("--gpu-all", action="store_true", help="on CUDA, in fp32 and in bf16 autocast")
    parser.add_argument("--json", type=Path, help="write the results here, and as tables beside it (.md)")
    args = parser.parse_args()
    device = pick_device("cuda" if args.gpu_all else "cpu")
    torch.set_float32_matmul_precision("high")  # as training does
    about = environment(device)
    date, machine = datetime.date.today().isoformat(), hardware(device)
    out = args.json or RESULTS / f"stem-{date}-{slug(machine.split(',')[0])}.json"
    cpu = device.type == "cpu"
    effort = Effort(4.0, 2, 9, quick=True) if args.quick else Effort(3.0 if device.type == "cuda" else 40.0, 3, 15)
    peak_bytes(lambda: torch.zeros(1, device=device), device)  # the profiler starts slowly
    report: dict[str, Any] = {
        "date": date,
        "hardware": machine,
        "torch": torch.__version__,
        "git": about["git"],
        "packages": about["packages"],
        "command": " ".join(["python benchmarks/stem.py", *(f for f in ("--quick", "--gpu-all") if f in sys.argv)]),
        "clock": "processor time of all threads" if cpu else "wall-clock",
        "memory": "all that torch allocated on the CPU" if cpu else "torch.cuda.max_memory_allocated",
        "cases": [],
        "kernels": [],
    }

    def keep() -> None:  # after every part, so that what comes later cannot lose it
        write_text(out, json.dumps(report, indent=1) + "\n")
        write_text(out.with_suffix(".md"), as_text(report))

    for precision in ("fp32",) if cpu else ("fp32", "bf16"):
        bench = Bench(device, precision)
        for scale in SCALES:
            report["cases"] += measure_scale(scale, bench, effort)
            keep()
    for precision in ("fp32",) if cpu else ("fp32", "bf16"):
        report["kernels"] += kernel_rows(Bench(device, precision), side=224, images=1 if cpu else 64)
        keep()
    print(as_text(report))
    print(f"written: {out} and {out.with_suffix('.md').name}", file=sys.stderr)


if __name__ == "__main__":
    main()
