"""A job: strings and paths, so that it can be pickled, queued and repeated. The same job in the same folder resumes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from quietvit.config.load import ConfigError, differences, load_config, to_yaml
from quietvit.config.resolve import check
from quietvit.config.schema import RunConfig
from quietvit.files import write_text


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


def prepare_run_dir(out_dir: Path, config: RunConfig) -> None:
    """Make the run folder and write its config.yaml; an existing run must have the same settings.

    Raises ConfigError when the folder cannot be written or holds a run with other settings.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        recorded = out_dir / "config.yaml"
        if recorded.exists():
            changed = differences(load_config(str(recorded)), config)
            if changed:
                raise ConfigError(
                    f"{out_dir} holds a run with other settings:\n  " + "\n  ".join(changed) + "\n"
                    "Repeat its settings to resume it, or choose another --out for a new run"
                )
        write_text(recorded, to_yaml(config))
    except OSError as error:
        raise ConfigError(f"cannot write the run folder {out_dir}: {error.strerror or error}") from error


def run_job(job: Job, console: Console) -> int:
    """Run a job in this process. Returns the exit code: 0 when it finished, 128 + signal when it saved and left."""
    config = job.config()
    out_dir = Path(job.out_dir)
    prepare_run_dir(out_dir, config)
    from quietvit.build import build_training
    from quietvit.train.loop import run

    finished = run(build_training(config, out_dir, console))
    return 0 if finished.signum is None else 128 + finished.signum
