"""The demo's page: whole, honest, escaped, and complete in one file."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from quietvit.backbones import make_backbone
from quietvit.config.load import load_config, to_yaml
from quietvit.weights import save_teacher
from quietvit_eval import demo_report, page_charts
from quietvit_eval.demo_report import write_report
from quietvit_eval.demo_scores import headline, rows, verdict

SUMMARY: dict[str, Any] = {
    "knn": {"trained": 61.3, "random": 42.1, "pixels": 33.7},
    "linear": {"trained": 70.2, "random": 55.9, "pixels": 40.4},
    "standard_error": {"knn": 1.1, "linear": 1.0},
    "label": "class",
    "classes": 8,
    "images": {"train": 4000, "test": 2000},
    "seconds": {"pretrain": 131.2, "export": 1.4, "evaluate": 41.9},
    "teacher": "runs/<demo> & co/teacher.safetensors",
    "seed": 17,
}
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Parses strictly: every element that opens closes, in order. Collects text, ids and what is pointed at."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.refers: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(str(value))
            if key in ("href", "src", "xlink:href", "srcset", "data", "action"):
                self.refers.append(str(value))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


def records(*, health: bool) -> list[dict[str, Any]]:
    losses = [
        {"step": s, "loss/total": 9 - s / 9, "loss/dino": 5.0, "loss/ibot": 4.0, "loss/koleo": 0.5, "images": 32.0 * s}
        for s in range(1, 31)
    ]
    losses[7]["loss/dino"] = None  # metrics.jsonl has null for what was not finite
    looks = [
        {"step": s, "health/knn": 30.0 + s, "health/rank": 9.0, "health/outlier_share": 0.01,
         "health/teacher/entropy": 3.0, "health/teacher/mean_entropy": 5.0}
        for s in (10, 20, 30)
    ]  # fmt: skip
    return losses + looks if health else losses


@pytest.fixture
def out(tmp_path: Path) -> Path:
    run = tmp_path / "pretrain"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(load_config("quickstart")))
    (run / "environment.json").write_text(
        json.dumps({"python": "3.11.9", "hardware": "Some <CPU> & co", "packages": {"torch": "2.11.0"}, "git": None})
    )
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records(health=True)))
    return tmp_path


def test_the_page_is_whole_and_says_it_all(out: Path) -> None:
    path = write_report(out, SUMMARY)
    assert path == out / "report.html"
    assert [p.name for p in out.iterdir() if p.name.startswith(".")] == []
    page = Page(path.read_text(encoding="utf-8"))
    text = page.text.replace("\N{NO-BREAK SPACE}", " ")
    for task in ("knn", "linear"):
        for score in SUMMARY[task].values():
            assert f"{score} %" in text
        assert f"{SUMMARY[task]['trained']} % ± {SUMMARY['standard_error'][task]}" in text
    for words in (
        "12.5 % by guessing", "After 30 steps on 960 pictures without a label", "2,000 test pictures", "seed 17",
        "131.2 s", "174.5 s", "Some <CPU> & co", "torch 2.11.0", "runs/<demo> & co/teacher.safetensors",
        "planks", "trellis", "background of the picture",
    ):  # fmt: skip
        assert words in text, words
    assert "git" not in text  # unknown facts are left out
    assert page.tags.count("svg") == 9
    assert page.tags.count("img") == 24


def test_the_page_needs_nothing_from_elsewhere(out: Path) -> None:
    html = write_report(out, SUMMARY).read_text(encoding="utf-8")
    assert "://" not in html
    assert "@import" not in html
    page = Page(html)
    assert {"script", "link", "iframe", "base", "form"} & set(page.tags) == set()
    assert {r for r in page.refers if not r.startswith(("#", "data:image/png;base64,"))} == set()
    inside = re.findall(r"url\(([^)]*)\)", html)
    assert all(r.startswith("#") for r in inside)
    pointed_at = {r.removeprefix("#") for r in [*page.refers, *inside] if r.startswith("#")}
    assert pointed_at
    assert pointed_at <= set(page.ids)  # what the charts refer to was not stripped
    assert page_charts.INK not in html  # text of the charts has the page's colour, dark or light
    assert "prefers-color-scheme: dark" in html


def test_pictures_are_those_of_their_class(out: Path) -> None:
    source = demo_report.open_source("scenes", None, split="train", image_size=16, num_images=60)
    shown = demo_report.examples(source, "shape")
    assert [e["name"] for e in shown] == source.classes["shape"]
    rows = np.flatnonzero(source.labels["shape"] == 2)[: len(shown[2]["images"])]
    for row, data in zip(rows, shown[2]["images"], strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        assert np.array_equal(pixels, source.load(int(row)))


class Nasty:
    """A source whose class names are markup, and whose second class has no picture."""

    labels = {"class": np.array([0, 0]), "<i>kind": np.array([0, 0])}  # noqa: RUF012
    classes = {"class": ["<script>alert(1)</script>", '"><b>'], "<i>kind": ["<script>alert(1)</script>", '"><b>']}  # noqa: RUF012

    def load(self, index: int) -> np.ndarray:
        return np.zeros((4, 4, 3), np.uint8)


def test_names_are_escaped(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_report, "open_source", lambda *_, **__: Nasty())
    html = write_report(out, {**SUMMARY, "classes": 2}).read_text(encoding="utf-8")
    page = Page(html)
    assert {"script", "b>", "i", "demo", "cpu"} & set(page.tags) == set()
    assert page.text.count("<script>alert(1)</script>") == 1
    assert '"><b>' in page.text
    assert "the <i>kind of the picture" in page.text


def test_charts_show_what_was_recorded(out: Path) -> None:
    with_health = [c.title for c in demo_report.charts(records(health=True), prototypes=256)]
    without = [c.title for c in demo_report.charts(records(health=False), prototypes=256)]
    assert without == ["Loss", "DINO loss", "iBOT loss", "KoLeo loss"]
    assert with_health[:4] == without
    assert len(with_health) == 9
    (falling,) = (c.svg for c in demo_report.charts(records(health=False), prototypes=None) if c.title == "Loss")
    paths = re.findall(r'd="M ([^"]*?)"[^>]*style="fill: none; stroke: #2f7fc1', falling)
    assert paths
    heights = [float(y) for y in re.findall(r"[\d.]+ ([\d.]+)", paths[0])]
    assert heights == sorted(heights)  # SVG counts downwards: a falling loss


@pytest.mark.parametrize("missing", ["metrics.jsonl", "environment.json", "config.yaml"])
def test_missing_records_leave_a_page(out: Path, missing: str) -> None:
    (out / "pretrain" / missing).unlink()
    page = Page(write_report(out, SUMMARY).read_text(encoding="utf-8"))
    assert "61.3" in page.text
    assert ("no record of the training" in page.text) == (missing == "metrics.jsonl")
    assert ("Made with" in page.text) == (missing != "environment.json")


def test_health_may_be_off(out: Path) -> None:
    lines = "".join(json.dumps(r) + "\n" for r in records(health=False))
    (out / "pretrain" / "metrics.jsonl").write_text(lines)
    assert Page(write_report(out, SUMMARY).read_text(encoding="utf-8")).tags.count("svg") == 4


def test_a_control_may_be_missing(out: Path) -> None:
    summary = {**SUMMARY, "linear": {"trained": 70.2, "random": 55.9}}
    for told, count in ((SUMMARY, 4), (summary, 3)):  # headline, note, and a row per task
        assert Page(write_report(out, told).read_text(encoding="utf-8")).text.count("raw pixels") == count


@pytest.mark.parametrize(
    ("trained", "how"),
    [(44.0, "no clear difference (+1.9"), (46.0, "a clear gain (+3.9"), (38.0, "a clear loss (-4.1")],
)
def test_the_verdict_is_honest(trained: float, how: str) -> None:
    # The better control has 42.1, one standard error is 1.1: clear begins at 2 * sqrt(2) * 1.1 = 3.1 points.
    summary = {**SUMMARY, "knn": {**SUMMARY["knn"], "trained": trained}}
    assert f"k-NN: {how} points ± 1.6 to the better control)" in verdict(summary)
    assert "Linear: a clear gain (+14.3 points" in verdict(summary)


def test_the_headline_without_records() -> None:
    assert headline(SUMMARY, []).startswith("After pretraining without a label, the network's features find")


def test_the_code_runs_and_is_four_lines(out: Path) -> None:
    torch.manual_seed(0)
    backbone = make_backbone("vit", embed_dim=8, depth=1, num_heads=2, patch_size=4, image_size=12, num_registers=3)
    folder = out / "it's a teacher"
    weights = save_teacher(folder, backbone, mean=(0.5,) * 3, std=(0.25,) * 3, image_size=12, provenance={})
    html = write_report(out, {**SUMMARY, "teacher": str(weights)}).read_text(encoding="utf-8")
    page = Page(html)
    start = page.text.index("import torch, quietvit")
    code = page.text[start : page.text.index("w, D]", start) + len("w, D]")]
    assert len([line for line in code.splitlines() if not line.startswith("#")]) == 4
    names: dict[str, Any] = {}
    exec(code, names)
    features = names["features"]
    assert features.cls.shape == (8, 8)
    assert features.registers.shape == (8, 3, 8)
    assert features.patches.shape == (8, 3, 3, 8)


DENSE: dict[str, Any] = {
    **SUMMARY,
    "segmentation": {"trained": 20.5, "random": 15.25, "constant": 8.0},
    "depth": {"trained": 1.02, "random": 1.05, "constant": 1.4, "place": 0.8},
    "standard_error": {**SUMMARY["standard_error"], "segmentation": 1.0, "depth": 0.02},
    "dense_images": {"train": 800, "test": 400},
}


def test_dense_tasks_have_their_units_and_their_pictures(out: Path) -> None:
    picture = out / "eval" / "pictures" / "a.png"
    picture.parent.mkdir(parents=True)
    Image.new("RGB", (6, 4), (200, 10, 10)).save(picture)
    page = Page(write_report(out, {**DENSE, "pictures": {"segmentation": ["eval/pictures/a.png"]}}).read_text())
    text = page.text.replace("\N{NO-BREAK SPACE}", " ")
    for words in (
        "20.5 % ± 1.0",
        "15.2 %",
        "1.020 m ± 0.020",
        "0.800 m",
        "the mean at each place",
        "800 pictures to learn",
    ):
        assert words in text, words
    own = base64.b64encode(picture.read_bytes()).decode()
    shown = [r for r in page.refers if r.endswith(own)]
    assert len(shown) == 1
    assert "What it sees now" in text
    assert "What it sees now" not in Page(write_report(out, SUMMARY).read_text()).text


def test_bars_and_verdicts_know_which_way_is_better() -> None:
    by_title = {task["title"].partition(":")[0]: task for task in rows(DENSE)}
    assert [r["width"] for r in by_title["Segmentation"]["rows"]] == [20.5, 15.25, 8.0]
    assert [r["width"] for r in by_title["Depth"]["rows"]] == pytest.approx([72.86, 75.0, 100.0, 57.14], abs=0.01)
    assert by_title["Depth"]["chance"] is None
    assert by_title["k-NN"]["chance"] == 12.5
    said = verdict(DENSE)
    assert "Segmentation: a clear gain (+5.2 points ± 1.4" in said
    assert "Depth: no clear difference (-0.030 m ± 0.028" in said
    worse = {**DENSE, "depth": {"trained": 1.3, "random": 1.05, "constant": 1.4}}
    assert "Depth: a clear loss (+0.250 m" in verdict(worse)
    better = {**DENSE, "depth": {"trained": 0.7, "random": 1.05, "constant": 1.4}}
    assert "Depth: a clear gain (-0.350 m" in verdict(better)
