"""What the exports of fixed size share: one graph for each size, for any number of images.

The position table is resized to the size before the graph is made, so that no graph has to resize it: other runtimes
resize otherwise than PyTorch does, or not at all (dinov2 issue 288).
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from quietvit.backbones import Trunk
from quietvit.contracts import Features
from quietvit.weights.export.target import ExportOptions, Size
from quietvit.weights.extractor import BackboneExtractor

__all__ = [
    "FixedSize",
    "OpenedGraphs",
    "Run",
    "description",
    "graph_files",
    "output_shapes",
    "outputs_as_code",
    "quietly",
    "size_refusal",
    "sizes_as_text",
    "written_files",
    "written_sizes",
]

EXAMPLE_BATCH = 2  # images that the graph is traced with; 1 would be taken for a constant
CHATTER_LINES = 40  # of what an exporter printed, noted on the error when it fails (ours)
Run = Callable[[Tensor], Mapping[str, Tensor]]


def written_sizes(extractor: BackboneExtractor, options: ExportOptions) -> tuple[Size, ...]:
    """The sizes asked for, each once, or the model's own; they are also the only ones that can be compared."""
    return tuple(dict.fromkeys(options.sizes)) or ((extractor.image_size, extractor.image_size),)


def graph_files(extractor: BackboneExtractor, options: ExportOptions, suffix: str) -> dict[str, Size]:
    """File name -> size: `model.onnx`, say, for the model's own alone, else `model_224x448.onnx` (height first)."""
    sizes = written_sizes(extractor, options)
    if sizes == ((extractor.image_size, extractor.image_size),):
        return {f"model{suffix}": sizes[0]}
    return {f"model_{height}x{width}{suffix}": (height, width) for height, width in sizes}


