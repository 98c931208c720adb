"""The rows and lines of the page's tables, as plain text."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quietvit.backbones.cost import count_parameters
from quietvit.config.load import flatten
from quietvit.config.schema import RunConfig
from quietvit.train.guard import ROWS
from quietvit.train.progress import duration
from quietvit_eval.cards import Card
from quietvit_eval.report import CAPTIONS, unit_of
from quietvit_eval.run_report.folder import RunFolder, is_number

Rows = list[tuple[str, str]]
STATES: Mapping[str, str] = {
    "queued": "waits in the queue",
    "running": "is running",
    "finished": "is finished",
    "stopped": "was stopped and can be resumed",
    "failed": "has failed",
    "new": "has not begun",
    "unknown": "is in a state that nobody wrote down",
}
NORMAL_95 = 1.96  # standard errors on each side of a 95 % interval
LISTED = 200  # unreadable images in the list (ours)


@dataclass(frozen=True)
class Score:
    """A line of the table of scores."""

    task: str
    caption: str
    score: str
    interval: str
    controls: str
    protocol: str
    note: str


def headline(run: RunFolder, num_images: int | None) -> str:
    """State, steps, time, images and passes, in one sentence or two."""
    guard = "was stopped by its guard" if run.guard.get("outcome") == "stopped" else None
    name = guard or STATES.get(run.state.name, f"is {run.state.name}")
    of = f" of {run.steps:,}" if run.steps else ""
    said = f"This run {name}: step {run.step:,}{of}."
    facts = []
    if seconds := training_seconds(run):
        facts.append(f"about {duration(seconds)} of training")
    images = run.last("images")
    if images:
        passes = f", {images / num_images:.1f} passes over {num_images:,}" if num_images else ""
        facts.append(f"{images:,.0f} images seen{passes}")
    return f"{said} {_sentence(facts)}".strip()


def training_seconds(run: RunFolder) -> float:
    """Time in training steps, from images and images per second; looks and checkpoints are not in it."""
    steps, speed = run.series("images_per_s")
    images = run.last("images")
    if not len(steps) or not images or not run.step:
        return 0.0
    batch = images / run.step
    good = np.isfinite(speed) & (speed > 0)
    return float((batch / speed[good]).sum())


def settings(run: RunFolder) -> tuple[Rows, str]:
    """Settings that differ from the defaults, as setting and "value (default: ...)"; and all, as YAML-like lines."""
    if run.config is None:
        return [], ""
    own, usual = flatten(run.config), flatten(RunConfig())
    changed = [(k, f"{_value(v)}  (default: {_value(usual[k])})") for k, v in own.items() if v != usual[k]]
    return changed, "\n".join(f"{k}={_value(v)}" for k, v in own.items())


def scores(run: RunFolder, weights_hash: str | None) -> list[Score]:
    """A line for each card of a model, with the controls of the same protocol."""
    by_protocol: dict[str, list[Card]] = {}
    for card in run.cards:
        by_protocol.setdefault(card.protocol_key(), []).append(card)
    out = []
    for cards in by_protocol.values():
        controls = [f"{c.subject} {_with_unit(c, c.scores[c.main])}" for c in cards if c.subject != "model"]
        models = [c for c in cards if c.subject == "model"] or cards[:1]
        for card in models:
            main, error = card.scores[card.main], card.standard_error
            interval = (
                ""
                if math.isnan(error)
                else " to ".join(unit_of(card.main).text(main + side * NORMAL_95 * error) for side in (-1, 1))
            )
            own = card.model.get("hash")
            other = weights_hash is not None and own is not None and own != weights_hash
            where = f" ({_short_path(card.model.get('path'))})" if card.model.get("path") else ""
            out.append(
                Score(
                    task=f"{card.task}, {card.main}",
                    caption=CAPTIONS.get(card.task, ""),
                    score=_with_unit(card, main),
                    interval=interval,
                    controls="; ".join(controls) or "none scored",
                    protocol=_protocol(card),
                    note=f"Of other weights than the newest{where}." if other else "",
                )
            )
    return out


def model(run: RunFolder, weights_hash: str | None) -> Rows:
    """Architecture, parameters, normalisation, provenance and hash of the newest teacher."""
    about = run.teacher
    backbone = _mapping(about.get("backbone"))
    arguments = _mapping(backbone.get("arguments"))
    if not arguments:
        return []
    normalisation, provenance = _mapping(about.get("normalisation")), _mapping(about.get("provenance"))
    start = _mapping(provenance.get("init"))
    known = ("embed_dim", "depth", "num_heads", "patch_size", "num_registers")
    shape = ", ".join(f"{key} {arguments[key]}" for key in known if key in arguments)
    rows = [
        ("architecture", f"{backbone.get('name', '')}: {shape}"),
        ("parameters", _parameters(str(backbone.get("name", "")), arguments)),
        ("image side", f"{about.get('image_size')} pixels"),
        ("mean, std", f"{_value(normalisation.get('mean'))}, {_value(normalisation.get('std'))} (RGB from 0 to 1)"),
        ("step", str(provenance.get("step", ""))),
        ("objective", str(provenance.get("objective", ""))),
        (
            "began with",
            "; ".join(map(str, [start["file"], *start.get("changes", ())])) if "file" in start else "fresh weights",
        ),
        ("seed", str(provenance.get("seed", ""))),
        ("SHA-256 of the weights", weights_hash or ""),
        ("hash of the settings", str(provenance.get("config_hash", ""))),
    ]
    return [(name, value) for name, value in rows if value]


def data(run: RunFolder, num_images: int | None) -> Rows:
    """Where the images came from."""
    provenance = _mapping(run.teacher.get("provenance"))
    config = run.config.data if run.config is not None else None
    rows = [
        ("source", str(provenance.get("data") or (config.source if config else ""))),
        ("path", str(config.path or "") if config else ""),
        ("options", ", ".join(f"{k}={_value(v)}" for k, v in config.options.items()) if config else ""),
        ("images", f"{num_images:,}" if num_images else ""),
        ("fingerprint", str(provenance.get("data_fingerprint", ""))),
        ("unreadable", f"{len(run.unreadable):,}"),
    ]
    return [(name, value) for name, value in rows if value]


def unreadable(run: RunFolder) -> Rows:
    """Names and reasons, as many as fit."""
    return list(run.unreadable.items())[:LISTED]


def environment(run: RunFolder) -> Rows:
    """Versions, hardware and the command."""
    facts = run.environment
    packages = ", ".join(f"{name} {version}" for name, version in _mapping(facts.get("packages")).items())
    command = facts.get("command")
    rows = [(key, str(facts.get(key) or "")) for key in ("hardware", "device", "platform", "python", "git")]
    rows += [("packages", packages), ("command", shlex.join(map(str, command)) if isinstance(command, list) else "")]
    return [(name, value) for name, value in rows if value]


def guard_table(run: RunFolder) -> list[list[str]]:
    """The model that the run began with, the best kept and the last, beside each other; [] without a guard."""
    looks = [
        (name, _mapping(run.guard.get(key)))
        for name, key in (("start", "start"), ("best kept", "best"), ("now", "now"))
    ]
    if not any(look for _, look in looks):
        return []
    head = ["", *(f"{name}, step {look['step']:.0f}" if is_number(look.get("step")) else name for name, look in looks)]
    lines = [
        [title, *(f"{look[key]:.3g}" if is_number(look.get(key)) else "-" for _, look in looks)]
        for key, title in ROWS.items()
        if any(is_number(look.get(key)) for _, look in looks)
    ]
    return [head, *lines]


def next_steps(run: RunFolder) -> list[tuple[str, str]]:
    """What to type next, with what it does."""
    folder = shlex.quote(str(run.path))
    kind = run.config.data.source if run.config else ""
    images = "scenes" if kind == "scenes" else "LABELLED_IMAGES"
    settings = shlex.quote(str(run.path / "config.yaml"))
    other = shlex.quote(f"{run.path}-continued")
    going_on = ("go on from the newest checkpoint", f"quietvit train {settings} --out {folder}")
    if run.guard.get("outcome") == "stopped" and run.config is not None:
        slower = f"optim.lr={run.config.optim.lr / 2:g}"
        going_on = ("try again at half the learning rate", f"quietvit train {settings} {slower} --out {other}")
    elif run.state.name == "finished":
        start = shlex.quote(f"init.from={run.path}")
        going_on = ("train on from this model, in a new run", f"quietvit train {settings} {start} --out {other}")
    elif run.state.name in ("running", "queued"):
        going_on = ("watch it", f"quietvit jobs {folder}")
    return [
        ("score it", f"quietvit eval knn,linear --model {folder} --data {images} --random-init --pixels"),
        ("hand it to other tools", f"quietvit export {folder} --out {shlex.quote(f'{run.path}-export')}"),
        going_on,
    ]


def _protocol(card: Card) -> str:
    view = card.protocol.get("image_size")
    test = _mapping(card.data.get("test"))
    classes = f", {card.num_classes} classes" if card.num_classes else ""
    parts = [
        f"label {card.label}{classes}",
        f"{view} px" if isinstance(view, int) else "",
        f"{test.get('images', 0):,} test images of {test.get('name', '')}",
        f"protocol {card.protocol_key()}",
    ]
    return "; ".join(part for part in parts if part)


def _with_unit(card: Card, value: float) -> str:
    unit = unit_of(card.main)
    return f"{unit.text(value)} {unit.name}".strip()


def _parameters(name: str, arguments: Mapping[str, Any]) -> str:
    try:
        return f"{count_parameters(name, **arguments):,}"
    except (ValueError, TypeError):
        return ""


def _short_path(path: object) -> str:
    text = str(path)
    return text if len(text) <= 40 else f"...{text[-37:]}"


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _value(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_value(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_value(v)}" for k, v in value.items()) + "}"
    return str(value)


def _sentence(parts: Sequence[str]) -> str:
    return f"{'; '.join(parts)}.".capitalize() if parts else ""
