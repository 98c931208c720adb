"""Which runs a study is made of: read from their folders, and alike in all but the number of registers and the seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quietvit.config.load import RESUMABLE, flatten, load_config
from quietvit.config.schema import RunConfig
from quietvit.weights.extractor import newest_teacher
from quietvit.weights.native import read_meta

COUNTS = (0, 1, 2, 4, 8, 16)  # registers paper, Figure 8
SEEDS = (0, 1)  # ours: the fewest that say anything about their spread
VARIED = ("model.num_registers", "train.seed")
NOTES = ("status.json", "environment.json")  # of a run folder: no part of the model
# Like RESUMABLE: they change how fast a run goes, or what is noted beside it, and not what is learnt. Data may have
# been moved, so that not their path but their fingerprint must agree.
NOT_COMPARED = (*RESUMABLE, "train.threads", "parallel.timeout")


@dataclass(frozen=True)
class StudyRun:
    """A finished run. `weights` is the SHA-256 of its newest teacher's file."""

    registers: int
    seed: int
    folder: Path
    config: RunConfig
    teacher: Path
    step: int
    data: str  # fingerprint of the images it was trained on
    images: str  # their name

    @property
    def name(self) -> str:
        return run_name(self.registers, self.seed)

    def weights(self) -> str:
        """SHA-256 of the teacher's file."""
        return file_hash(self.teacher)


def run_name(registers: int, seed: int) -> str:
    """The name of a run's folder, as `quietvit sweep` has it."""
    return f"num_registers={registers},seed={seed}"


def read_run(folder: Path) -> StudyRun:
    """A finished run as its folder tells it. Raises ValueError for a folder without settings or a usable teacher, or
    with a teacher of another seed or number of registers than the settings say."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise ValueError(f"{folder} is no run folder: it has no config.yaml")
    config = load_config(str(file))
    try:
        teacher = newest_teacher(folder)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
    meta = read_meta(teacher)
    known = meta["provenance"]
    registers = int(meta["backbone"]["arguments"].get("num_registers", 0))
    told = {"model.num_registers": registers, "train.seed": int(known.get("seed", config.train.seed))}
    settings = flatten(config)
    wrong = [
        f"{key}: {settings[key]} in config.yaml, {value} in {teacher.name}"
        for key, value in told.items()
        if settings[key] is not None and settings[key] != value
    ]
    if wrong:
        raise ValueError(f"{folder}: weights and settings are of different runs: {'; '.join(wrong)}")
    return StudyRun(
        registers,
        config.train.seed,
        folder,
        config,
        teacher,
        int(known.get("step", 0)),
        str(known.get("data_fingerprint", "")),
        str(known.get("data", "")),
    )


def disagreements(reference: RunConfig, other: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Settings in which two runs differ, besides seed, registers and what changes nothing that is learnt."""
    a, b = flatten(reference), flatten(other)
    return {
        key: (a[key], b[key])
        for key in a
        if a[key] != b[key] and key not in VARIED and not key.startswith(NOT_COMPARED)
    }


def check_alike(runs: Sequence[StudyRun], reference: RunConfig, what: str) -> None:
    """Raises ValueError, naming the keys, if a run has other settings than `reference`, which is `what`; and if two
    runs were trained on different images or for different numbers of steps."""
    lines = []
    for run in runs:
        for key, (wanted, found) in disagreements(reference, run.config).items():
            lines.append(f"{run.folder}: {key}={found!r}, but {wanted!r} in {what}")
    for fact, name in (("data", "images (fingerprint)"), ("step", "steps done")):
        values: dict[Any, StudyRun] = {}
        for run in runs:
            values.setdefault(getattr(run, fact), run)
        if len(values) > 1:
            said = ", ".join(f"{value or 'unknown'} in {run.folder}" for value, run in values.items())
            lines.append(f"{name}: {said}")
    if lines:
        raise ValueError(
            "these runs differ in more than registers and seed, so that a study of them would tell nothing about "
            "registers:\n  " + "\n  ".join(lines) + "\nGive the settings that they have, or leave such runs out"
        )


def by_place(runs: Iterable[StudyRun]) -> dict[tuple[int, int], StudyRun]:
    """Runs by (registers, seed). Raises ValueError if two have the same."""
    found: dict[tuple[int, int], StudyRun] = {}
    for run in runs:
        place = (run.registers, run.seed)
        before = found.setdefault(place, run)
        if before.folder.resolve() != run.folder.resolve():
            raise ValueError(
                f"two runs have {run.registers} registers and seed {run.seed}: {before.folder} and {run.folder}. "
                "Leave one of them out"
            )
    return found


def settings_of(config: RunConfig) -> Mapping[str, Any]:
    """All settings by dotted name but the two that vary, for study.json."""
    return {key: value for key, value in flatten(config).items() if key not in VARIED}


def model_hash(path: Path) -> str:
    """SHA-256 of whatever a model is made of: a file; of a folder the newest teacher, or the tensors and JSON in it."""
    if path.is_file():
        return file_hash(path)
    files = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".json") and p.name not in NOTES)
    if not any(p.suffix == ".safetensors" for p in files):
        files.append(newest_teacher(path))
    return hashlib.sha256("".join(file_hash(p) for p in files).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
