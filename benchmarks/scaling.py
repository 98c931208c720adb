"""Memory per GPU and time per step of S, B, L and g on 1 to 256 GPUs, from formulas: what docs/scaling.md shows.

    python -m benchmarks.scaling            print the tables
    python -m benchmarks.scaling --write    put them into docs/scaling.md

Nothing is run but a count of multiply-adds (fvcore); what is assumed of the hardware stands in ASSUMED.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from quietvit.backbones.cost import count_macs
from quietvit.build import build_method, step_shapes
from quietvit.config.load import load_config
from quietvit.train.device import GIB, Shapes, step_memory

DOC = Path(__file__).parents[1] / "docs" / "scaling.md"
MARKS = ("<!-- tables: python -m benchmarks.scaling --write -->", "<!-- end of tables -->")
SIZES = ("small", "base", "large", "giant")
GPUS = (1, 8, 32, 256)
HALF = 2  # bytes of bf16


@dataclass(frozen=True)
class Assumed:
    """An 80 GB data-centre GPU, eight to a node. None of this was measured by us."""

    flops: float = 312e12  # A100, bf16 dense, data sheet
    used: float = 0.4  # share of it that a step uses; the published run of docs/scaling.md used 0.46
    inside: float = 200e9  # bytes/s per GPU in a collective within a node: two thirds of NVLink 3's 300e9 a direction
    between: float = 20e9  # between nodes: 200 Gb/s per GPU, four fifths of it used
    hidden: float = 0.5  # share of the computing time behind which communication can hide
    memory: float = 80e9 * 0.9  # what is left to a step beside CUDA's own and fragments


ASSUMED = Assumed()


@dataclass(frozen=True)
class Model:
    """What decides the cost of one size."""

    shapes: Shapes
    macs_global: int
    macs_local: int

    @property
    def parameters(self) -> int:
        return self.shapes.parameters

    def flops_per_image(self) -> float:
        """Student forward and backward (3 times its forward), teacher forward on the two global crops."""
        student = 2 * self.macs_global + self.shapes.num_local * self.macs_local
        return 2.0 * (3 * student + 2 * self.macs_global)

    def block(self) -> int:
        """Parameters of one block, about: all blocks hold next to everything of the backbone."""
        return 12 * self.shapes.embed_dim**2


@cache
def model(size: str) -> Model:
    """A size with the settings of the recipe imagenet_short."""
    config = load_config("imagenet_short", [f"model.size={size}", "data.path=unused"])
    with torch.device("meta"):
        method = build_method(config)
    crops, patch = config.crops, config.model.patch_size
    cost = {
        side: count_macs("vit", size=size, image_size=side, patch_size=patch, num_registers=4)
        for side in (crops.global_size, crops.local_size)
    }
    return Model(step_shapes(config, method.student), cost[crops.global_size], cost[crops.local_size])


def states(m: Model, gpus: int, strategy: str) -> float:
    """Bytes of weights, gradients, moments (16 per student parameter) and the teacher (4).

    FSDP shares all of it out, and gathers in bf16 two blocks at a time and what is not in a block (tokens and heads).
    """
    if strategy != "fsdp":
        return 20.0 * m.parameters
    outside = m.parameters - m.shapes.depth * m.block()
    return 20.0 * m.parameters / gpus + HALF * (2 * m.block() + 2 * max(0, outside))


def activations(m: Model, images: int, checkpointing: str) -> float:
    """Bytes kept for the backward pass of `images` images. "full": a block's input (fp32), and one block whole."""
    whole = step_memory(m.shapes, images, bytes_per_value=HALF) - 20.0 * m.parameters
    if checkpointing == "none":
        return whole
    s = m.shapes
    tokens = 2 * s.global_tokens + s.num_local * s.local_tokens
    own = tokens * s.depth * (2 * s.embed_dim * 4 + (7 * s.embed_dim + s.ffn_values) * HALF) * images
    return whole - own + own / s.depth + tokens * s.depth * s.embed_dim * 4 * images


def images_that_fit(m: Model, gpus: int, strategy: str, checkpointing: str) -> int:
    """Images per GPU, a power of two; 0 if not even one does."""
    fit = 0
    images = 1
    while images <= 512 and states(m, gpus, strategy) + activations(m, images, checkpointing) <= ASSUMED.memory:
        fit, images = images, 2 * images
    return fit


def seconds(m: Model, gpus: int, strategy: str, images: int, *, recomputed: bool = False) -> float:
    """One step of `images` images per GPU."""
    flops = m.flops_per_image() * (1.25 if recomputed else 1.0)  # a fourth of a step is the student's forward
    computing = images * flops / (ASSUMED.flops * ASSUMED.used)
    share = (gpus - 1) / gpus
    # DDP: all-reduce of fp32 gradients. FSDP: bf16 weights gathered for two forwards and a backward, fp32 reduced.
    moved = share * m.parameters * (2 * 4 if strategy == "ddp" else 3 * HALF + 4)
    talking = moved / (ASSUMED.inside if gpus <= 8 else ASSUMED.between) if gpus > 1 else 0.0
    return computing + max(0.0, talking - ASSUMED.hidden * computing)


def tables() -> str:
    """Markdown."""
    lines = [
        "| model | M parameters with heads | TFLOP per image | GiB of states | MiB of activations per image |",
        "|---|---|---|---|---|",
    ]
    for size in SIZES:
        m = model(size)
        lines.append(
            f"| {size} | {m.parameters / 1e6:.0f} | {m.flops_per_image() / 1e12:.2f} | {20 * m.parameters / GIB:.1f} | "
            f"{(activations(m, 2, 'none') - activations(m, 1, 'none')) / 2**20:.0f} |"
        )
    lines += [
        "",
        "Images that fit on one 80 GB GPU, and images per second of all GPUs (bf16, recomputation: none / full):",
        "",
    ]
    lines.append("| model | GPUs | DDP, images per GPU | DDP, images/s | FSDP2, images per GPU | FSDP2, images/s |")
    lines.append("|---|---|---|---|---|---|")
    for size in SIZES:
        for gpus in GPUS:
            row = [size, str(gpus)]
            for strategy in ("ddp", "fsdp"):
                fits = [images_that_fit(model(size), gpus, strategy, c) for c in ("none", "full")]
                speeds = [
                    gpus * n / seconds(model(size), gpus, strategy, n, recomputed=again) if n else 0.0
                    for n, again in zip(fits, (False, True), strict=True)
                ]
                row += [" / ".join(str(n) for n in fits), " / ".join(f"{s:,.0f}" for s in speeds)]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def written(text: str) -> str:
    """The document with new tables between its marks."""
    before, rest = text.split(MARKS[0])
    return f"{before}{MARKS[0]}\n\n{tables()}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    if parser.parse_args().write:
        DOC.write_text(written(DOC.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(tables())


if __name__ == "__main__":
    main()
