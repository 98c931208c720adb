"""Evaluation by two gloo processes: each extracts its slice, and the cards are those of one process."""

from __future__ import annotations

import itertools
import json
import os
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from quietvit import dist
from quietvit.backbones import make_backbone
from quietvit.data.decode import UnreadableImage
from quietvit.weights import load, save_teacher
from quietvit_eval.cards import Card
from quietvit_eval.evaluate import evaluate
from quietvit_eval.extract import Reading, Tokens, extract
from quietvit_eval.feature_store import FeatureStore
from quietvit_eval.transform import EvalTransform
from quietvit_launch.ranks import ranks

TASKS = ["knn", "linear"]
QUICK = {"linear": {"steps": 20, "batch_size": 16}}
WHOLE = EvalTransform(16, 16, "whole")


class Pictures:
    """Coloured noise, some of it broken in the slices of both processes; it counts what is read."""

    def __init__(self, name: str, count: int, broken: tuple[int, ...]) -> None:
        self.name, self.count, self.broken, self.read = name, count, broken, 0
        self.classes = {"class": ["red", "green"]}
        self.labels = {"class": np.arange(count) % 2}

    def __len__(self) -> int:
        return self.count

    def load(self, index: int, *, min_side: int | None = None) -> np.ndarray:
        self.read += 1
        if index in self.broken:
            raise UnreadableImage(self.item_name(index), "cut short")
        pixels = np.random.default_rng(index + 1000 * len(self.name)).integers(0, 230, (16, 16, 3), dtype=np.uint8)
        pixels[..., index % 2] += 20
        return pixels

    def item_name(self, index: int) -> str:
        return f"{index:03d}.png"

    def fingerprint(self) -> str:
        return f"{self.name}-{self.count}"


class Nameless:
    """A model that cannot tell its weights: nothing of it is kept."""

    def __init__(self, inner: Any) -> None:
        self.last_blocks = inner.last_blocks
        for name in ("embed_dim", "num_blocks", "stride", "image_size", "mean", "std"):
            setattr(self, name, getattr(inner, name))


def sources() -> tuple[Pictures, Pictures]:
    return Pictures("train", 41, (1, 39)), Pictures("val", 26, (0, 7, 25))


def cards_of(folder: Path, cache: str, **changes: Any) -> list[Card]:
    return evaluate(
        folder / "run",
        TASKS,
        sources(),
        options=QUICK,
        device="cpu",
        batch_size=4,
        feature_cache=folder / cache,
        **changes,
    )


def tokens_of(folder: Path, *, kept: bool, stop_after: int | None = None) -> tuple[Tokens, int]:
    """Features of the test split, and how many images this process read for it."""
    extractor: Any = load(folder / "run", device="cpu")
    source = sources()[1]
    if stop_after is not None:
        inner, calls = extractor.last_blocks, itertools.count()

        def stopping(images: torch.Tensor, num: int) -> Any:
            if next(calls) == stop_after:
                raise KeyboardInterrupt
            return inner(images, num)

        extractor.last_blocks = stopping
    store = FeatureStore(folder / "slices", 10**9) if kept else None
    reading = Reading(4, store=store, scratch=folder / "scratch")
    found = extract(extractor if kept else Nameless(extractor), source, range(26), WHOLE, blocks=2, reading=reading)
    return found, source.read


