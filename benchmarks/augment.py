"""Multi-crop: images per second and core, against DINOv2's own pipeline in the same process.

    python benchmarks/augment.py [--tar PATH] [--images N] [--short-side PIXELS ...] [--json OUT]

Both start from the bytes of a JPEG in memory and make 2 x 224 + 8 x 96 views. DINOv2's ends with normalised float
tensors, as its loader hands them on; ours with uint8, which the training step normalises on the device. One thread.
The two take turns in short blocks; the ratio is the median over the blocks, so a busy machine disturbs it little.
Without the tar of photographs, pictures are made up.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import platform
import random
import statistics
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torchvision import transforms as T

from quietvit.data.blur import gaussian_blur
from quietvit.data.color import recolor, solarize
from quietvit.data.crops import MultiCrop
from quietvit.data.decode import decode_bytes
from quietvit.data.resample import resize_box

TAR = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenet-samples.tar"
BLOCK = 10  # images per turn


def read_photos(tar: Path, count: int) -> list[bytes]:
    """The bytes of `count` JPEGs, chosen by a fixed seed."""
    with tarfile.open(tar) as file:
        members = [m for m in file.getmembers() if m.isfile() and m.name.lower().endswith((".jpg", ".jpeg"))]
        chosen = random.Random(0).sample(members, min(count, len(members)))
        return [file.extractfile(m).read() for m in chosen]  # type: ignore[union-attr]


def make_photos(count: int) -> list[bytes]:
    """JPEGs of noise at several scales, 256 x 341: as large as the samples, and about as hard to decode."""
    photos = []
    for seed in range(count):
        rng, total = np.random.default_rng(seed), np.full((256, 341, 3), 120.0, np.float32)
        for cells, weight in ((3, 60.0), (12, 35.0), (48, 20.0), (160, 10.0)):
            coarse = rng.standard_normal((cells, cells, 3)).astype(np.float32)
            total += weight * cv2.resize(coarse, (341, 256), interpolation=cv2.INTER_CUBIC)
        photos.append(encode(Image.fromarray(total.clip(0, 255).astype(np.uint8))))
    return photos


def encode(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=88)
    return out.getvalue()


def resized(data: bytes, short_side: int) -> bytes:
    """The same picture with another shorter side, for the cost of larger files (the content gets softer)."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    factor = short_side / min(image.size)
    return encode(image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC))


class Reference:
    """DINOv2's DataAugmentationDINO: torchvision v1 transforms on PIL images, blur as it runs (0 / 0.9 / 0.5)."""

    def __init__(self) -> None:
        color = [
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            T.RandomGrayscale(p=0.2),
        ]
        end = [T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]

        def view(size: int, scale: tuple[float, float], blur: float, extra: Sequence[Any] = ()) -> T.Compose:
            crop = T.RandomResizedCrop(size, scale=scale, interpolation=T.InterpolationMode.BICUBIC)
            blurring = T.RandomApply([T.GaussianBlur(9, (0.1, 2.0))], p=blur)
            return T.Compose([crop, T.RandomHorizontalFlip(0.5), *color, blurring, *extra, *end])

        self.first = view(224, (0.32, 1.0), 0.0)
        self.second = view(224, (0.32, 1.0), 0.9, [T.RandomSolarize(128, p=0.2)])
        self.local = view(96, (0.05, 0.32), 0.5)

    def __call__(self, data: bytes, index: int) -> list[torch.Tensor]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return [self.first(image), self.second(image), *(self.local(image) for _ in range(8))]


