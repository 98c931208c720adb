"""The METHODS table: pretraining objectives, each from a Batch to named losses."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from quietvit.methods.dinov2 import DinoV2

__all__ = ["METHODS"]

METHODS: Mapping[str, type[nn.Module]] = {"dinov2": DinoV2}
