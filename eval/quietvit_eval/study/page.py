"""The page of a study: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from quietvit.files import write_text
from quietvit_eval.inspect.grids import heat
from quietvit_eval.pages import fill_page
from quietvit_eval.report import unit_of
from quietvit_eval.study.figures import Figure
from quietvit_eval.study.intervals import Interval
from quietvit_eval.study.results import Cell, Entry, Measure, Norms

VERDICTS: Mapping[str, str] = {
    "none": "no artifacts",
    "suspicious": "second mode, too near",
    "outliers": "artifacts",
    "not finite": "not finite",
}
MOST_REGISTERS = 16  # maps of registers in one row (the paper's greatest count)
Tree = Mapping[str, Any]


@dataclass(frozen=True)
class Content:
    """All that a page is made of."""

    study: Tree  # as in study.json
    entries: Sequence[Entry]
    measures: Sequence[Measure]
    norms: Sequence[Norms]
    sentences: Sequence[str]
    norm_figures: Sequence[Figure]
    score_figures: Sequence[tuple[Figure, Figure | None]]
    cost_figure: Figure | None


def write_page(path: Path, content: Content) -> None:
    """Write the page, atomically: styles and pictures are inside, and it asks nothing of any network."""
    study, runs = content.study, [e for e in content.entries if e.registers is not None]
    retrofits = [e for e in content.entries if e.registers is None]
    html = fill_page(
        "study",
        headline=content.sentences[0],
        sentences=content.sentences[1:],
        counts=", ".join(str(c) for c in study["registers"]),
        seeds=", ".join(str(s) for s in study["seeds"]),
        trained=f"{len(runs)} of {len(study['registers']) * len(study['seeds'])}",
        missing=study["missing"],
        norm_figures=content.norm_figures,
        norms=[norm_row(row) for row in content.norms],
        attention=attention_rows(runs),
        registers=list(register_maps(runs)),
        mass=mass_rows(runs, content.norms),
        looked=_looked(content.entries),
        scores=[
            {"figures": [f for f in figures if f is not None], **score_table(measure)}
            for measure, figures in zip(content.measures, content.score_figures, strict=True)
        ],
        cost=None if study["cost"] is None else cost_table(study["cost"]),
        cost_figure=content.cost_figure,
        retrofits=retrofit_rows(retrofits, content),
        retrofit_scores=[m.title for m in content.measures],
        facts=_facts(study),
        models=[_model_row(e) for e in content.entries],
    )
    write_text(path, html)


# ---- norms


def norm_row(row: Norms) -> dict[str, str]:
    """One arm in the table of norms."""
    shares = [s for s in row.shares if s is not None]
    kinds = ", ".join(f"{VERDICTS[kind]}: {many}" for kind, many in row.kinds.items())
    return {
        "arm": row.arm,
        "models": str(row.models),
        "verdict": kinds,
        "share": f"{100 * sum(shares) / len(shares):.2f}" if shares else "-",
        "median": _number(row.median),
        "max": _number(row.max_over_median, 2),
        "cls": _number(row.cls),
        "register": _number(row.register),
    }


# ---- attention


def attention_rows(runs: Sequence[Entry]) -> dict[str, Any] | None:
    """A row for each image, a map of [CLS] for each count, of the first seed that was looked into; None without."""
    chosen = _first_of_each(runs)
    if not chosen:
        return None
    looks = [entry.look["attention"] for entry in chosen if entry.look is not None]
    rows = [
        {
            "picture": picture,
            "maps": [map_text(np.array(look["maps"][number][0])) for look in looks],
        }
        for number, picture in enumerate(looks[0]["pictures"])
    ]
    return {"counts": [entry.arm for entry in chosen], "seed": chosen[0].seed, "rows": rows}


def register_maps(runs: Sequence[Entry]) -> Iterator[dict[str, Any]]:
    """For each count with registers the maps of them all, over the first image."""
    for entry in _first_of_each(runs):
        if entry.look is not None and entry.registers:
            attention = entry.look["attention"]
            maps = [np.array(m) for m in attention["maps"][0][1 : 1 + MOST_REGISTERS]]
            yield {
                "arm": entry.arm,
                "picture": attention["pictures"][0],
                "maps": [map_text(m) for m in maps],
            }


def mass_rows(runs: Sequence[Entry], norms: Sequence[Norms]) -> list[dict[str, str]]:
    """Where the attention of [CLS] and of registers lies, mean over seeds, registers, heads and images."""
    rows = []
    for arm in dict.fromkeys(e.arm for e in runs):
        masses = [np.array(e.look["attention"]["mass"]) for e in runs if e.arm == arm and e.look is not None]
        if not masses:
            continue
        cls = np.mean([m[0] for m in masses], axis=0)
        register = np.mean([m[1:].mean(0) for m in masses], axis=0) if masses[0].shape[0] > 1 else None
        alike = next((row.alike for row in norms if row.arm == arm), None)
        row = {"arm": arm, **_shares("cls", cls), **_shares("register", register)}
        rows.append({**row, "alike": _number(alike, 3)})
    return rows


def _shares(name: str, mass: np.ndarray | None) -> dict[str, str]:
    groups = ("cls", "registers", "patches")
    return {f"{name}_{g}": "-" if mass is None else f"{100 * mass[i]:.1f}" for i, g in enumerate(groups)}


def _first_of_each(runs: Sequence[Entry]) -> list[Entry]:
    """Of each count the first seed that was looked into, all of the same seed where there is one."""
    seen = [e for e in runs if e.look is not None]
    arms = list(dict.fromkeys(e.arm for e in seen))
    seeds = sorted({e.seed for e in seen if e.seed is not None}, key=lambda s: (-sum(e.seed == s for e in seen), s))
    return [min((e for e in seen if e.arm == arm), key=lambda e: _place(e.seed, seeds)) for arm in arms]


def _place(seed: int | None, seeds: Sequence[int]) -> int:
    return seeds.index(seed) if seed is not None else len(seeds)


def map_text(values: np.ndarray) -> str:
    """A map as PNG in base64, a pixel for each patch, from 0 (dark) to its own greatest value."""
    data = io.BytesIO()
    Image.fromarray(heat(values, low=0.0, high=float(values.max()))).save(data, "PNG", optimize=True)
    return base64.b64encode(data.getvalue()).decode("ascii")


# ---- scores


def score_table(measure: Measure) -> dict[str, Any]:
    """One measure: a row for each count, and what was scored."""
    unit = unit_of(measure.score)
    better = "higher" if measure.higher_is_better else "lower"
    error = f"{unit.text(measure.standard_error)} {unit.name}".rstrip()
    trained = [c for c in measure.cells if c.registers is not None]
    return {
        "title": measure.title,
        "note": (
            f"{measure.images:,} images of {measure.test}, label {measure.label!r}; {better} is better. From the draw "
            f"of these images alone a score has a standard error of {error}, most of which is shared by all models."
        ),
        "rows": [_score_row(cell, measure) for cell in trained],
    }


def _score_row(cell: Cell, measure: Measure) -> dict[str, str]:
    unit = unit_of(measure.score)
    control = list(measure.control.get(cell.arm, {}).values())
    return {
        "arm": cell.arm,
        "mean": unit.text(cell.interval.mean),
        "interval": interval_text(cell.interval, unit.text),
        "seeds": ", ".join(unit.text(v) for _, v in sorted(cell.by_seed.items())),
        "control": unit.text(float(np.mean(control))) if control else "-",
        "difference": "" if cell.difference is None else unit.text(cell.difference.mean, signed=True),
        "difference_interval": "" if cell.difference is None else interval_text(
            cell.difference, lambda v: unit.text(v, signed=True)
        ),
        "differences": ", ".join(unit.text(v, signed=True) for _, v in sorted(cell.differences.items())),
    }  # fmt: skip


def interval_text(interval: Interval, text: Any) -> str:
    """ "38.1 to 42.9", or that there is none."""
    if interval.low is None or interval.high is None:
        return "none: one seed"
    return f"{text(interval.low)} to {text(interval.high)}"


# ---- cost


def cost_table(cost: Tree) -> dict[str, Any]:
    """Rows by count, and what they are about."""
    measured, noted = cost.get("measured"), cost.get("noted") or {}
    timed = {row["registers"]: row for row in measured["counts"]} if measured else {}
    rows = []
    for row in cost["counts"]:
        own, seen = timed.get(row["registers"]), noted.get(str(row["registers"]))
        rows.append(
            {
                "registers": str(row["registers"]),
                "parameters": f"{row['parameters']:,}",
                "macs": f"{row['macs'] / 1e6:,.1f}",
                "ratio": _percent_more(row["macs_over_0"]),
                "formula": _percent_more(row["formula_over_0"]),
                "train": _percent_more(row["train_macs_over_0"]),
                "time": "" if own is None else f"{own['ratio']['median']:.2f}",
                "quartiles": "" if own is None else f"{own['ratio']['low']:.2f} to {own['ratio']['high']:.2f}",
                "speed": f"{own['images_per_s']:,.1f}" if own else "" if seen is None else f"{seen:,.1f}",
                "memory": "" if own is None else f"{own['peak_mib']:,.0f}",
            }
        )
    notes = [
        f"An image of {cost['image_size']} pixels has {cost['tokens']} tokens without registers; a global crop of "
        f"training {cost['crop_tokens']['global']}, a local one {cost['crop_tokens']['local']}. Formula: "
        f"(24 D (T + R) + 4 (T + R)²) / (24 D T + 4 T²) with T = {cost['tokens']}, D = {cost['embed_dim']}: blocks "
        "alone, MLP four times as wide."
    ]
    if measured:
        notes.append(
            f"Steps of {measured['batch_size']} images, {measured['rounds']} rounds by turns on one batch, without "
            f"reading images: {measured['clock']}, {measured['hardware']}. Memory: weights, optimizer and what a step "
            "holds at most."
        )
    elif cost.get("measuring_failed"):
        notes.append(f"Steps could not be timed: {cost['measuring_failed']}")
    elif noted:
        notes.append(
            "Images a second: as the runs noted them while they trained, on a machine that may have been busy."
        )
    return {"rows": rows, "notes": notes, "measured": bool(measured), "noted": bool(noted) and not measured}


def _percent_more(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.2f} %" if ratio != 1 else "-"


# ---- retrofits and facts


def retrofit_rows(retrofits: Sequence[Entry], content: Content) -> list[dict[str, Any]]:
    """Models without registers beside what was made of them: verdict, norms and every score."""
    if not retrofits:
        return []
    rows = []
    for norms in content.norms:
        if norms.registers not in (None, 0):
            continue
        scores = []
        for measure in content.measures:
            cell, unit = measure.cell(norms.arm), unit_of(measure.score)
            if cell is None:
                scores.append("-")
                continue
            text = unit.text(cell.interval.mean)
            if cell.difference is not None:
                text += f" ({unit.text(cell.difference.mean, signed=True)}: " + (
                    interval_text(cell.difference, lambda v, u=unit: u.text(v, signed=True)) + ")"
                )
            scores.append(text)
        name = "no registers" if norms.registers == 0 else norms.arm
        rows.append({**norm_row(norms), "arm": name, "scores": scores})
    return rows


def _looked(entries: Sequence[Entry]) -> str | None:
    look = next((e.look for e in entries if e.look is not None), None)
    if look is None:
        return None
    return f"{look['images']:,} images of {look['data']['name']}, {look['image_size']} pixels"


def _model_row(entry: Entry) -> dict[str, str]:
    hashes = {str(card.model.get("hash") or "")[:12] for card in entry.cards if card.subject == "model"}
    return {
        "arm": entry.arm,
        "seed": "-" if entry.seed is None else str(entry.seed),
        "folder": entry.folder,
        "hash": ", ".join(sorted(hashes)) or "-",
    }


def _facts(study: Tree) -> list[tuple[str, str]]:
    settings, environment = study["settings"], study["environment"]
    model = settings["model.size"] or f"{settings['model.embed_dim']} x {settings['model.depth']}"
    named = f"{settings['model.backbone']} {model}, patch {settings['model.patch_size']}"
    begins = settings["init.from"]
    return [
        ("recipe", str(study["recipe"])),
        ("model", named if begins is None else f"begun with {Path(begins).name}"),
        ("training", f"{study['steps']} steps of {settings['train.batch_size']} images of {study['data']}"),
        ("versions", f"quietvit {environment['quietvit']}, torch {environment['torch']}, {study['created']}"),
    ]


def _number(value: float | None, decimals: int | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if decimals is None else f"{value:.{decimals}f}"
