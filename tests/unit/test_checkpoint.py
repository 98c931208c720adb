"""A checkpoint is there whole or not at all, and a damaged one says so."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import hf_storage

from quietvit import dist
from quietvit.files import write_atomically, write_text
from quietvit.train import checkpoint
from quietvit.train.checkpoint import CheckpointError, Writer, complete, find, read, read_whole


def teacher_into(folder: Path) -> None:
    (folder / "teacher.safetensors").write_bytes(b"weights")
    (folder / "teacher.json").write_text("{}")


def save_step(run: Path, step: int, keep: int = 2) -> Path:
    tensors = {"method.w": torch.full((3,), float(step)), "method.t": torch.arange(6).view(2, 3).t()}
    return Writer(run, keep=keep).save(step, tensors, {"config_hash": "abc"}, save_teacher=teacher_into)


def test_newest_comes_back_and_the_last_k_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_step(tmp_path, step)
    assert [p.name for p in complete(tmp_path)] == ["step_00000020", "step_00000030"]
    found = find(tmp_path)
    assert found is not None
    assert (found.step, found.meta["config_hash"], found.meta["processes"]) == (30, "abc", 1)
    assert found.shapes == {"method.w": (3,), "method.t": (3, 2)}
    assert found.dtypes == {"method.w": torch.float32, "method.t": torch.int64}
    for tensors in (read_whole(found), {k: torch.zeros(s, dtype=found.dtypes[k]) for k, s in found.shapes.items()}):
        read(found, tensors)
        assert torch.equal(tensors["method.w"], torch.full((3,), 30.0))
        assert torch.equal(tensors["method.t"], torch.arange(6).view(2, 3).t())
    assert (tmp_path / "teacher.safetensors").read_bytes() == b"weights"


def test_nothing_there() -> None:
    assert find(Path("no/such/run")) is None


def test_a_kill_between_files_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    save_step(tmp_path, 10)

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Writer(tmp_path, keep=2).save(20, {"method.w": torch.zeros(3)}, {}, save_teacher=killed)
    found = find(tmp_path)
    assert found is not None
    assert found.step == 10
    # A real kill leaves the temporary folder behind: it is no checkpoint, and the next save clears it away.
    leftover = tmp_path / "checkpoints" / ".writing_00000020"
    leftover.mkdir()
    save_step(tmp_path, 30)
    assert not leftover.exists()
    assert [p.name for p in complete(tmp_path)] == ["step_00000010", "step_00000030"]


@pytest.mark.parametrize(
    ("module", "name"),
    [(hf_storage.HuggingFaceStorageWriter, "write_data"), (checkpoint, "write_atomically"), (checkpoint.os, "fsync")],
    ids=["state", "teacher", "flush"],
)
def test_a_full_disk_is_said_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: object, name: str
) -> None:
    save_step(tmp_path, 10)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, name, full)
    with pytest.raises(CheckpointError, match=r"disk is full.*Complete checkpoints there: step_00000010"):
        save_step(tmp_path, 20)
    monkeypatch.undo()
    assert (tmp_path / "teacher.safetensors").read_bytes() == b"weights"
    found = find(tmp_path)
    assert found is not None
    assert read_whole(found)["method.w"].tolist() == [float(found.step)] * 3
    assert [p.name for p in save_step(tmp_path, 30).parent.iterdir() if p.name.startswith(".")] == []


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process: what is written in the background needs one."""
    assert dist.make_group_of_one(torch.device("cpu"))
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_in_the_background_what_was_there_at_the_call_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_step(tmp_path, 10)
    go_on, write = threading.Event(), hf_storage.HuggingFaceStorageWriter.write_data

    def slowly(*args: Any) -> Any:
        assert go_on.wait(60)
        return write(*args)

    monkeypatch.setattr(hf_storage.HuggingFaceStorageWriter, "write_data", slowly)
    weights = torch.arange(4.0)
    writer = Writer(tmp_path, keep=2, background=True)
    writer.save(20, {"method.w": weights}, {}, save_teacher=teacher_into)
    weights.zero_()  # training goes on
    writer.settle()
    assert [p.name for p in complete(tmp_path)] == ["step_00000010"]
    go_on.set()
    writer.close()
    found = find(tmp_path)
    assert found is not None
    assert found.step == 20
    assert read_whole(found)["method.w"].tolist() == [0, 1, 2, 3]


@pytest.mark.usefixtures("alone")
def test_a_full_disk_in_the_background_is_said_later_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_step(tmp_path, 10)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hf_storage.HuggingFaceStorageWriter, "write_data", full)
    writer = Writer(tmp_path, keep=2, background=True)
    writer.save(20, {"method.w": torch.zeros(3)}, {}, save_teacher=teacher_into)
    with pytest.raises(CheckpointError, match=r"step 20 .*disk is full.*Complete checkpoints there: step_00000010"):
        writer.close()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000010"]
    writer.close()  # it was told once


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="could not write the checkpoint of step 10"):
        save_step(tmp_path, 10)


@pytest.mark.parametrize("cut", [0, 5, 40, -1])
def test_a_damaged_checkpoint_names_the_one_before(tmp_path: Path, cut: int) -> None:
    save_step(tmp_path, 10)
    [file] = (save_step(tmp_path, 20) / "state").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"step_00000020 is damaged .*Remove it to resume from step_00000010"):
        find(tmp_path)


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    save_step(tmp_path, 10)
    [file] = (save_step(tmp_path, 20) / "state").glob("*.safetensors")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"step_00000020 is damaged .*Remove it to resume from step_00000010"):
        find(tmp_path)


def test_bytes_lost_between_finding_and_reading_say_so_in_a_line(tmp_path: Path) -> None:
    path = save_step(tmp_path, 10)
    found = find(tmp_path)
    assert found is not None
    [file] = (path / "state").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"step_00000010 is damaged .*Remove it to start anew") as error:
        read_whole(found)
    assert len(str(error.value).splitlines()) == 1


def test_a_checkpoint_of_an_earlier_version(tmp_path: Path) -> None:
    old = tmp_path / "checkpoints" / "step_00000010"
    old.mkdir(parents=True)
    (old / "state.safetensors").write_bytes(b"all of it")
    (old / "state.json").write_text('{"step": 10}')
    with pytest.raises(CheckpointError, match=r"step_00000010 was written by an earlier version .*another --out"):
        find(tmp_path)


def test_damaged_counters(tmp_path: Path) -> None:
    (save_step(tmp_path, 10) / "state.json").write_text('{"st')
    with pytest.raises(CheckpointError, match="Remove it to start anew"):
        find(tmp_path)


def test_atomic_text_keeps_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, json.dumps({"a": 1}))

    def fails(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(path, fails)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
