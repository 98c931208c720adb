"""Kept features: taken for what they are and nothing else, resumed wherever work was cut off, bounded on disk."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quietvit.backbones import make_backbone
from quietvit.contracts import BadSample
from quietvit.data.decode import UnreadableImage
from quietvit.weights.extractor import BackboneExtractor
from quietvit_eval import feature_store
from quietvit_eval.evaluate import evaluate
from quietvit_eval.extract import Reading, Tokens, extract
from quietvit_eval.feature_store import FeatureStore, Place, open_store
from quietvit_eval.transform import EvalTransform

WHOLE = EvalTransform(16, 16, "whole")
LIMIT = 10**9


class Pictures:
    """Noise pictures in memory, some of them broken; it counts what is read."""

    name = "pictures"

    def __init__(self, count: int = 20, broken: tuple[int, ...] = ()) -> None:
        self.count, self.broken, self.read = count, broken, 0
        self.classes = {"class": ["a", "b"]}
        self.labels = {"class": np.arange(count) % 2}

    def __len__(self) -> int:
        return self.count

    def load(self, index: int, *, min_side: int | None = None) -> np.ndarray:
        self.read += 1
        if index in self.broken:
            raise UnreadableImage(self.item_name(index), "cut short")
        return np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)

    def item_name(self, index: int) -> str:
        return f"{index:03d}.png"

    def fingerprint(self) -> str:
        return f"pictures-{self.count}"


class Model(BackboneExtractor):
    """Stops before a batch, as Ctrl-C would."""

    stop_at: int | None = None
    batches = 0

    def last_blocks(self, images: torch.Tensor, num: int) -> Any:
        if self.batches == self.stop_at:
            raise KeyboardInterrupt
        self.batches += 1
        return super().last_blocks(images, num)


def model(seed: int = 0, mean: float = 0.5, depth: int = 3) -> Model:
    torch.manual_seed(seed)
    backbone = make_backbone("vit", embed_dim=8, depth=depth, num_heads=2, patch_size=4, image_size=16)
    meta = {
        "backbone": {"name": "vit", "arguments": backbone.arguments},
        "normalisation": {"mean": (mean,) * 3, "std": (0.25,) * 3},
        "image_size": 16,
        "provenance": {"seed": seed},
    }
    return Model(backbone, meta, device=torch.device("cpu"))


def features(
    store: Path | None, source: Pictures | None = None, extractor: Any = None, blocks: int = 2, **changes: Any
) -> Tokens:
    kept = None if store is None else FeatureStore(store, LIMIT)
    arguments: dict[str, Any] = {"indices": range(20), "transform": WHOLE, **changes}
    indices, transform = arguments["indices"], arguments["transform"]
    reading = Reading(batch_size=3, store=kept)
    return extract(extractor or model(), source or Pictures(), indices, transform, blocks=blocks, reading=reading)


def same(a: Tokens, b: Tokens) -> bool:
    return torch.equal(a.values, b.values) and torch.equal(a.indices, b.indices) and a.skipped == b.skipped


def entries(store: Path) -> list[Path]:
    return sorted(p for p in store.iterdir() if not p.name.startswith("."))


@pytest.mark.parametrize("broken", [(), (0,), (19,), (0, 1, 2, 7, 8, 19), tuple(range(1, 20))])
def test_kept_features_are_those_in_memory_and_are_not_computed_again(tmp_path: Path, broken: tuple[int, ...]) -> None:
    expected = features(None, Pictures(broken=broken))
    assert same(features(tmp_path, Pictures(broken=broken)), expected)
    source, extractor = Pictures(broken=broken), model()
    again = features(tmp_path, source, extractor)
    assert same(again, expected)
    assert again.mapped
    assert (extractor.batches, source.read) == (0, len(broken))  # broken ones are tried again
    (entry,) = entries(tmp_path)
    about = json.loads((entry / "about.json").read_text())
    assert about["complete"] is True
    assert about["bytes"] == (entry / "values.f32").stat().st_size == (20 - len(broken)) * 3 * 8 * 4
    assert about["unreadable"] == len(broken)


def test_more_blocks_serve_fewer_and_not_the_other_way(tmp_path: Path) -> None:
    features(tmp_path, blocks=3)
    extractor = model()
    for blocks in (2, 1):
        assert torch.equal(
            features(tmp_path, extractor=extractor, blocks=blocks).values, features(None, blocks=blocks).values
        )
    assert extractor.batches == 0
    other = tmp_path / "other"
    features(other, blocks=1)
    assert torch.equal(features(other, extractor=extractor, blocks=3).values, features(None, blocks=3).values)
    assert extractor.batches == 7


class Renamed(Pictures):
    def fingerprint(self) -> str:
        return "others"


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        ({}, True),
        ({"transform": EvalTransform(16, 16, "for another reason")}, True),
        ({"transform": EvalTransform(16, 18, "whole")}, False),
        ({"transform": EvalTransform(12, 16, "whole")}, False),
        ({"indices": range(1, 21)}, False),
        ({"indices": range(19)}, False),
        ({"extractor": model(seed=1)}, False),
        ({"extractor": model(mean=0.4)}, False),
        ({"source": Renamed()}, False),
    ],
)
def test_whatever_changes_features_makes_another_entry(tmp_path: Path, changes: dict[str, Any], shared: bool) -> None:
    features(tmp_path)
    source = changes.pop("source", None) or Pictures(count=20 if "indices" not in changes else 21)
    source.fingerprint = source.fingerprint if isinstance(source, Renamed) else lambda: "pictures-20"  # type: ignore[method-assign]
    features(tmp_path, source, **changes)
    assert (len(entries(tmp_path)) == 1) is shared


def test_precision_and_code_are_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features(tmp_path)
    low = model()
    low.bf16 = True
    features(tmp_path, extractor=low)
    assert len(entries(tmp_path)) == 2
    monkeypatch.setattr("quietvit.__version__", "99")
    features(tmp_path)
    assert len(entries(tmp_path)) == 3


def test_models_without_a_hash_are_never_kept(tmp_path: Path) -> None:
    class Nameless:
        def __init__(self, inner: BackboneExtractor) -> None:
            self.inner, self.last_blocks = inner, inner.last_blocks
            for name in ("embed_dim", "num_blocks", "stride", "image_size", "mean", "std"):
                setattr(self, name, getattr(inner, name))

    assert torch.equal(features(tmp_path, extractor=Nameless(model())).values, features(None).values)
    assert entries(tmp_path) == []


@pytest.mark.parametrize("stop_at", [0, 1, 4, 6])
def test_an_interrupted_extraction_goes_on_where_it_was(tmp_path: Path, stop_at: int) -> None:
    broken = (4, 5, 6, 17)
    extractor = model()
    extractor.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt):
        features(tmp_path, Pictures(broken=broken), extractor)
    assert json.loads((entries(tmp_path)[0] / "about.json").read_text())["complete"] is False
    extractor = model()
    found = features(tmp_path, Pictures(broken=broken), extractor)
    assert same(found, features(None, Pictures(broken=broken)))
    assert extractor.batches == 7 - stop_at


def test_a_killed_process_loses_only_its_last_seconds(tmp_path: Path) -> None:
    code = f"""
