"""Projection head: MLP, bottleneck of unit length, scores against K prototypes (DINO, arXiv 2104.14294, appendix
C)."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["ProjectionHead"]


class NormedPrototypes(nn.Module):
    """Scores g_k <v_k / ||v_k||, z>: a linear layer whose rows have a length g_k of their own (weight normalisation).

    Written out rather than hooked in, so that it can be deep-copied; keys `weight_g` [K 1] and `weight_v` [K b] as in
    the official heads. `frozen` keeps all lengths at 1.
    """

    def __init__(self, bottleneck_dim: int, num_prototypes: int, *, frozen: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(num_prototypes, 1), requires_grad=not frozen)
        # nn.Linear's own initialisation, as in the original, where this layer is made after the others are initialised.
        self.weight_v = nn.Parameter(nn.Linear(bottleneck_dim, num_prototypes, bias=False).weight.detach())

    def forward(self, z: Float[Tensor, "*rows b"]) -> Float[Tensor, "*rows K"]:
        with torch.autocast(z.device.type, enabled=False):  # lengths of rows in float32, whatever the product below
            weight = self.weight_g * F.normalize(self.weight_v, dim=-1, eps=1e-12)
        return F.linear(z, weight)


class ProjectionHead(nn.Module):
    """MLP of `num_layers` linear layers (GELU between), L2 normalisation, then one score per prototype.

    `weight_norm`: "frozen" prototypes of unit length (DINO, iBOT), "trained" lengths (DINOv2), "none": a plain linear
    layer with key `last_layer.weight` (DINOv3). `init` of the linear layers: "trunc_normal" with `init_std`, or
    "xavier", which starts sooner in narrow models, where a standard deviation of .02 leaves next to no signal. Biases
    start at zero.

    Defaults are those of DINOv2's short recipe, except for the frozen length: trained ones are weight-decayed there,
    and Sinkhorn-Knopp counts on bounded scores.

    Raises ValueError for an unknown `weight_norm` or `init`.
    """

    mlp: nn.Linear | nn.Sequential
    last_layer: NormedPrototypes | nn.Linear

    def __init__(
        self,
        in_dim: int,
        num_prototypes: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        *,
        use_bn: bool = False,
        mlp_bias: bool = True,
        weight_norm: str = "frozen",
        init: str = "trunc_normal",
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        if weight_norm not in ("frozen", "trained", "none"):
            raise ValueError(f"weight_norm must be 'frozen', 'trained' or 'none', not {weight_norm!r}")
        if init not in ("trunc_normal", "xavier"):
            raise ValueError(f"head init must be 'trunc_normal' or 'xavier', not {init!r}")
        self.num_prototypes = num_prototypes
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
        linears = [nn.Linear(a, b, bias=mlp_bias) for a, b in itertools.pairwise(widths)]
        if num_layers == 1:
            self.mlp = linears[0]
        else:
            layers: list[nn.Module] = []
            for linear in linears[:-1]:
                layers += [linear, *([nn.BatchNorm1d(hidden_dim)] if use_bn else []), nn.GELU()]
            self.mlp = nn.Sequential(*layers, linears[-1])
        if weight_norm == "none":
            self.last_layer = nn.Linear(bottleneck_dim, num_prototypes, bias=False)
            linears.append(self.last_layer)
        else:
            self.last_layer = NormedPrototypes(bottleneck_dim, num_prototypes, frozen=weight_norm == "frozen")
        for linear in linears:
            if init == "xavier":
                nn.init.xavier_uniform_(linear.weight)
            else:
                nn.init.trunc_normal_(linear.weight, std=init_std)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def bottleneck(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows b"]:
        """Unit vectors that the prototypes are compared with, in float32."""
        z: Tensor = self.mlp(x)
        with torch.autocast(z.device.type, enabled=False):
            return F.normalize(z.float(), dim=-1, eps=1e-12)

    def forward(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows K"]:
        """Scores of each row: the student's logits, or the teacher's before centering."""
        scores: Tensor = self.last_layer(self.bottleneck(x))
        return scores
