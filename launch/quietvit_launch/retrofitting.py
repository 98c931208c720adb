"""The command `retrofit`: arguments to a call of quietvit_eval.retrofit, and what came of it as tables."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from quietvit_launch.evaluation import check_model
from quietvit_launch.inspecting import open_images
from quietvit_launch.reporting import wide_console
from quietvit_launch.stopping import sigterm_stops

if TYPE_CHECKING:
    from quietvit_eval.retrofit.choose import Retrofit
    from quietvit_eval.retrofit.compare import Row


def run_retrofit(args: argparse.Namespace) -> int:
    """`quietvit retrofit MODEL`. Raises as `quietvit_eval.retrofit.write.retrofit_model`."""
    model, out = check_model(args.model), Path(args.out)
    source, console = open_images(args), wide_console()
    from quietvit.weights.extractor import load
    from quietvit_eval.retrofit.choose import RetrofitOptions
    from quietvit_eval.retrofit.write import retrofit_model

    options = RetrofitOptions(
        registers=args.registers,
        neurons=args.neurons,
        block=args.block,
        last_block=args.last_block,
        images=args.images,
        image_size=args.size,
        seed=args.seed,
        batch_size=args.batch_size,
        workers=args.workers,
    )
    with sigterm_stops():
        made, rows = retrofit_model(load(model, args.device), source, options, out, console=console)
    _print_neurons(made, console)
    print_rows(rows, console)
    console.print(f"wrote {out}: open it like any model", highlight=False, markup=False, soft_wrap=True)
    return 0


def _print_neurons(made: Retrofit, console: Console) -> None:
    found, blocks = made.found, made.found.top(made.chosen.neurons)
    said = ", ".join(f"{len(units)} of block {block}" for block, units in blocks.items())
    console.print(
        f"Outliers begin after block {found.begins}. Hidden units moved to registers: {said}. Of the outliers "
        f"{made.chosen.left:.1%} are left above the cutoff.",
        highlight=False,
        markup=False,
    )


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """The comparison, a line for each model."""
    table = Table(title="after the last block, before the final norm", title_justify="left", box=SIMPLE_HEAD)
    names = ("model", "registers", "verdict", "outliers", "above the first's cutoff", "median norm", "of registers",
             "[CLS] like the first's", "patches like the first's")  # fmt: skip
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in rows:
        norms = ", ".join(_number(one["median"], ".3g") for one in row.register_norms) or "-"
        table.add_row(
            row.name, str(row.registers), row.kind, f"{row.share:.2%}", _number(row.above, ".2%"),
            _number(row.patches["median"], ".3g"), norms, _number(row.same_cls, ".3f"),
            _number(row.same_patches, ".3f"),
        )  # fmt: skip
    console.print(table)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
