"""Does a model that is continued keep what it knew? Freeze and lower rate, neither, and neither with the guard.

    python benchmarks/continue.py --out runs/continue --json benchmarks/results/continue.json

A run of the recipe quickstart is the model to begin with. It is continued with new heads on the same pictures in
another order, three times: `careful` as init.from does by itself, at a tenth of the quickstart's learning rate;
`careless` without a freeze at ten times that rate, unguarded; `rewound` as careless, but with init.guard=rewind.
k-NN is that of the health probe, on the same held-out images throughout. What is there in --out is not done again.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from quietvit.build import build_training
from quietvit.config.load import load_config
from quietvit.train.environment import environment
from quietvit.train.loop import TrainingStoppedError, run
from quietvit.train.metrics import read_metrics

LOOKS = ["health.every=20", "checkpoint.every=20", "train.threads=1"]
CONTINUED = {
    "careful": ["optim.lr=1e-4"],
    "careless": ["optim.lr=1e-2", "init.freeze_steps=0", "init.guard=off"],
    "rewound": ["optim.lr=1e-2", "init.freeze_steps=0", "init.guard=rewind", "init.guard_patience=1"],
}


def trained(run_dir: Path, settings: list[str]) -> dict[str, Any]:
    """Figures of one run of the quickstart's recipe."""
    run_dir.mkdir(parents=True, exist_ok=True)
    training = build_training(load_config("quickstart", [*LOOKS, *settings]), run_dir, Console(width=120))
    said = ""
    try:
        run(training)
    except TrainingStoppedError as error:
        said = str(error).splitlines()[0]
    records = [r for r in read_metrics(run_dir / "metrics.jsonl") if "health/knn" in r]
    looks = [
        {"step": r["step"], **{k: round(float(str(r[f"health/{k}"])), 2) for k in ("knn", "rank")}} for r in records
    ]
    rewinds = json.loads((run_dir / "guard.json").read_text())["rewinds"] if (run_dir / "guard.json").exists() else []
    return {"settings": settings, "looks": looks, "rewinds": rewinds, "stopped": said}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/continue"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--hardware", default="")
    args = parser.parse_args()
    source = args.out / "source"
    report: dict[str, Any] = {"date": date.today().isoformat(), "hardware": args.hardware}
    report["environment"] = {k: v for k, v in environment(torch.device("cpu")).items() if k != "command"}
    report["source"] = trained(source, [f"train.steps={args.source_steps}"])
    for name, settings in CONTINUED.items():
        begun = [f"init.from={source}", f"train.steps={args.steps}", "train.seed=1", *settings]
        report[name] = trained(args.out / name, begun)
        report[name]["settings"] = [s for s in begun if not s.startswith("init.from")]
        start, end = (report[name]["looks"][i]["knn"] for i in (0, -1))
        print(f"{name}: k-NN {start} -> {end}, {len(report[name]['rewinds'])} rewinds")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
