"""A sweep is the product of its lists: every combination once, in a folder that says which."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from quietvit.config.load import ConfigError
from quietvit_launch.job import Job
from quietvit_launch.sweep import run_sweep, split_values, sweep_jobs


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0,1,2", ["0", "1", "2"]),
        ("0.5", ["0.5"]),
        ("", [""]),
        ("[0.3,1],[0.5,1]", ["[0.3,1]", "[0.5,1]"]),
        ("{a: [1,2], b: 3},null", ["{a: [1,2], b: 3}", "null"]),
        ("'x,y',z", ["'x,y'", "z"]),
    ],
)
def test_commas_part_values_outside_brackets(text: str, values: list[str]) -> None:
    assert split_values(text) == values


def test_the_product_in_folders_named_by_values() -> None:
    words = ["model.num_registers=0,4", "train.seed=3", "crops.global_scale=[0.3,1],[0.5,1]"]
    jobs = sweep_jobs("quickstart", words, Path("out"))
    assert [j.overrides for j in jobs] == [
        (f"model.num_registers={n}", "train.seed=3", f"crops.global_scale={s}")
        for n in (0, 4)
        for s in ("[0.3,1]", "[0.5,1]")
    ]
    assert [j.out_dir for j in jobs][:2] == [
        "out/num_registers=0,global_scale=[0.3,1]",
        "out/num_registers=0,global_scale=[0.5,1]",
    ]
    assert [j.config().model.num_registers for j in jobs] == [0, 0, 4, 4]


def test_names_that_would_meet() -> None:
    # Two settings of the same last name are told apart by all of it; values that cannot be a name are refused.
    jobs = sweep_jobs("quickstart", ["objective.head.init=a,b", "model.init=a,b"], Path("out"))
    assert jobs[1].out_dir == "out/objective.head.init=a,model.init=b"
    with pytest.raises(ConfigError, match="same folder out/path=_x"):
        sweep_jobs("quickstart", ["data.path=/x,:x"], Path("out"))
    with pytest.raises(ConfigError, match="too long a name"):
        sweep_jobs("quickstart", [f"data.path={'x' * 300},y"], Path("out"))
    with pytest.raises(ConfigError, match="'x' is not a setting"):
        sweep_jobs("quickstart", ["x"], Path("out"))


def test_one_that_fails_does_not_stop_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    begun = []

    def start(job: Job) -> int:
        begun.append(job.out_dir)
        if job.out_dir == "b":
            raise OSError(28, "No space left on device", "b/x")
        return 0

    assert run_sweep([Job("r", (), name) for name in "abc"], start) == 2
    assert begun == ["a", "b", "c"]
    err = capsys.readouterr().err
    assert "quietvit: b: b/x: the disk is full" in err
    assert re.search("1 of 3 runs failed: b$", err)


def test_a_stop_ends_the_sweep() -> None:
    codes = iter([0, 128 + signal.SIGTERM, 0])
    assert run_sweep([Job("r", (), name) for name in "abc"], lambda job: next(codes)) == 143
    assert next(codes) == 0


def test_a_fault_of_ours_is_not_swallowed() -> None:
    def start(job: Job) -> int:
        return int(["not a number"][0])

    with pytest.raises(ValueError, match="invalid literal"):
        run_sweep([Job("r", (), "a")], start)
