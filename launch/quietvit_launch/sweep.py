"""`quietvit sweep`: one run for every combination of lists of values."""

from __future__ import annotations

import itertools
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from quietvit.config.load import ConfigError
from quietvit.train.signals import StopRequest
from quietvit_launch.job import Job
from quietvit_launch.mistakes import message_for_user

LONGEST_NAME = 200  # file systems stop at 255 bytes


def sweep_jobs(recipe: str, words: Sequence[str], out: Path) -> list[Job]:
    """The runs of `key=v1,v2,...` words: the product of all lists, each in a folder of `out` named by its values.

    Commas inside brackets or quotes do not part values: train.x=[1,2],[3,4] are two. Raises ConfigError if there is no
    list, a value stands twice, or names are too long.
    """
    lists: dict[str, list[str]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r} is not a setting: write it as key=value or key=value,value,...")
        if key in lists:
            raise ConfigError(f"{key} is given twice: write all its values in one list, {key}=value,value")
        lists[key] = split_values(text)
        twice = [value for value, times in Counter(lists[key]).items() if times > 1]
        if twice:
            raise ConfigError(f"{key} has the value {twice[0]} twice")
    varied = [key for key, values in lists.items() if len(values) > 1]
    if not varied:
        raise ConfigError("nothing to sweep: give a setting several values, e.g. model.num_registers=0,4")
    short = Counter(key.rpartition(".")[2] for key in varied)
    jobs = []
    for values in itertools.product(*lists.values()):
        chosen = dict(zip(lists, values, strict=True))
        parts = [(key, key.rpartition(".")[2]) for key in varied]
        name = ",".join(f"{last if short[last] == 1 else key}={chosen[key]}" for key, last in parts)
        name = re.sub(r"[^\w.,=+\[\]-]+", "_", name)
        if len(name) > LONGEST_NAME:
            raise ConfigError(f"the values of a sweep name its folders, and {name[:40]}... is too long a name")
        jobs.append(Job(recipe, tuple(f"{k}={v}" for k, v in chosen.items()), str(out / name)))
    alike = [name for name, times in Counter(job.out_dir for job in jobs).items() if times > 1]
    if alike:
        raise ConfigError(f"two runs of the sweep would have the same folder {alike[0]}: sweep them apart")
    return jobs


def split_values(text: str) -> list[str]:
    """ "a,[1,2],'x,y'" as its three values."""
    values, depth, quote = [""], 0, ""
    for letter in text:
        if quote or letter in "'\"":
            quote = "" if letter == quote else quote or letter
        elif letter in "[{(":
            depth += 1
        elif letter in ")}]":
            depth -= 1
        elif letter == "," and depth == 0:
            values.append("")
            continue
        values[-1] += letter
    return values


def run_sweep(jobs: Sequence[Job], start: Callable[[Job], int]) -> int:
    """Run them one after the other. A run that fails is told and the others go on; a stop at a signal ends the sweep.

    Returns the exit code: 0, that of the stop, or 2 if a run failed.
    """
    failed = []
    for number, job in enumerate(jobs, start=1):
        print(f"run {number} of {len(jobs)}: {job.out_dir}", flush=True)
        try:
            code = start(job)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            message = message_for_user(error)
            if message is None:
                raise
            print(f"quietvit: {job.out_dir}: {message}", file=sys.stderr)
            code = 2
        if code - 128 in StopRequest.SIGNALS:
            return code
        if code:
            failed.append(job.out_dir)
    if failed:
        print(f"quietvit: {len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return 2 if failed else 0
