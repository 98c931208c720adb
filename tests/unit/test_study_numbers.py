"""Numbers of a study against scipy and by hand; its sentences on planted tables; what may be put side by side."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from quietvit.backbones import make_backbone
from quietvit.backbones.cost import count_macs
from quietvit.config.load import load_config, to_yaml
from quietvit.config.schema import RunConfig
from quietvit.weights import save_teacher
from quietvit_eval.cards import Card
from quietvit_eval.study import plan
from quietvit_eval.study.cost import LiveTensors, counted, formula_ratio, measured, noted_speed
from quietvit_eval.study.figures import pooled
from quietvit_eval.study.intervals import paired, t_factor, t_interval
from quietvit_eval.study.reading import about_cost, about_norms, about_registers, about_seeds, claim, reading
from quietvit_eval.study.results import Entry, Measure, Norms, measures_of, norms_of
from tiny_run import RECIPE, make_images

VALUES = [0.31, 0.352, 0.33, 0.364]


# ---- intervals


def test_interval_is_scipys() -> None:
    found = t_interval(VALUES)
    low, high = stats.t.interval(0.95, len(VALUES) - 1, np.mean(VALUES), stats.sem(VALUES))
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(VALUES), low, high), rel=1e-12)
    assert found.half_width == pytest.approx((high - low) / 2, rel=1e-9)
    test = stats.ttest_1samp(VALUES, 0.0)
    assert found.excludes(0) == (test.pvalue < 0.05)
    edge = test.confidence_interval(0.95).high
    assert found.excludes(edge + 1e-9)
    assert not found.excludes(edge - 1e-9)


def test_of_many_intervals_each_is_wider() -> None:
    wide = t_interval(VALUES, comparisons=5)
    low, high = stats.t.interval(0.99, len(VALUES) - 1, np.mean(VALUES), stats.sem(VALUES))
    assert (wide.low, wide.high) == pytest.approx((low, high), rel=1e-9)


def test_two_seeds_by_hand_and_one_has_none() -> None:
    # Of two values the standard error is half their distance, and t of one degree of freedom is tan(pi (0.975 - 0.5)).
    found = t_interval([0.2, 0.3])
    assert found.half_width == pytest.approx(0.05 * math.tan(0.475 * math.pi), rel=1e-9)
    assert t_factor(2) == pytest.approx(12.7062, abs=1e-4)
    alone = t_interval([0.4])
    assert (alone.mean, alone.low, alone.high, alone.half_width) == (0.4, None, None, None)
    assert not alone.excludes(0)
    with pytest.raises(ValueError, match="no values"):
        t_interval([])


def test_pairs_are_those_of_the_same_seed() -> None:
    assert paired({0: 1.0, 1: 2.0, 3: 9.0}, {1: 2.5, 0: 0.5, 2: 7.0}) == {0: -0.5, 1: 0.5}


# ---- tables and sentences


def card(score: float, *, subject: str = "model", task: str = "knn", steps: int = 1, higher: bool = True) -> Card:
    main = "top1@20" if higher else "rmse"
    part = {"name": "toy", "fingerprint": "f", "images": 100, "unreadable": 0}
    return Card(
        task, subject, {main: score}, main, higher, 0.02, {"hash": f"{score}"}, {"train": part, "test": part}, "class",
        4, {"steps": steps}, {}, 0, {}, 1.0, "now",
    )  # fmt: skip


def entries(table: dict[int, list[float]], *, control: float | None = None, **changes: Any) -> list[Entry]:
    """One entry for each score of each count, seeds from 0 on."""
    found = []
    for count, scores in table.items():
        for seed, score in enumerate(scores):
            cards = [card(score, **changes)]
            if control is not None:
                cards.append(card(control, subject="random-init", **changes))
            found.append(Entry(str(count), count, seed, "run", None, tuple(cards)))
    return found


def measure(table: dict[int, list[float]], **changes: Any) -> Measure:
    (found,) = measures_of(entries(table, **changes))
    return found


CLEAR = {0: [0.30, 0.32, 0.31, 0.33], 4: [0.50, 0.52, 0.512, 0.53], 8: [0.31, 0.30, 0.32, 0.335]}
TIE = {0: [0.30, 0.36], 1: [0.33, 0.32], 4: [0.31, 0.35]}


def test_differences_by_hand() -> None:
    cell = measure(CLEAR).cell("4")
    assert cell is not None
    assert cell.differences == pytest.approx({0: 0.2, 1: 0.2, 2: 0.202, 3: 0.2})
    want = stats.ttest_rel(CLEAR[4], CLEAR[0]).confidence_interval(0.95)
    assert cell.difference is not None
    assert (cell.difference.low, cell.difference.high) == pytest.approx((want.low, want.high), rel=1e-6)
    assert cell.strict is not None
    assert cell.strict.low == pytest.approx(
        stats.ttest_rel(CLEAR[4], CLEAR[0]).confidence_interval(0.975).low, rel=1e-6
    )


def test_unlike_protocols_are_two_measures() -> None:
    mixed = [*entries({0: [0.3], 4: [0.4]}), *entries({0: [0.5], 4: [0.6]}, steps=2)]
    found = measures_of(mixed)
    assert [sorted(v for c in m.cells for v in c.interval.values) for m in found] == [[0.3, 0.4], [0.5, 0.6]]


def test_a_clear_winner_is_named_and_nothing_else() -> None:
    said = claim(measure(CLEAR))
    assert "4 registers help clearly, by +20.1 points (95 % interval +19.9 to +20.2)" in said
    assert "8 registers do not differ from none beyond the spread of the seeds" in said
    assert said.endswith("The best mean, 51.6 %, is that of 4 registers.")


def test_an_error_that_rises_is_harm() -> None:
    table = {0: [0.50, 0.52, 0.51, 0.53], 4: [0.70, 0.72, 0.714, 0.73]}
    said = claim(measure(table, task="depth", higher=False))
    assert "4 registers harm clearly, by +0.201 m" in said
    assert "The best mean, 0.515 m, is that of 0 registers" in said


def test_one_register_helps_in_the_singular() -> None:
    assert "1 register helps clearly" in claim(measure({0: CLEAR[0], 1: CLEAR[4]}))


def test_a_tie_claims_nothing() -> None:
    found = measure(TIE)
    said = claim(found)
    assert "no number of registers differs from none beyond the spread of the seeds" in said
    assert "clearly" not in said
    widths = [100 * (c.difference.half_width or 0) for c in found.cells if c.difference is not None]
    below = f"{min(widths):.1f} to {max(widths):.1f} points"
    assert f"differences below {below}, by number, could not have been seen" in said
    assert said.endswith("which is no proof that it is the best count.")


def test_what_holds_alone_but_not_among_many_may_be_chance() -> None:
    table = {0: [0.30, 0.31, 0.32], 4: [0.33, 0.35, 0.34]}
    many = measures_of([e for steps in range(6) for e in entries(table, steps=steps)])
    assert measure(table).cell("4").strict.excludes(0)  # type: ignore[union-attr]
    said = claim(many[0])
    assert "which may be chance among so many comparisons" in said
    assert "clearly" not in said


def test_one_seed_and_no_base_say_so() -> None:
    assert "fewer than two seeds" in claim(measure({0: [0.3], 4: [0.4]}))
    assert claim(measure({1: [0.3], 4: [0.4]})) == "there is no run without registers to compare with."
    assert "no run with registers" in claim(measure({0: [0.3]}))
    lone = measure({0: [0.3, 0.31], 4: [0.35, 0.36], 8: []})
    assert lone.cell("8") is None
    assert "one seed" in "".join(about_seeds([lone], 1))
    assert "12.7 standard errors" in "".join(about_seeds([lone], 2))
    assert "".join(about_seeds([lone], 8)) == ""
    assert "".join(about_seeds([], 2)) == "Nothing was scored."


def test_training_that_did_not_help_is_said() -> None:
    found = measures_of(entries(TIE, control=0.34))
    said = reading([], found, None, [], 2)
    assert any("2 of 6 trained models are better than the same network before training: differences" in s for s in said)
    mostly = reading([], measures_of(entries(TIE, control=0.305)), None, [], 2)
    assert any("5 of 6 trained models are better than the same network before training." in s for s in mostly)
    assert not any("before training" in s for s in reading([], measures_of(entries(TIE, control=0.1)), None, [], 2))


def test_retrofits_are_paired_by_seed() -> None:
    named = [Entry("moved", None, seed, "m", None, (card(s),)) for seed, s in ((0, 0.31), (1, 0.33))]
    table = [*entries({0: [0.3, 0.32]}), *named]
    (found,) = measures_of(table)
    assert found.cell("moved").differences == pytest.approx({0: 0.01, 1: 0.01})  # type: ignore[union-attr]
    said = reading([], [found], None, [], 2)
    assert any(s.startswith("Retrofit moved: knn (top1@20) changes") for s in said)
    stranger = measures_of([*entries({0: [0.3, 0.32]}), Entry("x", None, None, "m", None, (card(0.4),))])[0]
    assert stranger.cell("x").interval.mean == 0.4  # type: ignore[union-attr]
    assert any("has no counterpart of its seed" in s for s in reading([], [stranger], None, [], 2))


def norms(registers: int | None, **kinds: int) -> Norms:
    models = sum(kinds.values())
    share = tuple(0.03 if i < kinds.get("outliers", 0) else 0.0 for i in range(models))
    return Norms(str(registers), registers, models, kinds, share, 10.0, 1.5, 9.0, None)


@pytest.mark.parametrize(
    ("rows", "said", "never"),
    [
        ([norms(0, none=2), norms(4, none=2)], "There was nothing for registers to remove", "With registers"),
        ([norms(0, outliers=2), norms(4, none=2), norms(8, none=2)], "4 and 8 of them, no model has any", "remain"),
        ([norms(0, outliers=2), norms(1, outliers=1, none=1), norms(4, none=2)], "remain in 1 of 2", "nothing for"),
        ([norms(0, outliers=1, none=1), norms(4, outliers=2)], "did not remove them", "no model has any"),
        ([norms(0, none=2), norms(4, outliers=1, none=1)], "did not keep them away", "nothing for"),
        ([norms(4, none=2)], "A model without registers is not among them", "nothing for"),
        ([norms(0, suspicious=1, none=1)], "In 1 of 2 models a second mode stands too near", "have artifacts"),
        ([], "nothing is known of artifacts", "No artifacts"),
    ],
)  # fmt: skip
def test_what_is_said_of_artifacts(rows: list[Norms], said: str, never: str) -> None:
    text = " ".join(about_norms(rows))
    assert said in text
    assert never not in text


def test_share_of_artifacts_is_that_of_models_that_have_them() -> None:
    assert "3.00 % of the patch tokens" in " ".join(about_norms([norms(0, outliers=1, none=1)]))


def test_registers_that_have_not_parted_are_said() -> None:
    alike = [replace(norms(4, none=2), alike=0.999), replace(norms(8, none=2), alike=0.97)]
    assert "correlation of their attention maps 0.970 to 0.999" in "".join(about_registers(alike))
    parted = "".join(about_registers([*alike, replace(norms(16, none=2), alike=0.3)]))
    assert "copies" not in parted
    assert "0.300 to 0.999" in parted
    assert "maps 1.000)" in "".join(
        about_registers([replace(norms(4, none=2), alike=0.9999), replace(norms(8, none=2), alike=1)])
    )
    assert list(about_registers([norms(0, none=2), norms(1, none=2)])) == []


def look(kind: str, share: float, norm: float) -> dict[str, Any]:
    spread = {"median": norm}
    layer = {"patches": {"median": norm, "max_over_median": 2.0}, "cls": spread, "registers": [spread, {"median": 3.0}]}
    return {"decision": {"kind": kind, "share": share}, "layers": [layer], "attention": {"registers_alike": share}}


def test_norms_are_means_over_models() -> None:
    table = [Entry("4", 4, s, "r", look("none", 0.5 + s / 4, 1.0 + s), ()) for s in (0, 1)] + [
        Entry("8", 8, 0, "r", None, ())
    ]
    (row,) = norms_of(table)
    assert (row.models, row.kinds, row.median, row.register) == (2, {"none": 2}, 1.5, 2.25)
    assert (row.shares, row.alike) == ((0.5, 0.75), 0.625)


def test_histograms_are_added_bin_by_bin() -> None:
    def of(start: int, patches: list[int], registers: list[list[int]]) -> dict[str, Any]:
        edges = [2 ** ((start + i) / 16) for i in range(len(patches) + 1)]
        return {"norms": {"edges": edges, "patches": patches, "cls": [0] * len(patches), "registers": registers}}

    found = pooled([of(5, [1, 2, 3], []), of(7, [4, 0], [[1, 0], [0, 3]])])
    assert found.first == 5
    np.testing.assert_allclose(found.patches, np.array([1, 2, 7, 0]) / 10)
    np.testing.assert_allclose(found.registers, np.array([0, 0, 1, 3]) / 4)
    assert found.cls.sum() == 0


# ---- cost


def test_formula_is_that_of_the_reference() -> None:
    # ViT-S, L and g at 224 pixels and patches of 14: shares printed beside the paper's "under 2 %" and "up to 6 %".
    for dim, registers, percent in (
        (384, 4, 1.72),
        (384, 16, 6.89),
        (1024, 1, 0.40),
        (1024, 8, 3.24),
        (1536, 16, 6.41),
    ):
        assert 100 * (formula_ratio(257, registers, dim) - 1) == pytest.approx(percent, abs=0.006)


def test_counted_cost_is_the_traced_one_and_near_the_formula() -> None:
    config, spec = load_config(str(RECIPE)), {"name": "vit", "arguments": _tiny().arguments}
    cost = counted(spec, config, (0, 2), 32)
    none, two = cost["counts"]
    own = {**spec["arguments"], "num_registers": 2}
    assert two["macs"] == count_macs("vit", **{**own, "image_size": 32})
    assert two["parameters"] - none["parameters"] == 2 * 32
    local = count_macs("vit", **{**own, "image_size": 16})
    assert two["train_macs"] == 4 * two["macs"] + 2 * local  # 2 global crops twice, 2 local ones once
    assert (cost["tokens"], cost["crop_tokens"]) == (17, {"global": 17, "local": 5})
    assert two["formula_over_0"] == pytest.approx(formula_ratio(17, 2, 32))
    assert 1 < two["macs_over_0"] < two["formula_over_0"]  # patches are embedded without registers
    text = " ".join(about_cost(cost))
    assert f"{100 * (two['macs_over_0'] - 1):.1f} % multiply-adds" in text
    assert "The paper's 2 % is for 257 tokens" in text


def test_live_tensors_by_hand() -> None:
    known = torch.zeros(64)
    with LiveTensors([known]) as live:
        a = torch.zeros(256)  # 1,024 bytes
        b = a * 2  # 2,048 alive
        view = b[:10]
        del a, b  # the view holds b
        known.add_(1)
        c = torch.zeros(128, dtype=torch.float64)
        assert live.now == 2048
        del view, c
    assert (live.now, live.peak) == (0, 2048)


def test_steps_are_timed_and_weighed(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images")
    config = load_config(str(RECIPE), [f"data.path={images}"])
    found = measured(config, (0, 2), rounds=2)
    none, two = found["counts"]
    assert none["ratio"]["median"] == 1.0
    assert found["batch_size"] == 8
    assert two["images_per_s"] == pytest.approx(8 / two["step_s"])
    assert two["peak_mib"] > none["peak_mib"] > 0
    assert "times that with 0" in " ".join(about_cost({**counted_tiny(config), "measured": found}))


def counted_tiny(config: RunConfig) -> dict[str, Any]:
    return counted({"name": "vit", "arguments": _tiny().arguments}, config, (0, 2), 32)


def test_noted_speed_is_the_median_after_the_first_tenth(tmp_path: Path) -> None:
    lines = [f'{{"step": {i}, "images_per_s": {1.0 if i < 2 else 50 + i}}}' for i in range(20)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert noted_speed(tmp_path) == 50 + 10.5
    assert noted_speed(tmp_path / "nowhere") is None


# ---- which runs


def _tiny(registers: int = 2) -> Any:
    return make_backbone(
        "vit", embed_dim=32, depth=2, num_heads=2, patch_size=8, image_size=32, num_registers=registers, init="xavier"
    )


def write_run(folder: Path, registers: int, seed: int, *words: str, data: str = "d", step: int = 20) -> Path:
    """A folder as a finished run leaves it, but for its log."""
    folder.mkdir(parents=True)
    config = load_config(str(RECIPE), [f"model.num_registers={registers}", f"train.seed={seed}", *words])
    (folder / "config.yaml").write_text(to_yaml(config))
    known = {"seed": seed, "step": step, "data": "toy", "data_fingerprint": data}
    save_teacher(folder, _tiny(registers), mean=(0.5,) * 3, std=(0.5,) * 3, image_size=32, provenance=known)
    return folder


def test_runs_that_differ_are_refused_with_the_keys(tmp_path: Path) -> None:
    runs = [plan.read_run(write_run(tmp_path / "a", 0, 0)), plan.read_run(write_run(tmp_path / "b", 4, 1))]
    plan.check_alike(runs, runs[0].config, "a")
    # What changes nothing that is learnt may differ.
    moved = write_run(
        tmp_path / "c", 1, 0, "data.path=/elsewhere", "train.threads=3", "checkpoint.every=5", "health.every=7"
    )
    plan.check_alike([*runs, plan.read_run(moved)], runs[0].config, "a")
    other = plan.read_run(write_run(tmp_path / "d", 2, 0, "optim.lr=0.002", "train.steps=10", step=10))
    with pytest.raises(ValueError, match="differ in more than registers and seed") as error:
        plan.check_alike([*runs, other], runs[0].config, "the first")
    assert f"{other.folder}: optim.lr=0.002, but 0.001 in the first" in str(error.value)
    assert "train.steps=10, but 20" in str(error.value)
    assert f"steps done: 20 in {runs[0].folder}, 10 in {other.folder}" in str(error.value)
    strange = plan.read_run(write_run(tmp_path / "e", 2, 0, data="other pictures"))
    with pytest.raises(ValueError, match=r"images \(fingerprint\): d in .*, other pictures in"):
        plan.check_alike([*runs, strange], runs[0].config, "the first")


def test_two_runs_of_one_place_are_refused(tmp_path: Path) -> None:
    runs = [plan.read_run(write_run(tmp_path / name, 4, 1)) for name in "ab"]
    assert plan.by_place([runs[0], runs[0]]) == {(4, 1): runs[0]}
    with pytest.raises(ValueError, match="two runs have 4 registers and seed 1"):
        plan.by_place(runs)


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it has no config\.yaml"):
        plan.read_run(tmp_path)
    run = write_run(tmp_path / "a", 4, 0)
    (run / "config.yaml").write_text(to_yaml(load_config(str(RECIPE), ["model.num_registers=1"])))
    with pytest.raises(ValueError, match=r"model.num_registers: 1 in config.yaml, 4 in teacher.safetensors"):
        plan.read_run(run)
    (run / "teacher.safetensors").unlink()
    with pytest.raises(ValueError, match="no model in"):
        plan.read_run(run)


def test_a_models_hash_is_that_of_its_files(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", 4, 0)
    before = plan.model_hash(run)
    (run / "status.json").write_text("{}")
    assert plan.model_hash(run) == before
    (run / "retrofit.json").write_text("{}")
    assert plan.model_hash(run) != before
    assert plan.model_hash(run / "teacher.safetensors") == plan.read_run(run).weights()


def test_disagreements_leave_out_what_varies() -> None:
    one = load_config(str(RECIPE))
    other = replace(one, model=replace(one.model, num_registers=16), train=replace(one.train, seed=9))
    assert plan.disagreements(one, other) == {}
    assert plan.disagreements(one, replace(one, optim=replace(one.optim, lr=1.0))) == {"optim.lr": (0.001, 1.0)}
