"""The honest reading: plain sentences made from a study's numbers, which claim no more than the intervals hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quietvit_eval.report import unit_of
from quietvit_eval.study.intervals import t_factor
from quietvit_eval.study.results import Cell, Measure, Norms, number_of_comparisons

Tree = Mapping[str, Any]
ALIKE = 0.95  # correlation of maps from which registers are said not to have parted (ours)
MOSTLY = 0.75  # of the trained models better than before, from which differences are taken for learnt ones (ours)
FEW_SEEDS = 5  # below it the width of t intervals is said (ours: t is 2.8 there, 4.3 with 3 seeds)


def reading(
    norms: Sequence[Norms], measures: Sequence[Measure], cost: Tree | None, missing: Sequence[str], seeds: int
) -> list[str]:
    """All sentences: artifacts, scores, how sure they are, cost, and what is missing."""
    return [
        *about_norms(norms),
        *about_registers(norms),
        *about_scores(measures),
        *about_retrofits(norms, measures),
        *about_seeds(measures, seeds),
        *about_control(measures),
        *about_cost(cost),
        *(f"Missing: {line}" for line in missing),
    ]


# ---- artifacts


def about_norms(norms: Sequence[Norms]) -> Iterator[str]:
    """Whether there were artifacts, and whether they went with registers."""
    trained = [row for row in norms if row.registers is not None]
    if not trained:
        yield "No model was looked into, so that nothing is known of artifacts."
        return
    without = [row for row in trained if row.registers == 0]
    with_some = [row for row in trained if row.registers]
    seen = [row for row in trained if row.kinds.get("outliers")]
    models = sum(row.models for row in trained)
    near = sum(row.kinds.get("suspicious", 0) for row in trained)
    broken = sum(row.kinds.get("not finite", 0) for row in trained)
    if not seen:
        yield (
            f"No artifacts at this size and length: in none of the {models} models do the norms of the patch tokens "
            "form a second mode after the last block. "
            + (
                "There was nothing for registers to remove, so that this study cannot say whether they would."
                if without
                else "A model without registers is not among them."
            )
        )
    elif without and without[0].kinds.get("outliers"):
        yield from _with_artifacts(without[0], with_some)
    else:
        yield (
            f"Artifacts are in {_count(seen)}, which have registers"
            + (", and in none of the models without" if without else "")
            + ": registers did not keep them away."
        )
    if near:
        yield (
            f"In {near} of {models} models a second mode stands too near to the first to be called outliers; it may "
            "come from what is in the pictures."
        )
    if broken:
        yield f"{broken} of {models} models have norms that are not finite: their figures say nothing."


def _with_artifacts(without: Norms, with_some: Sequence[Norms]) -> Iterator[str]:
    share = [s for s in without.shares if s]
    found = without.kinds["outliers"]
    many = f"{found} of {without.models} models" if found < without.models else f"all {found} models"
    yield (
        f"Without registers {many if found > 1 or without.models > 1 else 'the one model'} "
        f"{'have' if found > 1 else 'has'} artifacts: on average {100 * sum(share) / len(share):.2f} % of the patch "
        "tokens."
    )
    clean = [row.registers for row in with_some if not row.kinds.get("outliers") and row.registers is not None]
    still = [row for row in with_some if row.kinds.get("outliers")]
    if clean and not still:
        yield f"With registers, {_numbers(clean)} of them, no model has any."
    elif clean:
        yield f"With {_numbers(clean)} registers no model has any, but they remain in {_count(still)}."
    elif still:
        yield f"They remain in {_count(still)}: here registers did not remove them."
    else:
        yield "No model with registers was looked into."


def _count(rows: Sequence[Norms]) -> str:
    return ", ".join(f"{r.kinds['outliers']} of {r.models} models with {r.registers} registers" for r in rows)


def _numbers(values: Sequence[int]) -> str:
    words = [str(v) for v in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def about_registers(norms: Sequence[Norms]) -> Iterator[str]:
    """Whether the registers of a model look at different places."""
    known = [(row.registers, row.alike) for row in norms if row.registers and row.alike is not None]
    if not known:
        return
    low, high = min(a for _, a in known), max(a for _, a in known)
    between = " to ".join(dict.fromkeys((f"{low:.3f}", f"{high:.3f}")))
    if low >= ALIKE:
        yield (
            f"The registers of a model all look at the same places (correlation of their attention maps {between}): at "
            "this length they have not parted, so that more of them are copies of one."
        )
    else:
        yield f"Correlation of the attention maps of two registers of a model: {between}, by their number."


# ---- scores


def about_scores(measures: Sequence[Measure]) -> Iterator[str]:
    """For every measure the claim that its intervals allow, and no other."""
    for measure in measures:
        yield f"{measure.task} ({measure.score}): {claim(measure)}"
    pairs = [(m, c) for m in measures for c in m.cells if c.difference is not None and c.registers]
    apart = [(m, c) for m, c in pairs if c.difference is not None and c.difference.excludes(0)]
    total = number_of_comparisons(measures)
    if total > 1 and any(c.difference.low is not None for _, c in pairs if c.difference is not None):
        expected = 0.05 * total
        yield (
            f"Of {total} differences to no registers, {len(apart)} {'has' if len(apart) == 1 else 'have'} a 95 % "
            f"interval without 0; about {expected:.1f} would by chance alone if registers did nothing. Only a "
            f"difference that also holds at the width for {total} comparisons (Bonferroni) is called clear."
        )


def claim(measure: Measure) -> str:
    """One measure in words: a clear effect, one that may be chance, or none that shows; with the numbers."""
    unit, base = unit_of(measure.score), measure.cell("0")
    cells = [c for c in measure.cells if c.registers]
    if base is None:
        return "there is no run without registers to compare with."
    if not cells:
        return "there is no run with registers to compare with."
    known = [c for c in cells if c.difference is not None and c.difference.low is not None]
    if not known:
        return "fewer than two seeds have both, so that nothing can be said of the differences."
    said = []
    clear = [c for c in known if c.strict is not None and c.strict.excludes(0)]
    perhaps = [c for c in known if c not in clear and c.difference is not None and c.difference.excludes(0)]
    for cell in clear:
        said.append(f"{_registers(cell)} {_direction(measure, cell)} clearly, by {_amount(measure, cell)}")
    for cell in perhaps:
        said.append(
            f"{_registers(cell)} {_direction(measure, cell)} by {_amount(measure, cell)}, which may be chance among "
            "so many comparisons"
        )
    silent = [c for c in known if c not in clear and c not in perhaps]
    if silent:
        widths = [c.difference.half_width for c in silent if c.difference is not None and c.difference.half_width]
        least = " to ".join(dict.fromkeys(unit.text(f(widths)) for f in (min, max))) if widths else ""
        beyond = f"; differences below {least} {_difference_unit(measure)}".rstrip() if widths else ""
        tail = (", by number," if len(widths) > 1 else "") + " could not have been seen" if widths else ""
        whole = len(silent) == len(cells)
        plural = len(silent) > 1 or _r(silent[0]) != 1
        some = f"{_numbers([_r(c) for c in silent])} register{'s do' if plural else ' does'} not differ"
        which = "no number of registers differs" if whole else some
        said.append(f"{which} from none beyond the spread of the seeds{beyond}{tail}")
    return "; ".join(said) + f". {_best(measure, clear)}"


def _best(measure: Measure, clear: Sequence[Cell]) -> str:
    """The count with the best mean, and how little that may mean."""
    unit = unit_of(measure.score)
    sign = 1 if measure.higher_is_better else -1
    trained = [c for c in measure.cells if c.registers is not None]
    best = max(trained, key=lambda c: sign * c.interval.mean)
    text = f"The best mean, {unit.text(best.interval.mean)} {unit.name}".rstrip() + f", is that of {_registers(best)}"
    better = [c for c in clear if sign * (0.0 if c.difference is None else c.difference.mean) > 0]
    if best in better:
        return text + "."
    return text + ", which is no proof that it is the best count."


def _r(cell: Cell) -> int:
    return cell.registers or 0


def _registers(cell: Cell) -> str:
    return f"{_r(cell)} register{'s' if _r(cell) != 1 else ''}"


def _direction(measure: Measure, cell: Cell) -> str:
    assert cell.difference is not None
    better = (cell.difference.mean > 0) == measure.higher_is_better
    plural = _r(cell) != 1
    return ("help" if better else "harm") + ("" if plural else "s")


def _amount(measure: Measure, cell: Cell) -> str:
    unit, d = unit_of(measure.score), cell.difference
    assert d is not None
    assert d.low is not None
    assert d.high is not None
    return (
        f"{unit.text(d.mean, signed=True)} {_difference_unit(measure)}".rstrip()
        + f" (95 % interval {unit.text(d.low, signed=True)} to {unit.text(d.high, signed=True)})"
    )


def _difference_unit(measure: Measure) -> str:
    name = unit_of(measure.score).name
    return "points" if name == "%" else name


def about_retrofits(norms: Sequence[Norms], measures: Sequence[Measure]) -> Iterator[str]:
    """Each retrofit: whether artifacts are gone, and what the intervals say of its scores."""
    before = next((row for row in norms if row.registers == 0), None)
    arms = dict.fromkeys(
        [row.arm for row in norms if row.registers is None]
        + [cell.arm for measure in measures for cell in measure.cells if cell.registers is None]
    )
    for arm in arms:
        row = next((r for r in norms if r.arm == arm), None)
        said = []
        if row is not None:
            had = "unknown" if before is None else f"{before.kinds.get('outliers', 0)} of {before.models}"
            said.append(f"{row.kinds.get('outliers', 0)} of {row.models} models have artifacts (before: {had})")
        for measure in measures:
            cell = measure.cell(arm)
            if cell is not None:
                said.append(f"{measure.task} ({measure.score}) {_change(measure, cell)}")
        yield f"Retrofit {arm}: {'; '.join(said)}."


def _change(measure: Measure, cell: Cell) -> str:
    """What a retrofit did to a score, as far as its interval tells."""
    if cell.difference is None:
        return "has no counterpart of its seed to be compared with"
    if cell.difference.low is None:
        unit = unit_of(measure.score)
        amount = f"{unit.text(cell.difference.mean, signed=True)} {_difference_unit(measure)}".rstrip()
        return f"changes by {amount} with one seed, of which no spread is known"
    if cell.strict is not None and cell.strict.excludes(0):
        return f"changes clearly, by {_amount(measure, cell)}"
    if cell.difference.excludes(0):
        return f"changes by {_amount(measure, cell)}, which may be chance among so many comparisons"
    return f"does not change beyond the spread of seeds, {_amount(measure, cell)}"


def about_seeds(measures: Sequence[Measure], seeds: int) -> Iterator[str]:
    """How wide intervals over so few seeds are."""
    if not measures:
        yield "Nothing was scored."
    elif seeds < 2:
        yield "There is one seed: nothing is known of the spread over seeds, and no difference can be told from chance."
    elif seeds < FEW_SEEDS:
        factor = t_factor(seeds)
        yield (
            f"With {seeds} seeds an interval reaches {factor:.1f} standard errors to each side (Student's t with "
            f"{seeds - 1} degree{'s' if seeds > 2 else ''} of freedom; 2.0 with many seeds): only large effects could "
            "show, and that none shows does not mean that there is none."
        )


def about_control(measures: Sequence[Measure]) -> Iterator[str]:
    """Whether training helped at all: without that, counts of registers have nothing to differ in."""
    for measure in measures:
        pairs = [
            (value, measure.control[cell.arm][seed])
            for cell in measure.cells
            if cell.registers is not None
            for seed, value in cell.by_seed.items()
            if seed in measure.control.get(cell.arm, {})
        ]
        if not pairs:
            continue
        better = sum((a > b) == measure.higher_is_better and a != b for a, b in pairs)
        if better < len(pairs):
            little = ": differences there say little about what was learnt" if better < MOSTLY * len(pairs) else ""
            yield (
                f"{measure.task} ({measure.score}): {better} of {len(pairs)} trained models are better than the same "
                f"network before training{little}."
            )


# ---- cost


def about_cost(cost: Tree | None) -> Iterator[str]:
    """What 4 registers (or the nearest count there is) cost, beside the paper's figure for large images."""
    if cost is None:
        return
    rows = [row for row in cost["counts"] if row["registers"]]
    if not rows:
        return
    row = min(rows, key=lambda r: abs(r["registers"] - 4))
    tokens = cost["tokens"]
    text = (
        f"{row['registers']} register{'s add' if row['registers'] != 1 else ' adds'} "
        f"{100 * (row['macs_over_0'] - 1):.1f} % multiply-adds to an image of {cost['image_size']} pixels, which has "
        f"{tokens} other tokens, and {100 * (row['train_macs_over_0'] - 1):.1f} % to a training step, whose local "
        f"crops have {cost['crop_tokens']['local']}."
    )
    if tokens < 200:
        text += " The paper's 2 % is for 257 tokens: the fewer tokens an image has, the dearer a register."
    yield text
    if (measured := cost.get("measured")) is not None:
        timed = next(r for r in measured["counts"] if r["registers"] == row["registers"])
        ratio = timed["ratio"]
        yield (
            f"Measured, a training step with {row['registers']} takes {ratio['median']:.2f} times that with "
            f"{measured['against']} (middle half of {measured['rounds']} rounds: {ratio['low']:.2f} to "
            f"{ratio['high']:.2f}; {measured['clock']})."
        )
    elif cost.get("noted"):
        yield (
            "Images a second are those that the runs wrote down while they trained, perhaps beside other work: read "
            "them as hints. --measure times steps of all counts by turns."
        )
