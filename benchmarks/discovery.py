"""Object discovery (LOST) of one model: keys, queries and values, with three choices of what "similar" means.

    python benchmarks/discovery.py --model RUN --data FOLDER       images with boxes: VOC's XML, a CSV, COCO's JSON
    ... --size 320 --json OUT      longer side in pixels; benchmarks/results/discovery-<date>.json

For each facet: bias 0 (LOST), features less their mean over the image, and the bias chosen on the train images. Each
beside the same model before training and, once for each way, the colours of patches. All are scored on the same test
images; beside them stands what the whole image and the middle half of it reach as boxes. Scores are also given for each
kind of image, the part of its file name before the first "-". Differences from the model before training are of paired
bootstrap draws of the test images.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from quietvit.files import write_text
from quietvit.train.environment import environment
from quietvit_eval.cards import Card, find_cards, read_per_image
from quietvit_eval.compare import compare_cards, couples_within
from quietvit_eval.discovery.features import FACETS
from quietvit_eval.evaluate import DataSpec, evaluate

RESULTS = Path(__file__).parent / "results"
WAYS: dict[str, dict[str, Any]] = {
    "bias 0": {},
    "centred": {"center": True},
    "bias chosen": {"select": "held_out"},
}


def by_kind(card_path: Path) -> dict[str, dict[str, float]]:
    """CorLoc and number of images for each kind."""
    rows = read_per_image(card_path)
    kinds: dict[str, list[float]] = defaultdict(list)
    for name, hit in zip(rows.names, rows.values["CorLoc"], strict=True):
        kinds[PurePosixPath(name).stem.split("-")[0]].append(float(hit))
    return {kind: {"CorLoc": round(float(np.mean(hits)), 4), "images": len(hits)} for kind, hits in kinds.items()}


def told(card: Card, path: Path) -> dict[str, Any]:
    """A card without paths and names."""
    kept = ("bias", "level", "interval_95", "images_tied", "images_without_box", "area_of_boxes", "sweep")
    return {
        "scores": card.scores,
        "standard_error": card.standard_error,
        "kinds": by_kind(path),
        **{name: card.details[name] for name in kept},
        "CorLoc_without_features": card.details["CorLoc_without_features"],
        "model": str(card.model["hash"])[:8],
        "images": {split: part["images"] for split, part in card.data.items()},
        "protocol": card.protocol,
        "seconds": card.seconds,
    }


def measure(model: Path, data: Path, size: int, facet: str, way: str) -> dict[str, Any]:
    """One facet, one way: the model, itself before training and (for keys alone, being the same for all) colours."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        evaluate(
            model,
            ["discovery"],
            DataSpec(path=str(data)),
            options={"discovery": {"facet": facet, "pictures": 0, **WAYS[way]}},
            image_size=size,
            random_init=True,
            pixels=facet == "keys",
            device="cpu",
            out_dir=out,
        )
        found = {card.subject: told(card, path) for path, card in find_cards(out).items()}
        cards, couples = couples_within(out, "random-init")
        ((a, b),) = couples.alike
        difference = asdict(compare_cards(a, b, cards))
    names = ("score_a", "score_b", "difference", "low", "high", "share_better")
    return {**found, "model against random-init": {name: difference[name] for name in names}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    today = datetime.date.today().isoformat()
    result: dict[str, Any] = {
        "date": today,
        "environment": {k: v for k, v in environment(torch.device("cpu")).items() if k != "command"},  # it has paths
        "size": args.size,
        "results": {},
    }
    for facet in sorted(FACETS):
        for way in WAYS:
            found = result["results"][f"{facet}, {way}"] = measure(args.model, args.data, args.size, facet, way)
            line = ", ".join(
                f"{subject} {100 * row['scores']['CorLoc']:.1f}, tied {row['images_tied']}"
                for subject, row in found.items()
                if "scores" in row
            )
            print(f"{facet}, {way}: {line}", flush=True)
    target = args.json or RESULTS / f"discovery-{today}.json"
    write_text(target, json.dumps(result, indent=1) + "\n")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
