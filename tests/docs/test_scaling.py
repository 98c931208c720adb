"""docs/scaling.md shows what its script computes, and the formulas keep to their words."""

from __future__ import annotations

import pytest
from benchmarks.scaling import ASSUMED, DOC, activations, images_that_fit, model, seconds, states, written


def test_the_document_is_up_to_date() -> None:
    text = DOC.read_text(encoding="utf-8")
    assert written(text) == text


def test_formulas_by_hand() -> None:
    m = model("large")
    assert states(m, 1, "ddp") == states(m, 256, "ddp") == 20 * m.parameters
    shared = [states(m, gpus, "fsdp") for gpus in (8, 16)]
    assert shared[0] - shared[1] == pytest.approx(20 * m.parameters / 16)
    assert activations(m, 4, "full") < 0.3 * activations(m, 4, "none")
    assert seconds(m, 1, "ddp", 32) == pytest.approx(32 * m.flops_per_image() / (ASSUMED.flops * ASSUMED.used))
    assert seconds(m, 256, "ddp", 1) > seconds(m, 8, "ddp", 1) > seconds(m, 1, "ddp", 1)
    # ViT-L/16: 61.6 GMAC at 224 pixels (README of DINOv2's 197 tokens; here with 4 registers)
    assert m.macs_global / 1e9 == pytest.approx(61.6, rel=0.04)


def test_a_giant_needs_what_the_table_says() -> None:
    m = model("giant")
    few, many = images_that_fit(m, 1, "ddp", "none"), images_that_fit(m, 32, "fsdp", "none")
    assert 0 < few < many
    over = 2 * many
    assert states(m, 32, "fsdp") + activations(m, over, "none") > ASSUMED.memory
