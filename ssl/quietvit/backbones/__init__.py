"""The BACKBONES table. A new backbone is a Trunk with another stem, plus one line here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from inspect import signature
from typing import Any

from quietvit.backbones.t2t_vit import T2TViT
from quietvit.backbones.trunk import Trunk, TrunkOptions
from quietvit.backbones.vit import VisionTransformer

__all__ = ["BACKBONES", "Trunk", "make_backbone"]

BACKBONES: Mapping[str, type[Trunk]] = {"vit": VisionTransformer, "t2t_vit": T2TViT}


def make_backbone(name: str, *, size: str | None = None, **arguments: Any) -> Trunk:
    """Build a backbone: the arguments of a named size (`BACKBONES[name].SIZES`), overridden by those given.

    `make_backbone(name, **backbone.arguments)` rebuilds an existing one.

    Raises:
        ValueError: unknown name, size or argument (the message names the nearest), or a value that cannot be.
    """
    _check_known("backbone", name, BACKBONES)
    backbone = BACKBONES[name]
    if size is not None:
        _check_known(f"size of {name}", size, backbone.SIZES)
        arguments = {**backbone.SIZES[size], **arguments}
    stem = [p.name for p in signature(backbone).parameters.values() if p.kind is p.KEYWORD_ONLY]
    known = [*stem, *(f.name for f in fields(TrunkOptions))]
    for key in arguments:
        _check_known(f"argument of {name}", key, known)
    missing = [key for key in ("embed_dim", "depth", "num_heads") if key not in arguments]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}; or a size, one of {', '.join(backbone.SIZES)}")
    return backbone(**arguments)


def _check_known(what: str, name: str, known: Iterable[str]) -> None:
    names = list(known)
    if name not in names:
        near = get_close_matches(name, names, n=2, cutoff=0.4)
        raise ValueError(f"unknown {what} '{name}'; " + (f"nearest: {', '.join(near)}; " if near else "")
                         + f"known: {', '.join(names)}")  # fmt: skip
