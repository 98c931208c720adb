"""The commands that start, watch and stop runs: train, sweep, jobs, cancel. Only the standard library is imported."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quietvit_launch.job import Job
    from quietvit_launch.tasks import Evaluation

Commands = argparse._SubParsersAction  # has no public name


def at_least(least: int) -> Callable[[str], int]:
    """An argument's type: a whole number of at least `least`."""

    def number(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return number


def add_launching(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the four commands."""
    train = commands.add_parser(
        "train",
        help="pretrain a backbone; the same command resumes",
        epilog="examples: quietvit train own_images data.path=~/photos --out runs/photos\n"
        "          quietvit train own_images data.path=/data --out runs/photos --on slurm slurm.nodes=2 --dry-run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("recipe", help="name of a shipped recipe (see `quietvit recipes`) or a YAML file")
    train.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's; slurm.key: the job's"
    )
    train.add_argument("--out", required=True, help="run folder; a run found there with the same settings is resumed")
    _add_where(train, ("local", "torchrun", "slurm"))
    train.set_defaults(run=_train)

    sweep = commands.add_parser(
        "sweep",
        help="a run for every combination of lists of values",
        epilog="example: quietvit sweep quickstart model.num_registers=0,4,16 optim.lr=1e-3,2e-3 --out runs/registers",
    )
    sweep.add_argument("recipe", help="name of a shipped recipe or a YAML file")
    sweep.add_argument(
        "overrides", nargs="*", metavar="key=v1,v2,...", help="settings, those to sweep with their values"
    )
    sweep.add_argument("--out", required=True, help="folder for the run folders, each named by its values")
    _add_where(sweep, ("local", "slurm"))
    sweep.set_defaults(run=_sweep)

    jobs = commands.add_parser("jobs", help="list runs with their state, step and last figures")
    jobs.add_argument("folder", nargs="?", default="runs", help="where to look (default: runs)")
    jobs.add_argument("--format", choices=("table", "json"), default="table")
    jobs.set_defaults(run=_jobs)
    cancel = commands.add_parser("cancel", help="take a run out of Slurm's queue, or ask it to save and leave")
    cancel.add_argument("folder", metavar="run", help="run folder")
    cancel.set_defaults(run=_cancel)


def _add_where(parser: argparse.ArgumentParser, places: tuple[str, ...]) -> None:
    parser.add_argument(
        "--on",
        choices=places,
        help="local: this machine, one process per GPU (default); slurm: a job"
        + (
            "; torchrun: one of the processes that torchrun started (found out by itself)"
            if "torchrun" in places
            else ""
        ),
    )
    parser.add_argument("--processes", type=at_least(1), metavar="N", help="local: so many processes (default: GPUs)")
    parser.add_argument("--slurm", metavar="FILE", help="slurm: settings of the job (default: the recipe `slurm`)")
    parser.add_argument("--dry-run", action="store_true", help="slurm: print the sbatch script, submit nothing")
    parser.add_argument("--eval", metavar="TASKS", help="then judge the features: knn,linear, as `quietvit eval`")
    parser.add_argument("--eval-each", action="store_true", help="judge every kept checkpoint, not only the last")
    parser.add_argument("--data", metavar="PATH", help="labelled images for --eval")
    parser.add_argument(
        "--eval-args", metavar="ARGS", help="more arguments of `quietvit eval`, e.g. '--limit-train 999'"
    )


def _train(args: argparse.Namespace) -> int:
    from quietvit_launch.worker import launched

    place = args.on or ("torchrun" if launched() else "local")
    own, slurm = _parted(args, place)
    from quietvit_launch.job import Job

    job = Job(args.recipe, own, args.out)
    evaluation = _evaluation(args)
    if place == "slurm":
        from quietvit_launch.slurm import load_slurm, submit

        settings = load_slurm(args.slurm or "slurm", slurm)
        return submit([job], settings, Path(args.out), evaluation=evaluation, dry_run=args.dry_run)
    if place == "torchrun":
        if evaluation is not None:
            raise ValueError(
                "--eval goes with --on local or slurm: under torchrun give `quietvit eval` its own command"
            )
        if not launched():
            raise ValueError(f"--on torchrun: torchrun did not start this process. Type\n  {_torchrun(args)}")
        from quietvit_launch.worker import run_rank

        return run_rank(job)
    return _here(job, args.processes, evaluation)


def _sweep(args: argparse.Namespace) -> int:
    own, slurm = _parted(args, args.on or "local")
    from quietvit_launch.sweep import run_sweep, sweep_jobs

    jobs = sweep_jobs(args.recipe, own, Path(args.out))
    for job in jobs:
        job.config()
    evaluation = _evaluation(args)
    if args.on == "slurm":
        from quietvit_launch.slurm import load_slurm, submit

        settings = load_slurm(args.slurm or "slurm", slurm)
        return submit(jobs, settings, Path(args.out), evaluation=evaluation, dry_run=args.dry_run)
    return run_sweep(jobs, partial(_here, processes=args.processes, evaluation=evaluation))


def _here(job: Job, processes: int | None, evaluation: Evaluation | None) -> int:
    from quietvit_launch.local import run_locally

    code = run_locally(job, processes)
    return code if code or evaluation is None else evaluation.evaluate(Path(job.out_dir).expanduser())


def _jobs(args: argparse.Namespace) -> int:
    from quietvit_launch.jobs import run_jobs

    return run_jobs(Path(args.folder).expanduser(), args.format)


def _cancel(args: argparse.Namespace) -> int:
    from quietvit_launch.jobs import run_cancel

    return run_cancel(Path(args.folder).expanduser())


def _parted(args: argparse.Namespace, place: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Settings of the run and those of the Slurm job. Raises ValueError for what does not go with the place."""
    slurm = tuple(word for word in args.overrides if word.startswith("slurm."))
    if place != "slurm":
        given = {"--dry-run": args.dry_run, f"--slurm {args.slurm}": args.slurm, " ".join(slurm): slurm}
        for words in (words for words, value in given.items() if value):
            raise ValueError(f"{words}: only with --on slurm")
    if place != "local" and args.processes:
        other = "slurm.nodes and slurm.tasks_per_node" if place == "slurm" else "--nproc-per-node of torchrun"
        raise ValueError(f"--processes is for --on local: {other} says how many")
    return tuple(word for word in args.overrides if word not in slurm), slurm


def _evaluation(args: argparse.Namespace) -> Evaluation | None:
    """What is to follow the training; None without --eval. What is wrong with its arguments is told now."""
    if not args.eval:
        if args.data or args.eval_args or args.eval_each:
            raise ValueError("--data, --eval-args and --eval-each go with --eval TASKS")
        return None
    if not args.data:
        raise ValueError(f"--eval {args.eval}: --data must say which labelled images")
    from quietvit_launch.cli import make_parser
    from quietvit_launch.evaluation import make_plan
    from quietvit_launch.tasks import Evaluation

    evaluation = Evaluation(args.eval, args.data, tuple(shlex.split(args.eval_args or "")), args.eval_each)
    parsed = make_parser().parse_args(evaluation.words(Path(args.out)))
    make_plan(parsed.tasks, parsed.settings, size=parsed.size, select=parsed.select)
    return evaluation


def _torchrun(args: argparse.Namespace) -> str:
    """The command that was meant: with --nproc-per-node as asked, or the number of NVIDIA GPUs, or 2."""
    gpus = Path("/proc/driver/nvidia/gpus")
    count = args.processes or (len(list(gpus.iterdir())) if gpus.is_dir() else 0) or 2
    words = [args.recipe, *args.overrides, "--out", args.out]
    start = ["torchrun", "--standalone", f"--nproc-per-node={count}", "-m", "quietvit_launch.cli", "train"]
    if os.path.dirname(sys.executable) not in os.environ.get("PATH", "").split(os.pathsep):
        start[:1] = [sys.executable, "-m", "torch.distributed.run"]
    return shlex.join([*start, *words])
