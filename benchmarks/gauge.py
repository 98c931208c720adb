"""The artifact gauge: what it costs, and how often it accuses a model that has no artifacts.

    python benchmarks/gauge.py                     step time with and without a reading, quickstart and ViT-S/16
    python benchmarks/gauge.py --false-alarms      random models, heavy-tailed sets, and what is found of planted modes
    python benchmarks/gauge.py --gpu-all           CUDA: the cost in the cases of benchmarks/step.py
    ... --json OUT                                 add the results to this file

Cost: steps with and without a reading by turns, medians; processor time of all threads on the CPU. `added_ms` is the
difference of the medians, `inside_ms` what the observer and the reading themselves took. Amortised: over a reading
every `health.gauge_every` steps.

A random model: a ViT or T2T-ViT of random size, half of them with weights, norm gains and layer scales of random size
as training leaves them, on smooth noise, white noise or flat patches. An alarm is a block that `judge` says has
outliers; the gauge speaks of the last block only.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import interpolate

from quietvit import build
from quietvit.backbones import make_backbone
from quietvit.config.load import load_config
from quietvit.features.norms import NormHistogram, judge
from quietvit.files import write_text
from quietvit.train.device import pick_device
from quietvit.train.environment import environment, hardware
from quietvit.train.gauge import ArtifactGauge

Draw = Callable[[np.random.Generator, int], Any]
HEAVY_TAILS: Mapping[str, Draw] = {  # log norms
    "normal, width 0.1": lambda r, n: 0.1 * r.normal(size=n),
    "normal, width 1": lambda r, n: r.normal(size=n),
    "Student, 2 degrees": lambda r, n: 0.05 * r.standard_t(2, n),
    "Student, 3 degrees": lambda r, n: 0.2 * r.standard_t(3, n),
    "Student, 5 degrees": lambda r, n: 0.2 * r.standard_t(5, n),
    "Laplace": lambda r, n: 0.3 * r.laplace(size=n),
    "logistic": lambda r, n: 0.3 * r.logistic(size=n),
    "exponential (Pareto norms)": lambda r, n: 0.5 * r.exponential(size=n),
    "Gumbel": lambda r, n: 0.4 * r.gumbel(size=n),
    "log gamma": lambda r, n: np.log(r.gamma(2.0, size=n)),
}
SIZES = (200, 2000, 20_000, 200_000)  # tokens of a heavy-tailed set


def random_model(seed: int) -> Any:
    """A backbone in evaluation mode; every second one has left its start."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    heads = int(random.integers(1, 5))
    name = "t2t_vit" if seed % 4 == 3 else "vit"
    options: dict[str, Any] = {
        "embed_dim": heads * int(random.choice([16, 24, 32])),
        "depth": int(random.integers(1, 9)),
        "num_heads": heads,
        "image_size": 64,
        "num_registers": int(random.choice([0, 0, 1, 4])),
        "init": str(random.choice(["xavier", "trunc_normal"])),
        "layer_scale": float(random.choice([0.0, 1e-5, 0.1, 1.0])),
    }
    backbone: Any = make_backbone(name, **options, **({"patch_size": 8} if name == "vit" else {})).eval()
    if seed % 2:
        with torch.no_grad():
            for parameter in backbone.parameters():
                size = math.exp(random.normal() * 0.7)
                parameter.mul_(size).add_(0.05 * torch.randn_like(parameter))
                if parameter.ndim == 1:
                    parameter.mul_(torch.exp(0.3 * torch.randn_like(parameter)))
    return backbone


def random_images(seed: int, num: int = 16, side: int = 64) -> Tensor:
    """Noise that is smooth, white, or the same within squares; normalised as pictures are."""
    generator = torch.Generator().manual_seed(seed)
    scale = (4, side, 8)[seed % 3]
    noise = torch.randn(num, 3, scale, scale, generator=generator)
    return interpolate(noise, size=(side, side), mode="nearest" if seed % 3 == 2 else "bicubic")


@torch.no_grad()
def alarms_of_model(seed: int, *, letterboxed: bool = False) -> list[str]:
    """The kind of verdict on every block of a random model, on images with a bar at the top if wanted."""
    backbone = random_model(seed)
    counts = NormHistogram(backbone.num_blocks)
    first = 1 + backbone.num_registers

    def count(block: int, tokens: Tensor, groups: Any) -> None:
        counts.add(tokens.view(*groups[0], -1)[:, first:].float().norm(dim=-1), block)

    images = random_images(seed)
    if letterboxed:
        images[:, :, : 4 * (1 + seed % 4)] = (
            -2.0 if seed % 2 else images[:, :, :1, :1].clone()
        )  # black or of one colour
    with backbone.observing(count):
        backbone(images)
    return [counts.judge(block).kind for block in range(backbone.num_blocks)]


