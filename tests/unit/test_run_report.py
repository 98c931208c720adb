"""The page of a run: complete in one file, true to the records, plain about what is wrong, looked at in a browser."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from browser import Browser, browser, find_browser
from planted import planted_vit
from quietvit.build import build_training
from quietvit.config.load import load_config, to_yaml
from quietvit.weights import save_teacher
from quietvit_eval.cards import Card, write_card
from quietvit_eval.run_report.curves import BUCKETS, Line, draw, draw_map, short_number, thin, ticks
from quietvit_eval.run_report.findings import Finding, find
from quietvit_eval.run_report.folder import State, read_run_folder
from quietvit_eval.run_report.maps import best_fit, make_maps
from quietvit_eval.run_report.page import write_run_report
from quietvit_eval.run_report.sections import headline, next_steps, scores
from quietvit_launch import cli
from quietvit_launch.job import Job, run_job
from quietvit_launch.report_arguments import with_action
from tiny_run import RECIPE, make_images

VOID = {"meta", "img", "br", "link", "input", "hr", "path", "rect", "circle"}


class Page(HTMLParser):
    """Every element that opens closes, in order. Collects elements with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as `quietvit train` leaves it: two classes, three checkpoints, readings of the gauge, one broken image."""
    folder = tmp_path_factory.mktemp("report")
    for name in ("a", "b"):
        make_images(folder / "images" / name, 12)
    (folder / "images" / "a" / "000.png").write_bytes(b"no image")
    run = folder / "run"
    settings = ("data.source=classes", f"data.path={folder / 'images'}", "train.steps=12", "checkpoint.every=4",
                "health.every=4", "health.gauge_every=2", "data.max_bad_share=0.5")  # fmt: skip
    job = Job(str(RECIPE), settings, str(run))
    assert run_job(job, Console(file=io.StringIO())) == 0
    return run


@pytest.fixture(scope="module")
def page_file(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "deep" / "page.html"
    assert cli.main(["report", str(trained), "--images", "2", "--out", str(out)]) == 0
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def state_of(name: str = "finished", message: str = "", steps: int | None = 12) -> State:
    return State(name, message, steps)


def render(run: Path, state: State | None = None, *, images: int = 0) -> Page:
    out = write_run_report(run, run / "report.html", state=state or state_of(), images=images)
    return Page(out.read_text(encoding="utf-8"))


# ---- the page of a real run


def test_the_page_is_whole_and_needs_nothing(page_file: Path) -> None:
    html = page_file.read_text(encoding="utf-8")
    page = Page(html)
    assert [p.name for p in page_file.parent.iterdir()] == ["page.html"]
    assert page_file.stat().st_size < 1_000_000
    assert re.findall(r"https?://|@import|url\(", html) == []
    assert {"script", "link", "iframe", "base", "form", "object"} & {tag for tag, _ in page.elements} == set()
    images = page.all("img")
    # Three kinds of maps of two images: the image, the start, three checkpoints.
    assert len(images) == 3 * 2 * (1 + 1 + 3)
    for image in images:
        kind, _, data = image["src"].partition(",")
        assert kind == "data:image/png;base64"
        assert min(Image.open(io.BytesIO(base64.b64decode(data))).size) > 0
        assert image["alt"]
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {a["href"].removeprefix("#") for a in page.all("a")} == set(ids)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in page.all("svg"))
    assert page.text.index("000.png") < page.text.index("Curves")  # warnings come first


def test_the_page_says_what_the_run_is(page_file: Path, trained: Path) -> None:
    page = Page(page_file.read_text(encoding="utf-8"))
    text = re.sub(r"\s+", " ", page.text)
    identity = json.loads((trained / "teacher.json").read_text())["provenance"]
    for words in (
        "This run is finished: step 12 of 12.", "96 images seen, 4.0 passes over 24", "1 image could not be read",
        "Nobody has scored this model", "DINO, small crops", "Weight 0.1.", "k-NN, %", "before training",
        "Norms after the last block",
        "model.embed_dim", "32 (default: null)", "optim.lr=0.001", "image side", identity["config_hash"],
        identity["data_fingerprint"], "step 0", "step 12", "so training saw them", "quietvit eval knn,linear --model",
    ):  # fmt: skip
        assert words in text, words
    labels = " ".join(svg.get("aria-label", "") for svg in page.all("svg"))
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = (r["loss/total"] for r in lines if "loss/total" in r)
    assert f"Loss: {first:.4g} at step 1, {last:.4g} at step 12" in labels


def test_commands_of_the_page_are_commands(trained: Path, tmp_path: Path) -> None:
    odd = Path(shutil.copytree(trained, tmp_path / "it's a run"))
    run = read_run_folder(odd, state_of())
    for state in ("finished", "running", "stopped"):
        steps = next_steps(read_run_folder(odd, state_of(state)))
        for _, command in steps:
            name, *words = shlex.split(command)
            assert name == "quietvit"
            cli.make_parser().parse_args(words)
    words = shlex.split(next_steps(run)[2][1])
    assert words[3] == f"init.from={odd}"
    continued = load_config(words[2], [words[3]])
    (tmp_path / "new").mkdir()
    assert build_training(continued, tmp_path / "new", Console(file=io.StringIO())).steps == 12


# ---- what is missing or broken


@pytest.mark.parametrize("missing", ["metrics.jsonl", "checkpoints", "config.yaml", "environment.json", "teacher.json",
                                     "status.json", "unreadable.txt"])  # fmt: skip
def test_a_page_is_made_without(run: Path, missing: str) -> None:
    target = run / missing
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    text = render(run, images=1).text
    assert ("There are no metrics" in text) == (missing == "metrics.jsonl")
    assert ("no readable settings" in text) == (missing == "config.yaml")
    assert ("environment.json is not there" in text) == (missing == "environment.json")


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "teacher.json", "guard.json", "artifacts.json",
                                  "eval/knn.json", "metrics.jsonl", "unreadable.txt"])  # fmt: skip
@pytest.mark.parametrize("content", [b"{", b"[1, 2]", b"\xff\xfe\x00", b'{"guard": 3}', b"7\n"])
def test_broken_files_break_no_page(run: Path, name: str, content: bytes) -> None:
    (run / "eval").mkdir(exist_ok=True)
    (run / name).write_bytes(content)
    page = render(run)
    if name == "eval/knn.json" and content == b"{":
        assert "knn.json cannot be read" in page.text.replace("Knn.json", "knn.json")


def test_values_of_the_wrong_kind_break_no_page(run: Path) -> None:
    (run / "guard.json").write_text(json.dumps({"outcome": "running", "start": 5, "best": [], "now": {"knn": "x"}}))
    (run / "artifacts.json").write_text(json.dumps({"episodes": [{"began_step": "x"}, 4]}))
    (run / "teacher.json").write_text(json.dumps({"backbone": [], "provenance": 3, "normalisation": None}))
    (run / "environment.json").write_text(json.dumps({"packages": 3, "command": "text"}))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "loss/total": "much", "lr": [1], "health/knn": null}\n')
    assert "step 13" in render(run).text


def test_broken_lines_are_counted_but_for_one_being_written(run: Path) -> None:
    path = run / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 13, "lo')
    assert read_run_folder(run, state_of()).problems == ()
    path.write_bytes(b'\xff{"step"\n[1]\n{"step": "x"}\n' + whole)
    (problem,) = read_run_folder(run, state_of()).problems
    assert problem == "left out here, for they cannot be read: 3 lines of metrics.jsonl (first: line 1)"


def test_a_run_of_one_step(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(line for line in lines if json.loads(line)["step"] == 1) + "\n")
    shutil.rmtree(run / "checkpoints")
    for name in ("teacher.safetensors", "teacher.json"):
        (run / name).unlink()
    page = render(run, state_of("running"), images=2)
    assert "step 1 of 12" in page.text
    assert "There is no checkpoint yet to make maps with." in page.text
    assert len(page.all("circle")) > 5  # single points are drawn as dots


def test_images_that_are_gone_are_said(run: Path) -> None:
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"path: .*images", "path: /nowhere/images", config))
    page = render(run, images=2)
    assert "The images of this run are not there any more" in page.text
    assert page.all("img") == []


def test_a_broken_checkpoint_is_left_out(run: Path) -> None:
    (run / "checkpoints" / "step_00000008" / "teacher.safetensors").write_bytes(b"short")
    page = render(run, images=1)
    assert "Step 8 is left out" in page.text
    assert len(page.all("img")) == 3 * (1 + 1 + 2)


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Path) -> None:
    (tmp_path / "empty").mkdir()
    for words, said in (
        ([str(tmp_path / "nowhere")], "there is no run folder"),
        ([str(tmp_path / "empty")], "is not a run folder"),
        ([str(tmp_path)], f"holds runs, and a page is about one: {run}"),
        ([str(run), "--out", str(run / "config.yaml")], "must end in .html"),
        ([str(run), "--images", "17"], "from 0 to 16"),
    ):
        assert cli.main(["report", *words]) == 2
        assert said in capsys.readouterr().err
    assert "model:" in (run / "config.yaml").read_text()


def test_names_are_escaped(run: Path) -> None:
    nasty = '<script>alert("1")</script>&'
    (run / "unreadable.txt").write_text(f"{nasty}\t<b>reason\n")
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, f"loss/{nasty}": 1.0}) + "\n")
    page = render(run, state_of("failed", nasty))
    assert page.all("script") == []
    assert page.text.count(nasty) >= 3


def test_words_after_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shown").mkdir()
    assert with_action(["report", "runs/a", "--images", "2"]) == ["report", "run", "runs/a", "--images", "2"]
    assert with_action(["report", "--out", "x.html", "runs/a"]) == ["report", "run", "--out", "x.html", "runs/a"]
    assert with_action(["report", "shown"])[1] == "run"  # a folder, whatever it is like
    for words in (["report"], ["report", "-h"], ["report", "compare", "a", "b"], ["report", "run", "a"],
                  ["report", "compar", "a"], ["train", "a"], []):  # fmt: skip
        assert with_action(words) == words


# ---- warnings


def records(num: int = 200, **change: Callable[[int], Any]) -> list[dict[str, Any]]:
    """A healthy run; `change`: other values by step."""
    out: list[dict[str, Any]] = [{"step": 0, "health/knn": 20.0, "health/rank": 20.0, "health/outlier_share": 0.0}]
    for step in range(1, num + 1):
        row = {
            "step": step,
            "loss/total": 9.0 - step / num,
            "images_per_s": 100.0,
            "data_wait": 0.05,
            "images": 8.0 * step,
        }
        out.append(row | {k: v for k, f in change.items() if "/" not in k and (v := f(step)) is not None})
        if step % 50 == 0:
            look = {"health/knn": 20.0 + step / 10, "health/rank": 20.0, "health/outlier_share": 0.0,
                    "health/teacher/entropy": 1.5, "health/teacher/mean_entropy": 3.0}  # fmt: skip
            out.append({"step": step, **{k: change[k](step) if k in change else v for k, v in look.items()}})
    return out


@pytest.fixture
def healthy(tmp_path: Path) -> Path:
    """A folder by hand that nothing is wrong with."""
    folder = tmp_path / "healthy"
    save(folder, records())
    (folder / "config.yaml").write_text(to_yaml(load_config(str(RECIPE), ["train.steps=200", "health.images=500"])))
    torch.manual_seed(0)
    checkpoint = folder / "checkpoints" / "step_00000200"
    backbone = planted_vit(block=1, amount=1.0, positions=[0])
    for place in (checkpoint, folder):
        save_teacher(place, backbone, mean=(0.5,) * 3, std=(0.25,) * 3, image_size=32, provenance={"step": 200})
    card(folder)
    return folder


def save(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def card(folder: Path, **values: Any) -> Card:
    defaults: dict[str, Any] = {
        "task": "knn", "subject": "model", "scores": {"top1@20": 0.5}, "main": "top1@20", "higher_is_better": True,
        "standard_error": 0.02, "model": {"hash": "abc", "path": "runs/a"}, "label": "class", "num_classes": 4,
        "data": {"test": {"name": "here", "fingerprint": "f", "images": 625, "unreadable": 0}},
        "protocol": {"image_size": 32}, "details": {}, "seed": 0, "environment": {}, "seconds": 1.0, "created": "now",
    }  # fmt: skip
    made = Card(**(defaults | values))
    write_card(made, folder / "eval")
    return made


def findings(folder: Path, state: State | None = None) -> list[Finding]:
    return find(read_run_folder(folder, state or state_of(steps=200)))


def test_a_healthy_run_is_left_in_peace(healthy: Path) -> None:
    assert findings(healthy) == []
    assert "Nothing to warn about" in render(healthy, state_of(steps=200)).text


BY_RECORDS: dict[str, tuple[dict[str, Any], str, bool]] = {
    "collapsed": ({"health/rank": lambda s: 1.2}, "the features fill 1.2 of", True),
    "collapsed for a while": ({"health/rank": lambda s: 1.2 if s < 150 else 20.0}, "Later looks do not say so", False),
    "few prototypes": ({"health/teacher/mean_entropy": lambda s: 0.1}, "the teacher uses few prototypes", True),
    "uniform targets": ({"health/teacher/entropy": lambda s: 3.17}, "still uniform", True),
    "k-NN far below the start": ({"health/knn": lambda s: 10.0}, "worse than before training: k-NN 20.0 %", True),
    "k-NN a little below": ({"health/knn": lambda s: 19.0}, "worse than before training", False),
    "k-NN hardly above": ({"health/knn": lambda s: 21.0}, "not clearly better", False),
    "k-NN fell": ({"health/knn": lambda s: 60.0 - s / 10}, "from its best, 55.0 % at step 50", False),
    "one step skipped": ({"skipped": lambda s: 1.0 if s == 7 else None}, "1 step was skipped", False),
    "many steps skipped": ({"skipped": lambda s: s / 2 if s % 2 else None}, "100 steps were skipped", True),
    "waiting": ({"data_wait": lambda s: 0.45}, "45% of the time", False),
    "slow a while": ({"images_per_s": lambda s: 20.0 if 50 < s <= 80 else 100.0}, "15% of the steps, first at", False),
    "slow at the end": ({"images_per_s": lambda s: 20.0 if s > 180 else 100.0}, "and is slow now", False),
    "outliers": ({"health/outlier_share": lambda s: 0.021}, "2.1 % of the patch tokens had outlying norms", False),
    "metrics cut": ({"num": 120}, "the metrics end at step 120", False),
}  # fmt: skip


@pytest.mark.parametrize("case", BY_RECORDS)
def test_warnings_that_the_metrics_ask_for(healthy: Path, case: str) -> None:
    change, words, serious = BY_RECORDS[case]
    save(healthy, records(**change))
    (found,) = findings(healthy)
    assert words in f"{found.sentence} {found.advice}"
    assert found.serious == serious
    assert found.advice
    page = render(healthy, state_of(steps=200))
    assert found.sentence in page.text
    assert ("Problem:" in page.text) == serious


def test_a_step_that_was_not_finite_leaves_a_gap_that_is_told(healthy: Path) -> None:
    save(healthy, [r | ({"loss/total": None} if r["step"] == 30 else {}) for r in records()])
    labels = [svg.get("aria-label", "") for svg in render(healthy).all("svg")]
    assert any("no finite value at 1 steps" in label for label in labels)


def episode(**values: Any) -> dict[str, Any]:
    return {"began_step": 120, "layer": 2, "blocks": [2, 3], "share": 0.02, "ratio": 8.0, "max_share": 0.031, **values}


def test_warnings_of_artifacts(healthy: Path) -> None:
    path = healthy / "artifacts.json"
    path.write_text(json.dumps({"num_registers": 0, "episodes": [episode(ended_step=None)]}))
    (found,) = findings(healthy)
    assert found.serious
    assert "artifacts since step 120: up to 3.1 %" in found.sentence
    assert "Train with registers" in found.advice
    path.write_text(json.dumps({"num_registers": 0, "episodes": [episode(ended_step=160)]}))
    (found,) = findings(healthy)
    assert not found.serious
    assert "from step 120 to 160" in found.sentence


def test_warnings_of_how_it_ended(healthy: Path) -> None:
    save(healthy, records(230))
    first, second = findings(healthy, state_of("failed", "it ended without a word", steps=400))
    assert first.serious
    assert "it ended without a word" in first.sentence
    assert "goes on from step 200" in first.advice
    assert "last 30 steps were not saved" in second.sentence
    (found,) = findings(healthy, state_of("stopped", "saved at step 200 of 400", steps=400))
    assert "stopped before its end (saved at step 200 of 400)" in found.sentence
    verdict = "the model forgets what it began with: k-NN 50.0 at the start.\ntable\nadvice"
    guard = {"outcome": "stopped", "verdict": verdict, "start": {"step": 0.0, "knn": 50.0, "rank": 20.0},
             "best": None, "now": {"step": 200.0, "knn": 12.0, "rank": 9.0}}  # fmt: skip
    (healthy / "guard.json").write_text(json.dumps(guard))
    found, *_ = findings(healthy, state_of("failed", verdict, steps=400))
    assert found.sentence == "The guard stopped this run: the model forgets what it began with: k-NN 50.0 at the start."
    page = render(healthy, state_of("failed", verdict, steps=400))
    text = re.sub(r"\s+", " ", page.text)
    assert "was stopped by its guard" in text
    assert "k-NN, %50-12" in re.sub(r"\s", "", text).replace("k-NN,%", "k-NN, %")
    assert "optim.lr=0.0005" in text


def test_a_run_that_says_it_runs_but_is_silent(healthy: Path) -> None:
    assert findings(healthy, state_of("running", steps=400)) == []
    old = time.time() - 3 * 3600
    os.utime(healthy / "metrics.jsonl", (old, old))
    (found,) = findings(healthy, state_of("running", steps=400))
    assert "has written nothing for 3:00 h" in found.sentence
    assert found.serious


def test_warnings_of_what_is_not_there(healthy: Path) -> None:
    shutil.rmtree(healthy / "eval")
    (found,) = findings(healthy)
    assert "Nobody has scored this model" in found.sentence
    assert findings(healthy, state_of("running", steps=400)) == []
    shutil.rmtree(healthy / "checkpoints")
    assert any("no checkpoint yet" in f.sentence for f in findings(healthy))
    (healthy / "unreadable.txt").write_text("a.png\tempty\n")
    (healthy / "unreadable.rank1.txt").write_text("b.png\tcut short\na.png\tempty\n")
    assert any("2 images could not be read" in f.sentence for f in findings(healthy))


# ---- scores


def test_scores_have_intervals_controls_and_owners(healthy: Path) -> None:
    card(healthy, subject="random-init", scores={"top1@20": 0.31}, model={"hash": "other"})
    card(healthy, task="depth", scores={"rmse": 0.5}, main="rmse", standard_error=0.01, higher_is_better=False)
    run = read_run_folder(healthy, state_of())
    by_task = {s.task: s for s in scores(run, "abc")}
    own = by_task["knn, top1@20"]
    assert (own.score, own.interval) == ("50.0 %", "46.1 to 53.9")
    assert own.controls == "random-init 31.0 %"
    assert "625 test images of here" in own.protocol
    assert (by_task["depth, rmse"].score, by_task["depth, rmse"].interval) == ("0.500 m", "0.480 to 0.520")
    assert own.note == ""
    assert "other weights" in scores(run, "xyz")[0].note


def test_the_headline_counts(healthy: Path) -> None:
    said = headline(read_run_folder(healthy, state_of(steps=400)), 160)
    assert (
        said
        == "This run is finished: step 200 of 400. About 16 s of training; 1,600 images seen, 10.0 passes over 160."
    )


# ---- curves


def test_thinning_keeps_every_extreme() -> None:
    rng = np.random.default_rng(0)
    steps = np.sort(rng.choice(10_000, 3_000, replace=False)).astype(float)
    values = rng.normal(size=3_000)
    values[1234], values[77] = 50.0, np.nan
    thinned = thin(steps, values)
    assert len(thinned.steps) <= BUCKETS
    edges = [steps[0] + (steps[-1] - steps[0]) * i / BUCKETS for i in range(BUCKETS + 1)]
    i = 0
    for bucket in range(BUCKETS):
        inside = [v for s, v in zip(steps, values, strict=True)
                  if (edges[bucket] <= s < edges[bucket + 1] or (bucket == BUCKETS - 1 and s == steps[-1]))
                  and not np.isnan(v)]  # fmt: skip
        if inside:
            found = (thinned.low[i], thinned.high[i], thinned.mean[i])
            assert found == pytest.approx((min(inside), max(inside), sum(inside) / len(inside)))
            i += 1
    assert i == len(thinned.steps)
    assert thinned.high.max() == 50.0
    few = thin(steps[:50], values[:50])
    assert few.is_whole
    assert np.array_equal(few.mean, values[:50])


def coordinates(svg: str, kind: str) -> list[tuple[float, float]]:
    (path,) = re.findall(rf'<path class="{kind}" d="M([^"]*?)Z?"', svg)
    return [(float(x), float(y)) for x, y in (pair.split() for pair in path.split("L"))]


def test_lines_are_drawn_to_scale() -> None:
    chart = draw("t", "c", [Line("v", np.array([1.0, 50.0, 100.0]), np.array([4.0, 2.0, 0.0]))], steps=200)
    assert chart is not None
    (x0, y0), (x1, y1), (x2, y2) = coordinates(chart.svg, "line k0")
    assert (x1 - x0) / (x2 - x1) == pytest.approx(49 / 50, abs=0.01)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.15)  # downwards, evenly
    assert y0 < y1 < y2
    assert x2 == pytest.approx((44 + 312) / 2, abs=1)  # half of the run
    assert draw("t", "c", [Line("v", np.array([1.0]), np.array([np.nan]))]) is None


def test_a_spike_is_in_the_band() -> None:
    values = np.ones(5000)
    values[3210] = 9.0
    chart = draw("t", "c", [Line("v", np.arange(5000.0), values)], from_zero=True)
    assert chart is not None
    band, line = coordinates(chart.svg, "band k0"), coordinates(chart.svg, "line k0")
    top = min(y for _, y in band)
    assert top < min(y for _, y in line) - 50
    assert next(x for x, y in band if y == top) == pytest.approx(44 + 268 * 3210 / 4999, abs=3)


def test_maps_of_blocks_keep_the_greatest() -> None:
    rows = np.zeros((4, 300))
    rows[2, 150], rows[3, 299] = 5.0, 10.0
    svg = draw_map("t", "c", np.arange(300.0), rows).svg
    cells = re.findall(r'class="cell" x="([\d.]+)" y="([\d.]+)" [^>]*fill-opacity="([\d.]+)"', svg)
    (x0, y0, s0), (x1, y1, s1) = [tuple(map(float, c)) for c in cells]
    assert y1 < y0  # blocks count upwards
    assert x0 < x1
    assert (s0, s1) == pytest.approx((0.15 + 0.85 / 2, 1.0), abs=0.01)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 480), (0.98, 0.998), (-0.3, 2.1), (0, 1e-3), (5.4, 5.41), (0, 1e6), (3, 3)]
)
def test_ticks_are_round_and_few(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 1 <= len(found) <= 6
    assert all(low - 1e-9 <= t <= high + 1e-9 for t in found)
    assert len({short_number(t) for t in found}) == len(found)


def test_numbers_for_axes() -> None:
    assert [short_number(v) for v in (0, 0.5, 1e-6, 480, 9999, 25_000, 1.2e6, 3e9)] == [
        "0", "0.5", "1e-06", "480", "9999", "25k", "1.2M", "3G"]  # fmt: skip


# ---- maps


def test_components_are_put_in_the_order_of_the_last() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(500, 3, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 2.0, 1.0])
    turned = torch.stack([-target[:, 2], target[:, 0], -target[:, 1]], dim=1)
    order, signs = best_fit(turned, target)
    torch.testing.assert_close(turned[:, order] * signs, target)


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_planted_artifacts_are_the_bright_patches(healthy: Path, tmp_path: Path) -> None:
    images, marked = make_images(tmp_path / "pictures", 6), [5, 10]
    config = load_config(str(RECIPE), [f"data.path={images}", "train.steps=200"])
    (healthy / "config.yaml").write_text(to_yaml(config))
    backbone = planted_vit(block=1, amount=60.0, positions=marked)
    save_teacher(healthy / "checkpoints" / "step_00000200", backbone, mean=(0.5,) * 3, std=(0.25,) * 3, image_size=32,
                 provenance={"step": 200})  # fmt: skip
    maps = make_maps(read_run_folder(healthy, state_of()), images=3, console=None)
    norms = maps.kinds[2].strips
    assert len(norms) == 3
    for strip in norms:
        bright = decoded(strip.pictures[-1].uri).astype(int).sum(axis=2).ravel()
        assert sorted(np.argsort(bright)[-2:].tolist()) == marked
        assert float(re.findall(r"· ([\d.]+) times", strip.pictures[-1].caption)[0]) > 2


def test_time_is_bounded_and_the_last_comes_first(trained: Path) -> None:
    maps = make_maps(read_run_folder(trained, state_of()), images=1, console=None, seconds=0.0)
    assert [p.caption for p in maps.kinds[0].strips[0].pictures] == ["image", "step 12"]
    assert "1 of 4 checkpoints are shown" in " ".join(maps.notes)


# ---- a browser


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if find_browser() is None:
        pytest.skip("no Chromium here: install the package chromium to look at the page")
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def troubled_file(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with everything on it: scores, the guard's table, warnings, names that do not end."""
    run = Path(shutil.copytree(trained, tmp_path_factory.mktemp("troubled") / ("a-name-without-an-end" * 5)))
    name = "folder/" * 8 + "a_file_name_that_has_no_place_to_break_it_" * 4 + ".png"
    (run / "unreadable.txt").write_text(f"{name}\tno image\n")
    looks = [{"step": s, "knn": 50.0, "rank": 20.0, "outlier_share": 0.01} for s in (0, 4, 12)]
    (run / "guard.json").write_text(
        json.dumps({"outcome": "running", **dict(zip(("start", "best", "now"), looks, strict=True))})
    )
    artifacts = [{"step": s, "artifacts/share/block_00": 0.0, "artifacts/share/block_01": 0.04} for s in range(13)]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(r) + "\n" for r in artifacts)
    for subject in ("model", "random-init"):
        card(run, subject=subject, protocol={"image_size": 32, "view": "x" * 90})
    return write_run_report(run, run / "report.html", state=state_of("failed", "out of memory " * 20), images=2)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("which", ["page_file", "troubled_file"])
