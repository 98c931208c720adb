"""A folder of images -> a table of names and embeddings, as .npz or .parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from quietvit.contracts import BadSample, Extractor
from quietvit.data.sources import Source, open_source
from quietvit.files import write_atomically
from quietvit.weights.extractor import load
from quietvit_eval.extract import Reading, Tokens, identity_of, stream
from quietvit_eval.transform import choose_transform, eval_size

SUFFIXES = (".npz", ".parquet")


@dataclass(frozen=True)
class Embedded:
    """What was written."""

    path: Path
    images: int
    embed_dim: int
    skipped: tuple[BadSample, ...]


def embed(
    source: str | Path | Source,
    model: str | Path | Extractor,
    out: str | Path,
    *,
    kind: str = "auto",
    image_size: int | None = None,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "auto",
    bf16: bool = False,
    console: Console | None = None,
) -> Embedded:
    """Write the [CLS] embedding (after the final norm, fp32, not normalised) of every image.

    `.npz` holds `names` [M], `embeddings` [M D] and `about` (JSON); `.parquet` the columns `name` and `embedding`, with
    the JSON as schema metadata "quietvit", written batch by batch. Images that cannot be read are left out and
    reported. `source` is a path (`kind`: a row of DATASETS) or an open source. The file appears once it is complete.

    Raises ValueError for another suffix, or if no image can be read.
    """
    out = Path(out)
    if out.suffix not in SUFFIXES:
        raise ValueError(f"{out}: embeddings are written as {' or '.join(SUFFIXES)}")
    extractor = load(model, device, bf16=bf16) if isinstance(model, str | Path) else model
    images = open_source(kind, str(source)) if isinstance(source, str | Path) else source
    view = choose_transform(images, eval_size(extractor, image_size))
    about = {
        "model": identity_of(extractor),
        "data": images.fingerprint(),
        "image_size": view.image_size,
        "view": view.rule,
    }
    skipped: list[BadSample] = []
    count = 0

    def parts() -> Iterator[tuple[list[str], np.ndarray]]:
        nonlocal count
        reading = Reading(batch_size, workers, console)
        for part in stream(extractor, images, range(len(images)), view, blocks=1, reading=reading, what="embeddings"):
            skipped.extend(part.skipped)
            count += len(part.indices)
            yield _named(part, images)
        if count == 0:
            raise ValueError(f"none of the {len(images)} images of {images.name} can be read")

    write = _write_npz if out.suffix == ".npz" else _write_parquet
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda temporary: write(temporary, parts(), extractor.embed_dim, json.dumps(about)))
    return Embedded(out, count, extractor.embed_dim, tuple(skipped))


def _named(part: Tokens, images: Source) -> tuple[list[str], np.ndarray]:
    return [images.item_name(int(i)) for i in part.indices], part.cls.numpy()


def _write_npz(path: Path, parts: Iterator[tuple[list[str], np.ndarray]], embed_dim: int, about: str) -> None:
    names, rows = zip(*parts, strict=True)
    with path.open("wb") as file:  # given a name, numpy would append .npz to it
        np.savez(
            file,
            names=np.array([name for some in names for name in some]),
            embeddings=np.concatenate(rows),
            about=np.array(about),
        )


def _write_parquet(path: Path, parts: Iterator[tuple[list[str], np.ndarray]], embed_dim: int, about: str) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    schema = arrow.schema(
        [("name", arrow.string()), ("embedding", arrow.list_(arrow.float32(), embed_dim))], metadata={"quietvit": about}
    )
    with parquet.ParquetWriter(path, schema) as writer:
        for names, rows in parts:
            values = arrow.array(np.ascontiguousarray(rows).reshape(-1), arrow.float32())
            columns = [arrow.array(names, arrow.string()), arrow.FixedSizeListArray.from_arrays(values, embed_dim)]
            writer.write_table(arrow.table(columns, schema=schema))
