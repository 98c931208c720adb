"""PCA against numpy and scikit-learn, a planted foreground, signs, colours, and features that do not vary."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from quietvit.data.sources import open_source
from quietvit_eval.inspect import pca
from quietvit_eval.inspect.pca import (
    at_border,
    colours,
    component_scores,
    find_foreground,
    inspect_pca,
    principal_components,
)
from quietvit_eval.inspect.sample import Looks
from quietvit_launch.cli import main
from tiny_models import PatchPixels, build, extractor_of, save_run, write_images


@pytest.mark.parametrize(("rows", "width"), [(50, 7), (5, 12), (2, 3)])
def test_components_are_those_of_the_svd(rows: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.decomposition import PCA

    monkeypatch.setattr(pca, "CHUNK", 16)  # several chunks, the last one shorter
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)) @ torch.diag(torch.arange(width) + 1.0)
    count = min(3, rows - 1)
    found = principal_components(x + 5, count)
    centred = (x - x.double().mean(0)).numpy()
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    for ours, theirs in zip(found.directions.numpy(), directions, strict=False):
        assert abs(ours @ theirs) == pytest.approx(1, abs=1e-9)
        assert ours[np.abs(ours).argmax()] > 0
    np.testing.assert_allclose(found.variances, values[:count] ** 2 / (rows - 1), rtol=1e-5)
    theirs = PCA(count).fit(centred)
    np.testing.assert_allclose(found.explained(), theirs.explained_variance_ratio_, rtol=1e-5)
    np.testing.assert_allclose(found.scores(x + 5).abs(), np.abs(theirs.transform(centred)), atol=1e-4)


def scene(grid: tuple[int, int], inside: tuple[slice, slice], seed: int, sign: float) -> Tensor:
    """Features [h w 6]: one direction tells the inside, noise elsewhere."""
    features = 0.1 * torch.randn(*grid, 6, generator=torch.Generator().manual_seed(seed))
    features[..., 2] -= sign
    features[(*inside, 2)] += 2 * sign
    return features


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_planted_foreground_is_found_whatever_its_sign(sign: float) -> None:
    places = [(np.s_[2:5], np.s_[1:4]), (np.s_[1:3], np.s_[3:8])]
    maps = [scene(grid, at, i, sign) for i, (grid, at) in enumerate(zip([(6, 6), (5, 9)], places, strict=True))]
    found = find_foreground(maps)
    for mask, m, place in zip(found.masks, maps, places, strict=True):
        wanted = torch.zeros(m.shape[:2], dtype=torch.bool)
        wanted[place] = True
        assert torch.equal(mask, wanted)
    assert found.components.directions[0, 2] * sign > 0.9
    torch.testing.assert_close(found.scores[0], found.components.scores(maps[0])[..., 0])


def test_a_foreground_that_reaches_the_border_still_counts_as_the_smaller_part_of_it() -> None:
    maps = [scene((8, 8), (np.s_[2:8], np.s_[2:6]), 0, -1.0)]  # it covers 4 of the 28 patches at the border
    assert int(find_foreground(maps).masks[0].sum()) == 24


def test_one_row_of_patches_has_no_middle_and_a_sign_all_the_same() -> None:
    features = torch.zeros(1, 6, 4)
    features[0, :2, 1] = 1.0
    found = find_foreground([features])
    assert found.masks[0].tolist() == [[True, True, False, False, False, False]]
    assert bool(at_border(1, 6).all())
    assert at_border(3, 4).sum() == 10


@pytest.mark.parametrize("value", [0.0, 3.7])
def test_features_that_do_not_vary_are_told(value: float) -> None:
    constant = torch.full((4, 4, 8), value) + torch.arange(8)
    with pytest.raises(ValueError, match="all have the same features"):
        find_foreground([constant, constant])
    with pytest.raises(ValueError, match="no finite numbers"):
        find_foreground([constant * torch.nan])


def test_components_of_the_foreground_are_fitted_on_it_alone() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(5, 5, 4) * torch.tensor([1.0, 2.0, 3.0, 4.0]) for _ in range(2)]
    masks = [torch.rand(5, 5) > 0.5 for _ in range(2)]
    components, scores = component_scores(maps, masks)
    inside = torch.cat([m[k] for m, k in zip(maps, masks, strict=True)])
    again = principal_components(inside, 3)
    assert torch.equal(components.directions, again.directions)
    torch.testing.assert_close(scores[1][masks[1]], again.scores(maps[1][masks[1]]))
    with pytest.raises(ValueError, match="leaves 1 of 50 patches: go without it"):
        component_scores(maps, [torch.arange(25).view(5, 5) == 3, torch.zeros(5, 5, dtype=torch.bool)])


def test_colours_are_percentiles_of_the_foreground_of_all_images() -> None:
    torch.manual_seed(0)
    scores = [torch.randn(20, 20, 3).double(), 5 * torch.randn(10, 10, 3).double()]
    masks = [torch.rand(20, 20) > 0.3, torch.rand(10, 10) > 0.3]
    rgb = colours(scores, masks)
    inside = np.concatenate([s[m].numpy() for s, m in zip(scores, masks, strict=True)])
    low, high = np.percentile(inside, 1, axis=0), np.percentile(inside, 99, axis=0)
    for picture, s, m in zip(rgb, scores, masks, strict=True):
        wanted = np.clip((s.numpy() - low) / (high - low), 0, 1)
        np.testing.assert_allclose(picture[m], wanted[m])
        assert not picture[~m].any()


def test_whitened_colours_reach_three_standard_deviations() -> None:
    scores = [torch.tensor([[[-6.0, 0.0, 3.0], [6.0, 1.5, 9.0]]]).double()]
    rgb = colours(scores, None, whiten=torch.tensor([4.0, 0.25, 0.0]).double())
    np.testing.assert_allclose(rgb[0], [[[0, 0.5, 0.5], [1, 1, 0.5]]])


def test_a_component_without_spread_is_grey_and_few_channels_are_filled_up() -> None:
    rgb = colours([torch.tensor([[[1.0, 2.0], [1.0, 4.0]]]).double()], None)
    np.testing.assert_allclose(rgb[0], [[[0.5, 0, 0.5], [0.5, 1, 0.5]]])


@pytest.mark.parametrize("foreground", [True, False])
@pytest.mark.parametrize("whiten", [True, False])
def test_one_image_and_the_same_bytes_twice(tmp_path: Path, foreground: bool, whiten: bool) -> None:
    source = open_source("auto", str(write_images(tmp_path / "images", 1)))
    extractor = extractor_of(build("t2t"))
    done = [
        inspect_pca(extractor, source, tmp_path / out, looks=Looks(), foreground=foreground, whiten=whiten)
        for out in ("first", "second")
    ]
    assert done[0].pictures[0].read_bytes() == done[1].pictures[0].read_bytes()
    facts = json.loads(done[0].result.read_text())
    assert facts["components"]["patches"] == (round(16 * facts["images"][0]["foreground"]) if foreground else 16)


def test_a_disc_on_white_is_foreground_in_the_picture(tmp_path: Path) -> None:
    image = np.full((32, 32, 3), 255, np.uint8)
    image[8:24, 12:20] = np.random.default_rng(0).integers(0, 60, (16, 8, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(image).save(tmp_path / "images" / "a.png")
    source = open_source("auto", str(tmp_path / "images"))
    done = inspect_pca(PatchPixels(), source, tmp_path / "out", looks=Looks(image_size=32))
    facts = json.loads(done.result.read_text())
    assert facts["images"] == [{"name": "a.png", "foreground": 4 * 2 / 64}]
    picture = np.asarray(Image.open(done.pictures[0]))
    panel = picture[26:170, -8 - 4 - 144 : -8 - 4]  # the last column of the first row
    lit = panel.any(-1).reshape(8, 18, 8, 18).all((1, 3))
    assert lit[2:6, 3:5].all()
    assert lit.sum() == 8


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, images = save_run(tmp_path / "run"), write_images(tmp_path / "images", 3)
    words = ["inspect", "pca", "--model", str(run), "--data", str(images), "--device", "cpu"]
    assert main([*words, "--whiten", "--layer", "1", "--out", str(tmp_path / "here")]) == 0
    facts = json.loads((tmp_path / "here" / "pca.json").read_text())
    assert facts["block"] == 1
    assert facts["recipe"]["colours"] == "+-3 sigma"
    assert "foreground:" in capsys.readouterr().out
    assert main([*words, "--size", "30"]) == 2
    assert "image size 30 is no multiple of 8 pixels: use 24 or 32" in capsys.readouterr().err
    assert main([*words, "--layer", "7"]) == 2
    assert "this model has 3, 0 to 2" in capsys.readouterr().err
    assert main([*words[:4], "--data", str(tmp_path / "nothing")]) == 2
    assert "does not exist" in capsys.readouterr().err
