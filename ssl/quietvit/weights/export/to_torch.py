"""`--to torch`: one torch.export archive for each size; PyTorch alone opens it, quietvit need not be installed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, fx

from quietvit.weights.export.fixed_size import (
    FixedSize,
    OpenedGraphs,
    Run,
    description,
    graph_files,
    outputs_as_code,
    quietly,
    size_refusal,
    sizes_as_text,
    written_files,
    written_sizes,
)
from quietvit.weights.export.target import ExportOptions, Size, Target
from quietvit.weights.extractor import BackboneExtractor

__all__ = ["TARGET"]

DESCRIPTION = "quietvit.json"  # an extra file of the archive
TOLERANCE = 1e-5  # ours: the same operators run, so that the difference is 0 wherever the same kernels are chosen


def write(extractor: BackboneExtractor, folder: Path, options: ExportOptions) -> None:
    """Raises ValueError if torch cannot export the model, OSError as the file system does."""
    for name, size in graph_files(extractor, options, ".pt2").items():
        model = FixedSize(extractor, size)
        with quietly(f"torch {torch.__version__} cannot export this model; another version may"):
            program = torch.export.export(model, (model.example(),), dynamic_shapes=model.dynamic_shapes())
        _forget_machine(program.graph_module)
        text = json.dumps(description(extractor, size), indent=2)
        with (folder / name).open("wb") as file:
            stream = _Stream(file)
            with quietly(f"torch {torch.__version__} cannot save this model"):
                torch.export.save(program, stream, extra_files={DESCRIPTION: text})
            if stream.error is not None:
                raise stream.error


class _Stream(io.RawIOBase, BinaryIO):
    """A file that keeps its first error to itself: one that reaches PyTorch's writer ends the process (torch 2.11)."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)


def _forget_machine(graph_module: fx.GraphModule) -> None:
    """Drop the stack traces, which hold paths of this machine."""
    for module in graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)


def reopen(folder: Path, options: ExportOptions) -> OpenedGraphs:
    """All archives of a folder, by torch.export.load.

    Raises FileNotFoundError if there is none, ValueError if a file is damaged or no such archive. torch.export.load
    may run code that a stranger's archive holds: this is for archives written here.
    """
    return OpenedGraphs(dict(_open(file) for file in written_files(folder, ".pt2")))


def _open(file: Path) -> tuple[Size, Run]:
    wrong = f"{file} ({file.stat().st_size} bytes) is truncated or no archive of quietvit: export the model again"
    with quietly(wrong):
        extra: dict[str, Any] = {DESCRIPTION: ""}
        model = torch.export.load(file, extra_files=extra).module()
        height, width = json.loads(extra[DESCRIPTION])["size"]

    def run(images: Tensor) -> dict[str, Tensor]:
        return cast(dict[str, Tensor], model(images))

    return (height, width), run


def usage(extractor: BackboneExtractor, options: ExportOptions) -> str:
    """From file to features with PyTorch alone."""
    name, size = next(iter(graph_files(extractor, options, ".pt2").items()))
    outputs = outputs_as_code(extractor, size)
    return f"""import torch

# torch.export.load can run code that is hidden in an archive: open only those from people you trust.
model = torch.export.load("{name}").module()
images = torch.rand(2, 3, {size[0]}, {size[1]})  # any number of images [B 3 H W]: RGB in [0, 1]
mean, std = torch.tensor({list(extractor.mean)}), torch.tensor({list(extractor.std)})
images = (images - mean[:, None, None]) / std[:, None, None]
outputs = model(images)
{outputs}
"""


def remarks(extractor: BackboneExtractor, options: ExportOptions) -> str:
    """What the files take and hold, and what opening one means."""
    return f"""{sizes_as_text(extractor, options)}

Written by PyTorch {torch.__version__}; no other package is needed. `torch.export.load` can run code that somebody has
hidden in an archive (it falls back to unrestricted unpickling): open only archives from people you trust. The extra
file `{DESCRIPTION}` of an archive holds `mean`, `std`, `size`, `stride`, `backbone` and `provenance`.
"""


TARGET = Target(
    name="torch",
    about="torch.export archives of fixed size for any number of images (PyTorch alone opens them)",
    tolerance=TOLERANCE,
    refusal=size_refusal,
    write=write,
    reopen=reopen,
    sizes=written_sizes,
    usage=usage,
    remarks=remarks,
)
