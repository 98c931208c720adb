"""The commands `eval` and `embed`: arguments to calls of quietvit_eval."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

TASK_NAMES = ("knn", "linear")


def check_tasks(text: str) -> list[str]:
    """ "knn,linear" as a list. Raises ValueError for an unknown task; needs no torch."""
    tasks = [word.strip() for word in text.split(",") if word.strip()]
    if not tasks or (unknown := [t for t in tasks if t not in TASK_NAMES]):
        raise ValueError(f"unknown task {unknown[0] if tasks else text!r}: choose from {', '.join(TASK_NAMES)}")
    return tasks


def check_model(path: str) -> Path:
    """The model's path. Raises ValueError if nothing is there; needs no torch."""
    model = Path(path).expanduser()
    if not model.exists():
        raise ValueError(f"--model {path}: nothing is there. Give a run folder, a teacher.safetensors or a DINOv2 .pth")
    return model


def run_evaluation(args: argparse.Namespace) -> int:
    """`quietvit eval`: cards into a folder, tables on the screen."""
    tasks, model = check_tasks(args.tasks), check_model(args.model)
    from quietvit_eval.evaluate import DataSpec, evaluate

    kind, path = ("scenes", None) if args.data == "scenes" else (args.kind, args.data)
    out = Path(args.out) if args.out else (model if model.is_dir() else model.parent) / "eval"
    console = Console()
    evaluate(
        model,
        tasks,
        DataSpec(kind, path, args.train_split, args.test_split),
        label=args.label,
        random_init=args.random_init,
        pixels=args.pixels,
        image_size=args.size,
        limit_train=args.limit_train,
        limit_test=args.limit_test,
        options={"linear": {"select": args.select}} if "linear" in tasks else {},
        seed=args.seed,
        device=args.device,
        workers=args.workers,
        out_dir=out,
        console=console,
    )
    console.print(f"cards: {out}", highlight=False)
    return 0


def run_embedding(args: argparse.Namespace) -> int:
    """`quietvit embed`: names and embeddings into one file."""
    model = check_model(args.model)
    from quietvit_eval.embed import embed

    done = embed(
        args.images,
        model,
        args.out,
        image_size=args.size,
        batch_size=args.batch_size,
        device=args.device,
        console=Console(),
    )
    print(f"wrote {done.path}: {done.images} images, {done.embed_dim} numbers each")
    for sample in done.skipped:
        print(f"  skipped {sample.name}: {sample.reason}")
    return 0
