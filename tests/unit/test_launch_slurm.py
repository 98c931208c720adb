"""Slurm without Slurm: settings, the script that sbatch would get, and when a job asks to be run again."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import time
from pathlib import Path

import pytest

from quietvit.config.load import ConfigError
from quietvit_launch import cli, tasks
from quietvit_launch.job import Job
from quietvit_launch.slurm import SlurmConfig, for_evaluation, load_slurm
from quietvit_launch.tasks import Evaluation, Train, read_json

USR2, TERM = 128 + signal.SIGUSR2, 128 + signal.SIGTERM


# ---- settings


def test_the_shipped_recipe_is_the_defaults() -> None:
    assert load_slurm("slurm") == SlurmConfig()


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "lab.yaml"
    file.write_text(
        "partition: gpu\nsetup: |\n  module load cuda\n  source env\nextra: {exclusive: true, gres: 'x:1'}\n"
    )
    config = load_slurm(str(file), ["slurm.nodes=2", "slurm.extra.gres=y:2", "slurm.mem_gb=100"])
    assert (config.partition, config.nodes, config.mem_gb) == ("gpu", 2, 100.0)
    assert config.setup == "module load cuda\nsource env\n"
    assert config.extra == {"exclusive": True, "gres": "y:2"}
    for text, message in {"a: [": "does not parse", "- a": "key: value pairs", "nodez: 1": "slurm.nodes"}.items():
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_slurm(str(file))
    file.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="does not parse"):
        load_slurm(str(file))


def test_an_evaluation_is_one_process() -> None:
    config = for_evaluation(SlurmConfig(nodes=4, gpus_per_node=8, eval_time_min=2, partition="p"))
    assert (config.nodes, config.tasks, config.gpus_per_node, config.time_min) == (1, 1, 1, 2)
    assert config.partition == "p"
    assert config.signal_delay_s == 75
    assert for_evaluation(SlurmConfig(gpus_per_node=0)).gpus_per_node == 0


# ---- the script


def options(script: str) -> dict[str, str | bool]:
    found = [line.removeprefix("#SBATCH --").partition("=") for line in script.splitlines() if "#SBATCH" in line]
    return {key: shlex.split(value)[0] if equals else True for key, equals, value in found}


def dry_run(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """The scripts that a command prints."""
    assert cli.main([*words, "--on", "slurm", "--dry-run"]) == 0
    return capsys.readouterr().out.split("#!/bin/bash")[1:]


def test_the_script_has_what_was_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "my run"
    asked = ["partition=gpu", "account=lab", "qos=high", "constraint=h100|h200", "nodes=2", "gpus_per_node=4"]
    asked += ["cpus_per_task=6", "mem_gb=90.5", "time_min=60", "signal_delay_s=200", "extra={exclusive: true}"]
    asked += ["setup=source env", "python=run it"]
    words = [f"slurm.{word}" for word in asked]
    (script,) = dry_run(capsys, "train", "quickstart", "train.steps=7", *words, "--out", str(out))
    given = options(script)
    logs = {key: given.pop(key) for key in ("output", "error")}
    assert logs == {"output": f"{out}/slurm/%j_0_log.out", "error": f"{out}/slurm/%j_0_log.err"}
    assert given == {
        "job-name": "my run",
        "partition": "gpu",
        "account": "lab",
        "qos": "high",
        "constraint": "h100|h200",
        "nodes": "2",
        "gpus-per-node": "4",
        "ntasks-per-node": "4",
        "cpus-per-task": "6",
        "mem": "92672M",
        "time": "60",
        "signal": "USR2@200",
        "open-mode": "append",
        "requeue": True,
        "exclusive": True,
    }
    lines = script.splitlines()
    setup = lines.index("source env")
    assert re.fullmatch(
        rf"export PYTHONPATH='{out}/code-[0-9a-f]{{12}}'\$\{{PYTHONPATH:\+:\$PYTHONPATH\}}", lines[setup + 1]
    )
    (srun,) = [line for line in lines if line.startswith("srun ")]
    assert "--kill-on-bad-exit=1 --cpus-per-task=6 run it -m quietvit_launch.early -u -m submitit" in srun
    assert f"# runs: quietvit train quickstart train.steps=7 --out '{out}'" in script
    assert not out.exists()


def test_scripts_of_a_sweep_and_its_evaluations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", "quickstart", "train.steps=7,8,9", "slurm.array_parallelism=2", "slurm.nodes=2"]
    train, judge = dry_run(capsys, *words, "--out", str(tmp_path), "--eval", "knn,linear", "--data", "scenes")
    assert options(train)["array"] == "0-2%2"
    assert options(train)["output"] == f"{tmp_path}/slurm/%A_%a_0_log.out"
    assert re.findall(r"train\.steps=\d --out .*", train) == [
        f"train.steps={n} --out {tmp_path}/steps={n}" for n in (7, 8, 9)
    ]
    given = options(judge)
    assert (given["array"], given["nodes"], given["gpus-per-node"]) == ("0-2%2", "1", "1")
    assert (given["dependency"], given["kill-on-invalid-dep"]) == ("aftercorr:JOB", "yes")
    assert judge.count("# runs: quietvit eval knn,linear --model") == 3


def test_every_kept_checkpoint_is_judged_on_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (10, 2):
        (tmp_path / "checkpoints" / f"step_{step:08}").mkdir(parents=True)
    judged: list[tuple[str, str | None]] = []
    monkeypatch.setattr(
        "quietvit_launch.evaluation.run_evaluation", lambda args: judged.append((args.model, args.out)) or 0
    )
    assert Evaluation("knn", "scenes", each=True).evaluate(tmp_path) == 0
    names = ("step_00000002", "step_00000010")
    assert judged == [(str(tmp_path / "checkpoints" / n), str(tmp_path / "eval" / n)) for n in names]
    monkeypatch.setattr("quietvit_launch.evaluation.run_evaluation", lambda args: judged.append(args) or 130)
    judged.clear()
    assert Evaluation("knn", "scenes", each=True).evaluate(tmp_path) == 130
    assert len(judged) == 1


# ---- running again


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of a job, and a scontrol that answers with what stands in a file and notes its arguments."""
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n[ "$1" = requeue ] || cat {tmp_path}/job\n')
    scontrol.chmod(0o755)
    (tmp_path / "job").write_text("JobId=17 JobState=RUNNING PreemptEligibleTime=x PreemptTime=None\n")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    return tmp_path