class Ours:
    """quietvit's decoder and MultiCrop with its defaults, one generator per sample as the loader makes it."""

    def __init__(self) -> None:
        self.crop = MultiCrop()

    def __call__(self, data: bytes, index: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        image = decode_bytes(data, "photo", min_side=self.crop.min_side)
        return self.crop(image, np.random.default_rng((0, index, 0)))


def timed(pipeline: Callable[[bytes, int], object], photos: Sequence[bytes]) -> tuple[float, float]:
    """CPU and wall seconds per image."""
    cpu, wall = time.process_time(), time.perf_counter()
    for index, data in enumerate(photos):
        pipeline(data, index)
    return (time.process_time() - cpu) / len(photos), (time.perf_counter() - wall) / len(photos)


def compare(photos: Sequence[bytes]) -> dict[str, Any]:
    """Both pipelines in turns over blocks of photos."""
    reference, ours = Reference(), Ours()
    timed(reference, photos[:2]), timed(ours, photos[:2])  # first calls set things up
    rows = []
    for start in range(0, len(photos), BLOCK):
        block = photos[start : start + BLOCK]
        first, second = timed(reference, block), timed(ours, block)
        rows.append((*first, *second))
    ratios = sorted(row[0] / row[2] for row in rows)
    return {
        "blocks": len(rows),
        "reference_images_per_s": 1 / statistics.median(row[0] for row in rows),
        "ours_images_per_s": 1 / statistics.median(row[2] for row in rows),
        "ratio": statistics.median(ratios),
        "ratio_of_blocks_min_max": [ratios[0], ratios[-1]],
        "ratio_wall_clock": statistics.median(row[1] / row[3] for row in rows),
    }


def stages(photos: Sequence[bytes]) -> dict[str, float]:
    """Where our time goes: CPU milliseconds per image of all ten views."""
    crop = MultiCrop()
    spent = dict.fromkeys(("decode", "draw", "resize", "flip", "colour", "blur", "solarize"), 0.0)

    def run(stage: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        start = time.process_time()
        value = call(*args, **options)
        spent[stage] += time.process_time() - start
        return value

    for index, data in enumerate(photos):
        image = run("decode", decode_bytes, data, "photo", min_side=crop.min_side)
        for view in run("draw", crop.draw, image.shape[0], image.shape[1], np.random.default_rng((0, index, 0))):
            out = run("resize", resize_box, image, view.box, view.size)
            if view.flip:
                out = run("flip", cv2.flip, out, 1)
            if view.jitter is not None or view.grayscale:
                out = run("colour", recolor, out, view.jitter, grayscale=view.grayscale)
            if view.blur_sigma is not None:
                out = run("blur", gaussian_blur, out, view.blur_sigma, crop.blur_kernel)
            if view.solarize:
                run("solarize", solarize, out, crop.solarize_threshold)
    return {stage: 1000 * seconds / len(photos) for stage, seconds in spent.items()}


def resampling_error(photos: Sequence[bytes]) -> dict[str, float]:
    """Grey levels between our views before colour and PIL's antialiased bicubic of the same boxes of the full image.

    Includes the loss of decoding at a reduced scale, where the images are large enough for that.
    """
    crop = MultiCrop()
    means, largest = [], 0.0
    for index, data in enumerate(photos):
        full = Image.open(io.BytesIO(data)).convert("RGB")
        image = decode_bytes(data, "photo", min_side=crop.min_side)
        reduced = round(full.width / image.shape[1])
        for view in crop.draw(image.shape[0], image.shape[1], np.random.default_rng((1, index, 0))):
            top, left, height, width = (reduced * pixels for pixels in view.box)
            box = (left, top, min(left + width, full.width), min(top + height, full.height))
            expected = np.asarray(full.crop(box).resize((view.size, view.size), Image.Resampling.BICUBIC))
            error = np.abs(resize_box(image, view.box, view.size).astype(np.int16) - expected)
            means.append(float(error.mean()))
            largest = max(largest, float(error.max()))
    return {"mean": statistics.mean(means), "worst_view_mean": max(means), "largest": largest}


def hardware() -> str:
    """The processor's name; nothing that identifies a machine."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.machine()}, 1 core"


def measure(photos: Sequence[bytes]) -> dict[str, Any]:
    sizes = [Image.open(io.BytesIO(data)).size for data in photos]
    return {
        "median_size": [int(statistics.median(s[0] for s in sizes)), int(statistics.median(s[1] for s in sizes))],
        **compare(photos),
        "our_ms_per_image": stages(photos),
        "resampling_error_grey_levels": resampling_error(photos[:100]),
    }


def as_text(report: dict[str, Any]) -> str:
    lines = [
        f"Multi-crop, bytes in memory -> 2 x 224 + 8 x 96. {report['date']}, {report['hardware']}, {report['source']}.",
        "",
        "| images | DINOv2's pipeline, images/s | ours, images/s | ratio (CPU) | blocks from - to | ratio (wall) |",
        "|---|---|---|---|---|---|",
    ]
    for run in report["runs"]:
        low, high = run["ratio_of_blocks_min_max"]
        width, height = run["median_size"]
        lines.append(
            f"| {width} x {height} | {run['reference_images_per_s']:.1f} | {run['ours_images_per_s']:.1f} | "
            f"**{run['ratio']:.2f}** | {low:.2f} - {high:.2f} | {run['ratio_wall_clock']:.2f} |"
        )
    for run in report["runs"]:
        width, height = run["median_size"]
        error = run["resampling_error_grey_levels"]
        parts = ", ".join(f"{stage} {ms:.2f}" for stage, ms in run["our_ms_per_image"].items())
        lines += [
            "",
            f"{width} x {height}: our CPU milliseconds per image: {parts}. "
            f"Resampling against PIL's antialiased bicubic: {error['mean']:.3f} grey levels on average, "
            f"{error['worst_view_mean']:.3f} in the worst view.",
        ]
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of multi-crop augmentation against DINOv2's pipeline.")
    parser.add_argument("--tar", type=Path, default=TAR, help="tar of JPEGs; made-up pictures if it does not exist")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--short-side", type=int, nargs="*", default=[], help="measure also with files of this size")
    parser.add_argument("--json", type=Path, help="write the results here, and as a table beside it (.md)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    found = args.tar.exists()
    photos = read_photos(args.tar, args.images) if found else make_photos(args.images)
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "opencv": cv2.__version__}
    report = {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "source": f"{len(photos)} images of {args.tar.name}" if found else f"{len(photos)} made-up images",
        "versions": {**versions, "pillow": PIL.__version__, "numpy": np.__version__},
        "runs": [measure(photos), *(measure([resized(data, side) for data in photos]) for side in args.short_side)],
    }
    text = as_text(report)
    print(text)
    if args.json is not None:
        write(args.json, json.dumps(report, indent=1) + "\n")
        write(args.json.with_suffix(".md"), text)


if __name__ == "__main__":
    main()
