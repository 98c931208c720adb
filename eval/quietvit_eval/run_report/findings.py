"""What is wrong with a run, and what to do about it, in plain sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from quietvit.backbones import BACKBONES
from quietvit.train.health import verdicts
from quietvit.train.progress import duration
from quietvit_eval.run_report.folder import RunFolder, is_number

# All ours.
WAIT = 0.3  # share of the time spent waiting for data
SLOW, PARTS, LEAST_STEPS = 0.7, 20, 100  # of the usual speed, in which share of the run; in shorter runs it is noise
FALL = 5.0  # points of k-NN below the best look
SILENT_S, SILENT_STEPS = 600.0, 20  # without a new line: a running run has stopped, or hangs
SHOWN = 5  # steps or names in a sentence


@dataclass(frozen=True)
class Finding:
    """One warning. `serious`: the run, or what it made, cannot be trusted as it is."""

    sentence: str
    advice: str
    serious: bool


def find(run: RunFolder) -> list[Finding]:
    """All warnings about a run, the serious ones first."""
    found = [finding for check in CHECKS for finding in check(run)]
    return sorted(found, key=lambda f: not f.serious)


def _ended(run: RunFolder) -> Iterator[Finding]:
    state, saved = run.state, run.saved_step
    resume = "Repeat its command" + (f": it goes on from step {saved:,}." if saved else " to start it again.")
    if run.guard.get("outcome") == "stopped":
        verdict = str(run.guard.get("verdict", "")).partition("\n")[0]
        yield Finding(
            f"The guard stopped this run: {verdict}",
            "Try, in another folder, half of optim.lr, a longer "
            "init.freeze_steps or a slower teacher; the best model is this run's now.",
            True,
        )
    elif state.name == "failed":
        yield Finding(f"The run failed: {state.message or 'nobody wrote down why'}.".replace("..", "."), resume, True)
    elif state.name == "stopped":
        yield Finding(
            "The run was stopped before its end" + (f" ({state.message})." if state.message else "."), resume, False
        )
    lost = run.step - (saved or 0)
    if state.name == "failed" and lost > 0:
        yield Finding(
            f"The last {lost:,} steps were not saved and will be done again.",
            "A lower checkpoint.every loses less.",
            False,
        )


def _silent(run: RunFolder) -> Iterator[Finding]:
    if run.state.name != "running" or run.silent_s is None:
        return
    speed, batch = run.last("images_per_s"), _batch(run)
    usual = SILENT_STEPS * batch / speed if speed and batch else 0.0
    if run.silent_s > max(SILENT_S, usual):
        yield Finding(
            f"The run says that it is running, but has written nothing for {duration(run.silent_s)}.",
            "Look whether its process lives (quietvit jobs) and whether the disk is full or the file system hangs.",
            True,
        )


def _incomplete(run: RunFolder) -> Iterator[Finding]:
    recorded = max((r["step"] for r in run.records), default=0)
    if not run.records:
        yield Finding(
            "There are no metrics: metrics.jsonl is missing or empty.",
            "Without them there are no curves; a run writes its first line after its first step.",
            run.step > 0,
        )
    elif run.saved_step is not None and recorded < run.saved_step:
        yield Finding(
            f"The newest checkpoint is of step {run.saved_step:,}, but the metrics end at step {recorded:,}.",
            "Lines are missing, so the curves end early; the checkpoint is not touched by this.",
            False,
        )
    for problem in run.problems:
        yield Finding(
            f"{problem[:1].upper()}{problem[1:].rstrip('.')}.",
            "Copy the file again if this is a copy of the run.",
            False,
        )


def _health(run: RunFolder) -> Iterator[Finding]:
    """The verdicts of training itself, over all looks: those of the last one, and those that it no longer gives."""
    width, config = _width(run), run.config
    if width is None or config is None:
        return
    looks = [r for r in run.records if any(key.startswith("health/") for key in r)]
    said: dict[str, tuple[int, str]] = {}
    now: set[str] = set()
    for record in looks:
        values = {
            k.removeprefix("health/"): float(v) for k, v in record.items() if k.startswith("health/") and is_number(v)
        }
        sentences = verdicts(
            values,
            embed_dim=width,
            prototypes=config.objective.head.num_prototypes,
            progress=record["step"] / run.steps if run.steps else 1.0,
        )
        now = {s.partition(":")[0].partition("(")[0] for s in sentences}
        for sentence in sentences:
            said[sentence.partition(":")[0].partition("(")[0]] = (record["step"], sentence)
    for kind, (step, sentence) in said.items():
        problem, _, advice = sentence.rpartition(": ") if ": " in sentence else (sentence, "", "")
        if kind in now:
            yield Finding(f"At the last look, step {step:,}: {problem}.", f"{advice[:1].upper()}{advice[1:]}.", True)
        else:
            yield Finding(f"At step {step:,}: {problem}.", "Later looks do not say so any more.", False)


def _knn(run: RunFolder) -> Iterator[Finding]:
    steps, values = run.series("health/knn")
    steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    if len(steps) < 2:
        return
    start, best, last = values[0], values.max(), values[-1]
    images = run.config.health.images if run.config is not None else 500
    error = math.sqrt(2 * 0.25e4 / max(images, 1))  # of a difference, at worst
    at = f"{last:.1f} % at step {steps[-1]:,.0f}"
    if steps[0] == 0 and last < start:
        yield Finding(
            f"The features are worse than before training: k-NN {start:.1f} % at the start, {at}.",
            "Half of optim.lr, a larger batch or milder crops; if the run is young, wait.",
            bool(last < start - error),
        )
        return
    if steps[0] == 0 and last < start + error and run.progress >= 0.5:
        yield Finding(
            f"The features are not clearly better than before training: k-NN {start:.1f} % at the start, {at}, on "
            f"{images:,} pictures.",
            "Train longer, or look at more pictures (health.images).",
            False,
        )
    if last < best - FALL:
        step = int(steps[values.argmax()])
        kept = any(c.name == f"step_{step:08d}" for c in run.checkpoints)
        yield Finding(
            f"k-NN has fallen from its best, {best:.1f} % at step {step:,}, to {at}.",
            f"The checkpoint of step {step:,} is kept: evaluate that one too."
            if kept
            else "The checkpoint of that step is not kept; a higher checkpoint.keep would hold it.",
            False,
        )


def _skipped(run: RunFolder) -> Iterator[Finding]:
    steps = [r["step"] for r in run.records if is_number(r.get("skipped"))]
    if steps:
        named = ", ".join(f"{s:,}" for s in steps[:SHOWN]) + (
            f" and {len(steps) - SHOWN} more" if len(steps) > SHOWN else ""
        )
        many = f"{len(steps):,} steps were" if len(steps) > 1 else "1 step was"
        yield Finding(
            f"{many} skipped because a loss or gradient was not finite: {named}.",
            "Single ones do no harm. More of them: half of optim.lr, or train.precision=fp32.",
            len(steps) > 0.01 * run.step,
        )


def _artifacts(run: RunFolder) -> Iterator[Finding]:
    for episode in run.episodes:
        began, share, ended = (episode.get(k) for k in ("began_step", "max_share", "ended_step"))
        if not is_number(began) or not is_number(share):
            continue
        registers = _registers(run)
        if is_number(ended):
            yield Finding(
                f"Artifacts from step {began:,} to {ended:,}: up to {100 * share:.1f} % of the patch tokens.",
                "They are gone; nothing to do.",
                False,
            )
            continue
        cure = (
            f"The {registers} registers of this model do not take them in: try more"
            if registers
            else "Train with registers"
        )
        yield Finding(
            f"There are artifacts since step {began:,}: up to {100 * share:.1f} % of the patch tokens after the last "
            "block have norms far above the others.",
            f"{cure} (model.num_registers). Dense tasks and maps suffer most; "
            "quietvit inspect artifacts shows where they sit.",
            True,
        )
    share = run.last("health/outlier_share")
    if not run.episodes and share:
        yield Finding(
            f"At the last look {100 * share:.1f} % of the patch tokens had outlying norms.",
            "quietvit inspect artifacts tells whether they are artifacts.",
            False,
        )


def _speed(run: RunFolder) -> Iterator[Finding]:
    wait = run.series("data_wait")[1]
    late = wait[len(wait) // 2 :]
    share = float(np.nanmedian(late)) if np.isfinite(late).any() else 0.0
    if share > WAIT:
        yield Finding(
            f"{share:.0%} of the time goes by in waiting for images.",
            "More data.workers, or smaller or local files: the model could train faster.",
            False,
        )
    steps, speed = run.series("images_per_s")
    finite = np.isfinite(speed)
    steps, speed = steps[finite], speed[finite]
    if len(steps) < LEAST_STEPS:
        return
    usual = float(np.median(speed))
    medians = [
        (float(np.median(v)), s)
        for s, v in zip(np.array_split(steps, PARTS), np.array_split(speed, PARTS), strict=True)
    ]
    slow = [(m, s) for m, s in medians if m < SLOW * usual]
    if slow:
        where = f"in {len(slow) / PARTS:.0%} of the steps, first at step {slow[0][1][0]:,.0f}"
        least = min(median for median, _ in slow)
        at_end = ", and is slow now" if medians[-1][0] < SLOW * usual else ""
        yield Finding(
            f"The speed fell from its usual {usual:.3g} images a second to {least:.3g} {where}{at_end}.",
            "Look for other work on the machine, heat, or a slow disk.",
            False,
        )


def _data(run: RunFolder) -> Iterator[Finding]:
    if run.unreadable:
        names = ", ".join(list(run.unreadable)[:SHOWN])
        more = f" and {len(run.unreadable) - SHOWN:,} more" if len(run.unreadable) > SHOWN else ""
        many = f"{len(run.unreadable):,} images" if len(run.unreadable) > 1 else "1 image"
        yield Finding(
            f"{many} could not be read and gave way to others: {names}{more}.",
            "The list with reasons is below; repair or remove them.",
            False,
        )


def _scores(run: RunFolder) -> Iterator[Finding]:
    if not run.cards and run.state.name not in ("running", "queued", "new"):
        yield Finding(
            "Nobody has scored this model: there are no result cards.", "The command is at the end of this page.", False
        )
    if not run.checkpoints and run.records:
        yield Finding(
            "There is no checkpoint yet: nothing could be resumed or used.",
            "The first comes after checkpoint.every steps.",
            run.state.name != "running",
        )


def _batch(run: RunFolder) -> float | None:
    images = run.last("images")
    return images / run.step if images and run.step else None


def _arguments(run: RunFolder) -> dict[str, Any]:
    backbone = run.teacher.get("backbone")
    arguments = backbone.get("arguments") if isinstance(backbone, dict) else None
    return arguments if isinstance(arguments, dict) else {}


def _width(run: RunFolder) -> int | None:
    """Of the model, from its description, or from the settings while it has none."""
    known = _arguments(run).get("embed_dim")
    if known is None and run.config is not None:
        model = run.config.model
        backbone = BACKBONES.get(model.backbone or "")
        known = model.embed_dim or (backbone.SIZES.get(model.size or "", {}).get("embed_dim") if backbone else None)
    return known if isinstance(known, int) else None


def _registers(run: RunFolder) -> int:
    number = _arguments(run).get("num_registers", 0)
    return number if isinstance(number, int) else 0


CHECKS = (_ended, _silent, _health, _knn, _artifacts, _skipped, _incomplete, _data, _speed, _scores)
