"""Result cards: every score with everything that must be known before it is believed or compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from quietvit.files import write_atomically, write_text
from quietvit_eval.resampling import PerImage

FORMAT = "quietvit-card-2"
IMAGES = ".images.safetensors"  # beside a card: what was found on every test image


@dataclass(frozen=True)
class Card:
    """One score of one model on one data set by one protocol.

    Scores are shares in [0, 1], or errors in the units that their task tells.
    """

    task: str
    subject: str  # "model", "random-init" or "pixels"
    scores: dict[str, float]
    main: str  # the headline, a key of scores
    higher_is_better: bool  # of the headline
    standard_error: float  # of the headline, from the draw of test images alone
    model: dict[str, Any]  # hash of the weights, architecture, provenance, precision, path
    data: dict[str, Any]  # of each split that was read, train and test: name, fingerprint, images, unreadable ones
    label: str  # label set, or what a pixel's target is
    num_classes: int  # 0 where the target is no class
    protocol: dict[str, Any]  # of the task; with "view" (resize, crop, rule) and "image_size"
    details: dict[str, Any]
    seed: int
    environment: dict[str, Any]  # quietvit and torch versions, hardware
    seconds: float
    created: str  # ISO 8601, UTC
    format: str = FORMAT

    def protocol_key(self) -> str:
        """Equal for cards whose scores may stand side by side: same task, labels, images and protocol."""
        images = {k: (v["fingerprint"], v["images"]) for k, v in self.data.items()}
        text = json.dumps([self.task, self.label, self.seed, images, self.protocol], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def facts(self) -> dict[str, Any]:
        """What `protocol_key` is made of, by dotted name, e.g. "protocol.view.resize" or "data.test.fingerprint"."""
        images = {k: {"fingerprint": v["fingerprint"], "images": v["images"]} for k, v in self.data.items()}
        tree = {"task": self.task, "label": self.label, "seed": self.seed, "data": images, "protocol": self.protocol}
        return dict(_flat(json.loads(json.dumps(tree)), ""))


def _flat(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings with their dotted names; lists and empty mappings are leaves."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def card_name(card: Card) -> str:
    """`<task>_<label>_<subject>_<hash>`, the same only for the same model, precision and protocol.

    A model that cannot tell its hash is known by the name of its class.
    """
    who = [card.model.get("hash") or card.model.get("class"), card.model.get("precision")]
    own = hashlib.sha256(json.dumps([card.protocol_key(), who]).encode()).hexdigest()[:8]
    label = "".join(c if c.isalnum() or c in "-_" else "-" for c in card.label)
    return f"{card.task}_{label}_{card.subject}_{own}"


def write_card(card: Card, folder: Path, per_image: PerImage | None = None) -> Path:
    """Write the card as JSON and, beside it, what was found on every test image.

    A card is only overwritten by the same model, precision and protocol.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{card_name(card)}.json"
    if per_image is not None:
        about = {"names": json.dumps(per_image.names), "rule": per_image.rule}
        arrays = {name: np.ascontiguousarray(values) for name, values in per_image.values.items()}
        write_atomically(path.with_suffix(IMAGES), lambda file: save_file(arrays, file, metadata=about))
    write_text(path, json.dumps(asdict(card), indent=2) + "\n")
    return path


def read_per_image(card_path: Path) -> PerImage:
    """What lies beside a card. Raises ValueError if it is not there or broken."""
    path = card_path.with_suffix(IMAGES)
    try:
        with safe_open(path, "np") as file:
            about = file.metadata()
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        return PerImage(json.loads(about["names"]), values, about["rule"])
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: it was written beside {card_path.name} and is needed with it") from error
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_card(path: Path) -> Card:
    """Read a card. Raises ValueError if the file is not one of this version's, OSError if it is not there."""
    values = _read_json(path)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else None
        old = f": it is of the format {found!r}; evaluate the model again" if _is_format(found) else ""
        raise ValueError(f"{path} is not a result card of the format {FORMAT!r}{old}")
    names = {f.name for f in fields(Card)}
    if wrong := sorted(names ^ set(values)):
        said = ", ".join(f"{name} ({'missing' if name in names else 'unknown'})" for name in wrong)
        raise ValueError(f"{path} is a broken result card: {said}")
    return Card(**values)


def find_cards(path: Path) -> dict[Path, Card]:
    """The card at `path`, or all cards in that folder and in its folder `eval`, by path, sorted.

    Other JSON files of a folder are passed over. Raises ValueError if there is no card, or a broken one or one of
    another format among them.
    """
    if path.is_file():
        return {path: read_card(path)}
    if not path.is_dir():
        raise ValueError(f"there is no card and no folder at {path}")
    files = [*sorted(path.glob("*.json")), *sorted((path / "eval").glob("*.json"))]
    found = {file: read_card(file) for file in files if _claims_to_be_card(file)}
    if not found:
        raise ValueError(f"there are no result cards in {path} nor in {path / 'eval'}: `quietvit eval` writes them")
    return found


def _claims_to_be_card(path: Path) -> bool:
    values = _read_json(path)
    return isinstance(values, dict) and _is_format(values.get("format"))


def _is_format(text: object) -> bool:
    return isinstance(text, str) and text.startswith("quietvit-card-")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a result card: {error}") from error
