"""Weights that others released: which family a file is of is told by the names in it, never by its own name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from quietvit.backbones import make_backbone
from quietvit.weights import dinov2, hub_folder, open_clip, t2t, timm, timm_folder, transformers_folder
from quietvit.weights.family import Converted, Family, Hints, UnknownNormalisation
from quietvit.weights.native import load_strictly
from quietvit.weights.tensors_file import read_tensors
from quietvit.weights.torch_file import (
    check_stored,
    choose_entry,
    list_names,
    plain_names,
    strip_prefixes,
    tensor_keys,
)

__all__ = ["FAMILIES", "FOLDERS", "FolderFamily", "is_released_folder", "load_released", "plain_tensors"]

TIMM = Family("timm", timm.ABOUT, timm.recognises, timm.convert, beside=timm_folder.hints_beside)
# In the order in which they are asked: timm's names are those of DINOv2, less what DINOv2 alone has.
FAMILIES: Mapping[str, Family] = {f.name: f for f in (t2t.FAMILY, dinov2.FAMILY, open_clip.FAMILY, TIMM)}

# Where training code nests the weights; the average of the weights comes before the last ones.
ENTRIES = ("state_dict_ema", "teacher", "model", "state_dict")
WHOLE = (hub_folder.WEIGHTS_NAME, hub_folder.TORCH_NAME)  # what folders with a configuration call their weights
PREFIXES = ("module.", "model.", "teacher.", "backbone.")
WRAPPERS = re.compile(r"(?<![^.])(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


@dataclass(frozen=True)
class FolderFamily:
    """One row of FOLDERS: models that are a configuration beside weights, rather than a file that says all."""

    about: str  # for errors: by what a folder is recognised
    recognises: Callable[[Path], bool]
    load: Callable[[Path, Hints], Converted]


FOLDERS: Mapping[str, FolderFamily] = {
    "timm": FolderFamily("config.json of timm", timm_folder.is_folder, timm_folder.load_folder),
    "transformers": FolderFamily(
        "config.json of a Dinov2Model or Dinov2WithRegistersModel of transformers",
        transformers_folder.is_folder,
        transformers_folder.load_folder,
    ),
}


def is_released_folder(path: Path) -> bool:
    """Whether a folder is one that `load_released` knows."""
    return open_clip.folder_weights(path) is not None or any(f.recognises(path) for f in FOLDERS.values())


def load_released(path: Path | str, hints: Hints | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The backbone of a file or folder of one of FAMILIES or FOLDERS, in eval mode on the CPU, and its description
    (as `native.load_backbone`), whose provenance says what was left out, added or assumed.

    Raises FileNotFoundError if there is no such file; ValueError if it is truncated, needs code to be unpickled, is of
    no known family or not exactly one of its models (the message names the keys); its UnknownNormalisation if mean
    and std of the input cannot be told and `hints` do not tell them.
    """
    path, hints = Path(path), hints or Hints()
    name = path.name
    if path.is_dir() and (weights := open_clip.folder_weights(path)):
        path = weights
    elif path.name in WHOLE and any(f.recognises(path.parent) for f in FOLDERS.values()):
        path = path.parent  # the configuration there says more about the file than its names do
    if path.is_dir():
        source, converted = _convert_folder(path, hints)
        facts: Mapping[str, str] = {}
    else:
        source, converted, facts = _convert_file(path, hints)
    normalisation = hints.normalisation or converted.normalisation
    if normalisation is None:
        raise UnknownNormalisation(
            f"{path} does not tell which mean and standard deviation its images were normalised with. Put timm's "
            "config.json beside it, or give mean and std; on the command line, once: quietvit export "
            f"{path.name} --normalisation imagenet|inception|clip --out FOLDER"
        )
    activation = {} if hints.activation is None else {"activation": hints.activation}
    arguments = {**converted.arguments, **activation}
    backbone = _build(replace(converted, arguments=arguments), what=f"{path} ({source})")
    mean, std = normalisation
    provenance: dict[str, Any] = {"source": source, "file": name, **facts, **converted.facts, **_stored_as(converted)}
    asked = () if hints.normalisation is None else ("the normalisation is the one asked for",)
    if notes := [*converted.notes, *asked]:
        provenance["notes"] = notes
    return backbone, {
        "backbone": {"name": converted.backbone, "arguments": arguments},
        "normalisation": {"mean": list(mean), "std": list(std)},
        "image_size": converted.image_size,
        "provenance": provenance,
    }


