"""Photographs instead of renderings: a nano ViT pretrained here, judged on CamVid and on RGB-D pairs beside its own
initialisation.

    python benchmarks/real_data.py --data FOLDER --out runs/real_data
    ... --write benchmarks/results/real-data-<date>     also keep the figures (.json) and small pictures (a folder)

FOLDER holds camvid.tar (images/ and annotations/ as ADE20K's, 11 classes from 0, void 11), depth.tar (rgb/, depth/ in
millimetres, train.txt and test.txt by scene) and imagenet-samples.tar (1,000 photographs). Pretraining sees the train
images of the first two and all of the third, never a test image. Half an hour on one core; what is done already is not
done again.
"""

from __future__ import annotations

import argparse
import json
import os
import tarfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console

from quietvit.config.load import load_config
from quietvit.train.environment import environment
from quietvit_eval.cards import find_cards
from quietvit_eval.compare import compare_cards, couples_within
from quietvit_eval.evaluate import DataSpec, evaluate
from quietvit_launch.job import Job, run_job

RECIPE = Path(__file__).with_suffix(".yaml")
NAMES = ["Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian", "Bicyclist"]
# A quarter of DINOv2's crops, an eightieth of its steps at ten times its rate for a linear layer on a nano model.
# Tried before: 300 steps at 3e-3, where both scored lower (results/real-data-tried-2026-11-21.json).
SEGMENTATION = {
    "short_side": 120, "crop": 120, "stride": 80, "photometric": False, "average": "valid",
    "steps": 500, "warmup_steps": 30, "batch_size": 8, "lr": 1e-2, "pictures": 4,
}  # fmt: skip
DEPTH = {
    "layers": 4, "norm": True, "with_cls": False, "batch_norm": True, "upsample": 1, "bins": 64,
    "resize": 120, "crop": (112, 112), "train_crop": "none", "eval_crop": "none", "rotate": 0.0, "color": False,
    "batch_size": 8, "steps": 400, "warmup_steps": 20, "sig_warmup": 0, "gradient_weight": 0.0, "lr": 3e-3,
    "pictures": 4,
}  # fmt: skip
TASKS = {
    "segmentation": (SEGMENTATION, "camvid", {"num_classes": 11, "ignore": 11, "class_names": NAMES}),
    "depth": (DEPTH, "depth", {}),
}


def unpack(tars: Path, out: Path) -> Path:
    """The three sets side by side, and `mix`: links to the images that pretraining may see. Returns the folder."""
    for name in ("camvid", "depth", "imagenet-samples"):
        if not (out / name).is_dir():
            with tarfile.open(tars / f"{name}.tar") as tar:
                tar.extractall(out / name, filter="data")
    train = (out / "depth" / "train.txt").read_text().split()
    seen = {
        "camvid": (out / "camvid/images/training").glob("*.jpg"),
        "depth": (out / f"depth/rgb/{name}.jpg" for name in train),
        "imagenet": (out / "imagenet-samples").glob("*/*.JPEG"),
    }
    for name, files in seen.items():
        (out / "mix" / name).mkdir(parents=True, exist_ok=True)
        for file in files:
            link = out / "mix" / name / file.name
            if not link.exists():
                os.link(file, link)
    return out


def judge(out: Path, data: Path) -> dict[str, Any]:
    """Cards of both tasks, and the differences between the trained model and its initialisation."""
    found: dict[str, Any] = {}
    for task, (options, folder, layout) in TASKS.items():
        cards = out / "eval" / task
        if len(list(cards.glob("*.json"))) < 2:
            spec = DataSpec("folders", str(data / folder), options=layout)
            evaluate(
                out / "run", (task,), spec, random_init=True, options={task: options}, out_dir=cards, console=Console()
            )
        by_path, couples = couples_within(cards, "random-init")
        a, b = couples.alike[0]
        difference = compare_cards(a, b, by_path)
        found[task] = {
            **{card.subject: {k: round(v, 4) for k, v in card.scores.items()} for card in find_cards(cards).values()},
            "score": difference.score,
            "trained_minus_random": round(difference.difference, 4),
            "interval_95": [round(difference.low, 4), round(difference.high, 4)],
            "images": next(iter(by_path.values())).data["test"]["images"],
            "options": options,
        }
    return found


def keep(out: Path, report: dict[str, Any], name: Path) -> None:
    """Figures as JSON and two pictures of each task of the trained model, in 8-bit colours to stay small."""
    name.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    name.mkdir(exist_ok=True)
    for task in TASKS:
        cards = out / "eval" / task
        model = next(card for card in find_cards(cards).values() if card.subject == "model")
        for number, picture in enumerate(model.details["pictures"][:2]):
            image = Image.open(cards / picture).convert("RGB")
            image.thumbnail((900, 900))
            image.quantize(128).save(name / f"{task}-{number}.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the three tars")
    parser.add_argument("--out", type=Path, default=Path("runs/real_data"))
    parser.add_argument("--write", type=Path, help="name of the results, without suffix")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = unpack(args.data, args.out / "data")
    if code := run_job(Job(str(RECIPE), (f"data.path={data / 'mix'}",), str(args.out / "run")), Console()):
        raise SystemExit(code)
    machine = {k: v for k, v in environment(torch.device("cpu")).items() if k != "command"}
    steps = load_config(str(RECIPE)).train.steps
    report = {"date": date.today().isoformat(), "environment": machine, "steps": steps, **judge(args.out, data)}
    print(json.dumps(report, indent=1))
    if args.write:
        keep(args.out, report, args.write)


if __name__ == "__main__":
    main()