def a_start(folder: Path, step: int, *, ends_at: int | None = None) -> Train:
    """A task that began at one step and whose newest checkpoint is of another."""
    task = Train(Job("r", (), str(folder / "run")), max_requeues=3, signal_delay_s=60)
    (folder / "run" / "checkpoints" / f"step_{step:08}").mkdir(parents=True, exist_ok=True)
    task._begin()
    if ends_at is not None:
        (folder / "run" / "checkpoints" / f"step_{ends_at:08}").mkdir(exist_ok=True)
    return task


def requeued(folder: Path) -> bool:
    return "requeue 17" in (folder / "calls").read_text().splitlines()


def message(folder: Path) -> tuple[str, str]:
    status = read_json(folder / "run" / "status.json")
    return status.get("state", ""), status.get("message", "")


def test_the_end_of_the_time_requeues(slurm: Path) -> None:
    task = a_start(slurm, 5, ends_at=9)
    assert task._leave(USR2) == USR2
    assert requeued(slurm)
    assert message(slurm) == ("stopped", "saved at step 9 and requeued")


def test_the_warning_of_one_rank_is_enough(slurm: Path) -> None:
    task = a_start(slurm, 5, ends_at=9)
    assert task._requeue([TERM, USR2])
    assert requeued(slurm)


