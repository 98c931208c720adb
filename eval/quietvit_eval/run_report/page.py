"""The page of a run: one HTML file that needs nothing else."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console

import quietvit
from quietvit.data.sources import open_source
from quietvit.files import write_text
from quietvit.weights.extractor import load
from quietvit_eval.pages import fill_page
from quietvit_eval.run_report import sections
from quietvit_eval.run_report.charts import groups
from quietvit_eval.run_report.findings import find
from quietvit_eval.run_report.folder import RunFolder, State, read_run_folder
from quietvit_eval.run_report.maps import make_maps

IMAGES = 4  # looked at (ours: a page that is read to its end)
MOST_IMAGES = 16  # bounds the size of the file


def write_run_report(
    run_dir: Path, out: Path, *, state: State, images: int = IMAGES, console: Console | None = None
) -> Path:
    """Write the page about a run folder to the file `out`, and return that.

    `state`: how the run is, as `quietvit jobs` knows it. `images`: with maps over training, MOST_IMAGES at the most; 0:
    none. All of the page is in the file: styles, charts as SVG, pictures as PNG; it asks nothing of any network and has
    no script. What is missing or broken in the folder is said on the page. Models run on the CPU, for about a minute.

    Raises ValueError if `run_dir` is no run folder, `out` is no .html file or there are too many images; OSError as the
    file system does.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{out} is no name of a page: it must end in .html")
    if not 0 <= images <= MOST_IMAGES:
        raise ValueError(f"{images} images: from 0 to {MOST_IMAGES}, so that the page stays small")
    run = read_run_folder(run_dir, state)
    html = fill_page("run_report", **_contents(run, images, console))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, html)
    return out


def _contents(run: RunFolder, images: int, console: Console | None) -> dict[str, Any]:
    num_images, weights_hash = _count_images(run), _hash(run)
    changed, everything = sections.settings(run)
    return {
        "name": run.path.name or str(run.path),
        "path": str(run.path.resolve()),
        "headline": sections.headline(run, num_images),
        "findings": find(run),
        "groups": groups(run),
        "maps": make_maps(run, images=images, console=console),
        "scores": sections.scores(run, weights_hash),
        "changed": changed,
        "settings": everything,
        "model": sections.model(run, weights_hash),
        "data": sections.data(run, num_images),
        "unreadable": sections.unreadable(run),
        "unreadable_count": len(run.unreadable),
        "environment": sections.environment(run),
        "guard": sections.guard_table(run),
        "next_steps": sections.next_steps(run),
        "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "version": quietvit.__version__,
    }


def _count_images(run: RunFolder) -> int | None:
    """Images of the run's data, None where they are gone; the maps say why."""
    if run.config is None:
        return None
    data = run.config.data
    try:
        return len(open_source(data.source, data.path, split=data.split, **data.options))
    except (ValueError, OSError):
        return None


def _hash(run: RunFolder) -> str | None:
    """Of the newest teacher's weights, None where there are none to be read; the maps say why."""
    try:
        return str(load(run.path, "cpu").identity()["hash"])
    except (ValueError, OSError):
        return None
