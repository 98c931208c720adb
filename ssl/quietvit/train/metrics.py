"""metrics.jsonl, one flushed line per record, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from quietvit.files import write_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Value = float | int | str | list[str] | None


def read_metrics(path: Path) -> list[dict[str, Value]]:
    """The records of a metrics.jsonl; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


class NoMetrics:
    """What ranks other than the first write to."""

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Nothing is written."""

    def __enter__(self) -> NoMetrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        return None


class MetricsLog:
    """Appends records to `<run>/metrics.jsonl` and `<run>/tensorboard`.

    A resumed run drops the lines that came after its checkpoint: each step stands there once.
    """

    def __init__(self, run_dir: Path, *, resume_step: int, tensorboard: bool = True) -> None:
        path = run_dir / "metrics.jsonl"
        kept = [r for r in read_metrics(path) if isinstance(r.get("step"), int) and int(str(r["step"])) <= resume_step]
        write_text(path, "".join(json.dumps(r) + "\n" for r in kept))
        self._file = path.open("a", encoding="utf-8")
        self._board: SummaryWriter | None = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Write one record. Numbers that are not finite become null: JSON has no NaN."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **clean}) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in clean.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(key, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
