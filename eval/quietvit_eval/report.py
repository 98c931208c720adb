"""Cards as tables. Only scores of the same task, images and protocol share a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from quietvit_eval.cards import Card


def print_cards(cards: Sequence[Card], console: Console) -> None:
    """One table per protocol, best score first."""
    groups: dict[str, list[Card]] = {}
    for card in cards:
        groups.setdefault(card.protocol_key(), []).append(card)
    for group in groups.values():
        console.print(_table(group))


def _table(cards: Sequence[Card]) -> Table:
    first = cards[0]
    test = first.data["test"]
    title = f"{first.task}, label {first.label!r} ({first.num_classes} classes), {first.protocol['image_size']} px"
    caption = f"{test['images']:,} images of {test['name']}"
    if train := first.data.get("train"):
        caption += f"; trained on {train['images']:,} of {train['name']}"
    if choice := first.protocol.get("choice"):
        caption += f"; {choice}"
    names = list(first.scores)
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    table.add_column("model")
    for name in names:
        table.add_column(name + (" (headline)" if name == first.main else ""), justify="right")
    table.add_column("unreadable", justify="right")
    for card in sorted(cards, key=lambda c: -c.scores[c.main]):
        table.add_row(_name(card), *(_cell(card, name) for name in names), str(_skipped(card)))
    return table


def _name(card: Card) -> str:
    if card.subject == "model":
        return f"{card.model.get('path') or 'model'} {str(card.model['hash'])[:8]}"
    return card.subject


def _cell(card: Card, name: str) -> str:
    value = f"{100 * card.scores[name]:.1f}"
    return f"{value} ± {100 * card.standard_error:.1f}" if name == card.main else value


def _skipped(card: Card) -> int:
    return sum(part["unreadable"] for part in card.data.values())
