"""Is the demo's claim real? `quietvit demo` over seeds, and a supervised control on the same network and images.

    python -m benchmarks.quickstart --seeds 0 1 2 --out runs/quickstart --json benchmarks/results/quickstart.json

For k-NN and linear accuracy: trained and random initialisation by seed, their paired difference with a 95 % interval
(Student's t over seeds), raw pixels. The supervised control trains the same backbone with labels on the same training
images for as many steps, without augmentation but flips, and shows that the label can be learnt.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.build import build_backbone
from quietvit.config.load import load_config
from quietvit.data.ram_cache import cached
from quietvit.data.sources import open_source
from quietvit.train.environment import environment
from quietvit_launch.demo import RECIPE, TASKS, run_demo

# Student's t, two-sided, by number of seeds
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def interval(values: list[float]) -> dict[str, float]:
    """Mean and half-width of its 95 % interval."""
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": round(statistics.mean(values), 2), "half_width_95": round(half, 2)}


def images_and_labels(split: str, label: str, limit: int, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Normalised images [n 3 S S] and labels [n] of scenes."""
    source = cached(open_source("scenes", None, split=split, **options | {"num_images": limit}))
    pixels = torch.stack([torch.from_numpy(source.load(i)) for i in range(len(source))]).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (pixels.float() / 255 - mean) / std, torch.from_numpy(source.labels[label])


def supervised(label: str, *, train_images: int, steps: int, batch_size: int, seed: int) -> float:
    """Test accuracy in % of the demo's backbone trained with labels."""
    config = load_config(RECIPE)
    torch.manual_seed(seed)
    backbone = build_backbone(config)
    options = {k: v for k, v in config.data.options.items() if k != "num_images"}
    x, y = images_and_labels("train", label, train_images, options)
    head = nn.Linear(backbone.embed_dim, int(y.max()) + 1)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        rows = torch.randint(len(x), (batch_size,), generator=torch.Generator().manual_seed(step))
        images = x[rows].flip(-1) if step % 2 else x[rows]
        loss = nn.functional.cross_entropy(head(backbone(images).cls), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    tx, ty = images_and_labels("test", label, 2000, options)
    with torch.no_grad():
        answers = torch.cat([head(backbone.eval()(part).cls).argmax(1) for part in tx.split(250)])
    return 100 * float((answers == ty).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    summaries = []
    for seed in args.seeds:
        if not (args.out / f"seed{seed}" / "summary.json").exists():  # an interrupted benchmark goes on
            run_demo(args.out / f"seed{seed}", seed=seed)
        summaries.append(json.loads((args.out / f"seed{seed}" / "summary.json").read_text()))
    config = load_config(RECIPE)
    assert config.train.steps is not None
    assert isinstance(config.train.batch_size, int)
    began = time.monotonic()
    control = supervised(
        summaries[0]["label"], train_images=3000, steps=config.train.steps, batch_size=config.train.batch_size, seed=0
    )
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "environment": {k: v for k, v in environment(torch.device("cpu")).items() if k != "command"},
        "recipe": RECIPE,
        "label": summaries[0]["label"],
        "seeds": args.seeds,
        "supervised_control": {"test_accuracy": round(control, 2), "seconds": round(time.monotonic() - began, 1)},
    }
    for task in TASKS:
        rows = {who: [s[task][who] for s in summaries] for who in ("trained", "random", "pixels")}
        gains = [a - b for a, b in zip(rows["trained"], rows["random"], strict=True)]
        report[task] = {**rows, "gain_over_random": gains, "gain": interval(gains)}
    report["seconds"] = [s["seconds"] for s in summaries]
    print(json.dumps(report, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
