"""`quietvit info`: parameters equal the official counts, multiply-adds equal hand formulas and agree with papers."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from quietvit.backbones import BACKBONES, cost, make_backbone
from quietvit.backbones.cost import count_macs, count_parameters
from quietvit_launch import cli, info
from quietvit_launch.info import PUBLISHED, Row, published_form
from reference import VECTORS

OFFICIAL_T2T = {
    row["name"].removeprefix("t2t_vit_").replace("_", "-"): row["parameters"]
    for row in json.loads((VECTORS / "07_t2t/parameter_counts.json").read_text())["rows"]
}
# DINOv2's released weights: without registers and with 4.
OFFICIAL_DINOV2 = {
    "small": (22_056_576, 22_058_112),
    "base": (86_580_480, 86_583_552),
    "large": (304_368_640, 304_372_736),
    "giant": (1_136_480_768, 1_136_486_912),
}
EXPLAINED = {"14-wide", "dense"}  # their paper figures are further off than 2 %
make_rows = info.make_rows


@cache
def rows(name: str, image_size: int) -> list[Row]:
    return make_rows(name, image_size)


def rounding(printed: str, *, slack: float = 0.0) -> tuple[float, float]:
    """ "4.8 G": what is rounded to it, in G, widened by a share of it on both sides."""
    figure = printed.split()[0].replace(",", "")
    half = 0.5 * 10.0 ** -len(figure.partition(".")[2])
    return (float(figure) - half) * (1 - slack), (float(figure) + half) * (1 + slack)


# ---- parameters


@pytest.mark.parametrize("size", OFFICIAL_T2T)
def test_parameters_are_those_of_the_t2t_code(size: str) -> None:
    counted = count_parameters("t2t_vit", size=size, without=("mask_token",), **published_form("t2t_vit", size))
    assert counted == OFFICIAL_T2T[size] == PUBLISHED["t2t_vit"][size].official


@pytest.mark.parametrize("size", OFFICIAL_DINOV2)
def test_parameters_are_those_of_the_dinov2_weights(size: str) -> None:
    form = published_form("vit", size)
    counted = tuple(count_parameters("vit", size=size, **{**form, "num_registers": r}) for r in (0, 4))
    assert counted == OFFICIAL_DINOV2[size]
    assert PUBLISHED["vit"][size].official == counted[1]


def test_parameters_are_those_of_deit_tiny() -> None:
    # By hand: patches, cls, positions, 12 blocks, norm, head.
    d = 192
    block = 2 * 2 * d + 3 * d * d + 3 * d + d * d + d + 8 * d * d + 5 * d
    by_hand = 768 * d + d + d + 197 * d + 12 * block + 2 * d + 1000 * d + 1000
    counted = count_parameters("vit", size="tiny", without=("mask_token",), **published_form("vit", "tiny"))
    assert counted == by_hand == PUBLISHED["vit"]["tiny"].official


def test_counting_parameters_is_what_a_real_model_saves() -> None:
    model = make_backbone("t2t_vit", size="nano", image_size=64)
    saved = sum(tensor.numel() for tensor in model.state_dict().values())
    assert count_parameters("t2t_vit", size="nano", image_size=64) == saved
    learned = sum(p.numel() for p in model.parameters())
    assert saved == learned + 2 * 16 * 32  # the Performer's random features


def test_every_published_size_is_one_of_ours() -> None:
    assert set(PUBLISHED) == set(BACKBONES)
    for name, published in PUBLISHED.items():
        assert set(published) == set(BACKBONES[name].SIZES) - {"nano", "micro"}


# ---- multiply-adds by hand


def stem_by_hand(side: int, token_dim: int, width: int, *, transformer: bool) -> int:
    total, c, m = (side // 16) ** 2 * 9 * token_dim * width, token_dim, token_dim // 2
    for n, window in (((side // 4) ** 2, 3 * 49), ((side // 8) ** 2, 9 * c)):
        attention = 2 * n * n * c if transformer else 2 * n * c * m + 2 * n * m * c + n * m
        total += n * window * 3 * c + attention + n * c * c + 2 * n * c * c
    return total


def block_by_hand(n: int, d: int, hidden: int, layers: str = "plain", ffn: str = "mlp") -> int:
    projections = {"plain": 4 * d * d, "se": 4 * d * d, "ghost": 3 * d * d // 2 + d * d}[layers]
    feed_forward = {"mlp": 2 * d * hidden, "swiglu": 3 * d * 4096, "ghost": d * d + 3 * d * d}[ffn]
    return n * (projections + feed_forward) + 2 * n * n * d + (2 * d * (d // 16) if layers == "se" else 0)


def trunk_by_hand(n: int, s: dict[str, Any]) -> tuple[int, int]:
    """Multiply-adds of all blocks, and the width after them."""
    d, ratio = s["embed_dim"], s.get("mlp_ratio", 4.0)
    if "dense_groups" not in s:
        block = block_by_hand(n, d, int(d * ratio), s.get("attention_layer", "plain"), s.get("ffn", "mlp"))
        return s["depth"] * block, d
    total = 0
    for i, group in enumerate(map(int, s["dense_groups"].split("-"))):
        if i:
            total, d = total + n * d * (d // 2), d // 2
        for _ in range(group):
            total, d = total + block_by_hand(n, d, int(d * ratio)) + n * d * s["growth"], d + s["growth"]
    return total, d


def macs_by_hand(name: str, size: str, side: int, *, patch: int, others: int, classes: int) -> int:
    """`others`: tokens that are no patches."""
    s = dict(BACKBONES[name].SIZES[size])
    patches = (side // patch) ** 2
    blocks, last = trunk_by_hand(patches + others, s)
    if name == "vit":
        stem = patches * 3 * patch**2 * s["embed_dim"]
    else:
        transformer = s.get("stem_attention") == "transformer"
        stem = stem_by_hand(side, s.get("token_dim", 64), s["embed_dim"], transformer=transformer)
    return stem + blocks + last * classes


@pytest.mark.parametrize(("name", "row"), [(name, i) for name in BACKBONES for i in range(len(BACKBONES[name].SIZES))])
def test_macs_are_the_sum_over_the_layers(name: str, row: int) -> None:
    r = rows(name, 224)[row]
    patch = 14 if name == "vit" else 16
    assert r.trained_macs == macs_by_hand(name, r.size, 224, patch=patch, others=5, classes=0)
    if (name == "t2t_vit" and r.macs is not None) or r.size == "tiny":
        assert r.macs == macs_by_hand(name, r.size, 224, patch=16, others=1, classes=1000)
    elif r.macs is not None:
        assert r.macs == r.trained_macs  # 4 registers both times


def test_the_stems_by_hand_agree_with_an_independent_count() -> None:
    known = {
        (224, False): "0.30", (224, True): "1.60", (256, False): "0.39", (256, True): "2.63", (96, False): "0.055",
        (96, True): "0.094",
    }  # fmt: skip
    for (side, transformer), figure in known.items():
        low, high = rounding(figure)
        assert low <= stem_by_hand(side, 64, 384, transformer=transformer) / 1e9 <= high


@pytest.mark.parametrize(("side", "figure"), [(96, "0.83"), (112, "1.13"), (224, "4.78"), (256, "6.41")])
def test_t2t_14_agrees_with_an_independent_count(side: int, figure: str) -> None:
    form = {**published_form("t2t_vit", "14"), "image_size": side}
    low, high = rounding(figure)
    assert low <= count_macs("t2t_vit", size="14", **form) / 1e9 <= high


# ---- multiply-adds of papers


@pytest.mark.parametrize("name", PUBLISHED)
def test_macs_are_within_two_percent_of_the_papers(name: str) -> None:
    for r in rows(name, 224):
        if not r.paper_macs:
            continue
        assert r.macs is not None
        low, high = rounding(r.paper_macs, slack=0.02)
        near = low <= r.macs / 1e9 <= high
        assert near is (r.size not in EXPLAINED), f"{r.size}: {r.macs / 1e9:.3f} G, paper {r.paper_macs}"
        assert near or r.note


# DeiT III's README, patches of 16 pixels.
@pytest.mark.parametrize(("size", "figure"), [("small", "4.6"), ("base", "17.5"), ("large", "61.6")])
def test_vit_at_patch_16_agrees_with_deit_3(size: str, figure: str) -> None:
    counted = count_macs("vit", size=size, image_size=224, patch_size=16, num_registers=0, num_classes=1000)
    low, high = rounding(figure, slack=0.02)
    assert low <= counted / 1e9 <= high


# ---- how they are counted

SMALL: dict[str, dict[str, Any]] = {
    "vit": {},
    "t2t_vit": {},
    "official": {"stem_attention": "performer_official", "num_classes": 7},
    "transformer": {"stem_attention": "transformer"},
    "se": {"attention_layer": "se"},
    "ghost": {"attention_layer": "ghost", "ffn": "ghost", "mlp_ratio": 3.0},
    "swiglu": {"ffn": "swiglu", "num_registers": 0},
    "dense": {"dense_groups": "2-1", "growth": 24, "depth": 4},
}


@pytest.mark.parametrize("case", SMALL)
def test_counting_agrees_with_pytorchs_counter_over_the_whole_depth(case: str) -> None:
    # A counter of its own kind: it watches the kernels that really run, all blocks of them.
    name, arguments = ("vit" if case in {"vit", "swiglu"} else "t2t_vit"), SMALL[case]
    side = 56 if name == "vit" else 64
    model = make_backbone(name, size="nano", image_size=side, **arguments).eval()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        features = model(torch.zeros(1, 3, side, side))
        if "num_classes" in arguments:
            model.logits(features)
    assert 2 * count_macs(name, size="nano", image_size=side, **arguments) == counter.get_total_flops()


def test_a_layer_without_a_rule_is_no_silent_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "NOT_COUNTED", cost.NOT_COUNTED - {"aten::gelu"})
    with pytest.raises(AssertionError, match=r"no rule for the cost of \['aten::gelu'\]"):
        count_macs("vit", size="nano", image_size=56)


def test_wrong_names_and_sizes_are_told() -> None:
    with pytest.raises(ValueError, match="unknown backbone 'vti'; nearest: vit"):
        count_macs("vti", size="nano", image_size=224)
    with pytest.raises(ValueError, match="unknown size of vit 'smal'; nearest: small"):
        count_macs("vit", size="smal", image_size=224)
    with pytest.raises(ValueError, match="is no multiple of 14; use 224 or 238"):
        count_macs("vit", size="nano", image_size=225)


# ---- the command


@pytest.fixture(autouse=True)
def counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "make_rows", rows)


def test_the_tables_fit_and_are_whole_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert max(map(len, lines)) <= info.WIDTH
    assert "…" not in printed
    rows_told = [" ".join(line.split()) for line in lines]
    assert "14 16 384 14 6 21,545,550 21,545,550 21.5 4.78 4.8 21,189,350 4.88" in rows_told
    assert "giant 14 1536 40 24 1,136,486,912 1,136,486,912 1,100 304.17 1,134,777,344 304.17" in rows_told
    assert "nano 14 96 4 3 530,112 0.18" in rows_told  # nobody published it
    assert any(line.startswith("dense 16 128-584 22 8 ") for line in rows_told)
    for name, family in BACKBONES.items():
        assert f"{name} at 224 px" in lines
        assert {row.size for row in rows(name, 224)} == set(family.SIZES)
    assert " ".join(printed.split()).endswith("norms, softmax and activations are left out.")


def test_json_holds_the_same_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--format", "json", "--backbone", "t2t_vit"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["image_size"], list(told["backbones"])) == (224, ["t2t_vit"])
    assert [Row(**row) for row in told["backbones"]["t2t_vit"]] == rows("t2t_vit", 224)


def test_other_image_sizes_leave_the_papers_macs_out() -> None:
    at_252 = info.make_row("vit", "tiny", 252)
    assert (at_252.patch, at_252.macs, at_252.paper_macs) == (16, None, "")  # DeiT's patches do not fit
    assert at_252.trained_macs == macs_by_hand("vit", "tiny", 252, patch=14, others=5, classes=0)
    at_96 = info.make_row("t2t_vit", "7", 96)
    assert at_96.paper_macs == ""
    assert at_96.macs == macs_by_hand("t2t_vit", "7", 96, patch=16, others=1, classes=1000)
    headers = [str(column.header) for column in info._table([at_96], 96).columns]
    assert ("paper\nM" in headers, "paper\nG" in headers) == (True, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image-size", "250", "--backbone", "vit"], "vit takes multiples of 14; use --image-size 238 or 252"),
        (["--image-size", "8", "--backbone", "t2t_vit"], "t2t_vit takes multiples of 16; use --image-size 16"),
        (
            ["--image-size", "256"],
            "--image-size 256: vit takes multiples of 14; use --image-size 224 or 336, or --backbone t2t_vit",
        ),
        (["--image-size", "225"], "vit takes multiples of 14 and t2t_vit takes multiples of 16; use --image-size 224"),
    ],
)
def test_sizes_that_cannot_be_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["info", *arguments]) == cli.EXIT_USER_ERROR
    assert message in capsys.readouterr().err


def test_an_unknown_family_is_told_without_torch() -> None:
    code = "import sys; from quietvit_launch.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "info", "--backbone", "vti"], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "2 False\n"
    assert done.stderr == "quietvit: unknown backbone 'vti': choose from vit, t2t_vit\n"
