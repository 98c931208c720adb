"""The command line itself: what it answers without torch, what becomes a message and what stays a traceback."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import quietvit
from quietvit.config.load import ConfigError, recipes
from quietvit.data.quarantine import TooManyUnreadable
from quietvit.features import knn
from quietvit.weights.native import WEIGHTS_NAME
from quietvit_eval.embed import SUFFIXES
from quietvit_eval.task import TASKS
from quietvit_launch import cli, evaluation
from quietvit_launch.mistakes import message_for_user

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
        "unknown task 'knm'": ["eval", "knm", "--model", str(model), "--data", "scenes"],
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
    assert set(evaluation.TASK_NAMES) == set(TASKS)
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
    assert (
        message_for_user(caught(lambda: evaluation.check_tasks("knm")))
        == "unknown task 'knm': choose from knn, linear, classifier"
    )
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
    assert message_for_user(error) == "unknown task 'knm': choose from knn, linear, classifier"
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
