"""Writing a model for another tool: all of it, opened again and compared, or nothing."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from quietvit.files import free_folder, new_folder, write_text
from quietvit.weights.export.all_targets import find_target
from quietvit.weights.export.card import Run, ScoreRow, check_license, model_card, read_run
from quietvit.weights.export.compare import check_parities, compare
from quietvit.weights.export.target import ExportOptions, Parity, Size, Target
from quietvit.weights.extractor import BackboneExtractor, load

__all__ = ["Report", "export_model"]

CARD_NAME, REPORT_NAME = "README.md", "report.json"
READERS = ("quietvit", "torch", "safetensors", "transformers", "timm", "onnx", "onnxruntime")  # versions in the report


@dataclass(frozen=True)
class Report:
    """What was exported where, and how far it is from the model."""

    target: str
    out: Path
    weights: str  # hash of the model's weights (native.weights_hash)
    parities: tuple[Parity, ...]
    usage: str  # Python that opens it, run in `out`

    @property
    def max_difference(self) -> float:
        """Greatest difference of any output as the target's own library reads it."""
        return max(p.difference for p in self.parities if p.reader == self.target)

    def to_json(self) -> dict[str, Any]:
        """What report.json holds."""
        installed = {name: sys.modules.get(name) and _version(name) for name in READERS}
        return {
            "target": self.target,
            "weights": self.weights,
            "max_difference": self.max_difference,
            "parity": [asdict(p) for p in self.parities],
            "versions": {name: version for name, version in installed.items() if version},
        }


def export_model(
    model: Path | BackboneExtractor,
    out: Path,
    *,
    to: str = "safetensors",
    options: ExportOptions = ExportOptions(),  # noqa: B008 (frozen)
    run: Run | None = None,
    scores: Sequence[ScoreRow] = (),
    hints: Mapping[str, Any] | None = None,
) -> Report:
    """Write `model` into the new folder `out` in the form of the target `to` (a row of TARGETS), with README.md, the
    model card, and report.json.

    `model`: a path that `load` takes, or a loaded model. `run`: recipe and environment for the card; None: what lies
    beside the path. `scores`: rows for the card, of which it shows those of the same weights. `hints`: keywords of
    `load` for a path whose file does not tell everything (`num_heads`, `mean`, `std`).

    The export is made under another name beside `out`, opened again by the target's own library and compared with the
    model in float32 on the CPU, on the same images each time. If anything fails, or is interrupted, nothing remains.

    Raises FileExistsError if `out` is a file or holds anything; ValueError for an unknown target, a model or options
    that it cannot take, a licence that is no SPDX name, and an export that differs from the model by more than the
    target's tolerance; as `load` for the path; OSError as the file system does.
    """
    target = find_target(to)
    place = free_folder(out, what="the export")
    check_license(options.license)
    if run is None:
        run = read_run(model) if isinstance(model, Path) else Run()
    extractor = load(model, device="cpu", **(hints or {})) if isinstance(model, Path) else _on_cpu(model)
    sizes = _sizes(target, extractor, options)
    with new_folder(place) as folder:
        target.write(extractor, folder, options)
        opened = target.reopen(folder, options)
        parities = compare(extractor, opened, sizes, reader=target.name, tolerance=target.tolerance)
        check_parities(parities)
        del opened
        parities += target.further(extractor, folder, options)
        check_parities(parities)
        usage = target.usage(extractor, options)
        report = Report(target.name, out, extractor.identity()["hash"], tuple(parities), usage)
        write_text(folder / CARD_NAME, model_card(extractor, target, options, parities, run=run, scores=scores))
        write_text(folder / REPORT_NAME, json.dumps(report.to_json(), indent=2) + "\n")
    return report


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _on_cpu(extractor: BackboneExtractor) -> BackboneExtractor:
    if extractor.device.type == "cpu":
        return extractor
    return BackboneExtractor(copy.deepcopy(extractor.backbone), extractor.meta, device=torch.device("cpu"))


def _sizes(target: Target, extractor: BackboneExtractor, options: ExportOptions) -> Sequence[Size]:
    """Sizes to compare at. Raises ValueError if the target cannot take the model or the options."""
    if reason := target.refusal(extractor, options):
        raise ValueError(reason)
    sizes = target.sizes(extractor, options)
    if any(size not in sizes for size in options.sizes):
        raise ValueError(f"an export to {target.name} takes images of any size: leave sizes out")
    return sizes
