"""Settings as people write them, as the types that a task's options have. No torch here."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from quietvit.config.load import explained_yaml


def parse_value(text: str) -> Any:
    """The YAML value of `text`: 5, 1e-3, true, null, [1, 4], or text. Raises ValueError if it does not parse."""
    with explained_yaml(f"the value {text!r}"):
        return OmegaConf.to_container(OmegaConf.create(f"value: {text}"), resolve=True)["value"]  # type: ignore[call-overload,index]


def parse_setting(text: str) -> tuple[str, Any]:
    """ "steps=500" as ("steps", 500). Raises ValueError for text of another form."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ValueError(f"{text!r} is not a setting: write it as key=value, e.g. steps=500")
    return name.strip(), parse_value(value)


def typed_options(options: type[Any], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`given` in the types of the fields of the dataclass `options`. `where` begins the messages, e.g. "task linear".

    Lists become tuples and whole numbers floats where such are wanted. Raises ValueError for an option that is not
    there, naming the nearest, and for a value of another type.
    """
    hints = typing.get_type_hints(options)
    known = [f.name for f in dataclasses.fields(options)]
    out = {}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{where} has no option {name!r}; {nearest(name, known)}")
        fitting = _fitting(value, hints[name])
        if fitting is _NONE_FITS:
            raise ValueError(f"{where}: {name} takes {_said(hints[name])}, not {value!r}")
        out[name] = fitting
    return out


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """ "nearest: x; there are: ..." for a message."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return (f"nearest: {near[0]}; " if near else "") + f"there are: {', '.join(names) or 'none'}"


_NONE_FITS = object()


def _fitting(value: Any, hint: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        exact = [a for a in args if type(value) is a]
        found = [_fitting(value, a) for a in (*exact, *args)]
        return next((f for f in found if f is not _NONE_FITS), _NONE_FITS)
    if origin is typing.Literal:
        return value if value in args else _NONE_FITS
    if origin is tuple:
        return _fitting_tuple(value, args)
    if hint is type(None):
        return None if value is None else _NONE_FITS
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is bool or not isinstance(value, bool):
        return value if isinstance(value, hint) else _NONE_FITS
    return _NONE_FITS


def _fitting_tuple(value: Any, args: tuple[Any, ...]) -> Any:
    if not isinstance(value, list | tuple):
        return _NONE_FITS
    of_any_length = len(args) == 2 and args[1] is Ellipsis
    if not of_any_length and len(value) != len(args):
        return _NONE_FITS
    found = tuple(_fitting(v, a) for v, a in zip(value, args[:1] * len(value) if of_any_length else args, strict=True))
    return _NONE_FITS if _NONE_FITS in found else found


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "null"}


def _said(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_said(a) for a in args)
    if origin is typing.Literal:
        return " or ".join(map(str, args))
    if origin is tuple and args[-1] is Ellipsis:
        return f"a list [...] of values, each {_said(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)} values, [{', '.join('x' * len(args))}], each {_said(args[0])}"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))
