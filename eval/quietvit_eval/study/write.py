"""Everything that a study found, written: study.json, the folder figures, and the page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import quietvit
from quietvit.files import write_text
from quietvit_eval.inspect.artifacts import finite
from quietvit_eval.study.figures import cost_figure, norm_figures, score_figures
from quietvit_eval.study.page import Content, write_page
from quietvit_eval.study.reading import reading
from quietvit_eval.study.results import Entry, as_tree, measures_of, norms_of

FORMAT = "quietvit-register-study-1"
PAGE, RESULT, FIGURES = "study.html", "study.json", "figures"


@dataclass(frozen=True)
class About:
    """What was to be studied, and what of it is not there (a sentence each)."""

    recipe: str
    registers: tuple[int, ...]
    seeds: tuple[int, ...]
    settings: Mapping[str, Any]  # by dotted name, without the two that vary
    steps: int
    data: str
    missing: tuple[str, ...]


def write_study(out: Path, about: About, entries: Sequence[Entry], cost: Mapping[str, Any] | None) -> list[str]:
    """Write all of it into the folder `out`; returns the reading. `cost` as `cost.counted` with "measured" or "noted".

    Raises OSError as the file system does.
    """
    measures, norms = measures_of(entries), norms_of(entries)
    seeds = max((len(c.by_seed) for m in measures for c in m.cells if c.registers is not None), default=0)
    sentences = reading(norms, measures, cost, about.missing, seeds)
    study: dict[str, Any] = {
        "format": FORMAT,
        "recipe": about.recipe,
        "registers": list(about.registers),
        "seeds": list(about.seeds),
        "steps": about.steps,
        "data": about.data,
        "settings": dict(about.settings),
        "reading": sentences,
        "missing": list(about.missing),
        "models": [_model(entry) for entry in entries],
        **as_tree(measures, norms),
        "cost": cost,
        "environment": {"quietvit": quietvit.__version__, "torch": torch.__version__},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    content = Content(
        study, entries, measures, norms, sentences, norm_figures(entries), score_figures(measures),
        None if cost is None else cost_figure(cost),
    )  # fmt: skip
    pairs = [figure for both in content.score_figures for figure in both]
    (out / FIGURES).mkdir(parents=True, exist_ok=True)
    for figure in (*content.norm_figures, *pairs, content.cost_figure):
        if figure is not None:
            figure.write(out / FIGURES)
    write_text(out / RESULT, json.dumps(finite(study), indent=1, allow_nan=False) + "\n")
    write_page(out / PAGE, content)
    return sentences


def _model(entry: Entry) -> dict[str, Any]:
    """What study.json says of one model: without maps and histograms, which are in the folder looks."""
    look = entry.look
    kept = ("images", "image_size", "data", "grid", "decision", "layers")
    return {
        "arm": entry.arm,
        "registers": entry.registers,
        "seed": entry.seed,
        "folder": entry.folder,
        "look": None if look is None else {key: look[key] for key in kept},
        "scores": {
            f"{card.task} {card.protocol_key()} {card.subject}": {card.main: card.scores[card.main]}
            for card in entry.cards
        },
    }
