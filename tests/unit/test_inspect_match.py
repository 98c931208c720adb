"""Matches against loops, of permuted features and of shifted images; the filters; pixel coordinates; the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from quietvit_eval.inspect import match
from quietvit_eval.inspect.match import (
    Matches,
    MatchOptions,
    centres,
    choose_matches,
    draw_matches,
    inspect_match,
    mutual_matches,
    spaced,
    whole_patches,
)
from quietvit_launch.cli import main
from tiny_models import PatchPixels, save_run


def naive(a: Tensor, b: Tensor) -> list[tuple[int, int, float, float]]:
    """Steps 1 and 3 as loops in float64."""
    (h, w), (i, j) = a.shape[:2], b.shape[:2]
    x, y = (m.flatten(0, 1).double().numpy() for m in (a, b))
    x, y = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in (x, y))
    found = []
    for p in range(h * w):
        cosines = [float(x[p] @ y[q]) for q in range(i * j)]
        q = max(range(i * j), key=lambda n: cosines[n])
        if max(range(h * w), key=lambda n: float(x[n] @ y[q])) != p:
            continue
        others = [
            float(np.linalg.norm(x[p] - y[n]))
            for n in range(i * j)
            if max(abs(n // j - q // j), abs(n % j - q % j)) > 1
        ]
        distance = float(np.linalg.norm(x[p] - y[q]))
        found.append((p, q, cosines[q], distance / min(others) if others else 1.0))
    return sorted(found, key=lambda m: -m[2])


@pytest.mark.parametrize("grids", [((5, 6), (4, 7)), ((1, 3), (8, 2)), ((6, 6), (2, 2))])
def test_matches_are_those_of_the_loops(grids: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(match, "CHUNK", 7)
    torch.manual_seed(0)
    a, b = (torch.randn(*grid, 5) for grid in grids)
    found, wanted = mutual_matches(a, b), naive(a, b)
    assert list(zip(found.a.tolist(), found.b.tolist(), strict=True)) == [m[:2] for m in wanted]
    np.testing.assert_allclose(found.cosine, [m[2] for m in wanted], atol=1e-6)
    np.testing.assert_allclose(found.ratio, [m[3] for m in wanted], rtol=1e-4)


def test_permuted_features_are_found_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(match, "CHUNK", 10)
    torch.manual_seed(0)
    a = torch.randn(7, 6, 16)
    order = torch.randperm(42)
    b = (3 * a.flatten(0, 1)[order]).view(6, 7, 16)  # lengths do not count
    found, left = choose_matches(a, b, MatchOptions(spacing=1, most=99, ratio=0.5))
    assert left == {"mutual": 42, "ratio": 42, "spaced": 42, "kept": 42}
    assert torch.equal(order[found.b], found.a)
    assert bool((found.cosine > 0.9999).all())


def test_of_equal_patches_the_first_is_taken() -> None:
    a = torch.eye(2)[torch.tensor([[0, 0, 1]])]
    found = mutual_matches(a, torch.eye(2)[torch.tensor([[0, 1, 1, 0]])])
    assert sorted(zip(found.a.tolist(), found.b.tolist(), strict=True)) == [(0, 0), (2, 1)]


def test_the_ratio_leaves_the_neighbours_of_a_match_out() -> None:
    b = torch.zeros(1, 6, 6)
    b[0, torch.arange(6), torch.arange(6)] = 1
    b[0, 1] = b[0, 0] * 0.99 + b[0, 1] * 0.1  # a neighbour that looks the same
    b[0, 5] = b[0, 3] * 0.99 + b[0, 5] * 0.1  # a patch elsewhere that does
    a = torch.zeros(1, 2, 6)
    a[0, 0, 0] = a[0, 1, 3] = 1
    a[0, :, 4] = 0.05
    found, left = choose_matches(a, b, MatchOptions(ratio=0.3, spacing=1))
    assert left == {"mutual": 2, "ratio": 1, "spaced": 1, "kept": 1}
    assert (found.a.tolist(), found.b.tolist()) == ([0], [0])


def brute_spaced(pairs: list[tuple[int, int]], grids: Any, spacing: int) -> list[int]:
    kept: list[int] = []
    for i, pair in enumerate(pairs):
        apart = True
        for j in kept:
            for one, other, (_, w) in zip(pair, pairs[j], grids, strict=True):
                apart &= max(abs(one // w - other // w), abs(one % w - other % w)) >= spacing
        if apart:
            kept.append(i)
    return kept


@pytest.mark.parametrize("spacing", [1, 2, 3])
def test_better_matches_keep_others_away(spacing: int) -> None:
    generator = torch.Generator().manual_seed(spacing)
    grids = ((6, 5), (4, 9))
    a, b = torch.randperm(30, generator=generator), torch.randperm(36, generator=generator)[:30]
    found = spaced(Matches(a, b, torch.linspace(1, 0, 30), torch.ones(30)), grids, spacing)
    kept = brute_spaced(list(zip(a.tolist(), b.tolist(), strict=True)), grids, spacing)
    assert found.a.tolist() == a[kept].tolist()
    assert len(kept) == 30 or spacing > 1


def picture(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels).save(path)
    return path


def test_a_shifted_image_gives_the_shift_in_pixels(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    first = picture(tmp_path / "first.png", noise[:40, :48])
    second = picture(tmp_path / "second.png", noise[8:, 12:])  # two patches up, three to the left
    options = MatchOptions(size=48, spacing=1, most=999, ratio=0.5)
    done = inspect_match(PatchPixels(), first, second, tmp_path / "out", options)  # 40 x 52 is seen as 36 x 48
    assert done.lines[0].startswith("no matches") or len(json.loads(done.result.read_text())["matches"]) < 9
    second = picture(tmp_path / "second.png", noise[8:, 12:60])
    facts = json.loads(inspect_match(PatchPixels(), first, second, tmp_path / "out", options).result.read_text())
    assert facts["counts"]["kept"] == (10 - 2) * (12 - 3)
    for m in facts["matches"]:
        assert np.subtract(m["a"], m["b"]).tolist() == [12, 8]
        assert m["cosine"] == pytest.approx(1, abs=1e-5)
    assert min(m["b"] for m in facts["matches"]) == [2.0, 2.0]


def test_coordinates_are_those_of_the_stored_image(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    small = picture(tmp_path / "small.png", image)  # patches of 4
    large = picture(tmp_path / "large.png", image.repeat(3, axis=0).repeat(3, axis=1))  # patches of 12
    options = MatchOptions(size=40, spacing=1, most=999)
    facts = json.loads(inspect_match(PatchPixels(), large, small, tmp_path / "out", options).result.read_text())
    assert [i["grid"] for i in facts["images"]] == [[8, 10], [8, 10]]
    assert facts["counts"]["kept"] == 80
    for m in facts["matches"]:
        assert m["a"] == [3 * v for v in m["b"]]
        assert m["a"][0] % 12 == 6


def test_sizes_and_centres() -> None:
    image = np.zeros((100, 61, 3), np.uint8)
    assert whole_patches(image, 14, 98).shape == (98, 56, 3)
    assert whole_patches(image, 14, 3).shape == (14, 14, 3)
    assert whole_patches(image[:56, :28], 14, 56).base is not None  # not resampled
    assert centres(torch.tensor([0, 5]), (2, 4), (20, 80)).tolist() == [[10, 5], [30, 15]]


def test_only_foreground(tmp_path: Path) -> None:
    torch.manual_seed(0)
    a = 0.1 * torch.randn(6, 6, 8)
    a[..., 0] -= 2
    a[2:4, 2:4, 0] += 4
    b = a.roll((1, 0), (0, 1))
    found, left = choose_matches(a, b, MatchOptions(foreground=True, spacing=1))
    assert left["mutual"] == 36
    assert sorted(found.a.tolist()) == [14, 15, 20, 21]
    assert (found.b - found.a).tolist() == [6] * 4


def test_no_match_is_a_result(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    paths = [picture(tmp_path / f"{i}.png", generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for i in range(2)]
    done = inspect_match(PatchPixels(), *paths, tmp_path / "out", MatchOptions(size=32, ratio=0.01))
    assert done.lines[0].startswith("no matches (")
    assert json.loads(done.result.read_text())["matches"] == []
    assert Image.open(done.pictures[0]).size == (2 * 480 + 3 * 8, 480 + 2 * 8)


def test_lines_are_drawn_between_the_points() -> None:
    images = [np.zeros((48, 48, 3), np.uint8), np.zeros((96, 48, 3), np.uint8)]
    drawn = draw_matches(images, [np.array([[24.0, 12.0]]), np.array([[24.0, 24.0]])])
    assert drawn.shape == (496, 480 + 240 + 24, 3)
    lit = (drawn.max(-1) > 200) & (drawn.min(-1) < 100)
    rows, columns = lit.nonzero()
    assert abs(columns.min() - (8 + 240)) <= 4
    assert abs(columns.max() - (8 + 480 + 8 + 120)) <= 4
    assert abs(rows - 128).max() <= 4


@pytest.mark.parametrize("given", [{"ratio": 0.0}, {"ratio": 1.5}, {"spacing": 0}, {"most": 0}])
def test_options_that_cannot_be(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        MatchOptions(**given)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save_run(tmp_path / "run", "t2t")
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    one, other = (str(picture(tmp_path / f"{i}.png", pixels)) for i, pixels in enumerate((noise, noise[:, ::-1])))
    words = ["--model", str(run), "--device", "cpu"]
    assert main(["inspect", "match", one, one, *words]) == 0
    facts = json.loads((run / "inspect" / "match" / "match.json").read_text())
    assert facts["options"]["size"] == 64
    assert facts["counts"]["mutual"] == facts["images"][0]["grid"][0] * facts["images"][0]["grid"][1]
    assert all(m["a"] == m["b"] for m in facts["matches"])
    assert main(["inspect", "match", one, other, *words, "--foreground", "--ratio", "0.9"]) == 0
    capsys.readouterr()
    assert main(["inspect", "match", one, str(tmp_path / "none.png"), *words]) == 2
    assert "there is no image file" in capsys.readouterr().err
    (tmp_path / "text.png").write_text("text")
    assert main(["inspect", "match", one, str(tmp_path / "text.png"), *words]) == 2
    assert "is not an image that can be read" in capsys.readouterr().err
    assert main(["inspect", "match", one, other, *words, "--ratio", "3"]) == 2
    assert "ratio must be above 0" in capsys.readouterr().err
