"""Result cards: every score with everything that must be known before it is believed or compared."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
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


def card_name(card: Card) -> str:
    """`<task>_<label>_<subject>_<hash>`, the same only for the same model and protocol."""
    own = hashlib.sha256(f"{card.protocol_key()} {card.model.get('hash')}".encode()).hexdigest()[:8]
    label = "".join(c if c.isalnum() or c in "-_" else "-" for c in card.label)
    return f"{card.task}_{label}_{card.subject}_{own}"


def write_card(card: Card, folder: Path, per_image: PerImage | None = None) -> Path:
    """Write the card as JSON and, beside it, what was found on every test image.

    A card is only overwritten by the same model and protocol.
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
    """Read a card. Raises ValueError if the file is not one of this version's."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a result card: {error}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"{path} is not a result card of the format {FORMAT!r}")
    return Card(**values)