import sys, time; sys.path[:0] = [{str(Path(__file__).parent)!r}]
from pathlib import Path
import test_feature_store as t
t.feature_store.SYNC_SECONDS = 0.0
class Slow(t.Model):
    def last_blocks(self, images, num):
        if self.batches == 3: print("there", flush=True); time.sleep(60)
        return super().last_blocks(images, num)
slow = t.model(); slow.__class__ = Slow; Slow.__name__ = "Model"
t.features(Path({str(tmp_path)!r}), t.Pictures(broken=(4,)), slow)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        process.send_signal(signal.SIGKILL)
    extractor = model()
    assert same(features(tmp_path, Pictures(broken=(4,)), extractor), features(None, Pictures(broken=(4,))))
    assert extractor.batches == 4
    assert len(entries(tmp_path)) == 1


class Killed(BaseException):
    pass


@pytest.mark.parametrize("broken", [(0, 9, 10), (19,), (2,)])
def test_gaps_are_closed_right_wherever_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: tuple[int, ...]
) -> None:
    """Each call that flushes, cuts or renames a file is where one attempt ends; the next goes on from there."""
    monkeypatch.setattr(feature_store, "MOVED_BYTES", 4 * 96)  # 4 rows at a time, more than the gaps
    expected = features(None, Pictures(broken=broken))
    resumed = 0
    for deadly in range(1, 60):
        store = tmp_path / str(deadly)
        calls = 0

        def dying(real: Callable[..., Any], deadly: int = deadly) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == deadly:
                    raise Killed
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("fsync", "truncate", "replace"):
                patch.setattr(os, name, dying(getattr(os, name)))
            try:
                features(store, Pictures(broken=broken))
            except Killed:
                pass
            else:
                assert resumed >= 4
                return
        after = model()
        assert same(features(store, Pictures(broken=broken), after), expected), deadly
        assert after.batches in (0, 7)
        resumed += after.batches == 0
    raise AssertionError("no attempt came to its end")


