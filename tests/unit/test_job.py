"""A job is strings and paths; its folder is made for it, kept for it, and given up if it never begins."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from quietvit.config.load import ConfigError, load_config
from quietvit.config.schema import RunConfig
from quietvit_launch.job import Job, check_data, prepare_run_dir, withdraw


def config(*settings: str) -> RunConfig:
    return load_config("quickstart", settings)


def test_a_job_survives_pickling_and_gives_the_same_config() -> None:
    job = Job("quickstart", ("train.steps=7", "train.seed=3"), "runs/x")
    again = pickle.loads(pickle.dumps(job))
    assert again == job
    assert again.config() == job.config() == config("train.steps=7", "train.seed=3")


def test_a_job_checks_more_than_types() -> None:
    with pytest.raises(ConfigError, match=r"crops.local_size=25 is not a multiple of the patch \(8 px\): use 24 or 32"):
        Job("quickstart", ("crops.local_size=25",), "runs/x").config()


def test_data_are_looked_at_before_anything_else() -> None:
    check_data(config("data.options.num_images=32"))
    with pytest.raises(ConfigError, match=r"holds 31 images, fewer than one batch of 32.*train.batch_size=16"):
        check_data(config("data.options.num_images=31"))
    with pytest.raises(ValueError, match="takes no path"):
        check_data(config("data.path=x"))
    check_data(config("data.options.num_images=31", "train.batch_size=auto"))  # it will be chosen to fit


def test_the_folder_holds_the_config_that_reads_back(tmp_path: Path) -> None:
    run = tmp_path / "a" / "b"
    made = prepare_run_dir(run, config("optim.lr=0.01"))
    assert load_config(str(run / "config.yaml")) == config("optim.lr=0.01")
    assert made == [run / "config.yaml", run, tmp_path / "a"]
    (run / "environment.json").write_text("{}")
    withdraw(made)
    assert list(tmp_path.iterdir()) == []


def test_withdrawing_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    withdraw(prepare_run_dir(tmp_path, config()))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    prepare_run_dir(tmp_path, config())
    withdraw(prepare_run_dir(tmp_path, config()))
    assert (tmp_path / "config.yaml").exists()
    made = prepare_run_dir(tmp_path / "new", config())
    (tmp_path / "new" / "notes.txt").write_text("mine")
    withdraw(made)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["notes.txt"]


def test_with_a_checkpoint_settings_must_stay(tmp_path: Path) -> None:
    prepare_run_dir(tmp_path, config())
    (tmp_path / "unreadable.txt").write_text("a.jpg\ttruncated\n")
    prepare_run_dir(tmp_path, config("train.steps=9"))  # no checkpoint: nothing is lost
    assert load_config(str(tmp_path / "config.yaml")) == config("train.steps=9")
    assert not (tmp_path / "unreadable.txt").exists()

    (tmp_path / "checkpoints" / "step_00000005").mkdir(parents=True)
    (tmp_path / "unreadable.txt").write_text("a.jpg\ttruncated\n")
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=r"holds a run with other settings:\n  train.steps: 9 -> 10\n.*another --out"):
        prepare_run_dir(tmp_path, config("train.steps=10"))
    assert (tmp_path / "config.yaml").read_bytes() == before
    changed = config("train.steps=9", "data.workers=3", "checkpoint.every=7")  # how it runs, not what it computes
    assert prepare_run_dir(tmp_path, changed) == []
    assert load_config(str(tmp_path / "config.yaml")) == changed
    assert (tmp_path / "unreadable.txt").exists()


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(ConfigError, match="cannot write the run folder"):
            prepare_run_dir(place, config())
    assert (tmp_path / "file").read_text() == "mine"
