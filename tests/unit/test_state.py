"""What a checkpoint holds is all that a run needs: put back into a fresh one, the next step is the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quietvit.train.accumulate import split
from quietvit.train.loop import Training, running_buffers
from quietvit.train.state import gather, restore, room_for
from quietvit.train.step import seed_step, train_step
from tiny_run import make_images, tiny_training

OPTIONS = ("objective.centering=softmax", "health.images=0")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "images")


def advance(training: Training, step: int) -> None:
    seed_step(0, step)
    train_step(
        training.method,  # type: ignore[arg-type]
        training.optimizer,
        split(next(training.batches(step)), 1),
        training.schedules.at(step),
        clip=training.clip,
        device=training.device,
        precision=training.precision,
        state=running_buffers(training.method),
        engine=training.engine,
    )


def put_back(training: Training, saved: Mapping[str, Tensor]) -> None:
    """What reading a checkpoint does, without the files."""
    room = room_for(training.method, training.optimizer, {k: tuple(v.shape) for k, v in saved.items()})
    for name, value in room.items():
        value.copy_(saved[name])
    restore(training.method, training.optimizer, room)


def test_restored_equals_gathered_and_goes_on_alike(images: Path, tmp_path: Path) -> None:
    first = tiny_training(tmp_path / "a", images, *OPTIONS)
    for step in range(3):
        advance(first, step)
    saved = {k: v.clone() for k, v in gather(first.method, first.optimizer).items()}
    moments = [k for k in saved if k.endswith((".exp_avg", ".exp_avg_sq"))]
    assert len(moments) == 2 * sum(p.requires_grad for p in first.method.parameters())
    assert all(saved[k].abs().sum() > 0 for k in moments if "last_layer" not in k)
    assert saved["method.cls_center.center"].abs().sum() > 0

    second = tiny_training(tmp_path / "b", images, *OPTIONS, "train.seed=7")  # other weights to begin with
    advance(second, 0)
    put_back(second, saved)
    again = gather(second.method, second.optimizer)
    assert again.keys() == saved.keys()
    assert [k for k in saved if not torch.equal(again[k], saved[k])] == []
    second.seed, second.batches = first.seed, first.batches
    advance(first, 3)
    advance(second, 3)
    a, b = gather(first.method, first.optimizer), gather(second.method, second.optimizer)
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    assert not torch.equal(saved[moments[0]], a[moments[0]])  # it went on


def test_a_checkpoint_of_another_architecture_says_which_keys(images: Path, tmp_path: Path) -> None:
    small = tiny_training(tmp_path / "a", images, *OPTIONS)
    tensors = gather(small.method, small.optimizer)
    deeper = tiny_training(tmp_path / "b", images, *OPTIONS, "model.depth=3", "objective.head.num_prototypes=12")
    before = {k: v.clone() for k, v in gather(deeper.method, deeper.optimizer).items()}
    with pytest.raises(ValueError, match="checkpoint is of another architecture") as error:
        put_back(deeper, tensors)
    text = str(error.value)
    assert "missing student.backbone.blocks.2.norm1.weight" in text
    assert "more. Resume with the settings the run began with" in text
    after = gather(deeper.method, deeper.optimizer)
    assert [k for k in before if not torch.equal(before[k], after[k])] == []  # not half a load
    fewer = tiny_training(tmp_path / "c", images, *OPTIONS, "model.num_registers=0")
    with pytest.raises(ValueError, match=r"unexpected student\.backbone\.register_tokens"):
        put_back(fewer, tensors)
    others = tiny_training(tmp_path / "d", images, *OPTIONS, "objective.head.num_prototypes=12")
    with pytest.raises(ValueError, match=r"cls_center\.center: \(1, 24\) in the checkpoint, \(1, 12\) in the model"):
        put_back(others, tensors)
