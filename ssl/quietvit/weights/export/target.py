"""What an export target is: a row of TARGETS (quietvit/weights/export/__init__.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from quietvit.contracts import Features
from quietvit.weights.extractor import BackboneExtractor

__all__ = ["ExportOptions", "Opened", "Parity", "Size", "Target"]

Size = tuple[int, int]  # height, width in pixels
# What a reopened export computes: normalised images [B 3 H W], fp32 on the CPU -> features after the final norm.
# If it also has a method `logits(images) -> [B classes]`, and the model a head, class scores are compared too.
Opened = Callable[[Tensor], Features]


@dataclass(frozen=True)
class ExportOptions:
    """What the caller of an export may choose."""

    sizes: tuple[Size, ...] = ()  # formats of fixed size: those to write, one graph each; (): the model's own
    license: str | None = None  # SPDX name for the card; None: the card says that nobody has chosen one


@dataclass(frozen=True)
class Parity:
    """How far one output of an export is from the model's, at one image size."""

    reader: str  # what opened the export: the target's name, or what else can
    output: str  # "cls", "registers", "patches" or "logits"
    size: Size
    difference: float  # greatest absolute one over all images; not a number where a feature is not
    tolerance: float

    @property
    def passes(self) -> bool:
        return self.difference <= self.tolerance


def _no_remarks(extractor: BackboneExtractor, options: ExportOptions) -> str:
    return ""


def _nothing_further(extractor: BackboneExtractor, folder: Path, options: ExportOptions) -> Sequence[Parity]:
    return ()


@dataclass(frozen=True)
class Target:
    """One row of TARGETS: how a model is written for one other tool, and how that tool reads it back.

    `tolerance` is the greatest absolute difference allowed of any feature in fp32; 0 asks for equal bits.
    `refusal(extractor, options)` says why this model cannot be written so, in a sentence that ends with what can be
    done, or None; it is asked before anything is written, and knows about missing packages (naming the extra to
    install) too. `write(extractor, folder, options)` puts the files into an existing empty folder; it writes no card.
    `reopen(folder, options)` opens them as a user of that tool would. `sizes(extractor, options)` are the sizes to
    compare at: the native one first, then, where the format can take them, a larger, a smaller and a non-square one.
    `usage(extractor, options)` is Python code for the card that runs in the folder, from opening to features;
    `about` one line for the command's help.

    Two are optional. `remarks(extractor, options)`: Markdown for the card, below the code: what the format leaves out,
    or what a user of it has to know. `further(extractor, folder, options)`: comparisons through another reader.
    """

    name: str
    about: str
    tolerance: float
    refusal: Callable[[BackboneExtractor, ExportOptions], str | None]
    write: Callable[[BackboneExtractor, Path, ExportOptions], None]
    reopen: Callable[[Path, ExportOptions], Opened]
    sizes: Callable[[BackboneExtractor, ExportOptions], Sequence[Size]]
    usage: Callable[[BackboneExtractor, ExportOptions], str]
    remarks: Callable[[BackboneExtractor, ExportOptions], str] = _no_remarks
    further: Callable[[BackboneExtractor, Path, ExportOptions], Sequence[Parity]] = _nothing_further
