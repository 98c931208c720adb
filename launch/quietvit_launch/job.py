"""A job: strings and paths, so that it can be pickled, queued and repeated. The same job in the same folder resumes."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from quietvit.config.load import ConfigError, differences, load_config, to_yaml
from quietvit.config.resolve import check, plan
from quietvit.config.schema import RunConfig
from quietvit.files import write_text
from quietvit_launch.mistakes import file_system_reason, message_for_user

STATUS = "status.json"
T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One pretraining run."""

    recipe: str  # shipped name or YAML file
    overrides: tuple[str, ...]  # a.b=c
    out_dir: str

    def config(self) -> RunConfig:
        """The checked config; raises ConfigError. Needs no torch, so wrong arguments are answered at once."""
        config = load_config(self.recipe, self.overrides)
        check(config)
        return config


def check_data(config: RunConfig) -> None:
    """Look at the data before torch is imported and anything is written.

    Raises ValueError when there are no images where the config says, or fewer than a batch holds. Images themselves
    are not read, and the index of a large set is kept for when it is opened again.
    """
    from quietvit.data.sources import open_source

    data = config.data
    source = open_source(data.source, data.path, split=data.split, **data.options)
    if isinstance(config.train.batch_size, int):
        stride = config.model.patch_size or 1  # that of a model that is yet to be read decides nothing here
        plan(config, num_images=len(source), batch_size=config.train.batch_size, stride=stride)


def check_start(config: RunConfig, out_dir: Path) -> None:
    """Raises ConfigError if there is no model where init.from says. A run that is resumed does without."""
    begins = config.init.from_
    if begins is not None and not Path(begins).expanduser().exists() and not has_checkpoint(out_dir):
        raise ConfigError(f"init.from={begins}: there is no such file or folder")


def prepare_run_dir(out_dir: Path, config: RunConfig) -> list[Path]:
    """Make the run folder and write its config.yaml. Returns what was not there before, for `withdraw`.

    A run that has a checkpoint must have the same settings. One that never came so far has nothing to lose: the new
    settings take its place, so that a first attempt with, say, too large a batch does not spoil the folder. Raises
    ConfigError when the folder cannot be written or holds a run with other settings.
    """
    recorded = out_dir / "config.yaml"
    made = [p for p in (recorded, out_dir, *out_dir.parents) if not p.exists()]
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        check_same_run(out_dir, config)
        if not has_checkpoint(out_dir):
            # What could not be read by an attempt that is given up must not count against this one.
            (out_dir / "unreadable.txt").unlink(missing_ok=True)
        write_text(recorded, to_yaml(config))
    except OSError as error:
        withdraw(made)
        raise ConfigError(f"cannot write the run folder {out_dir}: {file_system_reason(error)}") from error
    return made


def has_checkpoint(out_dir: Path) -> bool:
    return any((out_dir / "checkpoints").glob("step_*"))


def check_same_run(out_dir: Path, config: RunConfig) -> None:
    """Raises ConfigError, with what differs, if the folder holds checkpoints of a run with other settings."""
    recorded = out_dir / "config.yaml"
    if not has_checkpoint(out_dir) or not recorded.exists():
        return
    changed = differences(load_config(str(recorded)), config)
    if changed:
        raise ConfigError(
            f"{out_dir} holds a run with other settings:\n  " + "\n  ".join(changed) + "\n"
            "Repeat its settings to resume it, or choose another --out for a new run"
        )


def withdraw(made: list[Path]) -> None:
    """Take back what `prepare_run_dir` made for a run that could not begin. Folders with anything in them stay."""
    for path in made:
        with contextlib.suppress(OSError):
            if path.is_dir():
                path.rmdir()
            else:
                for name in ("environment.json", "init.json", STATUS):
                    path.with_name(name).unlink(missing_ok=True)
                path.unlink()


def begin(job: Job) -> list[Path]:
    """Check a job's settings and data and make its folder; returns what `prepare_run_dir` does. Needs no torch."""
    config = job.config()
    out_dir = Path(job.out_dir).expanduser()
    check_start(config, out_dir)
    check_data(config)
    return prepare_run_dir(out_dir, config)


def run_job(job: Job, console: Console) -> int:
    """Run a job in this process. Returns the exit code: 0 when it finished, 128 + signal when it saved and left.

    In a process group all ranks call: the first one checks the data and makes the folder, and what is wrong with them
    is raised on all. `console` of the other ranks should be quiet.
    """
    config = job.config()
    out_dir = Path(job.out_dir).expanduser()
    made = on_first_rank(lambda: begin(job))
    from quietvit import dist
    from quietvit.build import build_training
    from quietvit.train.loop import run

    first = dist.rank() == 0
    try:
        training = build_training(config, out_dir, console)
        if first:
            write_status(out_dir, "running", steps=training.steps)
        finished = run(training)
    except BaseException as error:
        if first:
            if not (out_dir / "metrics.jsonl").exists():  # it fell before its first step: no run is there
                withdraw(made)
            message = message_for_user(error) or f"{type(error).__name__}: {error}"
            write_status(out_dir, "failed", message="interrupted" if isinstance(error, KeyboardInterrupt) else message)
        raise
    code = 0 if finished.signum is None else 128 + finished.signum
    if first:
        said = f"saved at step {finished.step} of {finished.steps}" if code else ""
        write_status(out_dir, "stopped" if code else "finished", steps=finished.steps, message=said)
    return code


def on_first_rank(action: Callable[[], T]) -> T:
    """What `action` returns on the first rank, on all ranks; alone simply its result.

    A ValueError or OSError there is raised on all of them, as the ConfigError that says its message.
    """
    # Alone, wrong settings are answered before torch is imported.
    if "torch.distributed" not in sys.modules:
        return action()
    from quietvit import dist

    if not dist.is_distributed():
        return action()
    own: tuple[T | None, str | None] = (None, None)
    if dist.rank() == 0:
        try:
            own = action(), None
        except (ValueError, OSError) as error:
            own = None, message_for_user(error) or str(error)
    result, message = dist.gather_objects(own)[0]
    if message is not None:
        raise ConfigError(message)
    return result  # type: ignore[return-value]


def write_status(out_dir: Path, state: str, *, message: str = "", steps: int | None = None) -> None:
    """Note in the run folder how the run is, for `quietvit jobs`: "running", "finished", "stopped" or "failed".

    Nothing is written where there is no folder, and a disk that is full stops nobody. `steps` once written stays.
    """
    if not out_dir.is_dir():
        return
    if steps is None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            steps = json.loads((out_dir / STATUS).read_text(encoding="utf-8")).get("steps")
    status: dict[str, Any] = {"state": state, "message": message, "steps": steps, "time": round(time.time(), 1)}
    status |= {"host": socket.gethostname(), "pid": os.getpid()}
    with contextlib.suppress(OSError):
        write_text(out_dir / STATUS, json.dumps(status, indent=1) + "\n")
