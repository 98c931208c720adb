"""The commands `eval` and `embed`: arguments to calls of quietvit_eval."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

# What can be told wrong before torch is imported is told from here; a test holds these against the tables themselves.
TASK_NAMES = ("knn", "linear", "classifier")
OUT_SUFFIXES = (".npz", ".parquet")
WEIGHTS = "teacher.safetensors"


def check_tasks(text: str) -> list[str]:
    """ "knn,linear" as a list. Raises ValueError for an unknown task; needs no torch."""
    tasks = [word.strip() for word in text.split(",") if word.strip()]
    if not tasks or (unknown := [t for t in tasks if t not in TASK_NAMES]):
        raise ValueError(f"unknown task {unknown[0] if tasks else text!r}: choose from {', '.join(TASK_NAMES)}")
    return tasks


def check_model(path: str) -> Path:
    """The model's path. Raises ValueError if no model can be there; needs no torch."""
    model = Path(path).expanduser()
    what = f"a run folder, a {WEIGHTS} or an official file of DINOv2 or T2T-ViT"
    if not model.exists():
        raise ValueError(f"there is no model at {path}: give {what}")
    if model.is_dir() and not (model / WEIGHTS).is_file() and not any(model.glob(f"checkpoints/step_*/{WEIGHTS}")):
        names = sorted(p.name for p in model.iterdir())[:8]
        raise ValueError(
            f"there is no model in the folder {path}: looked for {WEIGHTS} and checkpoints/step_*/{WEIGHTS}, found "
            f"{', '.join(names) or 'nothing'}. Give {what}"
        )
    return model


def run_evaluation(args: argparse.Namespace) -> int:
    """`quietvit eval`: cards into a folder, tables on the screen."""
    tasks, model = check_tasks(args.tasks), check_model(args.model)
    from quietvit.data.sources import open_source

    kind, path = ("scenes", None) if args.data == "scenes" else (args.kind, args.data)
    train, test = (open_source(kind, path, split=split) for split in (args.train_split, args.test_split))
    from quietvit_eval.evaluate import evaluate

    out = Path(args.out).expanduser() if args.out else (model if model.is_dir() else model.parent) / "eval"
    console = Console()
    evaluate(
        model,
        tasks,
        (train, test),
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
    model, out = check_model(args.model), Path(args.out).expanduser()
    if out.suffix not in OUT_SUFFIXES or out.is_dir():
        raise ValueError(f"--out {args.out}: name a file that ends in {' or '.join(OUT_SUFFIXES)}")
    from quietvit.data.sources import open_source

    images = open_source("auto", args.images)
    from quietvit_eval.embed import embed

    done = embed(
        images,
        model,
        out,
        image_size=args.size,
        batch_size=args.batch_size,
        device=args.device,
        console=Console(),
    )
    print(f"wrote {done.path}: {done.images} images, {done.embed_dim} numbers each")
    for sample in done.skipped:
        print(f"  skipped {sample.name}: {sample.reason}")
    return 0