def alarm_of_tail(seed: int) -> str:
    """The kind of verdict on a heavy-tailed set without a second mode."""
    names = list(HEAVY_TAILS)
    logs = HEAVY_TAILS[names[seed % len(names)]](np.random.default_rng(seed), SIZES[seed // len(names) % len(SIZES)])
    return judge(torch.from_numpy(np.exp(logs))).kind


def found_of_planted(tokens: int, *, sets: int = 10) -> dict[str, Any]:
    """For shares and ratios of a planted mode (widths 0.15, usual norms normal and Student with 5 degrees, 0.1): how
    many of the sets are found, and the median error of the share, relative."""
    table = {}
    for share in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3):
        for ratio in (2, 3, 5, 10, 20):
            hits, errors = 0, []
            for seed in range(sets):
                random = np.random.default_rng(seed)
                bulk = 0.1 * (random.standard_t(5, tokens) if seed % 2 else random.normal(size=tokens))
                high = random.random(tokens) < share
                logs = np.where(high, math.log(ratio) + 0.15 * random.normal(size=tokens), bulk)
                verdict = judge(torch.from_numpy(np.exp(logs)))
                if verdict.kind in ("outliers", "suspicious"):
                    hits += 1
                    errors.append(abs(verdict.share / high.mean() - 1))
            table[f"share {share:.1%}, ratio {ratio}"] = {
                "found": hits / sets, "error_of_share": statistics.median(errors) if errors else None
            }  # fmt: skip
    return table


def false_alarms(count: int = 100) -> dict[str, Any]:
    """Rates over `count` random models and `count` heavy-tailed sets."""
    tails = [alarm_of_tail(seed) for seed in range(count)]
    return {
        "models": _rates([alarms_of_model(seed) for seed in range(count)]),
        "models, letterboxed": _rates([alarms_of_model(seed, letterboxed=True) for seed in range(count)]),
        "heavy_tailed_sets": count,
        "sets_accused": tails.count("outliers"),
        "sets_suspicious": tails.count("suspicious"),
        "planted": {f"{tokens} tokens": found_of_planted(tokens) for tokens in (5000, 50_000)},
    }


def _rates(models: Sequence[Sequence[str]]) -> dict[str, int]:
    blocks = [kind for model in models for kind in model]
    return {
        "models": len(models),
        "accused": sum(model[-1] == "outliers" for model in models),
        "suspicious": sum(model[-1] == "suspicious" for model in models),
        "with_an_accused_block": sum("outliers" in model for model in models),
        "blocks": len(blocks),
        "blocks_accused": blocks.count("outliers"),
        "blocks_suspicious": blocks.count("suspicious"),
    }


def cost(overrides: Sequence[str], steps: int) -> dict[str, Any]:
    """Steps with and without a reading by turns."""
    from step import Stopwatch, advance, clock  # beside this file, which tests import from elsewhere

    config = load_config(
        "quickstart", [*overrides, "health.images=0", "data.workers=0", f"train.steps={1 + 2 * steps}"]
    )
    with tempfile.TemporaryDirectory() as folder:
        training = build.build_training(config, Path(folder), Console(stderr=True))
    gauge = ArtifactGauge(training.method.teacher["backbone"], every=1, steps=0)  # type: ignore[index,arg-type]
    watch, idle, silent = (Stopwatch(training.device) for _ in range(3))
    gauge._count = watch.around(gauge._count, "rest")  # type: ignore[method-assign]
    batches = training.batches(0)
    batch = next(batches)
    advance(training, 0, batch, silent)  # first calls set things up
    without, with_reading = [], []
    for step in range(steps):
        without.append(advance(training, 1 + 2 * step, batch, silent))
        start = clock(training.device)
        with gauge.watching(1):
            advance(training, 2 + 2 * step, batch, silent)
        with idle.part("rest"):
            gauge.read()
        with_reading.append(clock(training.device) - start)
    plain, read = statistics.median(without), statistics.median(with_reading)
    every = config.health.gauge_every
    inside = (watch.seconds["rest"] + idle.seconds["rest"]) / steps
    return {
        "overrides": list(overrides),
        "batch_size": training.batch_size,
        "steps_of_each_kind": steps,
        "step_ms": 1000 * plain,
        "step_with_reading_ms": 1000 * read,
        "added_ms": 1000 * (read - plain),
        "inside_ms": 1000 * inside,
        "gauge_every": every,
        "amortised_share": (read - plain) / every / plain,
        "amortised_share_inside": inside / every / plain,
        "clock": "processor time" if training.device.type == "cpu" else "wall-clock",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--false-alarms", action="store_true")
    parser.add_argument("--gpu-all", action="store_true", help="needs CUDA")
    parser.add_argument("--case", help="only the cases with this in their name")
    parser.add_argument("--steps", type=int, default=10, help="of each kind per measurement")
    parser.add_argument("--note", default="", help="about the machine, kept with the hardware")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = pick_device("cuda" if args.gpu_all else "auto")
    about = {
        "date": datetime.date.today().isoformat(),
        "hardware": "; ".join(filter(None, [hardware(device), args.note])),
        "torch": torch.__version__,
        "git": environment(device)["git"],
    }
    report: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    if args.false_alarms:
        report["false_alarms"] = {**about, **false_alarms()}
    else:
        from step import GPU_CASES, SMALL

        cases = {k: v for k, v in (GPU_CASES if args.gpu_all else SMALL).items() if (args.case or "") in k}
        costs = report.setdefault("cost on a GPU" if args.gpu_all else "cost", {})
        for name, overrides in cases.items():
            costs[name] = {**about, **cost(overrides, args.steps)}
    text = json.dumps(report, indent=1) + "\n"
    print(text)
    if args.json:
        write_text(args.json, text)


if __name__ == "__main__":
    main()
