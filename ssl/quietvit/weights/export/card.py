"""The model card of an export: README.md with the head that model hubs read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import quietvit
from quietvit.backbones.cost import count_macs
from quietvit.backbones.trunk import Trunk
from quietvit.weights.export.target import ExportOptions, Parity, Target
from quietvit.weights.extractor import BackboneExtractor

__all__ = ["Run", "ScoreRow", "check_license", "model_card", "read_run"]

ORIGINS = {  # by the "source" of a provenance: weights that others trained
    "dinov2": "pretrained without labels by DINOv2, converted by quietvit",
    "t2t_vit": "trained with labels by T2T-ViT, converted by quietvit",
    "open_clip": "the image tower of a CLIP model in open_clip's form, converted by quietvit",
    "timm": "read from a timm model, converted by quietvit",
    "transformers": "read from a transformers folder, converted by quietvit",
}
OURS = "pretrained without labels by quietvit"
LIBRARIES = {"transformers": "transformers", "timm": "timm", "onnx": "onnx", "torch": "pytorch"}
SPDX = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")
EXPRESSION = re.compile(rf"\(*{SPDX.pattern}\)*( (AND|OR|WITH) \(*{SPDX.pattern}\)*)*")


@dataclass(frozen=True)
class ScoreRow:
    """One score of the card, in words ready to print."""

    weights: str  # hash of the weights that were scored: a card shows scores of its own weights only
    task: str
    score: str
    random_init: str  # the same network before training, by the same protocol; "" if it was not scored
    protocol: str
    resolution: str
    data: str


@dataclass(frozen=True)
class Run:
    """What a run folder tells beside its weights."""

    recipe: str = ""  # its config.yaml
    environment: Mapping[str, Any] = field(default_factory=dict)  # its environment.json


def read_run(model: Path) -> Run:
    """The recipe and environment beside a model: in its folder, or in the run folder above a checkpoint's.

    What is missing or cannot be read stays empty: weights can be exported without.
    """
    folder = model if model.is_dir() else model.parent
    if folder.parent.name == "checkpoints":
        folder = folder.parent.parent
    environment = {}
    recipe = ""
    with suppress(OSError, ValueError):
        environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    with suppress(OSError, ValueError):
        recipe = (folder / "config.yaml").read_text(encoding="utf-8")
    return Run(recipe, environment if isinstance(environment, dict) else {})


def check_license(name: str | None) -> None:
    """Raises ValueError for what cannot be an SPDX licence expression (https://spdx.org/licenses)."""
    if name is not None and not EXPRESSION.fullmatch(name):
        raise ValueError(f"license {name!r} is no SPDX name: write e.g. Apache-2.0, MIT or CC-BY-NC-4.0")


def model_card(
    extractor: BackboneExtractor,
    target: Target,
    options: ExportOptions,
    parities: Sequence[Parity],
    *,
    run: Run = Run(),
    scores: Sequence[ScoreRow] = (),
) -> str:
    """The text of README.md. Scores of other weights are left out."""
    meta = extractor.meta
    origin = _origin(meta["provenance"])
    scored = [row for row in scores if row.weights == extractor.identity()["hash"]]
    sections = [
        _head(extractor, target, options),
        f"# {meta['backbone']['name']} backbone, {origin}",
        _summary(extractor),
        "## Use\n\nIn this folder:",
        f"```python\n{target.usage(extractor, options).rstrip()}\n```",
        target.remarks(extractor, options).strip(),
        _input(extractor),
        _architecture(extractor),
        _training(meta["provenance"], run),
        _scores(scored),
        _license(meta["provenance"], options),
        _limits(extractor, target, parities),
        _fold_out("Provenance", "json", json.dumps(meta["provenance"], indent=2)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _fold_out(title: str, language: str, text: str) -> str:
    fence = "`" * max(3, 1 + max((len(m) for m in re.findall(r"`+", text)), default=0))
    return f"<details><summary>{title}</summary>\n\n{fence}{language}\n{text.rstrip()}\n{fence}\n\n</details>"


def _origin(provenance: Mapping[str, Any]) -> str:
    if source := provenance.get("source"):
        return ORIGINS.get(source, f"weights of others ({_cell(source)}), converted by quietvit")
    if provenance.get("random_init"):
        return "random weights, not trained"
    if "step" not in provenance:
        return "of an origin that was not recorded"
    return f"{OURS}, from weights of others" if _begun_from(provenance) else OURS


def _begun_from(provenance: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Of weights trained here, the provenance of the weights of others at the start of the line, if there are any."""
    while isinstance(start := provenance.get("init"), Mapping):
        provenance = start.get("provenance") or {}
        if provenance.get("source"):
            return provenance
    return None


def _trained_here(provenance: Mapping[str, Any]) -> bool:
    return _origin(provenance).startswith(OURS)


def _head(extractor: BackboneExtractor, target: Target, options: ExportOptions) -> str:
    """The YAML head. Hubs know licences by their SPDX names in small letters; "unknown" is one of theirs too."""
    provenance, chosen = extractor.meta["provenance"], options.license
    if chosen is None:
        license_lines = ["license: unknown"]
    elif SPDX.fullmatch(chosen) and not chosen.startswith("LicenseRef-"):
        license_lines = [f"license: {chosen.lower()}"]
    else:
        license_lines = ["license: other", f"license_name: {json.dumps(chosen)}"]
    tags = ["quietvit", "vision-transformer", extractor.meta["backbone"]["name"].replace("_", "-")]
    tags += ["registers"] if cast(Trunk, extractor.backbone).num_registers else []
    tags += ["self-supervised"] if _trained_here(provenance) or provenance.get("source") == "dinov2" else []
    lines = [
        *license_lines,
        f"library_name: {LIBRARIES.get(target.name, 'quietvit')}",
        "pipeline_tag: image-feature-extraction",
        "tags:",
        *(f"- {tag}" for tag in tags),
    ]
    return "\n".join(["---", *lines, "---"])


def _summary(extractor: BackboneExtractor) -> str:
    backbone = cast(Trunk, extractor.backbone)
    registers = {0: "", 1: "1 register, "}.get(backbone.num_registers, f"{backbone.num_registers} registers, ")
    return (
        f"Frozen features of images: for each image a class token, {registers}and a grid of patch tokens, "
        f"{extractor.embed_dim} numbers each, after {extractor.num_blocks} blocks and the final norm."
        + (f" With a head of {extractor.num_classes} classes." if extractor.num_classes else "")
    )


def _input(extractor: BackboneExtractor) -> str:
    mean, std = list(extractor.mean), list(extractor.std)
    return (
        f"## Input\n\nRGB in [0, 1], minus {mean}, divided by {std}. Trained at {extractor.image_size} px; sides are "
        f"multiples of {extractor.stride} px."
    )


def _architecture(extractor: BackboneExtractor) -> str:
    backbone = cast(Trunk, extractor.backbone)
    numbers = sum(value.numel() for value in backbone.state_dict().values())
    side = backbone.image_size
    macs = count_macs(extractor.meta["backbone"]["name"], **backbone.arguments)
    rows = [
        ("parameters (all numbers in the file of quietvit)", f"{numbers:,}"),
        (f"multiply-adds of one image of {side} x {side} px", f"{macs / 1e9:.3g} G"),
        *((name, value) for name, value in backbone.arguments.items() if value != ""),
    ]
    return f"## Architecture\n\n{table(('argument', 'value'), rows)}"


def _training(provenance: Mapping[str, Any], run: Run) -> str:
    told = _told_of_ours(provenance, run) if _trained_here(provenance) else _told_of_others(provenance)
    rows = [(key, value) for key, value in told.items() if value not in (None, "")]
    parts = ["## Training", table(("what", "value"), rows) if rows else "Nothing is recorded."]
    if notes := provenance.get("notes"):
        parts.append("Of the conversion: " + "; ".join(map(_cell, notes)) + ".")
    if run.recipe and _trained_here(provenance):
        parts.append(_fold_out("Recipe (config.yaml, with the paths of the machine it ran on)", "yaml", run.recipe))
    return "\n\n".join(parts)


def _told_of_others(provenance: Mapping[str, Any]) -> dict[str, Any]:
    if not provenance.get("source"):
        return {"seed": provenance.get("seed")}
    return {"trained by": "others: see the card or the paper of the original", "file": provenance.get("file")}


def _told_of_ours(provenance: Mapping[str, Any], run: Run) -> dict[str, Any]:
    packages, start = run.environment.get("packages") or {}, provenance.get("init") or {}
    versions = {"quietvit": packages.get("quietvit"), "git": run.environment.get("git"), "torch": packages.get("torch")}
    return {
        "started from": "; ".join(map(str, [start["file"], *start.get("changes", ())])) if "file" in start else None,
        "data": provenance.get("data"),
        "images": provenance.get("num_images"),
        "fingerprint of the data": provenance.get("data_fingerprint"),
        "objective": provenance.get("objective"),
        "steps": provenance.get("step"),
        "seed": provenance.get("seed"),
        "hash of the recipe": provenance.get("config_hash"),
        "code": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "hardware": run.environment.get("hardware"),
    }


def _scores(rows: Sequence[ScoreRow]) -> str:
    if not rows:
        return "## Scores\n\nNo result card of these weights lay beside them (`quietvit eval` writes them)."
    head = ("task", "score", "random init", "protocol", "resolution", "data")
    lines = [(r.task, r.score, r.random_init or "not scored", r.protocol, r.resolution, r.data) for r in rows]
    return (
        f"## Scores\n\n{table(head, lines)}\n\nOf frozen features, ± the standard error from the draw of test images. "
        "Random init: the same network before training. Scores by another protocol do not compare."
    )


def _license(provenance: Mapping[str, Any], options: ExportOptions) -> str:
    said = [f"Stated at the export: {options.license}."] if options.license else []
    if provenance.get("source"):
        said.append("These are weights of others: their licence holds, and the conversion does not change it.")
    elif not options.license:
        said.append("Nobody has chosen a licence for these weights (`quietvit export --license` states one).")
    if start := _begun_from(provenance):
        said.append(
            f"Training began from weights of others ({_cell(start.get('file'))}): their licence may bind these too."
        )
    return "## Licence\n\n" + " ".join(said)


def _limits(extractor: BackboneExtractor, target: Target, parities: Sequence[Parity]) -> str:
    rows = [
        (p.reader, p.output, f"{p.size[0]} x {p.size[1]}", f"{p.difference:.3g}", f"{p.tolerance:g}") for p in parities
    ]
    first = max((p.difference for p in parities if p.reader == target.name), default=0.0)
    return (
        f"## Check\n\nBefore it got its name, this export was opened again and compared with the model in quietvit "
        f"{quietvit.__version__}, in float32 on the CPU, on rendered pictures and noise: greatest difference "
        f"{first:.3g}. At other sizes nothing was compared.\n\n"
        + table(("read by", "output", "height x width", "greatest difference", "allowed"), rows)
    )
