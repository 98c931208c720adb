"""Every probe on tokens of which it is known by construction what they tell; neighbours against a loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from quietvit_eval.inspect.one_token import OPTIONS, TokenTable, classify, draw_tokens, score_table
from quietvit_eval.inspect.places import Similarities, border_share, neighbour_similarity, share_map
from quietvit_eval.inspect.probes import (
    Answers,
    Linear,
    PixelFit,
    distance_of_a_guess,
    fit_positions,
    patch_pixels,
    places_of,
)

GRID = (4, 5)
N = GRID[0] * GRID[1]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ask(tokens: Tensor, probe: Linear, high: np.ndarray | None = None) -> dict[str, dict[str, dict[str, float]]]:
    answers = Answers(GRID)
    high = np.arange(N)[None].repeat(len(tokens), 0) % 7 == 0 if high is None else high
    for start in range(0, len(tokens), 3):
        part = slice(start, start + 3)
        answers.add(answers.ask_places(probe, tokens[part]), high[part])
    return answers.about(seed=0)


def fit(tokens: Tensor) -> Linear:
    places = torch.arange(N).repeat(len(tokens))
    return fit_positions(tokens.flatten(0, 1), places, N, seed=0)


# ---- place


def test_tokens_that_hold_their_place_are_told_exactly() -> None:
    def make(count: int, seed: int) -> Tensor:
        return 5 * torch.eye(N).repeat(count, 1, 1) + 0.3 * noise(count, N, N, seed=seed) + 100

    found = ask(make(10, 1), fit(make(60, 0)))
    for group in ("high", "rest"):
        assert found["top1"][group] == {"value": 1.0, "low": 1.0, "high": 1.0}
        assert found["distance"][group]["value"] == 0.0


def test_noise_is_chance_in_hits_and_in_distance() -> None:
    found = ask(noise(400, N, 8, seed=1), fit(noise(60, N, 8)))
    places = places_of(GRID).double().tolist()
    guess = np.mean([math.dist(a, b) for a in places for b in places])
    assert distance_of_a_guess(GRID) == pytest.approx(guess, abs=1e-12)
    for group in ("high", "rest"):
        top1, distance = found["top1"][group], found["distance"][group]
        assert top1["low"] < 1 / N < top1["high"]
        assert distance["value"] == pytest.approx(guess, rel=0.1)  # of any guess independent of the truth: near it


def test_place_known_by_normal_tokens_only_is_lost_in_the_high_ones() -> None:
    high = np.random.default_rng(0).random((200, N)) < 0.2

    def make(count: int, seed: int) -> Tensor:
        tokens = 5 * torch.eye(N).repeat(count, 1, 1) + 0.3 * noise(count, N, N, seed=seed)
        mask = torch.from_numpy(high[:count])
        tokens[mask] = noise(int(mask.sum()), N, seed=seed + 1)
        return tokens

    found = ask(make(200, 5), fit(make(100, 0)), high)
    assert found["top1"]["rest"]["value"] > 0.99
    assert found["top1"]["high"]["value"] < 3 / N
    assert found["top1"]["difference"]["high"] < -0.85


def test_the_probe_is_as_good_as_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression

    centres = noise(N, 12, seed=3)
    train, test = (centres + 1.2 * noise(count, N, 12, seed=seed) for count, seed in ((80, 4), (100, 5)))
    own = ask(test, fit(train), np.zeros((100, N), bool))["top1"]["rest"]["value"]
    there = LogisticRegression(C=1e3, max_iter=300).fit(train.flatten(0, 1), torch.arange(N).repeat(80))
    assert own == pytest.approx(there.score(test.flatten(0, 1), torch.arange(N).repeat(100)), abs=0.02)


# ---- pixels


def test_pixels_that_tokens_are_a_linear_map_of_come_back_exactly() -> None:
    pixels = noise(40, N, 12)
    tokens = pixels @ noise(12, 16, seed=1) + 7  # more channels than pixels: a hyperplane, as after a final norm
    pixel_fit = PixelFit()
    for part in (slice(0, 13), slice(13, 30)):
        pixel_fit.add(tokens[part].flatten(0, 1), pixels[part].flatten(0, 1))
    assert pixel_fit.tokens == 30 * N
    found = Answers.ask_pixels(pixel_fit.solve(), pixel_fit.mean_pixels, tokens[30:], pixels[30:])
    assert float(found["pixel_error"].max()) < 1e-3
    assert float(found["pixel_error_of_mean"].mean()) == pytest.approx(math.sqrt(12), rel=0.05)


def test_the_regression_is_that_of_scikit_learn_and_noise_is_the_mean() -> None:
    from sklearn.linear_model import LinearRegression

    pixels, tokens = noise(4000, 6) + 2, noise(4000, 5, seed=1)
    pixel_fit = PixelFit()
    pixel_fit.add(tokens, pixels)
    probe, there = pixel_fit.solve(), LinearRegression().fit(tokens.double(), pixels.double())
    np.testing.assert_allclose(probe.weight, there.coef_, atol=1e-5)
    np.testing.assert_allclose(probe.bias, there.intercept_, atol=1e-5)
    found = Answers.ask_pixels(probe, pixel_fit.mean_pixels, noise(1, 500, 5, seed=2), noise(1, 500, 6, seed=3) + 2)
    error, of_mean = (float(found[name].mean()) for name in ("pixel_error", "pixel_error_of_mean"))
    assert error == pytest.approx(of_mean, rel=0.01)
    assert error != of_mean


def test_pixels_of_a_patch_are_those_of_its_place() -> None:
    images = torch.arange(2 * 3 * 8 * 12, dtype=torch.float32).view(2, 3, 8, 12)
    found = patch_pixels(images, 4)
    assert found.shape == (2, 6, 48)
    for place, (row, column) in enumerate(places_of((2, 3)).int().tolist()):
        expected = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten(1)
        assert torch.equal(found[:, place], expected)


# ---- groups and intervals


def test_means_are_over_tokens_and_intervals_over_images() -> None:
    rng = np.random.default_rng(0)
    values, high = rng.random((30, 9)), rng.random((30, 9)) < 0.3
    answers = Answers((3, 3))
    answers.add({"top1": torch.from_numpy(values[:10])}, high[:10])
    answers.add({"top1": torch.from_numpy(values[10:])}, high[10:])
    found = answers.about(seed=3)
    assert found["tokens"] == {"high": int(high.sum()), "rest": int((~high).sum())}
    assert found["top1"]["high"]["value"] == pytest.approx(values[high].mean())
    assert found["top1"]["rest"]["value"] == pytest.approx(values[~high].mean())
    drawn = []
    for _ in range(2000):
        rows = rng.integers(0, 30, 30)
        drawn.append(values[rows][high[rows]].mean() - values[rows][~high[rows]].mean())
    expected = np.percentile(drawn, [2.5, 97.5])
    np.testing.assert_allclose([found["top1"]["difference"][k] for k in ("low", "high")], expected, atol=0.012)


def test_a_group_without_tokens_has_no_figure() -> None:
    answers = Answers((1, 2))
    answers.add({"top1": torch.ones(3, 2)}, np.zeros((3, 2), bool))
    found = answers.about(seed=0)["top1"]
    assert found["high"] is None
    assert found["difference"] is None
    assert found["rest"]["value"] == 1.0


# ---- one token


def planted_table(count: int = 240, width: int = 6, without: int = 0) -> tuple[TokenTable, np.ndarray, np.ndarray]:
    """The label is in the high token and in [CLS], nowhere else."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, count)
    told = 4 * np.eye(width)[labels]
    table, rows = TokenTable(), np.arange(count)
    parts = {
        "[CLS]": told[None] + 0.3 * rng.normal(size=(1, count, width)),
        "high": told[None] + 0.3 * rng.normal(size=(3, count, width)),
        "rest": rng.normal(size=(3, count, width)),
    }
    parts["high"][:, :without] = np.nan
    for kind, tokens in parts.items():
        for some in (rows[:50], rows[50:]):
            table.put(kind, some, tokens[:, some].astype(np.float32), count)
    return table, labels, rng.random(count) < 0.7