def size_refusal(extractor: BackboneExtractor, options: ExportOptions) -> str | None:
    """Why one of the sizes cannot be, and the nearest that can; or None."""
    stride = extractor.stride
    for height, width in written_sizes(extractor, options):
        for name, side in (("height", height), ("width", width)):
            if side < 1 or side % stride:
                below = max(side, 0) // stride * stride
                nearest = f"{below} or {below + stride}" if below else str(stride)
                return f"size {height}x{width}: the {name} is no multiple of {stride}; use {nearest}"
        try:
            cast(Trunk, extractor.backbone).positions((height // stride, width // stride))
        except ValueError as error:
            return f"size {height}x{width}: {error}"
    return None


def description(extractor: BackboneExtractor, size: Size) -> dict[str, Any]:
    """What is stored inside a graph's file: plain data, `size` as [height, width] in pixels."""
    return {
        "mean": list(extractor.mean),
        "std": list(extractor.std),
        "size": list(size),
        "stride": extractor.stride,
        "backbone": extractor.meta["backbone"],
        "provenance": extractor.meta["provenance"],
    }


def output_shapes(extractor: BackboneExtractor, size: Size) -> dict[str, tuple[int, ...]]:
    """The outputs of a graph by name, in order; each with its shape but for the first axis, the images.

    After the final norm: `cls` (D), `registers` (R, D) if there are any, `patches` (h, w, D); and `logits` (classes) if
    the weights came with a supervised head.
    """
    registers, width = cast(int, extractor.backbone.num_registers), extractor.embed_dim
    shapes: dict[str, tuple[int, ...]] = {"cls": (width,)}
    if registers:
        shapes["registers"] = (registers, width)
    shapes["patches"] = (size[0] // extractor.stride, size[1] // extractor.stride, width)
    if extractor.num_classes:
        shapes["logits"] = (extractor.num_classes,)
    return shapes


def sizes_as_text(extractor: BackboneExtractor, options: ExportOptions) -> str:
    """A sentence for a model card: the sizes that were written."""
    sizes = " or ".join(f"{height} x {width}" for height, width in written_sizes(extractor, options))
    return f"Images must be {sizes} pixels (height x width), any number at once; other sizes need another export."


def outputs_as_code(extractor: BackboneExtractor, size: Size) -> str:
    """Lines of Python for a model card that take each output from a dictionary `outputs`, with its shape."""
    shapes = output_shapes(extractor, size)
    return "\n".join(f'{name} = outputs["{name}"]  # [B {" ".join(map(str, s))}]' for name, s in shapes.items())


class FixedSize(nn.Module):
    """A copy of a backbone for images of one size: fp32, on the CPU, frozen, attention by PyTorch's own operator.

    Returns plain tensors by name: those of `output_shapes`, whose names are in `names`.
    """

    def __init__(self, extractor: BackboneExtractor, size: Size) -> None:
        super().__init__()
        self.size = size
        backbone = copy.deepcopy(cast(Trunk, extractor.backbone)).cpu().float().eval().requires_grad_(False)
        backbone.options = replace(backbone.options, attention="sdpa")
        grid = (size[0] // backbone.stride, size[1] // backbone.stride)
        with torch.no_grad():
            table = backbone.positions(grid)
        learned = isinstance(backbone.pos_embed, nn.Parameter)
        backbone.pos_embed = nn.Parameter(table, requires_grad=False) if learned else table  # type: ignore[assignment]
        backbone.native_grid = grid
        self.backbone = backbone
        self.names = tuple(output_shapes(extractor, size))

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> dict[str, Tensor]:
        features: Features = self.backbone(images)
        outputs = {"cls": features.cls, "registers": features.registers, "patches": features.patches}
        if "logits" in self.names:
            outputs["logits"] = self.backbone.logits(features)
        return {name: outputs[name] for name in self.names}

    def example(self) -> Float[Tensor, "B 3 H W"]:
        return torch.zeros(EXAMPLE_BATCH, 3, *self.size)

    def dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        """What torch's exporters are told: the first axis is free, and called "batch"."""
        return {"images": {0: torch.export.Dim("batch", min=1)}}


class OpenedGraphs:
    """Graphs as a user of another tool has opened them, by size: `Target.reopen` returns one.

    Raises ValueError for images of a size that no graph was written for.
    """

    def __init__(self, graphs: Mapping[Size, Run]) -> None:
        self.graphs = dict(graphs)

    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Features:
        """Features after the final norm, on the CPU."""
        outputs = self.run(images)
        cls = outputs["cls"]
        return Features(cls, outputs.get("registers", cls.new_zeros(len(cls), 0, cls.shape[1])), outputs["patches"])

    def logits(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B classes"]:
        """Class scores. Raises ValueError as a call, and if the model has no supervised head."""
        outputs = self.run(images)
        if "logits" not in outputs:
            raise ValueError("this export has no output 'logits': its model has no supervised head")
        return outputs["logits"]

    def run(self, images: Float[Tensor, "B 3 H W"]) -> Mapping[str, Tensor]:
        """All outputs by name."""
        size = (images.shape[2], images.shape[3])
        if size not in self.graphs:
            known = ", ".join(f"{height}x{width}" for height, width in self.graphs)
            raise ValueError(f"no graph for {size[0]}x{size[1]} pixels here; there are some for {known}")
        return self.graphs[size](images.float().cpu())


def written_files(folder: Path, suffix: str) -> Sequence[Path]:
    """The graphs in a folder. Raises FileNotFoundError if there is none."""
    name = re.compile(rf"model(_\d+x\d+)?{re.escape(suffix)}")
    files = sorted(f for f in folder.iterdir() if name.fullmatch(f.name)) if folder.is_dir() else []
    if not files:
        raise FileNotFoundError(f"no model{suffix} or model_HEIGHTxWIDTH{suffix} in {folder}: export the model again")
    return files


@contextlib.contextmanager
def quietly(failure: str) -> Iterator[None]:
    """What PyTorch or another package prints, logs and warns of is kept back, and noted on the error if it fails.

    Raises ValueError, `failure` with the reason, for whatever exception ends the block but those of the file system.
    """
    chatter = io.StringIO()
    before = logging.root.manager.disable
    try:
        with contextlib.redirect_stdout(chatter), contextlib.redirect_stderr(chatter), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable(logging.ERROR)
            yield
    except OSError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        explained = ValueError(f"{failure} ({reason})")
        said = chatter.getvalue().strip().splitlines()[-CHATTER_LINES:]
        if said:
            explained.add_note("\n".join(said))
        raise explained from error
    finally:
        logging.disable(before)
