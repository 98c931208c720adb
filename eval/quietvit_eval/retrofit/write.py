"""A retrofitted model as a folder: weights that `quietvit.load` opens, and retrofit.json: how it was made."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import quietvit
from quietvit.data.sources import Source
from quietvit.files import free_folder, new_folder, write_text
from quietvit.weights.extractor import BackboneExtractor
from quietvit.weights.native import save_teacher
from quietvit_eval.inspect.artifacts import Subject, finite
from quietvit_eval.retrofit.choose import Retrofit, RetrofitOptions, retrofit
from quietvit_eval.retrofit.compare import Row, comparison

FORMAT = "quietvit-retrofit-1"
JSON_NAME = "retrofit.json"
NAMES = ("before", "test-time registers")


def retrofit_model(
    extractor: BackboneExtractor, source: Source, options: RetrofitOptions, out: Path, *, console: Console | None = None
) -> tuple[Retrofit, list[Row]]:
    """Add test-time registers to a model and write it into the new folder `out`, with retrofit.json. Returns how it was
    come by, and the comparison of the model before and after on the images that the neurons were found on.

    All of the folder is written, or nothing. Raises FileExistsError if `out` is a file or holds anything; ValueError
    as `retrofit`; OSError as the file system does.
    """
    place = free_folder(out, what="the retrofit")
    made = retrofit(extractor, source, options, console=console)
    models = dict(zip(NAMES, (extractor, made.model), strict=True))
    rows = comparison([Subject(name, lambda m=model: m) for name, model in models.items()], made.images)  # type: ignore[misc]
    with new_folder(place) as folder:
        meta = made.model.meta
        save_teacher(
            folder, made.model.backbone, mean=made.model.mean, std=made.model.std, image_size=made.model.image_size,
            provenance=meta["provenance"], backbone_name=meta["backbone"]["name"],
        )  # fmt: skip
        about = finite(_about(made, rows, source, options))
        write_text(folder / JSON_NAME, json.dumps(about, indent=1, allow_nan=False) + "\n")
    return made, rows


def _about(made: Retrofit, rows: list[Row], source: Source, options: RetrofitOptions) -> dict[str, Any]:
    found = made.found
    return {
        "format": FORMAT,
        "data": {"name": source.name, "fingerprint": source.fingerprint(), "images": len(made.images)},
        "settings": {k: v for k, v in asdict(options).items() if k not in ("batch_size", "workers")},
        "image_size": made.images.transform.image_size,
        "outliers": {"block": found.block, "begin_after": found.begins, "patches": found.outliers}
        | {"verdict": asdict(found.verdict)},
        "neurons": [asdict(neuron) for neuron in found.ranked(made.chosen.neurons)],
        "trials": [asdict(trial) for trial in made.trials],
        "rows": [row.to_json() for row in rows],
        "environment": {"quietvit": quietvit.__version__, "torch": torch.__version__},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
