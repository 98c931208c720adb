"""Where a run goes is decided, and wrong words are answered, before torch is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quietvit.config.load import load_config, to_yaml
from quietvit_launch import cli
from quietvit_launch.job import Job

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


def test_wrong_words_are_answered_without_torch(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    train, slurm = ["train", "quickstart", *out], ["train", "quickstart", *out, "--on", "slurm"]
    sweep = ["sweep", "quickstart", *out]
    old = tmp_path / "old"
    (old / "checkpoints" / "step_00000002").mkdir(parents=True)
    (old / "config.yaml").write_text(to_yaml(load_config("quickstart", ["train.steps=7"])))
    expected = {
        "invalid choice: 'slum'": [*train, "--on", "slum"],
        "--processes: '0' is not a whole number of at least 1": [*train, "--processes", "0"],
        "--processes is for --on local: slurm.nodes": [*slurm, "--processes", "2"],
        "--dry-run: only with --on slurm": [*train, "--dry-run"],
        "slurm.nodes=2: only with --on slurm": [*train, "slurm.nodes=2"],
        "--slurm x.yaml: only with --on slurm": [*train, "--slurm", "x.yaml"],
        "Did you mean 'slurm.nodes'?": [*slurm, "slurm.node=2"],
        "slurm.nodes=0: use 1 or more": [*slurm, "slurm.nodes=0"],
        "'slurm.nodes' takes a value of type int": [*slurm, "slurm.nodes=two"],
        "use slurm.signal_delay_s=15 or less": [*slurm, "slurm.time_min=1"],
        "--slurm nowhere.yaml: there is no such file": [*slurm, "--slurm", "nowhere.yaml"],
        "there is the recipe `slurm`": [*slurm, "--slurm", "slurn"],
        "by 3 nodes with 1 processes each and train.accumulate=1: use a multiple of 3": [*slurm, "slurm.nodes=3"],
        "fewer than one batch": [*slurm, "data.options.num_images=9"],
        "there is no Slurm here: sbatch is not on PATH": slurm,
        "torchrun did not start this process. Type\n": [*train, "--on", "torchrun"],
        "--data must say which labelled images": [*train, "--eval", "knn"],
        "--data, --eval-args and --eval-each go with --eval": [*train, "--data", "scenes"],
        "unknown task 'knm'": [*train, "--eval", "knm", "--data", "scenes"],
        "--limit-test: 'few'": [*train, "--eval", "knn", "--data", "scenes", "--eval-args", "--limit-test few"],
        "nothing to sweep": [*sweep, "train.steps=9"],
        "train.steps is given twice": [*sweep, "train.steps=9", "train.steps=8"],
        "has the value 9 twice": [*sweep, "train.steps=9,9"],
        "Did you mean 'train.steps'?": [*sweep, "train.stepz=9,8"],
        "invalid choice: 'torchrun'": [*sweep, "train.steps=9,8", "--on", "torchrun"],
        "train.steps: 7 -> 9": ["train", "quickstart", "train.steps=9", "--out", str(old)],
        "train.steps: 7 -> 8": [
            "train",
            "quickstart",
            "train.steps=8",
            "--out",
            str(old),
            "--on",
            "slurm",
            "--dry-run",
        ],
        "there is no folder nowhere": ["jobs", "nowhere"],
        "nowhere is not queued or running": ["cancel", "nowhere"],
    }
    env = {**os.environ, "QUIETVIT_CACHE": str(tmp_path), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(list(expected.values()))],
        capture_output=True, text=True, timeout=120, cwd=tmp_path, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words, (code, message, with_torch) in zip(expected, json.loads(done.stdout), strict=True):
        assert words.lower() in message.lower()
        assert (code, with_torch) == (2, False), message
        assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_outside_torchrun_the_command_to_type_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "quickstart", "data.options.num_images=64", "--out", "my run", "--on", "torchrun"]
    assert cli.main([*words, "--processes", "4"]) == 2  # a number belongs to torchrun
    assert "--nproc-per-node of torchrun says how many" in capsys.readouterr().err
    assert cli.main(words) == 2
    command = capsys.readouterr().err.splitlines()[1]
    assert "--standalone --nproc-per-node=" in command
    assert command.endswith("-m quietvit_launch.cli train quickstart data.options.num_images=64 --out 'my run'")


def test_a_process_of_torchrun_joins_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[Job] = []
    monkeypatch.setattr("quietvit_launch.worker.run_rank", lambda job: joined.append(job) or 0)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    assert cli.main(["train", "quickstart", "--out", "x", "train.steps=3"]) == 0
    assert joined == [Job("quickstart", ("train.steps=3",), "x")]


def test_an_evaluation_follows_a_good_end_only(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = iter([0, 143])
    calls: list[object] = []
    monkeypatch.setattr("quietvit_launch.local.run_locally", lambda job, processes: next(ends))
    monkeypatch.setattr("quietvit_launch.evaluation.run_evaluation", lambda args: calls.append(args) or 0)
    words = ["train", "quickstart", "--out", "x", "--eval", "knn", "--data", "scenes", "--eval-args", "--limit-test 9"]
    assert cli.main(words) == 0
    (args,) = calls
    assert vars(args).items() >= {"tasks": "knn", "model": "x", "data": "scenes", "limit_test": 9}.items()
    assert cli.main(words) == 143
    assert len(calls) == 1
