"""Registers for a model that has none, without training: test-time registers (arXiv 2506.08010).

Which hidden units make the outliers is measured on images; a model made of the same weights then lets these units act
in added tokens (quietvit/nn/register_neurons.py). No activation elsewhere in the network is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from quietvit.backbones import Trunk, make_backbone
from quietvit.features.norms import NormHistogram, NormVerdict
from quietvit.nn.block import Block
from quietvit.nn.packing import Groups, unpack
from quietvit.nn.register_neurons import Neurons, neurons_text
from quietvit.weights.extractor import BackboneExtractor
from quietvit.weights.native import load_strictly

__all__ = ["RegisterNeuron", "RegisterNeurons", "add_test_time_registers", "find_register_neurons"]


@dataclass(frozen=True)
class RegisterNeuron:
    """A hidden unit of a feed-forward network, and the mean magnitude of its activation in two kinds of patches."""

    block: int  # from 0
    unit: int
    at_outliers: float
    elsewhere: float

    @property
    def score(self) -> float:
        return self.at_outliers - self.elsewhere


@dataclass(frozen=True)
class RegisterNeurons:
    """How hidden units act in outlier patches and in the others. The paper ranks by the first alone."""

    verdict: NormVerdict  # on the norms after `block`
    block: int  # after which outliers were told from the others
    begins: int  # the block after which they are there for the first time, and from there on up to `block`
    images: int
    outliers: int  # patches
    at_outliers: Float[Tensor, "L H"]  # mean magnitude by block, from 0 to the last that was looked into, and unit
    elsewhere: Float[Tensor, "L H"]

    def ranked(self, count: int) -> list[RegisterNeuron]:
        """The `count` units that act most more strongly in outliers than elsewhere, the foremost first; those that do
        not act more strongly there are left out."""
        score = (self.at_outliers - self.elsewhere).flatten()
        values, order = score.sort(descending=True, stable=True)
        width = self.at_outliers.shape[1]
        places = [divmod(int(i), width) for i in order[: min(count, int((values > 0).sum()))]]
        return [RegisterNeuron(b, u, float(self.at_outliers[b, u]), float(self.elsewhere[b, u])) for b, u in places]

    def top(self, count: int) -> dict[int, tuple[int, ...]]:
        """The foremost `count` units by block, as `add_test_time_registers` takes them."""
        found: dict[int, list[int]] = {}
        for neuron in self.ranked(count):
            found.setdefault(neuron.block, []).append(neuron.unit)
        return {block: tuple(sorted(found[block])) for block in sorted(found)}


def find_register_neurons(
    extractor: BackboneExtractor,
    images: Iterable[Float[Tensor, "b 3 H W"]],
    *,
    block: int = -1,
    last: int | None = None,
) -> RegisterNeurons:
    """Look through all hidden units for those that act in outlier patches.

    `images`: normalised batches of one size, which are gone through twice and must be the same both times. Outliers are
    the patches whose norm after `block` (from 0; -1 is the last) lies above the cutoff of `features.norms.judge`.
    Blocks up to `last` are looked into; None: up to the one after which outliers are there for the first time, as in
    the paper's released settings (its blocks 5 of OpenCLIP-B and 17 of DINOv2-L).

    Raises ValueError where there is nothing to move (no outliers), for norms that are not finite, a block that is not
    there, a dense trunk, and a model that has test-time registers already.
    """
    backbone = _checked(extractor)
    block = _index(block, backbone.num_blocks)
    histogram, norms = _norms(extractor, images, block)
    verdict = histogram.judge(block)
    if verdict.kind != "outliers":
        raise ValueError(f"nothing to move after block {block}: {verdict.reason}")
    begins = block
    while begins and histogram.judge(begins - 1).kind == "outliers":
        begins -= 1
    last = begins if last is None else _index(last, backbone.num_blocks)
    high = [batch > verdict.cutoff for batch in norms]
    sums = _Sums([_Sum() for _ in range(last + 1)])
    with sums.watching(backbone):
        count = 0
        for batch in images:
            if count == len(high) or len(batch) != len(high[count]):
                raise ValueError("the images of the second pass are others than those of the first")
            sums.high = high[count]
            extractor(batch)
            count += 1
    if count < len(high):
        raise ValueError("the images of the second pass are fewer than those of the first: give a list, or what can be "
                         "gone through again")  # fmt: skip
    outliers, total = sum(int(h.sum()) for h in high), sum(h.numel() for h in high)
    at_outliers = torch.stack([one.high for one in sums.blocks]) / outliers
    elsewhere = torch.stack([one.rest for one in sums.blocks]) / (total - outliers)
    return RegisterNeurons(
        verdict, block, begins, sum(map(len, high)), outliers, at_outliers.float(), elsewhere.float()
    )


def add_test_time_registers(extractor: BackboneExtractor, neurons: Neurons, num: int = 1) -> BackboneExtractor:
    """A model of the same weights with `num` more registers, the last ones, in which alone `neurons` act.

    `neurons`: hidden units by block, as of `RegisterNeurons.top`. The added tokens start at zero and have no position.
    The given model stays as it is; the new one holds its weights once more, on the same device, and is a model like any
    other: `save_teacher` writes it, `load` reads it. Its description names the neurons and the model it was made of.

    Raises ValueError for no neurons or registers, neurons that are not there, and models as `find_register_neurons`.
    """
    source = _checked(extractor)
    text = neurons_text(neurons)
    if not text or num < 1:
        raise ValueError(f"{num} registers for the neurons {text!r}: there must be one or more of both")
    own = {"num_registers": source.num_registers + num, "test_time_registers": num, "register_neurons": text}
    spec = extractor.meta["backbone"]
    with torch.random.fork_rng(devices=[]):
        backbone = make_backbone(spec["name"], **{**source.arguments, **own})
    tensors: dict[str, Tensor] = dict(source.state_dict())
    added = source.cls_token.detach().new_zeros(1, num, source.cls_token.shape[-1])
    tensors["register_tokens"] = torch.cat((tensors.get("register_tokens", added[:, :0]), added), dim=1)
    load_strictly(backbone, tensors, what="the model to add registers to")
    about = {"method": "test-time registers (arXiv 2506.08010)", "of": extractor.identity()["hash"], "added": num}
    meta: dict[str, Any] = {
        **extractor.meta,
        "backbone": {"name": spec["name"], "arguments": {**spec["arguments"], **own}},
        "provenance": {**extractor.meta["provenance"], "retrofit": {**about, "neurons": text}},
    }
    return BackboneExtractor(backbone, meta, device=extractor.device, bf16=extractor.bf16)


def _checked(extractor: BackboneExtractor) -> Trunk:
    backbone = cast(Trunk, extractor.backbone)
    if backbone.options.register_neurons:
        raise ValueError("this model has test-time registers already: take the one that they were added to")
    if backbone.options.dense_groups:
        raise ValueError("a dense trunk cannot have test-time registers: its blocks have no common width")
    return backbone


def _index(block: int, num_blocks: int) -> int:
    if not -num_blocks <= block < num_blocks:
        raise ValueError(f"there is no block {block}: the model has {num_blocks} (from 0, or from -1 down)")
    return block % num_blocks


@torch.no_grad()
def _norms(
    extractor: BackboneExtractor, images: Iterable[Tensor], block: int
) -> tuple[NormHistogram, list[Float[Tensor, "b N"]]]:
    """Norms of patches after every block, counted, and those after `block` of every batch, on the CPU."""
    backbone = cast(Trunk, extractor.backbone)
    histogram = NormHistogram(backbone.num_blocks, device=extractor.device)
    kept: list[Tensor] = []

    def see(i: int, tokens: Tensor, groups: Groups) -> None:
        norms = torch.linalg.vector_norm(_patches(backbone, tokens, groups).float(), dim=-1)
        histogram.add(norms, i)
        if i == block:
            kept.append(norms.cpu())

    with backbone.observing(see):
        for batch in images:
            extractor(batch)
    if not kept:
        raise ValueError("no images to look for outliers in")
    return histogram, kept


def _patches(backbone: Trunk, tokens: Tensor, groups: Groups) -> Float[Tensor, "b N C"]:
    return unpack(tokens, groups)[0][:, 1 + backbone.num_registers :]


@dataclass
class _Sum:
    """Sums of magnitudes by hidden unit, in float64."""

    high: Float[Tensor, " H"] = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    rest: Float[Tensor, " H"] = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))


@dataclass
class _Sums:
    """Sums over the batches that a backbone is shown while it is watched; `high` are the outliers of the next one."""

    blocks: list[_Sum]
    high: Bool[Tensor, "b N"] = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))

    @contextmanager
    def watching(self, backbone: Trunk) -> Iterator[None]:
        with ExitStack() as stack:
            for i, one in enumerate(self.blocks):
                layer = cast(nn.Linear, cast(Block, backbone.blocks[i]).mlp.out_layer)
                handle = layer.register_forward_pre_hook(self._adding(one, 1 + backbone.num_registers))
                stack.callback(handle.remove)
            yield

    def _adding(self, one: _Sum, first: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            images, patches = self.high.shape
            hidden = inputs[0].reshape(images, first + patches, -1)[:, first:].abs().float()
            high = self.high.to(hidden.device, hidden.dtype)
            one.high = one.high + torch.einsum("bn,bnh->h", high, hidden).double().cpu()
            one.rest = one.rest + torch.einsum("bn,bnh->h", 1 - high, hidden).double().cpu()

        return add
