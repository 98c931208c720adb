"""The page of `inspect artifacts`: one HTML file that needs nothing else, in plain sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quietvit.files import write_text
from quietvit_eval.inspect.plots import Chart
from quietvit_eval.pages import fill_page

KINDS: Mapping[str, str] = {
    "none": "no outliers",
    "suspicious": "second mode, too near",
    "outliers": "outliers",
    "not finite": "not finite",
}

Tree = Mapping[str, Any]


def write_page(path: Path, result: Tree, charts: Sequence[Chart]) -> None:
    """Write the page, atomically: styles and pictures are inside, and it asks nothing of any network."""
    html = fill_page(
        "inspect_artifacts",
        overview=[overview_row(model) for model in result["models"]],
        models=[_section(model, charts) for model in result["models"]],
        together=[chart for chart in charts if chart.model is None],
        data=result["data"],
        settings=result["settings"],
        environment=result["environment"],
        created=result["created"],
    )
    write_text(path, html)


def overview_row(model: Tree) -> dict[str, str]:
    """One model in the table of all, and on the screen."""
    shape, last = model["shape"], model["layers"][-1]["patches"]
    having = [str(layer["block"]) for layer in model["layers"] if layer["patches"]["kind"] == "outliers"]
    return {
        "model": model["name"],
        "blocks x width": f"{shape['blocks']} x {shape['embed_dim']}",
        "weights": _millions(shape["parameters"]),
        "registers": str(shape["registers"]),
        "verdict": KINDS[last["kind"]],
        "share": _percent(last["share"], 2) if last["kind"] in ("outliers", "suspicious") else "0 %",
        "times the rest": _number(last["ratio"], 1),
        "max / median": _number(last["max_over_median"], 1),
        "in blocks": _ranges(having),
    }


def _section(model: Tree, charts: Sequence[Chart]) -> dict[str, Any]:
    own = {chart.name: chart for chart in charts if chart.model == model["key"]}
    return {
        "name": model["name"],
        "sentences": list(sentences(model)),
        "charts": own,
        "high": model["probed"]["threshold"]["names"][0],
        "rest": model["probed"]["threshold"]["names"][1],
        "layers": [_layer_row(layer) for layer in model["layers"]],
        "has_registers": model["shape"]["registers"] > 0,
        "local": _local_rows(model),
        "local_note": _local_note(model),
        "one_token": _one_token(model),
        "steps": _steps(model),
        "facts": list(_facts(model)),
    }


# ---- sentences


def sentences(model: Tree) -> Iterator[str]:
    """What was found, the decision first."""
    threshold, places = model["probed"]["threshold"], model["places"]
    yield model["decision"]["sentence"]
    yield model["decision"]["blocks"]
    if threshold["kind"] == "stand-in":
        yield (
            f"Below, the {threshold['names'][0]} of the patch tokens by norm after block {model['probed']['block']} "
            f"(above {threshold['value']:.3g}) are compared with the rest. They are no outliers: they only stand where "
            "outliers would, so that figures can be compared with other models."
        )
    border = places["at_border"]
    if border["high"] is not None:
        yield (
            f"{_percent(border['high'], 0)} of the {threshold['names'][0]} sit in the outermost ring of the grid, "
            f"which holds {_percent(border['all'], 0)} of the patches. {places['images_with']:,} of "
            f"{model['images']:,} images have at least one, the fullest {places['most_in_one_image']:,}."
        )
    near = model["neighbours"]
    if "skipped" in near:
        yield f"Neighbours after the patch embedding were not compared: {near['skipped']}."
    elif near["more_alike"] is not None:
        yield (
            f"Of all pairs of a patch of the {threshold['names'][0]} and another one, the former is more like its "
            f"neighbours in {_percent(near['more_alike'], 0)} (50 % would be no difference)."
        )
    if model["unreadable"]:
        yield f"{model['unreadable']:,} images could not be read and were left out."
    if model["images"] < 100:
        yield f"These are only {model['images']} images: rare outliers can be missed, and intervals are wide."


# ---- tables


def _layer_row(layer: Tree) -> dict[str, str]:
    verdict = layer["patches"]
    registers = [r["median"] for r in layer["registers"] if r["median"] is not None]
    return {
        "block": str(layer["block"]),
        "verdict": KINDS[verdict["kind"]],
        "share": _percent(verdict["share"], 2) if verdict["share"] else "",
        "cutoff": _number(verdict["cutoff"], 3, general=True),
        "ratio": _number(verdict["ratio"], 1),
        "median": _number(verdict["median"], 3, general=True),
        "max": _number(verdict["max_over_median"], 1),
        "kurtosis": _number(verdict["kurtosis"], 1),
        "cls": _number(layer["cls"]["median"], 3, general=True),
        "registers": ", ".join(_number(r, 3, general=True) for r in registers),
    }


LOCAL = (
    ("top1", "place told right, %", 100.0, 1, "22.8 / 41.7"),
    ("distance", "place, mean error in patches", 1.0, 2, "5.09 / 0.79"),
    ("pixel_error", "pixels, norm of what is left", 1.0, 2, "25.23 / 18.38, in another unit"),
    ("pixel_error_of_mean", "the same if the mean patch is said", 1.0, 2, ""),
)


def _local_rows(model: Tree) -> list[dict[str, str]]:
    local = model["local"]
    if "skipped" in local:
        return []
    chance = {"top1": local["chance"]["top1"], "distance": local["chance"]["distance"]}
    return [
        {
            "what": title,
            "high": _interval(local[name]["high"], factor, decimals),
            "rest": _interval(local[name]["rest"], factor, decimals),
            "difference": _interval(local[name]["difference"], factor, decimals, signed=True),
            "guess": f"{factor * chance[name]:.{decimals}f}" if name in chance else "",
            "paper": paper,
        }
        for name, title, factor, decimals, paper in LOCAL
        if name in local
    ]


def _local_note(model: Tree) -> str:
    local = model["local"]
    if "skipped" in local:
        return f"Not probed: {local['skipped']}."
    trained, asked = local["trained_on"], local["tokens"]
    alone = "" if "top1" in local else " A grid of one patch has no places to tell apart."
    return (
        f"Trained on {trained['tokens_pixels']:,} tokens of {trained['images']:,} images (places: "
        f"{trained['tokens_places']:,} of them), asked about {asked['high']:,} and {asked['rest']:,} tokens of "
        f"{local['images']:,} other images. In brackets 95 % intervals by bootstrap over these.{alone}"
    )


# What one token of each kind is called, by what the high ones are.
TOKENS: Mapping[str, Mapping[str, str]] = {
    "outliers": {"high": "one outlier", "rest": "one normal patch token"},
    "suspicious": {"high": "one patch token of the upper mode", "rest": "one of the lower mode"},
    "stand-in": {"high": "one of the patch tokens of highest norm", "rest": "one of the other patch tokens"},
}


def _one_token(model: Tree) -> dict[str, Any]:
    found, threshold = model["one_token"], model["probed"]["threshold"]
    names, words = threshold["names"], TOKENS[threshold["kind"]]
    if "skipped" in found:
        return {"note": f"Not scored: {found['skipped']}.", "tables": []}
    dropped = found["dropped"]
    note = f"{found['labelled']:,} labelled images of {found['classes']} classes. " + (
        f"{dropped:,} of them have none of the {names[0]} (or nothing else) and are dropped from the first table, in "
        "the train and in the test part alike; the second is on all of them."
        if dropped
        else "All of them have a token of every kind."
    )
    titles = {"same_images": "The same images for every token", "all_images": "All labelled images"}
    tables = []
    for key, title in titles.items():
        if (part := found.get(key)) is None:
            continue
        rows = [
            {
                "token": words.get(s["token"], s["token"]),
                "top1": f"{100 * s['top1']:.1f} ± {100 * s['standard_error']:.1f}",
                "draws": "" if s["std"] is None else f"{100 * s['std']:.1f} over {s['draws']} draws",
            }
            for s in part.get("scores", [])
        ]
        said = f"{part['train']:,} images to learn from, {part['test']:,} to be asked"
        if "skipped" in part:
            said = f"Not scored: {part['skipped']}"
        else:
            said += f"; always the commonest class gives {100 * part['chance']:.1f} %"
        tables.append({"title": title, "note": said + ".", "rows": rows})
    return {"note": note, "tables": tables}


def _steps(model: Tree) -> dict[str, Any]:
    followed, gauge = model["checkpoints"], model["gauge"]
    rows, notes = [], []
    if followed is not None:
        for checkpoint in followed["checkpoints"]:
            last = checkpoint["verdicts"][-1]
            having = [
                str(b)
                for b, v in zip(followed["blocks"], checkpoint["verdicts"], strict=True)
                if v["kind"] == "outliers"
            ]
            share = _percent(last["share"], 2) if last["share"] else "0 %"
            rows.append({"step": f"{checkpoint['step']:,}", "verdict": KINDS[last["kind"]], "share": share,
                         "max": _number(last["max_over_median"], 1), "blocks": _ranges(having)})  # fmt: skip
        notes += [f"Left out: {problem}" for problem in followed["broken"]]
    for episode in (gauge or {}).get("episodes", []):
        ended = episode.get("ended_step")
        end = f" to {ended:,}" if ended is not None else " on, to the end of what was recorded"
        notes.append(f"The run's own gauge saw artifacts from step {episode['began_step']:,}{end}.")
    if gauge is not None and "broken" in gauge:
        notes.append(gauge["broken"])
    if gauge is not None and "steps" in gauge and not gauge.get("episodes"):
        notes.append(f"The run's own record ({gauge['column']}, {len(gauge['steps'])} readings) tells of no episode.")
    return {"rows": rows, "notes": notes}


def _facts(model: Tree) -> Iterator[tuple[str, str]]:
    shape = model["shape"]
    yield "weights", str(model["model"].get("hash") or "this model cannot tell its hash")
    yield "path", str(model["model"]["path"])
    yield "images", f"{model['images']:,}, {model['image_size']} pixels: {model['view']['rule']}"
    yield "patch grid", f"{shape['grid'][0]} x {shape['grid'][1]}, {shape['stride']} pixels each"
    yield "made on", f"{model['hardware']}, {model['seconds']} s"


# ---- figures


def _interval(found: Tree | None, factor: float, decimals: int, *, signed: bool = False) -> str:
    if found is None:
        return "none there"
    sign = "+" if signed else ""
    value, low, high = (f"{factor * found[k]:{sign}.{decimals}f}" for k in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _percent(share: float | None, decimals: int) -> str:
    return "" if share is None else f"{100 * share:.{decimals}f} %"


def _number(value: float | None, digits: int, *, general: bool = False) -> str:
    return "" if value is None else f"{value:.{digits}{'g' if general else 'f'}}"


def _millions(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f} M"


def _ranges(blocks: Sequence[str]) -> str:
    """ "2, 3, 4, 7" as "2-4, 7"."""
    numbers = [int(b) for b in blocks]
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"
