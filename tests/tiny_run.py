"""A whole run at test size: pictures from a formula, a nano model, everything put together by quietvit.build."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from quietvit.build import build_training
from quietvit.config.load import load_config
from quietvit.train.loop import Training

RECIPE = Path(__file__).parent / "tiny.yaml"


def make_images(folder: Path, num: int = 20, *, side: int = 40) -> Path:
    """PNG files that are the same bytes of pixels everywhere: integer arithmetic only."""
    folder.mkdir(parents=True, exist_ok=True)
    y, x, c = np.mgrid[:side, :side, :3]
    for i in range(num):
        blob = 96 * ((x - side // 2 - i) ** 2 + (y - 3 * i % side) ** 2 < (5 + i) ** 2)
        waves = (7 + i) * x * (c + 1) + (3 + 5 * i) * y + 40 * c * i
        Image.fromarray(((waves % 160) + blob).astype(np.uint8)).save(folder / f"{i:03}.png")
    return folder


def tiny_training(run_dir: Path, images: Path, *overrides: str) -> Training:
    """`tests/tiny.yaml` with overrides, ready for quietvit.train.loop.run."""
    run_dir.mkdir(parents=True, exist_ok=True)
    config = load_config(str(RECIPE), [f"data.path={images}", *overrides])
    return build_training(config, run_dir, Console(file=io.StringIO(), width=200))


def said(training: Training) -> str:
    """Everything that a run printed."""
    assert isinstance(training.console.file, io.StringIO)
    return training.console.file.getvalue()