@pytest.mark.parametrize(
    "harm",
    [
        lambda e: os.truncate(e / "values.f32", 100),
        lambda e: (e / "values.f32").unlink(),
        lambda e: (e / "state.u8").unlink(),
        lambda e: (e / "state.u8").write_bytes(b"\1" * 7),
        lambda e: (e / "state.u8").write_bytes(b"\1" * 20),
        lambda e: (e / "about.json").write_text("{"),
        lambda e: (e / "about.json").unlink(),
        lambda e: (e / "unreadable-0.jsonl").write_text('[4, "004.p'),
        lambda e: (e / "unreadable-0.jsonl").write_text('[4, "004.png", "cut short"]\n[99, "x", "y"]\n{"a": 1}\n7\n'),
        lambda e: (e / "unreadable-0.jsonl").unlink(),
        lambda e: (e / "lock").unlink(),
    ],
)
def test_damaged_entries_never_give_wrong_features(tmp_path: Path, harm: Callable[[Path], Any]) -> None:
    source = Pictures(broken=(4,))
    features(tmp_path, source)
    harm(entries(tmp_path)[0])
    assert same(features(tmp_path, source), features(None, source))


def test_an_image_that_can_be_read_again_is_taken_in(tmp_path: Path) -> None:
    assert len(features(tmp_path, Pictures(broken=(4, 9))).values) == 18
    assert same(features(tmp_path, Pictures(broken=(9,))), features(None, Pictures(broken=(9,))))
    assert len(entries(tmp_path)) == 1


def test_nothing_readable_leaves_no_entry(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none of the 20 images of pictures can be read; the first: 000\.png: cut"):
        features(tmp_path, Pictures(broken=tuple(range(20))))
    assert entries(tmp_path) == []
    with pytest.raises(ValueError, match="no image of pictures was asked for"):
        features(tmp_path, indices=[])


def test_a_full_disk_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    extractor = model()
    with pytest.raises(OSError, match=r"No space left on device.*values\.part"):
        features(tmp_path, extractor=extractor)
    with pytest.raises(OSError, match="No space left on device"):
        extract(extractor, Pictures(), range(20), WHOLE, blocks=1, reading=Reading(memory=0, scratch=tmp_path))
    assert extractor.batches == 0
    assert list(tmp_path.iterdir()) == []


def test_the_oldest_unused_entries_make_room(tmp_path: Path) -> None:
    features(tmp_path)
    limit = int(3.3 * sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()))  # three entries fit

    def kept(seed: int) -> FeatureStore:
        store = FeatureStore(tmp_path, limit)
        assert extract(model(seed), Pictures(), range(20), WHOLE, blocks=2, reading=Reading(store=store)).mapped
        return store

    def names() -> list[Path]:
        return sorted(entries(tmp_path), key=lambda p: (p / "lock").stat().st_mtime)

    for seed in (0, 1, 2):
        kept(seed)
        time.sleep(0.01)
    first, second, third = names()
    kept(0)  # used again: no longer the oldest
    holder = kept(1)  # the oldest but in use once its date is turned back
    os.utime(second / "lock", (1, 1))
    kept(3)
    assert third not in names()
    assert {first, second} < set(names())
    assert sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()) <= limit
    del holder
    kept(4)
    assert second not in names()


def test_what_does_not_fit_the_limit_is_not_kept(tmp_path: Path) -> None:
    features(tmp_path, blocks=1)
    before = entries(tmp_path)
    reading = Reading(store=FeatureStore(tmp_path, 100))
    found = extract(model(1), Pictures(), range(20), WHOLE, blocks=2, reading=reading)
    assert torch.equal(found.values, features(None, extractor=model(1)).values)
    assert not found.mapped
    assert set(entries(tmp_path)) <= set(before)


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    left = tmp_path / ".features-xyz"
    left.mkdir()
    (left / "values.part").write_bytes(bytes(100))
    (tmp_path / ".removed-abc").mkdir()
    foreign = tmp_path / "notes"
    foreign.mkdir()
    used = FeatureStore(tmp_path, 0).temporary(images=3, blocks=1, width=8)
    assert sorted(tmp_path.iterdir()) == sorted([foreign, used.path])


def test_a_second_command_waits_for_the_first_and_takes_its_features(tmp_path: Path) -> None:
    began, go = threading.Event(), threading.Event()

    class Waiting(Model):
        def last_blocks(self, images: torch.Tensor, num: int) -> Any:
            began.set()
            assert go.wait(60)
            return super().last_blocks(images, num)

    Waiting.__name__ = "Model"
    first, second = model(), model()
    first.__class__ = Waiting
    found: dict[str, Tokens] = {}
    threads = [
        threading.Thread(target=lambda n=name, m=m: found.update({n: features(tmp_path, extractor=m)}))  # type: ignore[misc]
        for name, m in (("first", first), ("second", second))
    ]
    threads[0].start()
    assert began.wait(60)
    threads[1].start()
    time.sleep(0.2)
    assert found == {}
    go.set()
    for thread in threads:
        thread.join(60)
    assert same(found["first"], found["second"])
    assert second.batches == 0


