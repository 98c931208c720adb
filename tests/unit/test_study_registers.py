"""`quietvit study registers` at test size: trains what is missing, takes what is there, goes on, writes its page."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from browser import browser, find_browser
from colours import Colours
from planted import planted_vit
from quietvit.config.load import load_config
from quietvit.weights import BackboneExtractor
from quietvit_eval.cards import find_cards
from quietvit_eval.study.figures import Figure
from quietvit_eval.study.looks import LookOptions, look_into
from quietvit_eval.study.reading import about_norms
from quietvit_eval.study.results import Entry, norms_of
from quietvit_launch import local
from quietvit_launch.cli import main, make_parser
from quietvit_launch.job import Job
from quietvit_launch.study_scores import evaluations_of, parts_of
from tiny_run import RECIPE, make_images

SHORT = ("train.steps=2", "health.images=0", "checkpoint.every=2", "data.source=classes")
LOOKS = ("--images", "8", "--shown", "2", "--eval", "knn --limit-train 12 --limit-test 12 ks=[3]")
SECTIONS = ("reading", "norms", "attention", "scores", "cost", "retrofits")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of twelve images, for training and for scoring."""
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "val"):
        for name, first in (("round", 0), ("square", 6)):
            made = make_images(folder / "made" / split / name, 12 + first)
            for file in sorted(made.iterdir())[:first]:
                file.unlink()
    return folder / "made"


def command(out: Path, images: Path, *words: str, registers: str = "0,1", seeds: str = "0,1") -> list[str]:
    settings = [str(RECIPE), f"data.path={images}", *SHORT]
    return [
        "study",
        "registers",
        *settings,
        "--registers",
        registers,
        "--seeds",
        seeds,
        "--out",
        str(out),
        *LOOKS,
        *words,
    ]


