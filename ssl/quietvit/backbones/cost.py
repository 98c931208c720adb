"""What a backbone costs: the numbers it stores, and the multiply-adds (MACs) of one image.

Counted are the products that papers count: linear layers, convolutions and matrix products, those inside attention and
inside the Performer's sums included. Biases, norms, softmax, activations and other elementwise work are not.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.backbones import BACKBONES, Trunk, make_backbone

__all__ = ["count_macs", "count_parameters"]

# Elementwise work, sums, copies and views. An operation that is neither here nor counted is an error, so that a new
# kind of layer is not left out in silence.
NOT_COUNTED = frozenset(
    f"aten::{operation}"
    for operation in (
        "add", "amax", "div", "exp", "gelu", "im2col", "layer_norm", "mT", "mean", "mul", "neg", "numpy_T", "pow",
        "rsub", "sigmoid", "silu", "square", "sub", "sum", "unflatten",
    )
)  # fmt: skip


def count_parameters(name: str, *, size: str | None = None, without: Collection[str] = (), **arguments: Any) -> int:
    """Numbers that a backbone saves: its parameters and frozen tables. `without`: names of tensors to leave out.

    `size` and `arguments` as in make_backbone, which says what is raised; those of an existing backbone need no size.
    Nothing is allocated.
    """
    tensors = _on_meta(name, size=size, **arguments).state_dict()
    return sum(tensor.numel() for key, tensor in tensors.items() if key not in without)


def count_macs(name: str, *, image_size: int, size: str | None = None, **arguments: Any) -> int:
    """Multiply-adds of one square image, counted by fvcore in a trace of the forward pass.

    The position table is made for `image_size`, so that resizing it costs nothing. Blocks of one kind are traced once
    and multiplied; a dense trunk is traced whole. `size` and `arguments` as in make_backbone, which says what is
    raised.
    """
    sizes = BACKBONES[name].SIZES if name in BACKBONES else {}
    shape = {**sizes.get(size or "", {}), **arguments}
    if shape.get("dense_groups"):
        return int(_trace(_on_meta(name, size=size, image_size=image_size, **arguments)).total())
    analysis = _trace(_on_meta(name, size=size, image_size=image_size, **{**arguments, "depth": 1}))
    return int(analysis.total() + (shape["depth"] - 1) * analysis.total("backbone.blocks.0"))


def _on_meta(name: str, **arguments: Any) -> Trunk:
    # Neither changes a count: the default way to initialise takes ten times as long on this device, and the machine
    # that counts may lack the attention kernels of the one that trained.
    arguments |= {"init": "xavier", "attention": "auto"}
    # Moving activations to registers multiplies nothing.
    arguments |= {"test_time_registers": 0, "register_neurons": ""}
    with torch.device("meta"):
        return make_backbone(name, **arguments)


class _Tensors(nn.Module):
    """The backbone with a plain tensor as its output, which is what can be traced: class scores, or class tokens."""

    def __init__(self, backbone: Trunk) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        return self.backbone.logits(features) if self.backbone.options.num_classes else features.cls


@torch.no_grad()
def _trace(backbone: Trunk) -> Any:
    """fvcore's analysis of a backbone that is on the meta device, where it could not be traced (torch 2.11: Python
    kernels of meta tensors take the tracer's sizes for tensors). It gets memory full of zeros instead of weights."""
    from fvcore.nn import FlopCountAnalysis, jit_handles

    backbone.to_empty(device="cpu")
    for tensor in backbone.state_dict().values():
        tensor.zero_()
    images = torch.zeros(1, 3, backbone.image_size, backbone.image_size)
    analysis = FlopCountAnalysis(_Tensors(backbone).eval(), images).clear_op_handles()
    analysis.set_op_handle("aten::linear", jit_handles.linear_flop_jit)
    analysis.set_op_handle("aten::matmul", jit_handles.matmul_flop_jit)
    analysis.set_op_handle("aten::_convolution", jit_handles.conv_flop_jit)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.total()  # traces; the analysis keeps the result
    unknown = set(analysis.unsupported_ops()) - NOT_COUNTED
    assert not unknown, f"no rule for the cost of {sorted(unknown)}"
    return analysis


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """q k' and then (n x m) v, for every image and head: n m (d + e)."""
    q, k, v = (x.type().sizes() for x in inputs[:3])
    return int(math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1]))