def test_a_browser_shows_it(tab: Browser, request: pytest.FixtureRequest, which: str, width: int, scheme: str) -> None:
    tab.open(request.getfixturevalue(which), width=width, scheme=scheme)
    assert tab.complaints() == []
    assert [r for r in tab.requests() if not r.startswith(("data:", "file:"))] == []
    broken = "[...document.images].filter(i => !i.complete || i.naturalWidth === 0).length"
    assert tab.ask(broken) == 0
    assert tab.ask("document.images.length") == 30
    assert tab.ask("document.documentElement.scrollWidth") <= width
    # No element but those that scroll by themselves or are only for screen readers reaches beyond the window.
    assert (
        tab.ask(f"""[...document.body.querySelectorAll('*')].filter(e => !e.closest('pre, thead') &&
        e.getBoundingClientRect().right > {width} + 1).map(e => e.outerHTML.slice(0, 80))""")
        == []
    )
    picture = tab.screenshot()
    assert picture.shape[1] >= width - 20
    assert (picture[2, 2].mean() > 200) == (scheme == "light")
    assert picture.std() > 8
    # WCAG 2.1, 1.4.3: text against what lies behind it.
    assert min(tab.ask(CONTRASTS)) >= 4.5


CONTRASTS = """(() => {
  const parts = c => c.match(/[\\d.]+/g).map(Number);
  const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = c => {
    const [r, g, b] = parts(c).slice(0, 3).map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor;
      if (parts(c)[3] !== 0) return c;
    }
    return 'rgb(255, 255, 255)';
  };
  const texts = document.querySelectorAll('h1, h2, h3, p, li, b, td, th, figcaption, summary, a, svg text, .advice');
  return [...texts].map(e => {
    const style = getComputedStyle(e);
    const ink = light(e.closest('svg') ? style.fill : style.color), paper = light(behind(e));
    return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  });
})()"""