@pytest.fixture(scope="module")
def study(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole study."""
    out = tmp_path_factory.mktemp("study") / "out"
    assert main(command(out, images)) == 0
    return out


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures without drawing, for tests that look at other things: it takes most of a page's time."""

    def figure(name: str, title: str, caption: str, canvas: Any) -> Figure:
        return Figure(name, title, caption, b"", "", "")

    monkeypatch.setattr("quietvit_eval.study.figures._figure", figure)


def result(out: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((out / "study.json").read_text())
    return tree


def test_all_runs_are_there_with_scores_and_norms(study: Path) -> None:
    tree = result(study)
    assert sorted(p.name for p in (study / "runs").iterdir()) == [
        f"num_registers={r},seed={s}" for r in (0, 1) for s in (0, 1)
    ]
    assert [(m["registers"], m["seed"]) for m in tree["models"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(m["look"]["images"] == 8 and len(m["look"]["layers"]) == 2 for m in tree["models"])
    (measure,) = tree["measures"]
    assert measure["task"] == "knn"
    assert set(measure["control"]) == {"0", "1"}
    assert tree["missing"] == []
    assert (tree["steps"], tree["seeds"], tree["registers"]) == (2, [0, 1], [0, 1])


def test_numbers_are_those_of_the_cards(study: Path) -> None:
    scores: dict[int, dict[int, float]] = {0: {}, 1: {}}
    for folder in (study / "cards").iterdir():
        registers, seed = map(int, re.findall(r"=(\d+)", folder.name))
        (inner,) = folder.iterdir()
        cards = [c for c in find_cards_beside(inner) if c.subject == "model"]
        scores[registers][seed] = cards[0].scores[cards[0].main]
    (measure,) = result(study)["measures"]
    cell = next(c for c in measure["cells"] if c["arm"] == "1")
    a, b = ([scores[r][s] for s in (0, 1)] for r in (0, 1))
    assert cell["interval"]["values"] == b
    difference = [y - x for x, y in zip(a, b, strict=True)]
    assert list(cell["differences"].values()) == pytest.approx(difference)
    if difference[0] != difference[1]:
        want = stats.ttest_rel(b, a).confidence_interval(0.95)
        assert (cell["difference"]["low"], cell["difference"]["high"]) == pytest.approx((want.low, want.high))


def find_cards_beside(folder: Path) -> list[Any]:
    return list(find_cards(folder).values())


def test_the_page_is_whole(study: Path) -> None:
    html = (study / "study.html").read_text()
    assert [s for s in SECTIONS if f'<h2 id="{s}">' not in html] == []
    assert "http" not in html
    assert html.count("<svg") == len(list((study / "figures").glob("*.svg"))) == 5  # 2 norms, scores, differences, cost
    for sentence in result(study)["reading"]:
        assert sentence.replace("'", "&#39;") in html
    # A map of [CLS] for each count and image, one of the register, and the pictures.
    assert html.count("data:image/png;base64,") == 2 * (1 + 2) + 2
    assert str(study) not in html
    for file in (study / "figures").glob("*.svg"):
        assert file.read_text().startswith("<?xml")
        assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(find_browser() is None, reason="no Chromium here")
def test_a_browser_has_nothing_to_say_of_it(study: Path, tmp_path: Path) -> None:
    with browser(tmp_path) as tab:
        for scheme, width in (("light", 1000), ("dark", 1000), ("light", 380)):
            tab.open(study / "study.html", width=width, scheme=scheme)
            assert tab.complaints() == []
            assert [url for url in tab.requests() if not url.startswith(("file:", "data:"))] == []
            assert tab.ask("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
            assert tab.ask("document.documentElement.scrollWidth <= window.innerWidth"), (scheme, width)
            dark = tab.ask("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
            assert dark == (scheme == "dark")


@pytest.mark.usefixtures("undrawn")
def test_again_nothing_is_done_twice(study: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: Any, **named: Any) -> Any:
        raise AssertionError("done already")

    monkeypatch.setattr("quietvit_launch.local.run_locally", never)
    monkeypatch.setattr("quietvit_eval.study.looks.look_into", never)
    monkeypatch.setattr("quietvit_eval.evaluate.evaluate", never)
    monkeypatch.setattr("quietvit_eval.study.cost.counted", never)
    before = result(study)
    (study / "study.html").unlink()
    assert main(command(study, images)) == 0
    assert {**result(study), "created": ""} == {**before, "created": ""}
    assert (study / "study.html").is_file()


@pytest.mark.usefixtures("undrawn")
def test_finished_runs_are_taken_and_nothing_is_trained(study: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "taken"
    assert (
        main(
            ["study", "registers", "--runs", str(study / "runs"), "--out", str(out), "--images", "4", "--eval", "none"]
        )
        == 0
    )
    tree = result(out)
    assert not (out / "runs").exists()
    assert (tree["registers"], tree["seeds"], tree["measures"]) == ([0, 1], [0, 1], [])
    assert "Nothing was scored." in tree["reading"]
    # A subset of them, and one that is nowhere: a gap in the page, but no failure.
    words = ["--registers", "1,4", "--seeds", "1", "--page-only"]
    assert main(["study", "registers", "--runs", str(study / "runs"), "--out", str(out), "--eval", "none", *words]) == 0
    tree = result(out)
    assert [(m["registers"], m["seed"]) for m in tree["models"]] == [(1, 1)]
    assert tree["missing"] == ["the run with 4 registers and seed 1: it is not there"]
    assert "Missing: the run with 4 registers" in (out / "study.html").read_text()


def test_unlike_runs_are_refused(study: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(command(out, images, "--runs", str(study / "runs"), "--images", "4", "optim.lr=0.5")) == 2
    said = capsys.readouterr().err
    assert "optim.lr=0.001, but 0.5 in the recipe" in said
    assert not out.exists()


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_is_not_finished_is_left_out(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(study / "runs", runs)
    stopped = runs / "num_registers=1,seed=1"
    (stopped / "status.json").write_text(json.dumps({"state": "stopped", "steps": 9}))
    words = [
        "study",
        "registers",
        "--runs",
        str(runs),
        "--out",
        str(tmp_path / "out"),
        "--images",
        "4",
        "--eval",
        "none",
    ]
    assert main(words) == 0
    assert f"{stopped} is left out: stopped, step 2 of 9" in capsys.readouterr().err
    assert result(tmp_path / "out")["missing"] == ["the run with 1 registers and seed 1: it is not there"]
    assert main([*words[:3], str(stopped), *words[4:]]) == 2
    assert "no run there is finished" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_a_failed_run_leaves_a_gap(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole: Callable[..., int] = local.run_locally

    def broken(job: Job, processes: int | None = None) -> int:
        return 2 if "num_registers=1,seed=0" in job.out_dir else whole(job, processes)

    monkeypatch.setattr(local, "run_locally", broken)
    out = tmp_path / "out"
    assert main(command(out, images, seeds="0")) == 2
    assert "1 of 2 runs failed" in capsys.readouterr().err
    tree = result(out)
    assert [m["registers"] for m in tree["models"]] == [0]
    assert tree["missing"] == ["the run with 1 registers and seed 0: it is not there"]
    assert (out / "study.html").is_file()
    monkeypatch.setattr(local, "run_locally", whole)
    assert main(command(out, images, seeds="0")) == 0
    assert (result(out)["missing"], len(result(out)["models"])) == ([], 2)


@pytest.mark.usefixtures("undrawn")
def test_a_model_that_cannot_be_looked_into_is_a_gap(
    study: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(study, out)
    broken = next((out / "runs").iterdir()) / "teacher.safetensors"
    assert main(command(out, images, "--eval", "knn --limit-test 3 ks=[3]", "--retrofit", f"cut={broken.parent}")) == 0
    said = [s for s in result(out)["reading"] if s.startswith("Retrofit cut")]
    assert len(said) == 1
    assert "has no counterpart" not in said[0]
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "teacher.safetensors").write_bytes(broken.read_bytes()[:5000])
    assert main(command(out, images, "--retrofit", f"cut={tmp_path / 'cut'}")) == 2
    assert any("norms and attention of cut" in line for line in result(out)["missing"])
    assert "is truncated" in capsys.readouterr().err


def test_artifacts_planted_in_a_model_are_seen() -> None:
    backbone = planted_vit(positions=(5, 9))
    meta = {"backbone": {"arguments": {}}, "normalisation": {"mean": (0.5,) * 3, "std": (0.25,) * 3}, "image_size": 32}
    extractor = BackboneExtractor(backbone, {**meta, "provenance": {"seed": 7}}, device=torch.device("cpu"))
    look = look_into(extractor, Colours("val", 40), LookOptions(images=30, shown=2))
    assert (look["decision"]["kind"], look["decision"]["blocks"], look["seed"]) == ("outliers", [2, 3], 7)
    assert look["decision"]["share"] == pytest.approx(2 / 64)
    assert len(look["attention"]["maps"]) == 2
    norms = norms_of([Entry("0", 0, 7, "planted", look, ())])
    assert "has artifacts: on average 3.12 % of the patch tokens" in " ".join(about_norms(norms))


def test_wrong_arguments_are_told(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> str:
        try:
            code = main(["study", "registers", *words])
        except SystemExit as error:
            code = int(str(error.code))
        assert code == 2
        return capsys.readouterr().err

    out = ("--out", str(tmp_path / "o"))
    assert "name the recipe, or give finished --runs" in said(*out)
    assert "'quickstrat'" in said("quickstrat", *out)
    assert "'second' is not a setting" in said("quickstart", "second", *out)
    assert "there is no such folder" in said("--runs", str(tmp_path / "none"), *out)
    assert "there are no runs" in said("--runs", str(images), *out)
    assert "no list of whole numbers" in said("quickstart", "--registers", "0,x", *out)
    assert "names a number twice" in said("quickstart", "--seeds", "1,1", *out)
    assert "--dry-run: only with --on slurm" in said("quickstart", "--dry-run", *out)
    assert "slurm.nodes=2: only with --on slurm" in said("quickstart", "slurm.nodes=2", *out)
    assert "unknown task" in said("quickstart", "--eval", "knnn", *out)
    assert "`quietvit eval` has no --sise" in said("quickstart", "--eval", "knn --sise 3", *out)
    assert "--model is the study's to say" in said("quickstart", "--eval", "knn --model x", *out)
    assert "write NAME=MODEL" in said("quickstart", "--retrofit", "x", *out)
    assert "there is no model at" in said("quickstart", "--retrofit", "x=/nowhere", *out)
    assert "would be taken for a number of registers" in said("quickstart", "--retrofit", f"4={images}", *out)
    assert not (tmp_path / "o").exists()


def test_an_array_is_shown_for_slurm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["study", "registers", "quickstart", "--out", str(out), "--on", "slurm", "--dry-run", "--seeds", "0"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "#SBATCH --array=0-5%" in told
    assert told.count("# runs: quietvit train quickstart model.num_registers=") == 6
    assert not out.exists()


def test_evaluations_go_by_kind_of_data(images: Path) -> None:
    assert parts_of("knn,depth,linear,cheap-segmentation") == ["knn,linear", "depth", "cheap-segmentation"]
    config = load_config("quickstart")

    def of(*words: str) -> list[tuple[str, ...]]:
        return evaluations_of(make_parser().parse_args(["study", "registers", "--out", "o", *words]), config)

    scenes = ("--data", "scenes", "--data-option", "image_size=64")
    assert of() == [("knn,linear", *scenes)]
    assert of("--eval", "none") == []
    assert of("--eval", "knn,depth") == [("knn", *scenes), ("depth", *scenes)]
    assert of("--eval", "knn --data /x --limit-test 5", "--device", "cpu") == [
        ("knn", "--data", "/x", "--limit-test", "5", "--device", "cpu")
    ]
    assert of("--data", "/photos") == [("knn,linear", "--data", "/photos")]
    with pytest.raises(ValueError, match="an --eval of its own"):
        of("--eval", "knn,depth steps=3")
