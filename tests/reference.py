"""Reads the reference vectors: numbers computed by the original implementations, kept in tests/oracle/vectors.

Origin: facebookresearch/dinov2 @b8931f7, facebookresearch/dinov3 @6876159, yitu-opensource/T2T-ViT @0f63dc9,
run on tiny random models; only the numbers and their descriptions are here (see tests/oracle/vectors/README.md).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

VECTORS = Path(__file__).parent / "oracle" / "vectors"


@dataclass(frozen=True)
class Case:
    """One reference case: its description and all its tensors by stored name."""

    info: dict[str, Any]
    tensors: dict[str, Tensor]

    def weights(self, prefix: str = "weights") -> dict[str, Tensor]:
        """State dict of one weight set ("weights", or "student"/"weights_<name>" where a case has several)."""
        return {k[len(prefix) + 1 :]: v for k, v in self.tensors.items() if k.startswith(prefix + "/")}

    def inputs(self, run: str) -> dict[str, Tensor]:
        return self.weights(f"{run}/in")

    def outputs(self, run: str) -> dict[str, Tensor]:
        return self.weights(f"{run}/out")

    def check(self, run: str, name: str, value: Tensor) -> None:
        """Assert that `value` meets the stored output within the tolerance that stands beside it."""
        stored = self.tensors[f"{run}/out/{name}"]
        spec = self.info["runs"][run]["outputs"][name]
        assert value.shape == stored.shape, f"{run}/{name}: shape {tuple(value.shape)}, stored {tuple(stored.shape)}"
        torch.testing.assert_close(
            value.detach().double(),
            stored.double(),
            atol=float(spec.get("atol", 0.0)),
            rtol=float(spec.get("rtol", 0.0)),
            msg=lambda m: f"{run}/{name}: {m}",
        )


def case(name: str) -> Case:
    """Read one case, e.g. case("01_vit/list_forward_reg4")."""
    info = json.loads((VECTORS / f"{name}.json").read_text())
    file = VECTORS / f"{name}.safetensors"
    return Case(info, load_file(file) if file.exists() else {})
