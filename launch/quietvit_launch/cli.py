"""The command `quietvit`. Only the standard library is imported here: wrong arguments are answered at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from quietvit_launch.commands import add_launching, at_least
from quietvit_launch.eval_arguments import MODEL, add_eval, add_protocols
from quietvit_launch.export_arguments import add_export
from quietvit_launch.info_arguments import add_info
from quietvit_launch.inspect_arguments import add_inspect
from quietvit_launch.mistakes import message_for_user
from quietvit_launch.report_arguments import add_report, with_action
from quietvit_launch.retrofit_arguments import add_retrofit
from quietvit_launch.stopping import exit_code
from quietvit_launch.study_arguments import add_study

EXIT_USER_ERROR = 2
# Arguments that hold settings, of whatever command, and an example of one.
SETTINGS = {"overrides": "train.steps=1000", "settings": "steps=500"}


def make_parser() -> argparse.ArgumentParser:
    """All commands with their arguments."""
    parser = argparse.ArgumentParser(
        prog="quietvit", description="Self-supervised pretraining of vision transformers with registers."
    )
    parser.add_argument("--version", action="version", version=f"quietvit {metadata.version('quietvit')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_launching(commands)
    _add_recipes(commands)
    add_eval(commands, _eval)
    add_protocols(commands, _protocols)
    add_report(commands, _report, _compare, _show)
    _add_use(commands)
    add_export(commands, _export)
    add_info(commands, _info)
    add_inspect(commands, _inspect)
    add_retrofit(commands, _retrofit)
    add_study(commands, _study)
    demo = commands.add_parser("demo", help="pretrain, evaluate and export on the embedded data set, in minutes")
    demo.add_argument("--out", default="runs/demo", help="folder for the run and its summary.json (default: runs/demo)")
    demo.add_argument("--seed", type=at_least(0), default=0)
    demo.set_defaults(run=_demo)
    return parser


def _add_recipes(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    recipes = commands.add_parser("recipes", help="list the shipped recipes, or print one with all its settings")
    recipes.add_argument("name", nargs="?")
    recipes.set_defaults(run=_recipes)


def _add_use(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    embed = commands.add_parser("embed", help="write file names and embeddings of a folder of images")
    embed.add_argument("images", help="a folder, tar or list")
    embed.add_argument("--model", required=True, help=MODEL)
    embed.add_argument("--out", required=True, help="features.parquet or features.npz")
    embed.add_argument("--size", type=at_least(1), help="image side in pixels (default: the model's)")
    embed.add_argument("--batch-size", type=at_least(1), default=64)
    embed.add_argument("--device", default="auto")
    embed.set_defaults(run=_embed)


def _recipes(args: argparse.Namespace) -> int:
    from quietvit.config.load import load_config, recipes, to_yaml

    if args.name:
        print(to_yaml(load_config(args.name)), end="")
        return 0
    for name, file in recipes().items():
        first = file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        print(f"{name:22} {first}")
    return 0


def _eval(args: argparse.Namespace) -> int:
    from quietvit_launch.evaluation import run_evaluation

    return run_evaluation(args)


def _protocols(args: argparse.Namespace) -> int:
    from quietvit_launch.reporting import run_protocols

    return run_protocols(args)


def _report(args: argparse.Namespace) -> int:
    from quietvit_launch.reporting import run_report

    return run_report(args)


def _compare(args: argparse.Namespace) -> int:
    from quietvit_launch.reporting import run_compare

    return run_compare(args)


def _show(args: argparse.Namespace) -> int:
    from quietvit_launch.reporting import run_show

    return run_show(args)


def _embed(args: argparse.Namespace) -> int:
    from quietvit_launch.evaluation import run_embedding

    return run_embedding(args)


def _export(args: argparse.Namespace) -> int:
    from quietvit_launch.exporting import run_export

    return run_export(args)


def _info(args: argparse.Namespace) -> int:
    from quietvit_launch.info import run_info

    return run_info(args)


def _inspect(args: argparse.Namespace) -> int:
    from quietvit_launch.inspecting import run_inspect

    return run_inspect(args)


def _retrofit(args: argparse.Namespace) -> int:
    from quietvit_launch.retrofitting import run_retrofit

    return run_retrofit(args)


def _study(args: argparse.Namespace) -> int:
    from quietvit_launch.studying import run_study

    return run_study(args)


def _demo(args: argparse.Namespace) -> int:
    from quietvit_launch.demo import run_demo

    return run_demo(Path(args.out), seed=args.seed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. A user's mistake is one message on stderr and exit code 2; a fault of ours is a traceback."""
    parser = make_parser()
    args, rest = parser.parse_known_args(with_action(sys.argv[1:] if argv is None else argv))
    # argparse takes no further positional arguments once an option stood between them; people write --out anywhere.
    name = next((n for n in SETTINGS if hasattr(args, n)), None)
    if name is not None and not any(word.startswith("-") for word in rest):
        setattr(args, name, [*getattr(args, name), *rest])
    elif rest:
        hint = f": settings are written key=value, e.g. {SETTINGS[name]}" if name is not None else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except KeyboardInterrupt as stop:
        resume = "; the same command goes on from what was saved" if args.command in ("eval", "study") else ""
        print(f"quietvit: interrupted{resume}", file=sys.stderr)
        return exit_code(stop)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        message = message_for_user(error)
        if message is None:
            raise
        print(f"quietvit: {message}", file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
