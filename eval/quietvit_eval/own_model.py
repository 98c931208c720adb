"""A model of the user's own: `file.py:name`, a class or function that returns an Extractor. Checked before it is used.

Only that file is run, because the user names it; nothing is looked for elsewhere.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.contracts import Extractor

NUMBERS = ("embed_dim", "num_blocks", "stride", "image_size")
TRIPLES = ("mean", "std")
PARTS = ("cls", "registers", "patches")
MOST = 224  # side of the image tried (ours: enough, and quick on a CPU)
CLOSE = 1e-3  # how far two passes over the same image may lie apart, by the largest feature (ours)
SPEC = re.compile(r"(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)")


def load_own(spec: str, device: str = "auto") -> Extractor:
    """The extractor that `file.py:name` makes. A class or function is called with device=... if it takes that, else
    without arguments; anything else is taken as it is.

    Modules beside the file can be imported by it. Raises ValueError if the file cannot be run, the name is not in it or
    fails, or what it gives is no Extractor (see `check_extractor`).
    """
    match = SPEC.fullmatch(spec)
    if match is None:
        raise ValueError(f"{spec!r} is no model of your own: write file.py:name, name being a class or function in it")
    file, name = Path(match["file"]).expanduser().resolve(), match["name"]
    if not file.is_file():
        raise ValueError(f"there is no file {match['file']}")
    with _importing_from(file.parent):
        module = _run(file)
        if not hasattr(module, name):
            there = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise ValueError(f"{file} has no {name!r}; it has: {', '.join(there) or 'no function or class'}")
        made = getattr(module, name)
        if inspect.isclass(made) or inspect.isfunction(made):
            made = _call(spec, made, device)
    check_extractor(made, spec)
    return made  # type: ignore[no-any-return]  # checked


def check_extractor(extractor: Any, what: str) -> None:
    """Raises ValueError, in sentences that begin with `what`, unless it is an Extractor that works on a black image:
    features of the right shapes, finite, frozen, and the same when asked again."""
    missing = [name for name in (*NUMBERS, *TRIPLES) if not hasattr(extractor, name)]
    missing += [] if callable(extractor) else ["__call__(images)"]
    missing += [] if callable(getattr(extractor, "last_blocks", None)) else ["last_blocks(images, num)"]
    if missing:
        raise ValueError(f"{what} gives a {type(extractor).__name__}, which lacks {', '.join(missing)}")
    for name in NUMBERS:
        value = getattr(extractor, name)
        if type(value) is not int or value < 1:
            raise ValueError(f"{what}: {name} must be a whole number of at least 1, not {value!r}")
    for name in TRIPLES:
        _check_triple(what, name, getattr(extractor, name))
    if not isinstance(getattr(extractor, "device", torch.device("cpu")), torch.device):
        raise ValueError(f"{what}: device must be a torch.device, not {extractor.device!r}")
    if isinstance(extractor, nn.Module) and extractor.training:
        raise ValueError(f"{what} is in training mode: call its eval() before it is returned")
    side = max(1, min(extractor.image_size, MOST) // extractor.stride) * extractor.stride
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (extractor.mean, extractor.std))
    black = ((torch.zeros(1, 3, side, side) - mean) / std).to(getattr(extractor, "device", "cpu"))
    first, second = (_tried(what, "a call", lambda: extractor(black)) for _ in range(2))
    _check_features(what, first, extractor, side)
    if float((first.cls - second.cls).abs().max()) > CLOSE * float(first.cls.abs().max()):
        raise ValueError(f"{what} gives other features each time it sees the same image: is dropout on? call eval()")
    count = min(2, extractor.num_blocks)
    last = _tried(what, f"last_blocks(images, {count})", lambda: extractor.last_blocks(black, count))
    if not isinstance(last, list | tuple) or len(last) != count:
        raise ValueError(f"{what}: last_blocks(images, {count}) must give a list of {count} Features, earliest first")
    for features in last:
        _check_features(f"{what}: last_blocks", features, extractor, side)


def _check_triple(what: str, name: str, value: Any) -> None:
    numbers = isinstance(value, list | tuple) and len(value) == 3 and all(type(v) in (int, float) for v in value)
    if not numbers or (name == "std" and min(value) <= 0):
        least = " above 0" if name == "std" else ""
        raise ValueError(f"{what}: {name} must be three numbers{least}, for RGB in [0, 1], not {value!r}")


def _check_features(what: str, features: Any, extractor: Extractor, side: int) -> None:
    width, grid = extractor.embed_dim, side // extractor.stride
    if absent := [part for part in PARTS if not isinstance(getattr(features, part, None), Tensor)]:
        raise ValueError(
            f"{what} gives a {type(features).__name__} without {', '.join(absent)}: return quietvit.contracts.Features"
        )
    registers = features.registers.shape[1] if features.registers.ndim == 3 else "R"
    wanted: dict[str, tuple[Any, ...]] = {
        "cls": (1, width), "registers": (1, registers, width), "patches": (1, grid, grid, width)
    }  # fmt: skip
    for part, shape in wanted.items():
        found: Tensor = getattr(features, part)
        if tuple(found.shape) != shape:
            raise ValueError(
                f"{what}: for one image of {side} x {side} pixels (embed_dim {width}, stride {extractor.stride}) "
                f"{part} must be of shape [{', '.join(map(str, shape))}], not {list(found.shape)}"
            )
        if not found.is_floating_point() or not bool(found.isfinite().all()):
            raise ValueError(f"{what}: {part} holds values that are no finite numbers, for a black image")
        if found.requires_grad:
            raise ValueError(f"{what}: {part} carries a gradient: compute features under torch.no_grad()")


def _tried(what: str, doing: str, call: Any) -> Any:
    try:
        return call()
    except Exception as error:
        raise ValueError(f"{what}: {doing} fails on one black image: {_told(error)}") from error


def _call(spec: str, made: Any, device: str) -> Any:
    from quietvit.train.device import pick_device

    given = {"device": pick_device(device)} if "device" in inspect.signature(made).parameters else {}
    try:
        return made(**given)
    except Exception as error:
        raise ValueError(f"{spec} cannot be made: {_told(error)}") from error


def _run(file: Path) -> ModuleType:
    name = f"quietvit_own_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{file} cannot be run: {_told(error)}") from error
    return module


def _told(error: Exception) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")]
    where = "" if isinstance(error, SyntaxError) else f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
    return f"{type(error).__name__}: {error}{where}"


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
