"""The command `export`: arguments to a call of quietvit.weights.export, and the scores for its model card."""

from __future__ import annotations

import argparse
import ast
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from quietvit_launch.reporting import wide_console
from quietvit_launch.stopping import sigterm_stops

if TYPE_CHECKING:
    from quietvit.weights.export import Report, ScoreRow
    from quietvit_eval.cards import Card


def run_export(args: argparse.Namespace) -> int:
    """`quietvit export`: the folder, a table of differences, and how to open it. Raises as `export_model`."""
    from quietvit_launch.evaluation import check_model

    model = check_model(args.model)
    scores, unread = score_rows(model if model.is_dir() else model.parent)
    from quietvit.weights.export import ExportOptions, export_model
    from quietvit.weights.family import NORMALISATIONS

    hints: dict[str, Any] = {}
    if args.normalisation:
        hints["mean"], hints["std"] = NORMALISATIONS[args.normalisation]
    if args.num_heads:
        hints["num_heads"] = args.num_heads
    options = ExportOptions(sizes=tuple(args.size), license=args.license)
    with sigterm_stops():
        report = export_model(model, Path(args.out), to=args.to, options=options, scores=scores, hints=hints)
    _print(report)
    for reason in unread:
        print(f"not in the model card: {reason}")
    return 0


def score_rows(folder: Path) -> tuple[list[ScoreRow], list[str]]:
    """The result cards in a model's folder `eval` as rows for a model card, and why others cannot be read."""
    from quietvit_eval.cards import read_card

    cards, unread = [], []
    for file in sorted((folder / "eval").glob("*.json")):
        try:
            cards.append(read_card(file))
        except ValueError as error:
            unread.append(str(error))
    controls = {(c.protocol_key(), str(c.model.get("backbone"))): c for c in cards if c.subject == "random-init"}
    return [
        _row(card, controls.get((card.protocol_key(), str(card.model.get("backbone")))))
        for card in cards
        if card.subject == "model"
    ], unread


def _row(card: Card, control: Card | None) -> ScoreRow:
    from quietvit.weights.export import ScoreRow

    size = card.protocol.get("image_size")
    test = card.data["test"]
    trained = f", trained on {card.data['train']['images']:,}" if "train" in card.data else ""
    return ScoreRow(
        weights=str(card.model.get("hash")),
        task=f"{card.task}, {card.label}",
        score=_score(card),
        random_init=_score(control) if control is not None else "",
        protocol=f"{card.protocol.get('name', card.task)} ({card.protocol_key()})",
        resolution=f"{size} px" if size else "of each image",
        data=f"{test['images']:,} images of {test['name']}{trained}",
    )


def _score(card: Card) -> str:
    from quietvit_eval.report import unit_of

    unit = unit_of(card.main)
    text = f"{card.main} {unit.text(card.scores[card.main])} ± {unit.text(card.standard_error)} {unit.name}".rstrip()
    return text if card.higher_is_better else f"{text} (lower is better)"


def _print(report: Report) -> None:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("read by", "output", "height x width", "greatest difference", "allowed"):
        table.add_column(column, justify="left" if column in ("read by", "output") else "right")
    for p in report.parities:
        table.add_row(p.reader, p.output, f"{p.size[0]} x {p.size[1]}", f"{p.difference:.3g}", f"{p.tolerance:g}")
    wide_console().print(table)
    same = "equal" if report.max_difference == 0 else "the same within tolerance"
    print(f"wrote {report.out}: features {same} after reloading (greatest difference {report.max_difference:.3g})")
    print(f"To open it, in {report.out} (more in its README.md):")
    for line in _opening(report.usage):
        print(f"  {line}")


def _opening(code: str) -> list[str]:
    """The imports of a piece of code and its first two statements: what opens the model, with what that needs."""
    statements = [s for s in ast.parse(code).body if not isinstance(s, ast.Import | ast.ImportFrom)]
    last = statements[:2][-1].end_lineno
    return [line for line in code.splitlines()[:last] if line.strip()]
