"""The embedded data set: images per second and core, what raw pixels tell about its labels, and a picture of it.

    python benchmarks/scenes.py [--images N] [--image-size PIXELS] [--json OUT] [--sheet PNG]

Speed counts the processor time of this one process, so that a busy machine disturbs it little. Raw pixels are scored by
the 20 nearest neighbours under the cosine, a bank of 4,000 training pictures and 1,000 test pictures.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from quietvit.data.scenes import Scenes
from quietvit.features.knn import knn_accuracy

BANK, QUERIES = 4000, 1000


def speed(num: int, image_size: int) -> float:
    """Rendered images per second of processor time."""
    data = Scenes("train", image_size=image_size)
    for i in range(20):  # noise tiles are made once per process
        data.load(i)
    start = time.process_time()
    for i in range(num):
        data.load(20 + i)
    return num / (time.process_time() - start)


def pixel_knn() -> dict[str, float]:
    """Share of test pictures whose label the nearest raw 64 px pictures tell, for every label."""
    bank, queries = Scenes("train", num_images=BANK), Scenes("test", num_images=QUERIES)
    x, y = (torch.from_numpy(np.stack([d.load(i) for i in range(len(d))])).flatten(1) / 255 for d in (bank, queries))
    centre = x.mean(0)  # without it every cosine is near one
    scores = {}
    for name in ("shape", "material", "background"):
        labels = (torch.from_numpy(d.labels[name]) for d in (bank, queries))
        scores[name] = knn_accuracy(x - centre, next(labels), y - centre, next(labels), ks=(20,))[20]
    return scores


def sheet(path: Path, *, scale: int = 2) -> None:
    """Eight scenes: picture, mask and depth (brighter is nearer), one below the other."""
    data = Scenes("val", image_size=96)
    columns = []
    for scene in map(data.render, range(8)):
        mask = (scene.segmentation * (255 // len(data.classes["material"]))).astype(np.uint8)
        near = np.clip(255 / scene.depth, 0, 255).astype(np.uint8)
        columns.append(np.concatenate([scene.image, *(np.repeat(a[..., None], 3, axis=2) for a in (mask, near))]))
    Image.fromarray(np.concatenate(columns, axis=1)).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--sheet", type=Path, help="write a picture of eight scenes here")
    args = parser.parse_args()
    rate = speed(args.images, args.image_size)
    print(f"{rate:.0f} images/s/core at {args.image_size} px")
    pixels = pixel_knn()
    print("raw pixels, 20-NN: " + ", ".join(f"{name} {100 * value:.1f} %" for name, value in pixels.items()))
    if args.sheet:
        sheet(args.sheet)
    if args.json:
        result: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "cpu": platform.processor() or platform.machine(),
            "numpy": np.__version__,
            "python": platform.python_version(),
            "fingerprint": Scenes("train").fingerprint(),
            "images": args.images,
            "image_size": args.image_size,
            "images_per_second_per_core": round(rate, 1),
            "pixel_knn": {name: round(value, 4) for name, value in pixels.items()},
        }
        partial = args.json.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(partial, args.json)


if __name__ == "__main__":
    main()
