"""The command line itself: what it answers without torch, what becomes a message and what stays a traceback."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import quietvit
from quietvit.backbones import make_backbone
from quietvit.config.load import ConfigError, recipes
from quietvit.data.quarantine import TooManyUnreadable
from quietvit.features import knn
from quietvit.weights import save_teacher
from quietvit.weights.native import WEIGHTS_NAME
from quietvit_eval import fit, own_model
from quietvit_eval.cards import find_cards
from quietvit_eval.embed import SUFFIXES
from quietvit_eval.task import TASKS
from quietvit_launch import cli, evaluation
from quietvit_launch.mistakes import message_for_user

UNKNOWN = (
    "unknown task 'knm': choose from knn, linear, logistic, finetune, classifier, segmentation, segmentation-patches, "
    "depth, discovery"
)
# Answers every command line of a list, then tells which of them it had to import torch for.
PROBE = """
import contextlib, io, json, sys
from quietvit_launch.cli import main
answers = []
for words in json.loads(sys.argv[1]):
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
    answers.append((code, err.getvalue(), "torch" in sys.modules))
print(json.dumps(answers))
"""


def test_wrong_arguments_are_answered_without_torch(tmp_path: Path) -> None:
    model = tmp_path / "teacher.safetensors"
    model.write_bytes(b"not looked into before the arguments are right")
    (tmp_path / "empty").mkdir()
    out = ["--out", str(tmp_path / "out")]
    on = ["--model", str(model), "--data", "scenes"]
    expected = {
        "invalid choice: 'trian'": ["trian"],
        "required: COMMAND": [],
        "required: recipe": ["train", *out],
        "required: --out": ["train", "quickstart"],
        "Did you mean 'train.steps'?": ["train", "quickstart", *out, "train.stepz=1"],
        "'x' is not a setting": ["train", "quickstart", *out, "x"],
        "Did you mean 'quickstart'?": ["train", "quickstrat", *out],
        "unrecognized arguments: --steps": ["train", "quickstart", *out, "--steps=1"],
        "not a multiple of the patch": ["train", "quickstart", *out, "crops.global_size=50"],
        "fewer than one batch": ["train", "quickstart", *out, "data.options.num_images=9"],
        "has no option 'num_image'": ["train", "quickstart", *out, "data.options.num_image=9"],
        "no such folder/images does not exist": ["train", str(tmp_path / "own.yaml"), *out],
        "Nearest: knn": ["eval", "knm", "--model", str(model), "--data", "scenes"],
        "Nearest: dinov2-nyu-linear": ["eval", "dinov2-nyu-linear", "--model", str(model), "--data", "scenes"],
        "by itself": ["eval", "knn,cheap-linear", "--model", str(model), "--data", "scenes"],
        "knn needs labels and depth needs metres": ["eval", "knn,depth", "--model", str(model), "--data", "scenes"],
        "is a setting of which task? Write knn.temp=1": ["eval", "knn,linear", "temp=1", *on],
        "not among those to run": ["eval", "knn", "linear.steps=1", *on],
        "joined by commas: knn,linear": ["eval", "knn", "linear", *on],
        "'steps' is not a setting": ["eval", "linear", *on, "steps"],
        "unrecognized arguments: --steps=5: settings": ["eval", "linear", *on, "--steps=5"],
        "--select is a setting of the task linear": ["eval", "knn", *on, "--select", "val"],
        "--memory: '0' is not a number above 0": ["eval", "knn", *on, "--memory", "0"],
        "unknown layout 'folder'": ["eval", "segmentation", *on[:2], "--data", str(tmp_path), "--kind", "folder"],
        "has no option 'sise'": ["eval", "depth", *on, "--data-option", "sise=3"],
        "does not exist": ["eval", "knn", *on, "--test-data", "nowhere"],
        "Name the class or function too": ["eval", "knn", "--model", "mine.py", "--data", "scenes"],
        "no file mine.py with a model": ["eval", "knn", "--model", "mine.py:make", "--data", "scenes"],
        "there is no protocol file x.yaml": ["eval", "x.yaml", *on],
        "unknown protocol 'cheap'; nearest: cheap": ["protocols", "cheap"],
        "required: ACTION": ["report"],
        "required: PATH": ["report", "show"],
        "invalid choice: 'csv'": ["report", "show", "x", "--format", "csv"],
        "two paths A and B, or one path": ["report", "compare", "x"],
        "no card and no folder at x": ["report", "show", "x"],
        "there is no model at nowhere": ["eval", "knn", "--model", "nowhere", "--data", "scenes"],
        "there is no model in the folder": ["export", str(tmp_path / "empty"), *out],
        "--limit-test: 'few'": ["eval", "knn", "--model", str(model), "--data", "scenes", "--limit-test", "few"],
        "invalid choice: 'best'": ["eval", "knn", "--model", str(model), "--data", "scenes", "--select", "best"],
        "no images in": ["embed", str(tmp_path / "empty"), "--model", str(model), "--out", "x.npz"],
        "ends in .npz or .parquet": ["embed", "images", "--model", str(model), "--out", "x.csv"],
        "--seed: '-1' is not a whole number of at least 0": ["demo", "--seed", "-1"],
    }
    (tmp_path / "own.yaml").write_text("data: {path: no such folder/images}\ntrain: {steps: 1}\n")
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(list(expected.values()))],
        capture_output=True, text=True, timeout=120, cwd=tmp_path, env={**os.environ, "QUIETVIT_CACHE": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words, (code, message, with_torch) in zip(expected, json.loads(done.stdout), strict=True):
        assert words in message
        assert (code, with_torch) == (2, False), message
        assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_the_installed_command() -> None:
    command = Path(sys.executable).with_name("quietvit")
    told = subprocess.run(
        [command, "train", "quickstart", "--out", "x", "train.stepz=1"], capture_output=True, text=True
    )
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.startswith("quietvit: unknown setting 'train.stepz'. Did you mean 'train.steps'?")
    assert len(told.stderr.splitlines()) == 1
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout == f"quietvit {quietvit.__version__}\n"


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(recipes())
    assert all(len(line.split()) > 3 for line in listed)  # each says what it is for
    assert cli.main(["recipes", "quickstart"]) == 0
    printed = capsys.readouterr().out
    assert "num_registers: 4" in printed
    assert "koleo_weight: 0.1" in printed  # a default, which the recipe does not mention


def test_settings_may_stand_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = []
    monkeypatch.setattr("quietvit_launch.local.run_locally", lambda job, processes: jobs.append(job) or 0)
    assert cli.main(["train", "quickstart", "a.b=1", "--out", "x", "c.d=2", "e.f=3"]) == 0
    assert cli.main(["train", "--out", "x", "quickstart", "a.b=1", "c.d=2", "e.f=3"]) == 0
    assert [(j.recipe, j.overrides, j.out_dir) for j in jobs] == [("quickstart", ("a.b=1", "c.d=2", "e.f=3"), "x")] * 2


def test_tables_told_without_torch_are_those_with_it() -> None:
    assert {name: task.target for name, task in TASKS.items()} == evaluation.TASK_TARGETS
    assert own_model.SPEC.pattern == evaluation.OWN.pattern
    assert evaluation.OUT_SUFFIXES == SUFFIXES
    assert evaluation.WEIGHTS == WEIGHTS_NAME


# ---- a message, or a traceback


def caught(call: Callable[[], object]) -> BaseException:
    with pytest.raises(BaseException) as info:  # noqa: PT011  (any)
        call()
    return info.value


def a_full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x/state.safetensors")


def test_what_quietvit_raises_is_a_message() -> None:
    assert message_for_user(caught(lambda: evaluation.check_tasks("knm"))) == UNKNOWN
    missing = caught(lambda: evaluation.check_model("nowhere"))
    assert str(message_for_user(missing)).startswith("there is no model at nowhere")


def test_what_the_machine_answers_is_a_message() -> None:
    told = message_for_user(caught(a_full_disk))
    assert told == (
        "x/state.safetensors: the disk is full (No space left on device): free some space, then repeat the command"
    )
    assert message_for_user(caught(lambda: open("nowhere/x"))) == "nowhere/x: No such file or directory"  # noqa: SIM115
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nbacktrace")):
        told = str(message_for_user(error))
        assert told.startswith("out of memory: ")
        assert "train.batch_size" in told
        assert "backtrace" not in told
    huge = caught(lambda: torch.empty(1 << 60))
    assert "train.accumulate" in str(message_for_user(huge))
    worker = RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly")
    assert "--shm-size" in str(message_for_user(worker))


def test_faults_of_ours_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble() -> None:
        raise ValueError("raised outside quietvit")

    assert message_for_user(caught(stumble)) is None
    # The last frame is quietvit's, but it called something that failed; it did not raise.
    x, wrong = torch.zeros(2, 3), torch.zeros(4, 5)
    labels = torch.zeros(2, dtype=torch.int64)
    inside = caught(lambda: knn.knn_accuracy(x, labels, wrong, labels, ks=(1,), num_classes=2))
    assert isinstance(inside, RuntimeError)
    assert message_for_user(inside) is None
    monkeypatch.setattr(evaluation, "check_model", lambda path: stumble())
    with pytest.raises(ValueError, match="raised outside quietvit"):
        cli.main(["export", "x", "--out", "y"])


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(path: str) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "check_model", interrupt)
    assert cli.main(["export", "x", "--out", "y"]) == 130
    assert capsys.readouterr().err == "quietvit: interrupted\n"


# ---- eval, from words to cards


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(1)
    backbone = make_backbone("vit", embed_dim=16, depth=4, num_heads=2, patch_size=8, image_size=32, init="xavier")
    save_teacher(folder, backbone, mean=(0.5,) * 3, std=(0.25,) * 3, image_size=32, provenance={"seed": 1})
    return folder


def on_scenes(teacher: Path, out: Path, *, num: int = 80) -> list[str]:
    data = ["--data", "scenes", "--data-option", f"num_images={num}", "--data-option", "image_size=32"]
    words = ["--model", str(teacher), *data, "--device", "cpu", "--out", str(out)]
    return [*words, "--cache", str(out / "features")]


def test_words_become_cards_that_are_shown_and_compared(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "knn,linear", "knn.ks=[1, 5]", *on_scenes(teacher, tmp_path), "linear.steps=20", "--select", "val"]
    assert cli.main([*words, "--random-init", "--batch-size", "16", "--memory", "0.5"]) == 0
    cards = {card.task: card for card in find_cards(tmp_path).values() if card.subject == "model"}
    assert cards["knn"].protocol["ks"] == [1, 5]
    assert (cards["linear"].protocol["steps"], cards["linear"].protocol["select"]) == (20, "val")
    assert cards["knn"].data["test"]["images"] == 80
    capsys.readouterr()
    assert cli.main(["report", "show", str(tmp_path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "random-init" in shown
    assert "top1@5, %" in shown
    assert cli.main(["report", "show", str(tmp_path), "--format", "json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 4
    assert cli.main(["report", "compare", str(tmp_path), "--against", "random-init", "--draws", "50"]) == 0
    assert "95 % interval" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["linear", "lr=1"], "task linear has no option 'lr'; nearest: lrs"),
        (["linear", "steps=many"], "task linear: steps takes a whole number or null, not 'many'"),
        (["linear", "select=best"], "select must be one of held_out, val"),
        (["depth", "norm=maybe"], "task depth: norm takes true or false, not 'maybe'"),
        (["knn", "--class-map", "nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_settings_are_explained(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert cli.main(["eval", *words, *on_scenes(teacher, tmp_path)]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


PROTOCOL = """# The k-NN of this test.
task: knn
data: {data}
size: 32
options: {{ks: [20], temp: 0.1}}
published: {{score: top1@20, source: a paper, figures: {{ViT-S/14: 79.0, ViT-B/14: 82.1}}}}
"""


def test_published_figures_stand_beside_the_score(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(PROTOCOL.format(data="scenes"))
    words = ["eval", str(file), *on_scenes(teacher, tmp_path / "out")]
    assert cli.main(words) == 0
    told = " ".join(capsys.readouterr().out.split())
    (card,) = find_cards(tmp_path / "out").values()
    assert card.protocol["temp"] == 0.1
    assert card.protocol["image_size"] == 32
    share = 100 * card.scores["top1@20"]
    assert f"this model {share:.1f}. Published (a paper): ViT-S/14 79.0, ViT-B/14 82.1" in told
    assert "Not comparable" not in told
    assert cli.main([*words, "temp=0.2", "--limit-train", "60"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Not comparable with these: this command has other temp, --limit-train." in told
    file.write_text(PROTOCOL.format(data="imagenet"))  # figures of other data say nothing here
    assert cli.main(words) == 0
    assert "Published" not in capsys.readouterr().out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_an_evaluation_and_says_how_to_go_on(
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
) -> None:
    saved = []

    def interrupted(*args: object, **kwargs: object) -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        finally:
            saved.append("state")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("quietvit_eval.evaluate.evaluate", interrupted)
    assert cli.main(["eval", "knn", *on_scenes(teacher, tmp_path)]) == code
    assert saved == ["state"]
    assert capsys.readouterr().err == "quietvit: interrupted; the same command goes on from what was saved\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupted_head_goes_on_and_ends_as_if_nothing_had_been(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["steps=8", "batch_size=2", "warmup_steps=0", "crop=32", "short_side=32", "stride=21", "pictures=0"]

    def words(out: Path) -> list[str]:
        return ["eval", "segmentation", *settings, *on_scenes(teacher, out, num=6)]

    gradients, taken = fit._gradients, []

    def interrupting(*args: Any) -> float:
        taken.append(None)
        if len(taken) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        return gradients(*args)

    assert cli.main(words(tmp_path / "whole")) == 0
    monkeypatch.setattr(fit, "_gradients", interrupting)
    assert cli.main(words(tmp_path / "broken")) == 143
    assert cli.main(words(tmp_path / "broken")) == 0
    assert len(taken) == 8  # the step underway was finished and kept
    (whole,), (broken,) = (find_cards(tmp_path / name).values() for name in ("whole", "broken"))
    assert whole.scores == broken.scores


def test_data_may_lie_in_two_places(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for place, count in (("here/train", 4), ("there", 3)):
        for name in ("cats", "dogs"):
            folder = tmp_path / place / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    words = ["eval", "knn", "--model", str(teacher), "--data", str(tmp_path / "here"), "--device", "cpu"]
    words += ["--test-data", str(tmp_path / "there"), "--out", str(tmp_path), "--cache", str(tmp_path / "features")]
    assert cli.main(words) == 0
    (card,) = find_cards(tmp_path).values()
    assert (card.data["train"]["images"], card.data["test"]["images"]) == (8, 6)


# ---- errors out of worker processes


class Failing(Dataset[int]):
    """Fails in a worker, in one of several ways."""

    def __init__(self, way: str) -> None:
        self.way = way

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        if self.way == "ours":
            cli.EXIT_USER_ERROR  # noqa: B018  (quietvit is imported in the worker)
            evaluation.check_tasks("knm")
        elif self.way == "ours, of a type of its own":
            from quietvit.config.resolve import scaled_lr

            scaled_lr(1.0, 1, "cubic")
        elif self.way == "theirs":
            raise ValueError("not quietvit's")
        return int(np.zeros((2, 2)) @ np.zeros(3))


def from_worker(way: str) -> BaseException:
    return caught(lambda: list(DataLoader(Failing(way), num_workers=1)))


def test_a_worker_s_message_arrives_clean() -> None:
    error = from_worker("ours")
    assert "Original Traceback" in str(error)
    assert message_for_user(error) == UNKNOWN
    typed = from_worker("ours, of a type of its own")
    assert isinstance(typed, ConfigError)
    assert message_for_user(typed) == "optim.scaling='cubic': choose sqrt_wrt_1024, linear_wrt_256 or none"


@pytest.mark.parametrize("way", ["theirs", "a call that fails"])
def test_a_worker_s_faults_keep_their_traceback(way: str) -> None:
    assert message_for_user(from_worker(way)) is None


def test_messages_of_several_lines_stay_whole() -> None:
    file = sys.modules[TooManyUnreadable.__module__].__file__
    text = (
        "Caught TooManyUnreadable in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        f'  File "{file}", line 1, in add\n    raise TooManyUnreadable(\n    ^^^^^\n'
        "quietvit.data.quarantine.TooManyUnreadable: two lines: one\nand another\n"
    )
    assert message_for_user(TooManyUnreadable(text)) == "two lines: one\nand another"
    assert message_for_user(TooManyUnreadable(text.replace(str(file), "/elsewhere/quietvit/x.py"))) is None
