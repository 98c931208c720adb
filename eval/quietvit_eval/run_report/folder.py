"""What a run folder tells, read leniently: what is missing stays empty, what is broken is said in words."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import numpy as np
from jaxtyping import Float

from quietvit.config.load import load_config
from quietvit.config.schema import RunConfig
from quietvit.train import checkpoint
from quietvit.weights.native import JSON_NAME
from quietvit_eval.cards import Card, read_card

SIGNS = ("config.yaml", "metrics.jsonl", "checkpoints", "status.json", "teacher.json")  # one of them makes a run

Record: TypeAlias = dict[str, Any]
Values: TypeAlias = Float[np.ndarray, " n"]


@dataclass(frozen=True)
class State:
    """How a run is: "queued", "running", "finished", "stopped" (saved at a signal), "failed", "new" or "unknown"."""

    name: str
    message: str = ""
    steps: int | None = None  # its length, where it is known


@dataclass(frozen=True)
class RunFolder:
    """A run as it lies on disk. Steps count from 1; 0 is the model before training."""

    path: Path
    state: State
    records: tuple[Record, ...]  # of metrics.jsonl, each with a whole number under "step"
    config: RunConfig | None
    environment: Mapping[str, Any]
    teacher: Mapping[str, Any]  # teacher.json of the newest teacher
    checkpoints: tuple[Path, ...]  # complete ones, oldest first
    cards: tuple[Card, ...]
    guard: Mapping[str, Any]
    episodes: tuple[Mapping[str, Any], ...]  # of artifacts
    unreadable: Mapping[str, str]  # images: name to reason
    silent_s: float | None  # seconds since the metrics were last written
    problems: tuple[str, ...]  # what could not be read

    @property
    def step(self) -> int:
        """The last step that anything tells of."""
        recorded = max((r["step"] for r in self.records), default=0)
        return max(recorded, self.saved_step or 0)

    @property
    def saved_step(self) -> int | None:
        """Of the newest complete checkpoint."""
        return checkpoint.step_of(self.checkpoints[-1]) if self.checkpoints else None

    @property
    def steps(self) -> int | None:
        """Length of the run, where it is known."""
        return self.state.steps or (self.config.train.steps if self.config else None)

    @property
    def progress(self) -> float:
        """Share of the run that is done; 1 where its length is not known."""
        return min(1.0, self.step / self.steps) if self.steps else 1.0

    def series(self, key: str) -> tuple[Values, Values]:
        """Steps and values of a column of the metrics, in order of steps; nan where a value was not finite."""
        pairs = [(r["step"], r[key]) for r in self.records if key in r and (r[key] is None or is_number(r[key]))]
        pairs.sort(key=lambda pair: pair[0])
        steps, values = [s for s, _ in pairs], [math.nan if v is None else v for _, v in pairs]
        return np.array(steps, np.float64), np.array(values, np.float64)

    def columns(self, prefix: str) -> list[str]:
        """Names of columns that begin so, in the order in which they come."""
        return list(dict.fromkeys(key for r in self.records for key in r if key.startswith(prefix)))

    def last(self, key: str) -> float | None:
        """The newest finite value of a column."""
        values = self.series(key)[1]
        finite = values[np.isfinite(values)]
        return float(finite[-1]) if len(finite) else None


def is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_run_folder(path: Path, state: State) -> RunFolder:
    """Read all of a run folder but its weights. Raises ValueError if it is none."""
    if not path.is_dir():
        raise ValueError(f"there is no run folder {path}")
    if not any((path / name).exists() for name in SIGNS):
        raise ValueError(f"{path} is not a run folder: it has none of {', '.join(SIGNS)}. `quietvit train` makes them")
    problems: list[str] = []
    checkpoints = tuple(checkpoint.complete(path))
    metrics = path / "metrics.jsonl"
    artifacts = _read_json(path / "artifacts.json", problems).get("episodes")
    return RunFolder(
        path=path,
        state=state,
        records=tuple(_read_records(metrics, problems)),
        config=_read_config(path / "config.yaml", problems),
        environment=_read_json(path / "environment.json", problems),
        teacher=_read_teacher(path, checkpoints, problems),
        checkpoints=checkpoints,
        cards=tuple(_read_cards(path / "eval", problems)),
        guard=_read_json(path / "guard.json", problems),
        episodes=tuple(e for e in artifacts if isinstance(e, dict)) if isinstance(artifacts, list) else (),
        unreadable=dict(_read_unreadable(path)),
        silent_s=time.time() - metrics.stat().st_mtime if metrics.is_file() else None,
        problems=tuple(problems),
    )


def _read_records(path: Path, problems: list[str]) -> Iterator[Record]:
    if not path.is_file():
        return
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    broken = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError:
            record = line
        if isinstance(record, dict) and isinstance(record.get("step"), int) and not isinstance(record["step"], bool):
            yield record
        elif record is not None and number < len(lines):  # a last line without its end is one that is being written
            broken.append(number)
    if broken:
        many = f"{len(broken)} lines" if len(broken) > 1 else "1 line"
        problems.append(f"left out here, for they cannot be read: {many} of metrics.jsonl (first: line {broken[0]})")


def _read_config(path: Path, problems: list[str]) -> RunConfig | None:
    if not path.is_file():
        return None
    try:
        return load_config(str(path))
    except (ValueError, OSError) as error:
        problems.append(f"the settings in {path.name} cannot be read: {error}")
    return None


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values
        problems.append(f"{path.name} holds something else than was written there")
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} cannot be read: {error}")
    return {}


def _read_teacher(path: Path, checkpoints: tuple[Path, ...], problems: list[str]) -> dict[str, Any]:
    for folder in (path, *reversed(checkpoints)):
        if values := _read_json(folder / JSON_NAME, problems):
            return values
    return {}


def _read_cards(folder: Path, problems: list[str]) -> Iterator[Card]:
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        values = _read_json(file, problems)
        if not str(values.get("format", "")).startswith("quietvit-card-"):
            continue
        try:
            yield read_card(file)
        except (ValueError, OSError) as error:
            problems.append(str(error))


def _read_unreadable(path: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(path.glob("unreadable*.txt")):
        for line in file.read_bytes().decode("utf-8", errors="replace").splitlines():
            name, _, reason = line.partition("\t")
            if name:
                yield name, reason or "no reason was written"