def work(rank: int, folder: str, port: int) -> None:
    """What each process does; results go to a file."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    home = Path(folder)
    with ranks("cpu") as device:
        assert (device, dist.world_size(), dist.rank()) == ("cpu", 2, rank)
        cards = cards_of(home, "two", out_dir=home / "cards")
        again = cards_of(home, "two")
        uncached, read = tokens_of(home, kept=False)
        resumed, read_more = tokens_of(home, kept=True)
        try:
            extract(load(home / "run", device="cpu"), sources()[1], [0, 7], WHOLE, blocks=1, reading=Reading(4))
        except ValueError as error:
            told = str(error)
    assert not torch.distributed.is_initialized()
    results = {
        "cards": [asdict(c) for c in cards], "again": [asdict(c) for c in again], "read": read, "read_more": read_more,
        "told": told, "skipped": [[s.name for s in t.skipped] for t in (uncached, resumed)],
    }  # fmt: skip
    (home / f"out{rank}.json").write_text(json.dumps(results))
    torch.save({"uncached": uncached.values.clone(), "resumed": resumed.values.clone()}, home / f"out{rank}.pt")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    torch.manual_seed(5)
    backbone = make_backbone("vit", embed_dim=8, depth=4, num_heads=2, patch_size=4, image_size=16)
    save_teacher(folder / "run", backbone, mean=(0.5,) * 3, std=(0.25,) * 3, image_size=16, provenance={"seed": 5})
    (folder / "scratch").mkdir()
    with pytest.raises(KeyboardInterrupt):
        tokens_of(folder, kept=True, stop_after=2)  # one process begins, two go on
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(str(folder), port), nprocs=2, join=True)
    return folder


@pytest.fixture(scope="module")
def results(home: Path) -> list[dict[str, Any]]:
    return [json.loads((home / f"out{rank}.json").read_text()) for rank in range(2)]


KEPT = ("task", "scores", "data", "protocol", "details", "num_classes", "standard_error")


@pytest.mark.parametrize("which", ["cards", "again"])
def test_cards_of_two_are_those_of_one(home: Path, results: list[dict[str, Any]], which: str) -> None:
    alone = [json.loads(json.dumps(asdict(c))) for c in cards_of(home, "one")]
    for rank in range(2):
        both = results[rank][which]
        assert [c["task"] for c in both] == TASKS
        for card, expected in zip(both, alone, strict=True):
            assert {k: card[k] for k in KEPT} == {k: expected[k] for k in KEPT}
            assert card["data"]["train"]["unreadable_names"] == ["001.png", "039.png"]
            assert card["data"]["test"]["unreadable_names"] == ["000.png", "007.png", "025.png"]
            assert card["environment"]["processes"] == 2
    assert len(list((home / "cards").glob("*.json"))) == 2


def test_each_reads_its_slice_and_nothing_stays_of_a_model_without_a_hash(
    home: Path, results: list[dict[str, Any]]
) -> None:
    assert [r["read"] for r in results] == [12, 14]  # 7 batches of 4
    assert list((home / "scratch").iterdir()) == []


def test_two_go_on_with_what_one_began(home: Path, results: list[dict[str, Any]]) -> None:
    assert [r["read_more"] for r in results] == [8, 10]  # 5 batches were left


def test_both_hold_all_rows(home: Path, results: list[dict[str, Any]]) -> None:
    expected = tokens_of(home, kept=False)[0]
    for rank in range(2):
        found = torch.load(home / f"out{rank}.pt", weights_only=True)
        for name in ("uncached", "resumed"):
            assert torch.equal(found[name], expected.values)
        assert results[rank]["skipped"] == [["000.png", "007.png", "025.png"]] * 2


def test_both_raise_the_same_error(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert "none of the 2 images of val can be read; the first: 000.png: cut short" in result["told"]


def test_alone_nothing_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with ranks("auto") as device:
        assert device == "auto"
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("environment", "device", "message"),
    [
        ({"RANK": "0"}, "cpu", "WORLD_SIZE is ''. Start the command with torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "cpu", "LOCAL_RANK is 'x'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "cuda:0", "2 processes cannot share the device 'cuda:0'"),
        ({"RANK": "99", "WORLD_SIZE": "100", "LOCAL_RANK": "99"}, "cuda", "process 99 .* has no GPU of its own"),
    ],
)
def test_mistakes_are_explained_before_anything_is_joined(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], device: str, message: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), ranks(device):
        raise AssertionError("joined")
