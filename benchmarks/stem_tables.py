"""What benchmarks/stem.py found, as Markdown. Run by itself it does nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PATCH, NAIVE = "patch", "n x n"  # the contestant that all are compared with, and the one that is only weighed
MIB = 1024**2


def as_text(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        f"The tokens-to-token stem, forward + backward. {report['date']}, {report['hardware']}, "
        f"torch {report['torch']}, {report['git']}.",
        "",
        f"    {report['command']}",
        "",
        f"Times: {report['clock']}, over that of the patch stem in the same round: median (least - greatest). Memory: "
        f"peak above the start, {report['memory']}. n x n: the transformer stem with its attention matrix in memory; "
        "~ is estimated from the smaller images.",
    ]
    for scale in dict.fromkeys(case["scale"] for case in report["cases"]):
        for precision in dict.fromkeys(case["precision"] for case in report["cases"]):
            cases = [c for c in report["cases"] if (c["scale"], c["precision"]) == (scale, precision)]
            if cases:
                lines += ["", f"## {scale}, {precision}", *_time_table(cases), *_memory_table(cases), *_shares(cases)]
    if report["kernels"]:
        lines += ["", "## Attention of the transformer stem's first stage", *_kernel_table(report["kernels"])]
    return "\n".join(lines) + "\n"


def _stems(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    return [n for n in dict.fromkeys(name for case in cases for name in case["rows"]) if n not in (PATCH, NAIVE)]


def _title(case: Mapping[str, Any]) -> str:
    return f"{case['part']}, {case['crops']}"


def _time_table(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    stems = _stems(cases)
    lines = ["", f"| time | patch, ms | {' | '.join(stems)} |", "|---" * (2 + len(stems)) + "|"]
    for case in cases:
        cells = []
        for name in stems:
            row = case["rows"].get(name, {"failed": "-"})
            low, high = row.get("ratio_min_max", (0, 0))
            cells.append(row["failed"] if "failed" in row else f"**{row['ratio']:.2f}** ({low:.2f} - {high:.2f})")
        lines.append(f"| {_title(case)} | {case['rows'][PATCH]['ms']:.1f} | {' | '.join(cells)} |")
    return lines


def _memory_table(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [PATCH, *_stems(cases), *([NAIVE] if any(NAIVE in case["rows"] for case in cases) else [])]
    lines = ["", f"| memory, MiB | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for case in cases:
        cells = []
        for name in names:
            row = case["rows"].get(name, {"failed": "-"})
            sign = "~" if row.get("estimated") else ""
            cells.append(row["failed"] if "failed" in row else f"{sign}{row['bytes'] / MIB:.1f}")
        lines.append(f"| {_title(case)} | {' | '.join(cells)} |")
    return lines


def _shares(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """How much of the whole backbone's time and memory is the stem's, on the crops of a step."""
    stem, whole = cases[-2]["rows"], cases[-1]["rows"]
    parts = [
        f"{name} {stem[name]['ms'] / whole[name]['ms']:.0%}"
        for name in (PATCH, *_stems(cases))
        if "ms" in stem.get(name, {}) and "ms" in whole.get(name, {})
    ]
    return ["", f"Share of the stem in the time of its whole backbone: {', '.join(parts)}."]


def _kernel_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["", "| images | precision | mask | backend | ms | MiB |", "|---|---|---|---|---|---|"]
    for row in rows:
        backend = f"chosen: `{row['kernel']}`" if "kernel" in row else row["backend"]
        cost = f"{row['failed']} | -" if "failed" in row else f"{row['ms']:.2f} | {row['bytes'] / MIB:.1f}"
        masked = "yes" if row["masked"] else "no"
        lines.append(f"| {row['images']} x {row['side']} px | {row['precision']} | {masked} | {backend} | {cost} |")
    return lines
