"""A checkpoint is there whole or not at all, and a damaged one says so."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from quietvit.files import write_atomically, write_text
from quietvit.train import checkpoint
from quietvit.train.checkpoint import CheckpointError, complete, load, save


def teacher_into(folder: Path) -> None:
    (folder / "teacher.safetensors").write_bytes(b"weights")
    (folder / "teacher.json").write_text("{}")


def save_step(run: Path, step: int, keep: int = 2) -> Path:
    tensors = {"method.w": torch.full((3,), float(step)), "method.t": torch.arange(6).view(2, 3).t()}
    return save(run, step, tensors, {"config_hash": "abc"}, keep=keep, save_teacher=teacher_into)


def test_newest_comes_back_and_the_last_k_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_step(tmp_path, step)
    assert [p.name for p in complete(tmp_path)] == ["step_00000020", "step_00000030"]
    found = load(tmp_path)
    assert found is not None
    assert (found.step, found.meta["config_hash"]) == (30, "abc")
    assert torch.equal(found.tensors["method.w"], torch.full((3,), 30.0))
    assert torch.equal(found.tensors["method.t"], torch.arange(6).view(2, 3).t())
    assert (tmp_path / "teacher.safetensors").read_bytes() == b"weights"


def test_nothing_there() -> None:
    assert load(Path("no/such/run")) is None


def test_a_kill_between_files_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_step(tmp_path, 10)

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 20, {"method.w": torch.zeros(3)}, {}, keep=2, save_teacher=killed)
    found = load(tmp_path)
    assert found is not None
    assert found.step == 10
    # A real kill leaves the temporary folder behind: it is no checkpoint, and the next save clears it away.
    leftover = tmp_path / "checkpoints" / ".writing_00000020"
    leftover.mkdir()
    save_step(tmp_path, 30)
    assert not leftover.exists()
    assert [p.name for p in complete(tmp_path)] == ["step_00000010", "step_00000030"]


def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_step(tmp_path, 10)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"disk is full.*Complete checkpoints there: step_00000010"):
        save_step(tmp_path, 20)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000010"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="could not write the checkpoint of step 10"):
        save_step(tmp_path, 10)


@pytest.mark.parametrize("cut", [0, 5, 40, -1])
def test_a_damaged_checkpoint_names_the_one_before(tmp_path: Path, cut: int) -> None:
    save_step(tmp_path, 10)
    file = save_step(tmp_path, 20) / "state.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"step_00000020 is damaged .*Remove it to resume from step_00000010"):
        load(tmp_path)


def test_damaged_counters(tmp_path: Path) -> None:
    (save_step(tmp_path, 10) / "state.json").write_text('{"st')
    with pytest.raises(CheckpointError, match="Remove it to start anew"):
        load(tmp_path)


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
