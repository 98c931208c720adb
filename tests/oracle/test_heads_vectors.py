"""Projection heads against the originals: every stored output and gradient."""

from __future__ import annotations

import copy

import pytest

from quietvit.nn.heads import ProjectionHead
from reference import VECTORS, Case, case

NAMES = [
    "dinohead_v2_1layer",
    "dinohead_v2_3layers",
    "dinohead_v2_3layers_g1",
    "dinohead_v2_bn_eval",
    "dinohead_v3_3layers",
    "dinohead_v3_halves",
]


def head_of(stored: Case) -> ProjectionHead:
    options = dict(stored.info["constructor"])
    head = ProjectionHead(
        options.pop("in_dim"),
        options.pop("out_dim"),
        num_layers=options.pop("nlayers"),
        weight_norm="none" if "_v3_" in stored.info["case"] else "trained",
        **options,
    )
    head.load_state_dict(stored.weights(), strict=True)
    return head.eval()


RUNS = [(name, run) for name in NAMES for run in case(f"02_heads/{name}").info["runs"] if run != "halves"]


@pytest.mark.parametrize(("name", "run"), RUNS)
@pytest.mark.parametrize("copied", [False, True])
def test_head(name: str, run: str, copied: bool) -> None:
    stored = case(f"02_heads/{name}")
    head = head_of(stored)
    head = copy.deepcopy(head) if copied else head
    inputs = stored.inputs(run)
    x = inputs["x"].requires_grad_()
    out = head(x)
    stored.check(run, "out", out)
    wanted = set(stored.outputs(run)) - {"out"}
    if "probe" in inputs:
        (out * inputs["probe"]).sum().backward()
        grads = {"grad/x": x.grad} | {f"grad/{k}": p.grad for k, p in head.named_parameters()}
        assert wanted <= set(grads)
    for key in wanted:
        stored.check(run, key, grads[key])


def test_halves() -> None:
    stored = case("02_heads/dinohead_v3_halves")
    head = head_of(stored)
    x = stored.inputs("halves")["x"]
    z = head.bottleneck(x)
    stored.check("halves", "no_last_layer", z)
    stored.check("halves", "only_last_layer_of_it", head.last_layer(z))
    stored.check("halves", "full", head(x))


def test_every_vector_has_a_test() -> None:
    assert {p.stem for p in (VECTORS / "02_heads").glob("*.json")} == set(NAMES)