def test_a_label_planted_in_the_outlier_alone_is_found_there_alone() -> None:
    table, labels, train = planted_table()
    found = score_table(table, labels, train, needs="high", seed=0)
    assert found["dropped"] == 0
    assert "all_images" not in found
    scores = {s["token"]: s for s in found["same_images"]["scores"]}
    assert scores["[CLS]"]["top1"] == scores["high"]["top1"] == 1.0
    assert abs(scores["rest"]["top1"] - 1 / 3) < 0.12
    assert scores["rest"]["std"] > 0
    assert scores["[CLS]"]["std"] is None
    assert scores["high"]["draws"] == 3
    assert found["same_images"]["chance"] == pytest.approx(1 / 3, abs=0.12)


def test_images_without_an_outlier_are_dropped_and_counted() -> None:
    table, labels, train = planted_table(without=60)
    labels[-10:] = -1
    found = score_table(table, labels, train, needs="high", seed=0)
    assert (found["labelled"], found["dropped"]) == (230, 60)
    assert found["same_images"]["train"] + found["same_images"]["test"] == 170
    assert found["all_images"]["train"] + found["all_images"]["test"] == 230
    assert [s["token"] for s in found["all_images"]["scores"]] == ["[CLS]", "rest"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda labels: labels[:15], "only"),
        (lambda labels: 0 * labels, "of 1 classes"),
    ],
)
def test_too_few_images_or_classes_are_said(change: object, said: str) -> None:
    table, labels, train = planted_table()
    labels = change(labels)  # type: ignore[operator]
    small = TokenTable({kind: tokens[:, : len(labels)] for kind, tokens in table.kept.items()})
    found = score_table(small, labels, train[: len(labels)], needs="high", seed=0)
    assert said in found["same_images"]["skipped"]


