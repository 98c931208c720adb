"""`--on slurm`: settings of a job, its sbatch script, and its submission through submitit."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor

from quietvit.config.load import ConfigError, from_mapping
from quietvit.config.schema import RunConfig
from quietvit.files import write_text
from quietvit_launch.job import Job, check_data, check_same_run, check_start, prepare_run_dir, withdraw
from quietvit_launch.snapshot import snapshot_path, take_snapshot
from quietvit_launch.tasks import Evaluate, Evaluation, Train

LOGS = "slurm"  # folder of a run or sweep: scripts, logs, pickled jobs
RECORD = Path("slurm", "job.json")  # of a run: its job, for `quietvit jobs` and `cancel`
PREFIX = "slurm."
# slurmctld looks at time limits every 30 s and warns up to 30 s early; Python needs some seconds to start.
EARLIEST_WARNING_S = 45


@dataclass(frozen=True)
class SlurmConfig:
    """The keys of configs/launch/slurm.yaml, which says what each is. The defaults are ours."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodes: int = 1
    gpus_per_node: int = 1
    tasks_per_node: int | None = None
    cpus_per_task: int = 8
    mem_gb: float | None = None
    time_min: int = 1440
    signal_delay_s: int = 120
    max_requeues: int = 50
    array_parallelism: int = 8
    eval_time_min: int = 240
    python: str | None = None
    check_data: bool = True
    setup: str | None = None
    extra: dict[str, str | int | bool] = field(default_factory=dict)

    @property
    def tasks(self) -> int:
        """Processes on a node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)


def load_slurm(recipe: str, overrides: Sequence[str] = ()) -> SlurmConfig:
    """Read a launch recipe ("slurm" or the path of a YAML file) and apply `slurm.key=value`.

    Raises ConfigError for an unknown recipe or key, and for values that cannot be.
    """
    known = resources.files("quietvit.configs").joinpath("launch", f"{recipe}.yaml")
    file = Path(recipe).expanduser()
    if file.suffix not in (".yaml", ".yml") and not known.is_file():
        raise ConfigError(f"--slurm {recipe}: there is the recipe `slurm`, or give the path of a .yaml file")
    try:
        text = (file if file.suffix in (".yaml", ".yml") else known).read_text(encoding="utf-8")
        given = OmegaConf.from_dotlist([word.removeprefix(PREFIX) for word in overrides])
        tree = OmegaConf.create(text)
        if not OmegaConf.is_dict(tree):
            raise ConfigError(f"--slurm {recipe} must be key: value pairs")
        values = OmegaConf.to_container(OmegaConf.merge(tree, given), resolve=True)
    except FileNotFoundError as error:
        raise ConfigError(f"--slurm {recipe}: there is no such file") from error
    except Exception as error:
        if isinstance(error, OmegaConfBaseException | UnicodeDecodeError) or type(error).__module__.startswith("yaml"):
            raise ConfigError(f"--slurm {recipe} or a slurm setting does not parse: {error}") from error
        raise
    assert isinstance(values, dict)
    config = from_mapping(SlurmConfig, {str(k): v for k, v in values.items()}, PREFIX)
    _check(config)
    return config


def _check(config: SlurmConfig) -> None:
    least = {"nodes": 1, "cpus_per_task": 1, "time_min": 1, "eval_time_min": 1, "array_parallelism": 1}
    least |= {"gpus_per_node": 0, "max_requeues": 0, "signal_delay_s": 1, "tasks_per_node": 1, "mem_gb": 0}
    for name, number in least.items():
        value = getattr(config, name)
        if value is not None and value < number:
            raise ConfigError(f"slurm.{name}={value}: use {number} or more")
    if config.time_min * 60 - config.signal_delay_s < EARLIEST_WARNING_S:
        most = config.time_min * 60 - EARLIEST_WARNING_S
        raise ConfigError(
            f"slurm.signal_delay_s={config.signal_delay_s} of slurm.time_min={config.time_min}: the warning could come "
            f"before the job runs. Use slurm.signal_delay_s={most} or less, or more time"
        )


def check_share(run: RunConfig, slurm: SlurmConfig) -> None:
    """Raises ConfigError for a batch that the job's processes cannot share evenly."""
    batch, ranks = run.train.batch_size, slurm.nodes * slurm.tasks
    parts = ranks * run.train.accumulate
    if isinstance(batch, int) and batch % parts:
        raise ConfigError(
            f"train.batch_size={batch} cannot be shared evenly by {slurm.nodes} nodes with {slurm.tasks} processes "
            f"each and train.accumulate={run.train.accumulate}: use a multiple of {parts}"
        )


