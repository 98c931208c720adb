"""The scores of a study: `quietvit eval` for every model, each evaluation once."""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from quietvit.config.schema import RunConfig
from quietvit_launch.evaluation import TASK_TARGETS, make_plan

DEFAULT = "knn,linear"
NOTHING = "none"
OURS = ("--model", "--out")


def evaluations_of(args: argparse.Namespace, config: RunConfig) -> list[tuple[str, ...]]:
    """Arguments of `quietvit eval` but model and folder, for each of --eval.

    Tasks that need data of one kind go together, others and protocols each by themselves. Without data of their own
    they get --data, and without that the data of the recipe. Raises ValueError for an --eval that is none.
    """
    given = args.eval or [DEFAULT]
    if given == [NOTHING]:
        return []
    found = []
    for text in given:
        words = shlex.split(text)
        if not words or words[0].startswith("-") or words[0] == NOTHING:
            raise ValueError(f"--eval {text!r}: begin with tasks or a protocol, as `quietvit eval`")
        if ours := [w for w in words for name in OURS if w == name or w.startswith(f"{name}=")]:
            raise ValueError(f"--eval {text!r}: {ours[0]} is the study's to say")
        groups = parts_of(words[0])
        if len(groups) > 1 and any("=" in w and not w.startswith("-") for w in words[1:]):
            raise ValueError(f"--eval {text!r}: these tasks need data of several kinds; give each an --eval of its own")
        more = [*words[1:], *_data(words, args, config)]
        if args.device != "auto" and "--device" not in words:
            more += ["--device", args.device]
        found += [(group, *more) for group in groups]
    return found


def parts_of(names: str) -> list[str]:
    """ "knn,linear,cheap-depth" as what one command can score: "knn,linear" and "cheap-depth"."""
    groups: dict[str, list[str]] = {}
    for name in (word.strip() for word in names.split(",")):
        groups.setdefault(TASK_TARGETS.get(name, name), []).append(name)
    return [",".join(group) for group in groups.values()]


def _data(words: Sequence[str], args: argparse.Namespace, config: RunConfig) -> list[str]:
    if any(word == "--data" or word.startswith("--data=") for word in words):
        return []
    data = config.data
    if args.data is not None and args.data != "scenes":
        return ["--data", args.data]
    if args.data == "scenes" or data.source == "scenes":
        options = data.options if data.source == "scenes" else {}
        # How many pictures training had says nothing of how many are to be scored.
        kept = [f"{name}={value}" for name, value in options.items() if name != "num_images"]
        return ["--data", "scenes", *(word for option in kept for word in ("--data-option", option))]
    if data.path is None:
        raise ValueError("--data must say which images are to be scored")
    return ["--data", data.path]


def check_evaluations(evaluations: Sequence[tuple[str, ...]]) -> None:
    """Raises ValueError, and SystemExit as argparse does, for arguments that `quietvit eval` would refuse at once."""
    from quietvit_launch.cli import make_parser

    for words in evaluations:
        parsed, rest = make_parser().parse_known_args(["eval", *words, "--model", "none"])
        if unknown := [word for word in rest if word.startswith("-")]:
            raise ValueError(f"--eval {words[0]}: `quietvit eval` has no {unknown[0]}")
        make_plan(parsed.tasks, [*parsed.settings, *rest], size=parsed.size, select=parsed.select)


def evaluate_once(words: tuple[str, ...], model: Path, weights: str, folder: Path, done_only: bool) -> tuple[Path, int]:
    """The folder of the cards and an exit code: 0 if they are there, or now are; 2 if not; more after a signal.

    The folder's name holds a hash of the arguments and of the weights, so that what is there fits both.
    """
    key = hashlib.sha256(json.dumps([words, weights]).encode()).hexdigest()[:8]
    from quietvit_eval.study.results import DONE

    cards = folder / f"{words[0].replace('/', '_')}-{key}"
    if (cards / DONE).is_file():
        return cards, 0
    if done_only:
        return cards, 2
    from quietvit.files import write_text
    from quietvit_launch.cli import main

    cards.mkdir(parents=True, exist_ok=True)
    code = main(["eval", *words, "--model", str(model), "--out", str(cards)])
    if code == 0:
        write_text(cards / DONE, json.dumps({"words": list(words), "weights": weights}) + "\n")
    return cards, code