def test_evaluate_keeps_features_for_the_next_task(tmp_path: Path) -> None:
    sources = (Pictures(20), Pictures(12, broken=(3,)))
    quick = {"linear": {"steps": 5}}
    alone = [
        evaluate(model(), [t], sources, options={t: quick.get(t, {})}, feature_cache_gb=0)[0] for t in ("knn", "linear")
    ]
    both = evaluate(model(), ["knn", "linear"], sources, options=quick, feature_cache=tmp_path / "kept")
    assert len(entries(tmp_path / "kept")) == 2
    extractor = model()
    for task, known in zip(("knn", "linear"), both, strict=True):
        (card,) = evaluate(
            extractor, [task], sources, options={task: quick.get(task, {})}, feature_cache=tmp_path / "kept"
        )
        assert card.scores == known.scores
        assert card.data == known.data
        assert card.data["test"]["unreadable_names"] == ["003.png"]
    assert extractor.batches == 0
    assert [c.scores for c in alone] == [c.scores for c in both]


def test_unusable_settings_are_explained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sources = (Pictures(20), Pictures(12))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"file.* cannot hold features .*name a folder that can be written"):
        evaluate(model(), ["knn"], sources, feature_cache=tmp_path / "file")
    for wrong in ({"memory_gb": -1.0}, {"feature_cache_gb": float("nan")}, {"memory_gb": float("inf")}):
        with pytest.raises(ValueError, match=rf"{next(iter(wrong))} is a number of GiB from 0 on"):
            evaluate(model(), ["knn"], sources, **wrong)  # type: ignore[arg-type]
    assert open_store(tmp_path / "file" / "deeper", LIMIT, asked_for=False) is None
    assert "QUIETVIT_CACHE" in caplog.text


def test_features_beyond_the_memory_limit_are_never_held_whole(tmp_path: Path) -> None:
    """100,000 x 384: 307 MB with the mean patch. RLIMIT_DATA bounds all memory but mapped files: a copy is an error."""
    code = f"""
import resource, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}]
import numpy as np, torch
from pathlib import Path
from quietvit.contracts import Features
from quietvit_eval.data import EvalData, Split
from quietvit_eval.extract import Reading
from quietvit_eval.knn import KnnOptions, KnnTask
from quietvit_eval.linear import LinearOptions, LinearTask
from quietvit_eval.transform import EvalTransform
import test_feature_store as t

torch.set_num_threads(1)

class Wide:
    embed_dim, num_blocks, stride, image_size, mean, std = 384, 1, 1, 1, (0.5,) * 3, (0.5,) * 3
    def last_blocks(self, images, num):
        cls = images.flatten(1).repeat(1, 128)
        return [Features(cls, cls[:, None][:, :0], cls[:, None, None])]

class Dots(t.Pictures):
    pixels = np.random.default_rng(0).integers(0, 256, (100_000, 1, 1, 3), dtype=np.uint8)
    def load(self, index, *, min_side=None):
        return self.pixels[index]

class Plain(EvalTransform):
    def __call__(self, pixels):
        return torch.from_numpy(pixels).permute(2, 0, 1)

def score(count, memory):
    source = Dots(count)
    labels = np.arange(count) % 2
    train = Split(source, np.arange(count), labels)
    test = Split(source, np.arange(200), labels[:200])
    reading = Reading(1000, memory=memory, scratch=Path({str(tmp_path)!r}))
    data = EvalData(train, test, "class", ["a", "b"], Plain(1, 1, "x"), 1, reading, 0, torch.device("cpu"))
    KnnTask().run(Wide(), data, KnnOptions())
    LinearTask().run(Wide(), data, LinearOptions(steps=20, lrs=(0.1,)))
    return data.features(Wide(), "train").tokens

score(2000, 2**30)  # whatever libraries take once
used = int([l for l in open("/proc/self/status") if l.startswith("VmData")][0].split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 180_000_000, -1))
tokens = score(100_000, int(0.1 * 2**30))
assert tokens.mapped and tokens.values.shape == (100_000, 2, 384)
try:
    tokens.values.clone()
except RuntimeError:
    print("bounded")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "bounded\n"
    assert list(tmp_path.iterdir()) == []


def test_a_place_tells_what_was_unreadable_in_order(tmp_path: Path) -> None:
    place = Place(tmp_path, 4, 1, 8)
    (tmp_path / "state.u8").write_bytes(bytes([2, 1, 2, 0]))
    (tmp_path / "unreadable-0.jsonl").write_text('\n[2, "c", "late"]\n[3, "d", "not marked"]\n')
    (tmp_path / "unreadable-1.jsonl").write_text('\n[0, "a", "once"]\n[0, "a", "twice"]\n')
    assert list(place.unreadable().items()) == [(0, BadSample("a", "twice")), (2, BadSample("c", "late"))]
