"""New heads on a backbone that knows something already: for the first steps only the heads learn.

Gradients of the backbone are computed, clipped and reported as ever, so that every engine works as it does later; then
they are dropped. AdamW passes over a parameter without a gradient: no step, no weight decay, no moments. The first step
after the thaw is therefore that of a new optimizer, whatever was seen before, and until then student and teacher keep
the backbone that the run began with bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

__all__ = ["drop_gradients"]


def drop_gradients(modules: Iterable[nn.Module]) -> None:
    """Take the gradients of all parameters of `modules` away, sharded ones too."""
    for module in modules:
        for parameter in module.parameters():
            parameter.grad = None