def _convert_folder(path: Path, hints: Hints) -> tuple[str, Converted]:
    for name, family in FOLDERS.items():
        if family.recognises(path):
            _check_registers(hints, path, name)
            return name, family.load(path, hints)
    known = " or ".join(family.about for family in FOLDERS.values())
    raise ValueError(f"the folder {path} has no {known}, so that nothing tells what its weights are")


def _convert_file(path: Path, hints: Hints) -> tuple[str, Converted, dict[str, str]]:
    loaded = read_tensors(path)
    hints = replace(hints, names={'its "arch"': str(loaded.get("arch", "")), "the file's name": path.name})
    try:
        entry, tensors = plain_tensors(loaded)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    family = next((f for f in FAMILIES.values() if f.recognises(tensors.keys())), None)
    if family is None:
        keys, known = list(tensor_keys(loaded)), "; ".join(f.about for f in FAMILIES.values())
        raise ValueError(
            f"{path} is of no family that can be read. Of those that can, {known}. "
            f"Found: {len(keys)} tensors ({list_names(keys)}) under {list_names(map(str, loaded))}"
        )
    if not family.adds_registers:
        _check_registers(hints, path, family.name)
    try:
        hints = family.beside(path, hints) if family.beside else hints
        converted = family.convert(tensors, hints)
    except ValueError as error:
        raise ValueError(f"{path}, read as {family.name}: {error}") from error
    return family.name, converted, {"entry": entry}


def plain_tensors(loaded: Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """The tensors of a loaded file that make up the model, without what wrappers put before their names.

    Chosen are the entry where training code nests them (returned first; "" for the file itself) and the teacher among
    several models. Raises ValueError if two names become one, or if there is a student without a teacher.
    """
    entry, entries = choose_entry(loaded, ENTRIES)
    tensors = {k: v for k, v in entries.items() if isinstance(v, Tensor)}
    tensors = plain_names(tensors, lambda key: WRAPPERS.sub("", strip_prefixes(str(key), ("module.",))))
    if any(k.startswith("teacher.") for k in tensors):  # a whole training state: the student is not what is used
        tensors = {k: v for k, v in tensors.items() if k.startswith("teacher.")}
    elif any(k.startswith("student.") for k in tensors) or (not entry and isinstance(loaded.get("student"), Mapping)):
        raise ValueError(
            "it holds a student without its teacher, and the teacher is what is evaluated and used. If the student is "
            "what you want, save its weights alone, as a dictionary of tensors"
        )
    return entry, plain_names(tensors, lambda key: strip_prefixes(key, PREFIXES))


def _build(converted: Converted, *, what: str) -> nn.Module:
    """The backbone with its tensors, all of them and no others."""
    try:
        backbone = make_backbone(converted.backbone, **converted.arguments)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    check_stored(converted.tensors, what=what)
    load_strictly(backbone, converted.tensors, what=what)
    return backbone.eval()


def _stored_as(converted: Converted) -> dict[str, str]:
    kinds = {str(v.dtype).removeprefix("torch.") for v in converted.tensors.values()} - {"float32"}
    return {"stored_as": ", ".join(sorted(kinds))} if kinds else {}


def _check_registers(hints: Hints, path: Path, family: str) -> None:
    if hints.num_registers:
        raise ValueError(
            f"{path}: num_registers adds untrained registers to T2T-ViT files; this is a {family} one, which says "
            "itself how many it has. To train with more, begin from it: init.from with model.num_registers"
        )