def test_a_job_that_was_cancelled_is_not_requeued(slurm: Path) -> None:
    task = a_start(slurm, 5, ends_at=9)
    assert task._leave(TERM) == TERM
    (slurm / "job").write_text("JobId=17 JobState=CANCELLED PreemptTime=2026-01-01T00:00:00\n")
    assert task._leave(TERM) == TERM
    assert not requeued(slurm)


def test_a_preempted_job_is_requeued_even_before_its_first_step(slurm: Path) -> None:
    (slurm / "job").write_text("JobId=17 JobState=RUNNING PreemptTime=2026-01-01T00:00:00\n")
    a_start(slurm, 5)._leave(TERM)
    assert requeued(slurm)


def test_no_step_in_the_time_of_a_start_ends_it(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_start(slurm, 5)._leave(USR2)
    assert not requeued(slurm)
    state, why = message(slurm)
    assert state == "failed"
    assert "no step was done in the time of one start (it began at step 5). Raise slurm.time_min" in why
    assert why in capsys.readouterr().err


def test_a_good_end_asks_nobody(slurm: Path) -> None:
    assert a_start(slurm, 5, ends_at=9)._leave(0) == 0
    assert not (slurm / "calls").exists()


def test_the_number_of_restarts_is_bounded(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    a_start(slurm, 1, ends_at=2)._leave(USR2)
    assert requeued(slurm)
    (slurm / "calls").unlink()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    a_start(slurm, 2, ends_at=3)._leave(USR2)
    assert not requeued(slurm)
    assert "it was restarted 3 times, and slurm.max_requeues allows no more" in message(slurm)[1]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "4")  # Slurm itself started it again
    with pytest.raises(ConfigError, match="given up after 3 restarts"):
        a_start(slurm, 4)
    assert message(slurm)[0] == "failed"


def test_starts_without_a_step_between_them_end(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As when a node fails again and again, which nobody is asked about.
    a_start(slurm, 5)
    a_start(slurm, 5)
    with pytest.raises(ConfigError, match="3 starts in a row began at step 5"):
        a_start(slurm, 5)
    monkeypatch.setenv("SLURM_JOB_ID", "18")  # somebody mended it and submitted again
    a_start(slurm, 5)
    a_start(slurm, 5)
    a_start(slurm, 6)
    a_start(slurm, 6)
    steps = [json.loads(line)["step"] for line in (slurm / "run" / tasks.STARTS).read_text().splitlines()]
    assert steps == [5, 5, 5, 5, 6, 6]


def test_the_reason_of_a_failure_is_kept_for_the_list(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = a_start(slurm, 5)
    for rank, told, kept in (
        ("1", "lost rank 0", "lost rank 0"),
        ("0", "disk full", "disk full"),
        ("2", "x", "disk full"),
    ):
        monkeypatch.setenv("RANK", rank)
        task._failed(told)
        assert message(slurm) == ("failed", kept)


def test_a_scontrol_that_fails_is_told(slurm: Path) -> None:
    (slurm / "bin" / "scontrol").write_text('#!/bin/sh\necho "Requested operation is disabled" >&2\nexit 1\n')
    with pytest.raises(
        ConfigError, match="saved at step 9, but scontrol could not requeue the job: Requested operation"
    ):
        a_start(slurm, 5, ends_at=9)._leave(USR2)
    assert message(slurm)[0] == "failed"


def test_a_task_drops_the_result_of_an_earlier_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"SUBMITIT_EXECUTOR": "slurm", "SUBMITIT_FOLDER": str(tmp_path), "SLURM_JOB_ID": "123456"}
    environment |= {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "n[07-08]"}
    environment |= dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"), "")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stale, other = tmp_path / "123456_3_result.pkl", tmp_path / "123456_0_result.pkl"
    stale.write_bytes(b"")
    other.write_bytes(b"")
    tasks.begin_task()
    assert (stale.exists(), other.exists()) == (False, True)
    values = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")]
    assert values == ["3", "4", "1", "n07", "13456"]


def test_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert tasks._time_left() == float("inf")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 50))
    assert 40 < tasks._time_left() <= 50
