"""A step that is not finite changes nothing, bit for bit, and names what was broken; a good one does the arithmetic."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quietvit.contracts import Batch
from quietvit.schedules import StepValues
from quietvit.train.accumulate import split
from quietvit.train.loop import Training, running_buffers
from quietvit.train.state import gather
from quietvit.train.step import Outcome, seed_step, train_step
from tiny_run import make_images, tiny_training

AT = StepValues(lr=0.01, last_layer_lr=0.0, weight_decay=0.1, momentum=0.9, teacher_temp=0.05)


@pytest.fixture
def training(tmp_path: Path) -> Training:
    return tiny_training(
        tmp_path / "run",
        make_images(tmp_path / "images"),
        "objective.centering=softmax",  # it has centers to lose
        "objective.separate_heads=true",
        *(f"objective.{head}.hidden_dim=32" for head in ("head", "ibot_head")),
        "objective.ibot_head.num_prototypes=12",
    )


def step(training: Training, batch: Batch, *, parts: int = 2, at: StepValues = AT) -> Outcome:
    return train_step(
        training.method,  # type: ignore[arg-type]
        training.optimizer,
        split(batch, parts),
        at,
        clip=training.clip,
        device=training.device,
        precision=training.precision,
        state=running_buffers(training.method),
        engine=training.engine,
    )


def everything(training: Training) -> dict[str, Tensor]:
    """Weights of both, centers, moments and rates, as they are now."""
    groups = enumerate(training.optimizer.param_groups)
    rates = {f"group {i} {k}": torch.tensor(g[k]) for i, g in groups for k in ("lr", "weight_decay")}
    return {k: v.clone() for k, v in (gather(training.method, training.optimizer) | rates).items()}


def differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    assert before.keys() == after.keys()
    return [k for k in before if not torch.equal(before[k], after[k])]


def spoil(training: Training, monkeypatch: pytest.MonkeyPatch, term: str, value: float, call: int) -> None:
    """Make one term of the call-th micro-batch from now on not finite, its gradient included."""
    study, calls = training.method.study, itertools.count()

    def broken(batch: Batch, targets: Any) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = study(batch, targets)  # type: ignore[operator]
        return losses | {term: losses[term] * value} if next(calls) == call else losses

    monkeypatch.setattr(training.method, "study", broken)


@pytest.mark.parametrize("term", ["dino_local", "dino_global", "ibot", "koleo"])
@pytest.mark.parametrize(("value", "call"), [(float("nan"), 0), (float("inf"), 1)])
def test_a_broken_loss_changes_nothing(
    training: Training, monkeypatch: pytest.MonkeyPatch, term: str, value: float, call: int
) -> None:
    batches = training.batches(0)
    assert step(training, next(batches)).broken == ()  # now there are moments and moved centers
    before = everything(training)
    spoil(training, monkeypatch, term, value, call)
    batch = next(batches)
    outcome = step(training, batch)
    assert outcome.broken == (f"loss {term}",)
    assert differing(before, everything(training)) == []
    assert all(p.grad is None for p in training.method.parameters())
    monkeypatch.undo()
    # And the run goes on from there: the next step is the one that would have been taken without the broken one.
    assert step(training, batch).broken == ()
    assert "method.cls_center.center" in differing(before, everything(training))


@pytest.mark.parametrize("part", ["backbone", "dino_head", "ibot_head"])
def test_a_broken_gradient_alone_is_named_and_changes_nothing(training: Training, part: str) -> None:
    batches = training.batches(0)
    step(training, next(batches))
    before = everything(training)
    parameter = next(p for p in training.method.trainable()[part].parameters() if p.requires_grad)  # type: ignore[operator]
    hook = parameter.register_hook(lambda g: g.index_fill(0, torch.tensor([0]), float("inf")))
    outcome = step(training, next(batches))
    hook.remove()
    assert outcome.broken == (f"gradient of {part}",)
    assert all(v == v and abs(v) < float("inf") for v in outcome.losses.values())
    assert differing(before, everything(training)) == []
    assert all(p.grad is None for p in training.method.parameters())


def test_a_good_step(training: Training) -> None:
    before = everything(training)
    seed_step(0, 0)
    outcome = step(training, next(training.batches(0)))
    after = everything(training)
    assert outcome.broken == ()
    assert list(outcome.losses) == ["dino_local", "dino_global", "ibot", "koleo"]
    assert list(outcome.grad_norms) == ["backbone", "dino_head", "ibot_head"]
    assert len(outcome.targets) == 2  # one per micro-batch
    prefix = "method.student."
    for name in (k.removeprefix(prefix) for k in before if k.startswith(prefix)):
        student, teacher = after[f"{prefix}{name}"], after[f"method.teacher.{name}"]
        at_rest = "last_layer" in name  # last_layer_lr is zero
        assert torch.equal(before[f"{prefix}{name}"], student) == at_rest, name
        # The teacher follows the student of after the step.
        torch.testing.assert_close(teacher, 0.9 * before[f"method.teacher.{name}"] + 0.1 * student)
    for group in training.optimizer.param_groups:
        assert group["lr"] == (0.0 if group["is_last_layer"] else 0.01 * group["lr_mult"])
        assert group["weight_decay"] == 0.1 * group["wd_mult"]


def test_the_clip_bounds_what_moves_the_weights(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, float] = {}
    update = training.optimizer.step

    def watched() -> None:
        for key, module in training.method.trainable().items():  # type: ignore[operator]
            gradients = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
            seen[key] = float(torch.cat(gradients).norm())
        update()

    monkeypatch.setattr(training.optimizer, "step", watched)
    training.clip = 0.01
    outcome = step(training, next(training.batches(0)))
    for key, norm in outcome.grad_norms.items():
        assert norm > 0.011, key  # told as it was before
        assert seen[key] == pytest.approx(0.01, rel=1e-3), key


def test_a_step_is_a_function_of_seed_and_step(training: Training) -> None:
    """Stochastic depth is the only draw of torch in a step."""
    batch, losses = next(training.batches(0)), []
    quiet = StepValues(lr=0.0, last_layer_lr=0.0, weight_decay=0.0, momentum=1.0, teacher_temp=0.05)
    for seed, number in ((0, 3), (0, 4), (1, 3), (0, 3)):
        for name, buffer in training.method.named_buffers():
            if name.endswith("center"):
                buffer.zero_()
        seed_step(seed, number)
        losses.append(step(training, batch, at=quiet).losses)
    assert losses[0] == losses[3]
    assert losses[0] != losses[1]
    assert losses[0] != losses[2]
