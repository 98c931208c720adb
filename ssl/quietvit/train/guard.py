"""The forgetting guard: a run that begins with a model must not come to know less than that model did.

The measure is the k-NN of the health probe, on the same held-out images at every look; that of step 0 is the start. A
look is bad when it is more than `margin` points below. `patience` bad looks in a row, or a bad one at the last step,
end the run; or rewind it: every later checkpoint is dropped, the newest one that was looked at and good is resumed,
exactly as after a kill, and from there on the learning rate is the schedule's times `lr_factor` (once more at each
rewind). While the guard is on the run is looked at before every checkpoint, one is written before the first step, and
the best of them is kept whatever `checkpoint.keep` says.

What it knows travels in the state.json of each checkpoint; <run>/guard.json shows it as it is now.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quietvit import dist
from quietvit.files import write_text
from quietvit.train import checkpoint

__all__ = ["ForgottenError", "Guard", "Rules", "table"]

NOTE = "guard.json"
ROWS = {"knn": "k-NN, %", "rank": "rank", "outlier_share": "outlier share"}  # of the table
ADVICE = (
    "Try, in another --out: half of optim.lr, a longer init.freeze_steps, a slower teacher (teacher.momentum), or "
    "milder crops. If the fall is expected (other labels matter to you), raise init.guard_margin or set init.guard=off "
    "and repeat the command"
)
RANK_SHARE = 0.5  # of the rank at the start, below which is warned (ours; a share, since ranks go with the width)


@dataclass(frozen=True)
class Rules:
    """When it is too much, and what happens then; see InitConfig."""

    action: str  # "stop", "rewind" or "off"
    margin: float  # points of k-NN
    patience: int  # looks in a row
    rewinds: int  # at most
    lr_factor: float  # at each rewind


class ForgottenError(RuntimeError):
    """The last look was one bad look too many; the message says which figures."""


class Guard:
    """Judges the looks of one run. Under ranks all call everything; the first one's figures count for all.

    Off, it only keeps what it knew: the learning rate of a run that was rewound before does not jump back.
    """

    def __init__(self, run_dir: Path, rules: Rules) -> None:
        self.run_dir, self.rules = run_dir, rules
        self.start: dict[str, float] | None = None  # figures of the looks, "step" among them
        self.best: dict[str, float] | None = None  # of those that were saved
        self.now: dict[str, float] | None = None
        self.bad = 0  # looks in a row
        self.lr_factor = 1.0  # on the schedule
        self.rewinds: list[dict[str, float]] = []

    @property
    def measures(self) -> bool:
        """Whether there is a k-NN to go by, at the start and now; known after the first look."""
        return self.rules.action != "off" and all(look is not None and "knn" in look for look in (self.start, self.now))

    @property
    def best_step(self) -> int | None:
        """Step of the checkpoint that is kept in any case."""
        return None if self.best is None else int(self.best["step"])

    def judge(self, step: int, values: Mapping[str, float], *, last: bool) -> list[str]:
        """Take in a look at `step`; returns sentences for the user. `last`: no other look will come.

        Raises ForgottenError when it is one bad look too many.
        """
        if self.rules.action == "off":
            return []
        own = {k: float(v) for k, v in values.items() if k in ROWS}
        self.now = {"step": float(step), **dist.gather_objects(own)[0]}
        if self.start is None and step > 0:  # it was off when the run began
            return [
                "guard: nobody looked at the model that this run began with, so that there is nothing to compare with"
            ]
        if self.start is None:
            self.start = self.now
            self._write("running")
            return self._said_at_start()
        if not self.measures:
            self._write("running")
            return self._warnings()
        self.bad = self.bad + 1 if self._drop() > self.rules.margin else 0
        self._write("running")
        if self.bad and (self.bad >= self.rules.patience or last):
            raise ForgottenError(self._verdict())
        if not self.bad:
            return []
        left = self.rules.patience - self.bad
        return [f"k-NN is {self._drop():.1f} points below the start; {left} more such look(s), and the guard acts"]

    def figures(self) -> dict[str, float]:
        """For the metrics: how far below the start, bad looks in a row, the factor on the learning rate."""
        if self.rules.action == "off" and not self.rewinds:
            return {}
        drop = {"guard/knn_below_start": self._drop()} if self.measures else {}
        return {**drop, "guard/bad_looks": float(self.bad), "guard/lr_factor": self.lr_factor}

    def saving(self, step: int) -> dict[str, Any]:
        """What goes into the checkpoint of `step`: this guard as it is, and whether that checkpoint is known good."""
        looked = self.measures and self.now is not None and self.now["step"] == step
        if looked and not self.bad and (self.best is None or self._knn(self.now) >= self._knn(self.best)):
            self.best = self.now
        return {**self._state(), "good": looked and not self.bad}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Be as the guard was when a checkpoint with this state was saved."""
        self.start, self.best, self.now = state["start"], state["best"], state["now"]
        self.bad, self.lr_factor, self.rewinds = state["bad"], state["lr_factor"], list(state["rewinds"])

    def stopped_before(self) -> str | None:
        """What was said when this run was stopped under the same rules; None if it was not."""
        said = None
        if dist.rank() == 0 and (self.run_dir / NOTE).is_file():
            try:
                note = json.loads((self.run_dir / NOTE).read_text(encoding="utf-8"))
                said = note["verdict"] if note["outcome"] == "stopped" and note["rules"] == asdict(self.rules) else None
            except (OSError, ValueError, KeyError, TypeError):
                said = None
        return dist.gather_objects(said)[0]

    def rewind(self) -> str | None:
        """Go back to the newest good checkpoint, which is then the newest. Returns what was done; None: not possible.

        First the good checkpoint learns of the rewind, then later ones are dropped: a run killed in between comes to
        the same.
        """
        assert self.now is not None
        dist.barrier()  # the first rank has given the last checkpoint its name
        target = self._newest_good() if self.rules.action == "rewind" else None
        if target is None or len(self.rewinds) >= self.rules.rewinds:
            return None
        step, factor = checkpoint.step_of(target), self.lr_factor * self.rules.lr_factor
        done = {"from": self.now["step"], "to": float(step), "knn": self._knn(self.now), "lr_factor": factor}
        state = {**checkpoint.read_meta(target)["guard"], "lr_factor": factor, "rewinds": [*self.rewinds, done]}
        dist.barrier()  # all have read it
        if dist.rank() == 0:
            checkpoint.write_meta(target, {**checkpoint.read_meta(target), "guard": state})
            checkpoint.drop_after(self.run_dir, step)
            checkpoint.publish(target)
        dist.barrier()
        self.resume(state)
        self._write("running")
        return (
            f"rewound to step {step} ({len(self.rewinds)} of at most {self.rules.rewinds} times); the learning rate is "
            f"{factor:g} of the schedule's from here on"
        )

    def stop(self, why: str) -> str:
        """Leave the best teacher as the run's, and return the whole verdict with the table."""
        best = None if self.best_step is None else checkpoint.folder_of(self.run_dir, self.best_step)
        kept = ""
        if best is not None and best.is_dir():
            if dist.rank() == 0:
                checkpoint.publish(best)
            kept = f"\nThe best model, k-NN {self._knn(self.best):.1f}, is kept in {best}, and is {self.run_dir}'s now."
        rewound = f" It was rewound {len(self.rewinds)} times before." if self.rewinds else ""
        verdict = f"{why}{rewound}\n{self.table()}{kept}\n{ADVICE}"
        self._write("stopped", verdict)
        return verdict

    def finish(self) -> str:
        """The table of a run that came to its end; "" if nobody compared."""
        if self.start is None or self.rules.action == "off":
            return ""
        self._write("finished")
        return self.table()

    def table(self) -> str:
        """Start, best kept and now beside each other."""
        return table(self.start, self.best, self.now)

    def _said_at_start(self) -> list[str]:
        if self.measures:
            return [
                f"guard: the model to keep up with has a k-NN of {self._knn(self.start):.1f}; more than "
                f"{self.rules.margin:g} points below it in {self.rules.patience} look(s) in a row, and the run is "
                + ("stopped" if self.rules.action == "stop" else "rewound")
            ]
        return [
            "guard: no labels, hence no k-NN to see forgetting by; a fall of the rank is only warned of. Class folders "
            "(health.label) make the guard work"
        ]

    def _warnings(self) -> list[str]:
        start, now = (self.start or {}).get("rank"), (self.now or {}).get("rank")
        if start is None or now is None or now >= RANK_SHARE * start:
            return []
        return [
            f"the rank of the features fell from {start:.1f} at the start to {now:.1f}: the model may be forgetting. "
            "Without labels nothing more can be said; compare the two by hand, or halve optim.lr"
        ]

    def _verdict(self) -> str:
        looks = (
            f"{self.bad} looks in a row" if self.bad > 1 else "the last look" if self.rules.patience > 1 else "a look"
        )
        return (
            f"the model forgets what it began with: k-NN {self._knn(self.start):.1f} at the start, "
            f"{self._knn(self.now):.1f} at step {int((self.now or {})['step'])}; {looks} more than "
            f"{self.rules.margin:g} points below."
        )

    def _newest_good(self) -> Path | None:
        found = [p for p in checkpoint.complete(self.run_dir) if checkpoint.read_meta(p).get("guard", {}).get("good")]
        return found[-1] if found else None

    def _drop(self) -> float:
        return self._knn(self.start) - self._knn(self.now)

    @staticmethod
    def _knn(figures: Mapping[str, float] | None) -> float:
        assert figures is not None
        return figures["knn"]

    def _state(self) -> dict[str, Any]:
        names = ("start", "best", "now", "bad", "lr_factor", "rewinds")
        return {name: getattr(self, name) for name in names}

    def _write(self, outcome: str, verdict: str = "") -> None:
        if dist.rank() == 0:
            note = {"outcome": outcome, "rules": asdict(self.rules), **self._state(), "verdict": verdict}
            write_text(self.run_dir / NOTE, json.dumps({**note, "table": self.table()}, indent=1) + "\n")


def table(*columns: Mapping[str, float] | None) -> str:
    """Figures of looks beside each other: of the start, the best kept, and now. None: not there."""
    lines = [["", *(f"{name} (step {int(c['step'])})" if c else name for name, c in zip(("start", "best kept", "now"),
             columns, strict=True))]]  # fmt: skip
    for key, name in ROWS.items():
        if any(c and key in c for c in columns):
            lines.append([name, *(f"{c[key]:.3g}" if c and key in c else "-" for c in columns)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
