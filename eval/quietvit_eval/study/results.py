"""From cards and looks to tables: scores by number of registers, paired differences, norms, each over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quietvit_eval.cards import Card, read_card
from quietvit_eval.report import unit_of
from quietvit_eval.study.intervals import Interval, paired, t_interval

CONTROL = "random-init"
DONE = "done.json"  # beside the cards of an evaluation that came to its end


@dataclass(frozen=True)
class Entry:
    """One model of the study: a run, or a retrofit of one. `registers` is None for retrofits, which are known by name.

    `look` is None, and `cards` empty, for what is not there.
    """

    arm: str  # "4", or the retrofit's name
    registers: int | None
    seed: int | None
    folder: str
    look: Mapping[str, Any] | None
    cards: tuple[Card, ...]


@dataclass(frozen=True)
class Cell:
    """One score of one arm: by seed, with the mean over seeds, and the difference to no registers at the same seeds."""

    arm: str
    registers: int | None
    by_seed: dict[int, float]
    interval: Interval
    differences: dict[int, float]
    difference: Interval | None  # None without a seed that has both
    strict: Interval | None  # the same, wide enough for all comparisons of the study to hold at once


@dataclass(frozen=True)
class Measure:
    """One headline score on one data set by one protocol, for every arm that has it."""

    key: str
    task: str
    score: str
    label: str
    higher_is_better: bool
    test: str  # name of the test set
    images: int
    standard_error: float  # of a score, from the draw of test images alone; mean over cards
    cells: tuple[Cell, ...]
    control: dict[str, dict[int, float]] = field(default_factory=dict)  # untrained models: by arm and seed

    @property
    def title(self) -> str:
        unit = unit_of(self.score).name
        return f"{self.task}: {self.score}{f', {unit}' if unit else ''}"

    def cell(self, arm: str) -> Cell | None:
        return next((cell for cell in self.cells if cell.arm == arm), None)


def read_cards(folders: Iterable[Path]) -> tuple[Card, ...]:
    """All cards in some folders, those of the first before those of the second. Raises ValueError for a broken one."""
    files = [file for folder in folders for file in sorted(folder.glob("*.json")) if file.name != DONE]
    return tuple(read_card(file) for file in files)


def measures_of(entries: Sequence[Entry]) -> list[Measure]:
    """Scores grouped by protocol, in the order in which they first come. Cards of unlike protocols never meet."""
    groups: dict[str, list[tuple[Entry, Card]]] = {}
    for entry in entries:
        for card in entry.cards:
            groups.setdefault(f"{card.task} {card.protocol_key()}", []).append((entry, card))
    arms = list(dict.fromkeys((e.arm, e.registers) for e in entries))
    comparisons = max(1, sum(_comparisons(found, arms) for found in groups.values()))
    return [_measure(key, found, arms, comparisons) for key, found in groups.items()]


def _values(found: Sequence[tuple[Entry, Card]], arm: str, subject: str) -> dict[int, float]:
    return {
        entry.seed: card.scores[card.main]
        for entry, card in found
        if entry.arm == arm and card.subject == subject and entry.seed is not None
    }


def _comparisons(found: Sequence[tuple[Entry, Card]], arms: Sequence[tuple[str, int | None]]) -> int:
    base = _values(found, "0", "model")
    return sum(bool(base.keys() & _values(found, arm, "model").keys()) for arm, _ in arms if arm != "0")


def _measure(
    key: str, found: Sequence[tuple[Entry, Card]], arms: Sequence[tuple[str, int | None]], comparisons: int
) -> Measure:
    first = next((card for _, card in found if card.subject == "model"), found[0][1])
    base, cells, control = _values(found, "0", "model"), [], {}
    for arm, registers in arms:
        by_seed = _values(found, arm, "model")
        if untrained := _values(found, arm, CONTROL):
            control[arm] = untrained
        # A retrofit whose seed is not known still has its score.
        every = list(by_seed.values()) or [c.scores[c.main] for e, c in found if e.arm == arm and c.subject == "model"]
        if not every:
            continue
        differences = {} if arm == "0" else paired(base, by_seed)
        values = list(differences.values())
        cells.append(
            Cell(
                arm, registers, by_seed, t_interval(every), differences,
                t_interval(values) if values else None,
                t_interval(values, comparisons=comparisons) if values else None,
            )
        )  # fmt: skip
    errors = [card.standard_error for _, card in found if card.subject == "model"]
    test = first.data["test"]
    return Measure(
        key, first.task, first.main, first.label, first.higher_is_better, str(test["name"]), int(test["images"]),
        sum(errors) / max(1, len(errors)), tuple(cells), control,
    )  # fmt: skip


def number_of_comparisons(measures: Sequence[Measure]) -> int:
    """Differences to no registers that the study has."""
    return sum(cell.difference is not None for measure in measures for cell in measure.cells)


@dataclass(frozen=True)
class Norms:
    """The last block's norms of one arm, over its models. Means of what each model has."""

    arm: str
    registers: int | None
    models: int
    kinds: dict[str, int]  # verdicts: how many models have each
    shares: tuple[float | None, ...]  # of outliers, by model
    median: float | None
    max_over_median: float | None
    cls: float | None
    register: float | None  # median norm of a register, mean over registers and models
    alike: float | None = None  # correlation of the attention maps of two registers, mean over pairs and models


def norms_of(entries: Sequence[Entry]) -> list[Norms]:
    """A row for every arm of which a model was looked into."""
    rows = []
    for arm, registers in dict.fromkeys((e.arm, e.registers) for e in entries):
        looks = [e.look for e in entries if e.arm == arm and e.look is not None]
        if not looks:
            continue
        kinds: dict[str, int] = {}
        for look in looks:
            kinds[look["decision"]["kind"]] = kinds.get(look["decision"]["kind"], 0) + 1
        last = [look["layers"][-1] for look in looks]
        rows.append(
            Norms(
                arm, registers, len(looks), kinds,
                tuple(look["decision"]["share"] for look in looks),
                _mean(layer["patches"]["median"] for layer in last),
                _mean(layer["patches"]["max_over_median"] for layer in last),
                _mean(layer["cls"]["median"] for layer in last),
                _mean(one["median"] for layer in last for one in layer["registers"]),
                _mean(look["attention"]["registers_alike"] for look in looks),
            )
        )  # fmt: skip
    return rows


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def as_tree(measures: Sequence[Measure], norms: Sequence[Norms]) -> dict[str, Any]:
    """Both for study.json."""
    return {"measures": [asdict(m) for m in measures], "norms": [asdict(n) for n in norms]}
