"""The model that a run begins with (`init.from`), and the note in the run folder that a resumed run reads instead."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from quietvit.backbones import Trunk, make_backbone
from quietvit.files import write_text
from quietvit.weights.adapt import adapt
from quietvit.weights.extractor import load
from quietvit.weights.native import weights_hash

__all__ = ["Start", "read_start"]

NOTE = "init.json"
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Start:
    """A model to begin with. `source` is None in a resumed run, whose weights come from its own checkpoint."""

    file: str  # name of the file or folder, without its path
    name: str  # of its kind of backbone
    arguments: dict[str, Any]  # of make_backbone, all of them
    mean: Triple  # input normalisation, RGB in [0, 1]
    std: Triple
    hash: str  # weights_hash of the model as it was found
    provenance: dict[str, Any]  # its own
    changes: tuple[str, ...] = ()  # what was made different for this run
    source: Trunk | None = None

    def backbone(self, arguments: dict[str, Any]) -> tuple[Start, Trunk]:
        """The run's backbone with `arguments`, and this start with what had to be changed for it.

        Raises ValueError as `adapt`.
        """
        if self.source is None:
            return self, make_backbone(self.name, **arguments)
        backbone, changes = adapt(self.source, self.name, arguments)
        return replace(self, changes=tuple(changes), source=None), backbone

    def write(self, run_dir: Path) -> None:
        """Leave the note, so that the run can be resumed where the file is no longer, or no longer the same."""
        about = {k: v for k, v in asdict(replace(self, source=None)).items() if k != "source"}
        write_text(run_dir / NOTE, json.dumps(about, indent=1) + "\n")

    def about(self) -> dict[str, Any]:
        """What the provenance of the run's teacher says of it."""
        return {"file": self.file, "hash": self.hash, "changes": list(self.changes), "provenance": self.provenance}


def read_start(path: str, run_dir: Path, *, resumed: bool, num_heads: int | None = None) -> Start:
    """The model at `path` (anything that `quietvit.weights.load` reads), or a resumed run's note of it.

    `num_heads`: for T2T-ViT files, whose shapes do not tell it. Raises as `load`, and ValueError for a note that cannot
    be read.
    """
    if resumed and (run_dir / NOTE).is_file():
        return _read_note(run_dir / NOTE)
    extractor = load(path, device="cpu", num_heads=num_heads)
    source = cast(Trunk, extractor.backbone)
    return Start(
        file=Path(path).expanduser().resolve().name,
        name=extractor.meta["backbone"]["name"],
        arguments={**source.arguments},
        mean=extractor.mean,
        std=extractor.std,
        hash=weights_hash(source),
        provenance=dict(extractor.meta["provenance"]),
        source=source,
    )


def _read_note(path: Path) -> Start:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        mean, std, changes = (tuple(about.pop(name)) for name in ("mean", "std", "changes"))
        return Start(**about, mean=cast(Triple, mean), std=cast(Triple, std), changes=changes)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} says what this run began with, and cannot be read ({error}): the run cannot be resumed without it"
        ) from error
