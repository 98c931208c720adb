"""Result cards: every score with everything that must be known before it is believed or compared."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quietvit.files import write_text

FORMAT = "quietvit-card-1"


@dataclass(frozen=True)
class Card:
    """One score of one model on one data set by one protocol. Scores are shares in [0, 1]."""

    task: str
    subject: str  # "model", "random-init" or "pixels"
    scores: dict[str, float]
    main: str  # the headline, a key of scores
    standard_error: float  # of the headline, from the number of test images alone
    model: dict[str, Any]  # hash of the weights, architecture, provenance, precision, path
    data: dict[str, Any]  # of each split that was read, train and test: name, fingerprint, images, unreadable ones
    label: str
    num_classes: int
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


def write_card(card: Card, folder: Path) -> Path:
    """Write `<task>_<label>_<subject>_<hash>.json`. A card is only overwritten by the same model and protocol."""
    folder.mkdir(parents=True, exist_ok=True)
    own = hashlib.sha256(f"{card.protocol_key()} {card.model.get('hash')}".encode()).hexdigest()[:8]
    label = "".join(c if c.isalnum() or c in "-_" else "-" for c in card.label)
    path = folder / f"{card.task}_{label}_{card.subject}_{own}.json"
    write_text(path, json.dumps(asdict(card), indent=2) + "\n")
    return path


def read_card(path: Path) -> Card:
    """Read a card. Raises ValueError if the file is not one of this version's."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a result card: {error}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"{path} is not a result card of the format {FORMAT!r}")
    return Card(**values)