class Executor(SlurmExecutor):
    """submitit's, which can also show its script where there is no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self, count: int | None = None) -> str:
        """What would be handed to sbatch: for one job, or for an array of `count`."""
        parameters = {**self.parameters, **({} if count is None else {"map_count": count})}
        beside, self.parameters = self.parameters, parameters
        try:
            return self._make_submission_file_text(self._submitit_command_str, "")
        finally:
            self.parameters = beside


def make_executor(
    config: SlurmConfig, folder: Path, code: Path, *, name: str, dependency: str | None = None
) -> Executor:
    """An executor whose jobs import the code at `code` and log to `folder`.

    `dependency`: of sbatch, e.g. "afterok:17"; a job whose dependency can no longer be met is dropped.
    """
    python = config.python or shlex.quote(sys.executable)
    executor = Executor(folder, python=f"{python} -m quietvit_launch.early")
    path = f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}"
    extra: dict[str, Any] = {"requeue": True, **({} if dependency is None else {"kill-on-invalid-dep": "yes"})}
    settings = {
        "job_name": name,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "nodes": config.nodes,
        "ntasks_per_node": config.tasks,
        "gpus_per_node": config.gpus_per_node or None,
        "cpus_per_task": config.cpus_per_task,
        "mem": None if config.mem_gb is None else f"{round(config.mem_gb * 1024)}M",
        "time": config.time_min,
        "signal_delay_s": config.signal_delay_s,
        "array_parallelism": config.array_parallelism,
        "dependency": dependency,
        "setup": [*(config.setup or "").splitlines(), path],
        # Since 22.05 srun does not take the CPUs over from sbatch.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={config.cpus_per_task}"],
        "additional_parameters": extra | config.extra,
    }
    executor.update_parameters(**{k: v for k, v in settings.items() if v is not None}, wckey=None)
    return executor


def for_evaluation(config: SlurmConfig) -> SlurmConfig:
    """The same place for one process on one node."""
    return replace(
        config,
        nodes=1,
        tasks_per_node=1,
        gpus_per_node=min(1, config.gpus_per_node),
        time_min=config.eval_time_min,
        signal_delay_s=min(config.signal_delay_s, config.eval_time_min * 60 - EARLIEST_WARNING_S),
    )


def submit(
    jobs: Sequence[Job],
    slurm: SlurmConfig,
    folder: Path,
    *,
    evaluation: Evaluation | None = None,
    dry_run: bool = False,
) -> int:
    """Submit runs: one as a job, several as an array, with logs and code in `folder`. Returns the exit code 0.

    What runs are the settings and the code of now: both are copied. `evaluation` is the job that follows each, if it
    ends well. `dry_run` prints the scripts and writes nothing. Raises ConfigError
    for settings that cannot be, where there is no Slurm, and for what sbatch refuses.
    """
    folder = folder.expanduser().resolve()
    outs = [Path(job.out_dir).expanduser().resolve() for job in jobs]
    configs = [job.config() for job in jobs]
    for out, config in zip(outs, configs, strict=True):
        check_share(config, slurm)
        check_same_run(out, config)
        if slurm.check_data:
            check_start(config, out)
            check_data(config)
    # Frozen: the recipe may be edited before the job starts, or starts again.
    tasks = [Train(Job(str(o / "config.yaml"), (), str(o)), slurm.max_requeues, slurm.signal_delay_s) for o in outs]
    if dry_run:
        _show(slurm, folder, jobs, evaluation)
        return 0
    if shutil.which("sbatch") is None:
        raise ConfigError("there is no Slurm here: sbatch is not on PATH. --dry-run shows the script; --on local runs")
    from quietvit_launch.jobs import in_queue

    for out in outs:
        if (job := in_queue(out)) is not None:
            raise ConfigError(f"{out} is in the queue as job {job}: `quietvit cancel {out}` takes it out")
    made = [path for out, config in zip(outs, configs, strict=True) for path in prepare_run_dir(out, config)]
    new = [path for path in (snapshot_path(folder), folder / LOGS) if not path.exists()]
    try:
        executor = make_executor(slurm, folder / LOGS, take_snapshot(folder), name=folder.name)
        ids = _submitted(executor, tasks)
    except ConfigError:
        for path in new:
            shutil.rmtree(path, ignore_errors=True)
        withdraw(made)
        raise
    follow = [""] * len(ids)
    if evaluation is not None:
        array = ids[0].partition("_")[0]
        after = f"afterok:{ids[0]}" if len(ids) == 1 else f"aftercorr:{array}"
        place = for_evaluation(slurm)
        executor = make_executor(
            place, folder / LOGS, snapshot_path(folder), name=f"{folder.name}-eval", dependency=after
        )
        follow = _submitted(executor, [Evaluate(evaluation, out) for out in outs])
    for out, own, next_one in zip(outs, ids, follow, strict=True):
        _record(out, own, next_one, folder / LOGS)
        print(f"job {own}: {out}" + (f", then job {next_one} evaluates it" if next_one else ""))
    return 0


def _submitted(executor: Executor, tasks: Sequence[Callable[[], int]]) -> list[str]:
    try:
        if len(tasks) == 1:
            return [executor.submit(tasks[0]).job_id]
        with executor.batch():
            submitted = [executor.submit(task) for task in tasks]
        return [job.job_id for job in submitted]
    except (FailedJobError, FailedSubmissionError) as error:
        raise ConfigError(f"sbatch refused: {str(error).strip()}") from error


def _record(out: Path, job: str, evaluation: str, logs: Path) -> None:
    (out / RECORD).parent.mkdir(parents=True, exist_ok=True)
    record = {"job": job, "evaluation": evaluation or None, "logs": str(logs), "submitted": round(time.time(), 1)}
    write_text(out / RECORD, json.dumps(record, indent=1) + "\n")


def _show(slurm: SlurmConfig, folder: Path, jobs: Sequence[Job], evaluation: Evaluation | None) -> None:
    code, count = snapshot_path(folder), None if len(jobs) == 1 else len(jobs)
    print(f"# Dry run: nothing was written or submitted. In {os.getcwd()} sbatch would get:\n")
    print(make_executor(slurm, folder / LOGS, code, name=folder.name).script(count))
    for job in jobs:
        print(f"# runs: quietvit train {shlex.join([job.recipe, *job.overrides, '--out', job.out_dir])}")
    if evaluation is not None:
        place = for_evaluation(slurm)
        after = "afterok:JOB" if count is None else "aftercorr:JOB"
        script = make_executor(place, folder / LOGS, code, name=f"{folder.name}-eval", dependency=after).script(count)
        print(f"\n# and when that has ended well:\n\n{script}")
        for job in jobs:
            each = "each of step_*" if evaluation.each else None
            print(f"# runs: quietvit {shlex.join(evaluation.words(Path(job.out_dir), each))}")