def test_noise_is_not_fitted_since_c_is_chosen_on_held_out_images() -> None:
    """Of 200 channels of noise the weakest regularisation learns the train images by heart."""
    rng = np.random.default_rng(1)
    x, labels = rng.normal(size=(300, 200)).astype(np.float32), rng.permutation(np.repeat([0, 0, 1], 100))
    hits = classify(x[:200], labels[:200], x[200:], labels[200:], seed=0)
    commonest = (labels[200:] == 0).mean()
    assert hits.mean() == pytest.approx(commonest, abs=0.05)
    assert OPTIONS.held_out == 0.2


def test_drawn_tokens_are_of_their_kind_and_every_one_can_come() -> None:
    high = np.zeros((50, 6), bool)
    high[:40, [1, 4]] = True
    high[40] = True
    drawn = draw_tokens(high, draws=8, seed=0)
    assert set(np.unique(drawn["high"][:, :40])) == {1, 4}
    assert set(np.unique(drawn["rest"][:, :40])) == {0, 2, 3, 5}
    assert (drawn["high"][:, 41:] == -1).all()
    assert (drawn["rest"][:, 40] == -1).all()
    assert abs((drawn["high"][:, :40] == 1).mean() - 0.5) < 0.1
    assert np.array_equal(drawn["high"], draw_tokens(high, draws=8, seed=0)["high"])


# ---- places


def test_neighbour_similarity_against_a_loop() -> None:
    tokens = noise(2, 3, 4, 5).double()
    tokens[1, 2, 0] = 0
    found = neighbour_similarity(tokens)
    for image in range(2):
        for row in range(3):
            for column in range(4):
                values = []
                for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                    if 0 <= r < 3 and 0 <= c < 4:
                        a, b = tokens[image, row, column], tokens[image, r, c]
                        lengths = float(a.norm() * b.norm())
                        values.append(float(a @ b) / lengths if lengths else 0.0)
                assert float(found[image, row, column]) == pytest.approx(np.mean(values), abs=1e-12)


def test_one_grid_cell_has_no_neighbours_and_one_row_has_two() -> None:
    assert bool(neighbour_similarity(noise(2, 1, 1, 4)).isnan().all())
    same = noise(1, 1, 1, 4).expand(1, 1, 3, 4)
    torch.testing.assert_close(neighbour_similarity(same), torch.ones(1, 1, 3))
    nothing = Similarities.none()
    nothing.add(torch.full((2, 1), torch.nan), np.zeros((2, 1), bool))
    assert nothing.about() is None


def test_densities_of_similarity_and_their_order() -> None:
    rng = np.random.default_rng(0)
    values, high = rng.uniform(-1, 1, (40, 30)), rng.random((40, 30)) < 0.2
    values[high] = rng.uniform(0.5, 1, int(high.sum()))
    values[0, :3] = [-1, 1, 1.0000001]
    counts = Similarities.none()
    counts.add(torch.from_numpy(values[:15]), high[:15])
    counts.add(torch.from_numpy(values[15:]), high[15:])
    found = counts.about()
    assert found is not None
    for group, chosen in (("high", high), ("rest", ~high)):
        assert found[group]["tokens"] == chosen.sum()
        assert found[group]["mean"] == pytest.approx(values[chosen].mean(), abs=0.005)
        assert found[group]["above_0.9"] == pytest.approx((values[chosen] > 0.9).mean(), abs=0.01)
    pairs = values[high][:, None] - values[~high][None]
    assert found["more_alike"] == pytest.approx((pairs > 0).mean(), abs=0.005)


def test_maps_count_images_at_each_place() -> None:
    high = np.zeros((4, 12), bool)
    high[:3, 5] = high[0, 11] = True
    expected = np.zeros((3, 4))
    expected[1, 1], expected[2, 3] = 0.75, 0.25
    assert np.array_equal(share_map(high, (3, 4)), expected)
    assert border_share(high, (3, 4)) == (0.25, 10 / 12)
    assert math.isnan(border_share(high & False, (3, 4))[0])
    assert border_share(np.ones((1, 1), bool), (1, 1)) == (1.0, 1.0)
    with pytest.raises(ValueError, match="13 patch tokens are not a grid of 3 x 4"):
        share_map(np.zeros((4, 13), bool), (3, 4))
