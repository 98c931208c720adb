"""Losses and teacher centering against the originals (DINOv2, DINOv3), values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from quietvit.losses.centering import SoftmaxCentering, sinkhorn_knopp
from quietvit.losses.dino import view_cross_entropy
from quietvit.losses.gram import gram_loss
from quietvit.losses.ibot import ibot_loss
from quietvit.losses.koleo import koleo_loss
from reference import VECTORS, Case, case


def runs(name: str) -> list[str]:
    return list(case(f"03_losses/{name}").info["runs"])


def setup(name: str, run: str) -> tuple[Case, dict[str, Tensor], dict[str, Any]]:
    stored = case(f"03_losses/{name}")
    return stored, stored.inputs(run), stored.info["runs"][run]["settings"]


@pytest.mark.parametrize("run", runs("sinkhorn"))
def test_sinkhorn(run: str) -> None:
    stored, inputs, settings = setup("sinkhorn", run)
    q = sinkhorn_knopp(inputs["teacher"], settings["teacher_temp"], iterations=settings["n_iterations"])
    stored.check(run, "cls", q)
    stored.check(run, "patch", q)


@pytest.mark.parametrize("run", runs("dino_center"))
def test_center(run: str) -> None:
    stored, inputs, settings = setup("dino_center", run)
    centering = SoftmaxCentering(inputs["center0"].shape[1], momentum=settings["center_momentum"])
    centering.center.copy_(inputs["center0"])
    for i in range(3):
        stored.check(run, f"center_used_{i}", centering.center)
        stored.check(run, f"probs_{i}", centering(inputs[f"teacher_{i}"], settings["teacher_temp"]))
    stored.check(run, "center_after_all", centering.center)


@pytest.mark.parametrize("run", runs("dino_loss"))
def test_dino_sum_over_pairs(run: str) -> None:
    stored, inputs, settings = setup("dino_loss", run)
    student = inputs["student"].requires_grad_()
    mean = view_cross_entropy(student, inputs["teacher_probs"], temp=settings["student_temp"])
    loss = mean * settings["student_crops"] * settings["teacher_crops"]
    loss.backward()
    stored.check(run, "loss", loss)
    stored.check(run, "grad/student", student.grad)


@pytest.mark.parametrize("run", runs("dino_loss_v3"))
def test_dino_mean_over_pairs(run: str) -> None:
    stored, inputs, settings = setup("dino_loss_v3", run)
    student = inputs["student"].requires_grad_()
    loss = view_cross_entropy(
        student,
        inputs["teacher_probs"],
        temp=settings["student_temp"],
        pairs="distinct" if settings["ignore_diagonal"] else "all",
    )
    loss.backward()
    stored.check(run, "loss", loss)
    stored.check(run, "grad/student", student.grad)


@pytest.mark.parametrize("run", runs("ibot_loss"))
def test_ibot(run: str) -> None:
    stored, inputs, settings = setup("ibot_loss", run)
    masks, temp = inputs["masks"].bool(), settings["student_temp"]
    num = settings["n_masked_patches"]
    student = inputs["student"].requires_grad_()
    loss = ibot_loss(
        student[:num],
        inputs["teacher_probs"][:num],
        inputs["masks_weight"][:num],
        num_crops=len(masks),
        temp=temp,
    )
    loss.backward()
    stored.check(run, "masked_loss", loss)
    stored.check(run, "grad/student", student.grad)
    weights = (1.0 / masks.sum(1).clamp_min(1)).unsqueeze(1).expand_as(masks)[masks]
    stored.check(
        run,
        "masked_loss_default_weight",
        ibot_loss(student[:num], inputs["teacher_probs"][:num], weights, num_crops=len(masks), temp=temp),
    )
    full = ibot_loss(
        inputs["student_full"][masks],
        inputs["teacher_full"][masks],
        weights,
        num_crops=len(masks),
        temp=temp,
    )
    stored.check(run, "full_loss", full)


@pytest.mark.parametrize("run", runs("ibot_loss"))
def test_ibot_center(run: str) -> None:
    stored, inputs, settings = setup("ibot_loss", run)
    raw = inputs["teacher_raw"].squeeze(0)
    centering = SoftmaxCentering(raw.shape[1], momentum=settings["center_momentum"], average="ranks")
    centering.center.copy_(inputs["center0"].squeeze(0))
    stored.check(run, "probs_0", centering(raw, settings["teacher_temp"]).unsqueeze(0))
    stored.check(run, "center_1", centering.center.unsqueeze(0))
    stored.check(run, "probs_1", centering(raw, settings["teacher_temp"]).unsqueeze(0))


@pytest.mark.parametrize(("name", "run"), [(n, r) for n in ("koleo", "koleo_v3_topk") for r in runs(n)])
def test_koleo(name: str, run: str) -> None:
    stored, inputs, settings = setup(name, run)
    x = inputs["x"].requires_grad_()
    loss = koleo_loss(x, num_neighbours=settings.get("topk", 1))
    loss.backward()
    stored.check(run, "loss", loss)
    if "grad/x" in stored.outputs(run):
        stored.check(run, "grad/x", x.grad)
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("run", runs("gram_loss"))
def test_gram(run: str) -> None:
    stored, inputs, settings = setup("gram_loss", run)
    options = settings["constructor"]
    x = inputs["output_feats"].requires_grad_()
    loss = gram_loss(
        x,
        inputs["target_feats"],
        per_image=settings["img_level"],
        normalize=options.get("apply_norm", True),
        negatives="drop"
        if options.get("remove_neg", True)
        else "drop_anchor"
        if options.get("remove_only_teacher_neg")
        else "keep",
    )
    loss.backward()
    stored.check(run, "loss", loss)
    stored.check(run, "grad/output_feats", x.grad)


def test_every_vector_has_a_test() -> None:
    tested = {
        "sinkhorn",
        "dino_center",
        "dino_loss",
        "dino_loss_v3",
        "ibot_loss",
        "koleo",
        "koleo_v3_topk",
        "gram_loss",
    }
    elsewhere = {"two_processes"}  # tests/distributed/test_losses_two_processes.py
    assert {p.stem for p in (VECTORS / "03_losses").glob("*.json")} == tested | elsewhere
