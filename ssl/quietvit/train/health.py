"""Is it learning? What is looked at every N steps, and what the figures mean in plain sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from quietvit import dist
from quietvit.contracts import Targets
from quietvit.features.knn import knn_accuracy
from quietvit.features.norms import outlier_share
from quietvit.features.rank import rankme
from quietvit.train.held_out import HeldOut

CHUNK = 64  # images per forward of the probe (ours: small next to a training step)


@dataclass
class TargetGauge:
    """Teacher statistics gathered over the steps between two looks."""

    entropies: list[Tensor] = field(default_factory=list)
    mean_target: Tensor | None = None
    used: Tensor | None = None
    rows: int = 0

    def add(self, targets: Sequence[Targets]) -> None:
        """Take in the class-token targets of one step."""
        for target in targets:
            q = target.cls.flatten(0, 1)
            self.entropies.append(-torch.xlogy(q, q).sum(1).mean())
            total = q.sum(0)
            self.mean_target = total if self.mean_target is None else self.mean_target + total
            hits = torch.zeros(q.shape[1], dtype=torch.bool, device=q.device)
            hits[q.argmax(1)] = True
            self.used = hits if self.used is None else self.used | hits
            self.rows += len(q)

    def read(self) -> dict[str, float]:
        """Over all ranks, which must all call: entropy in nats of one target and of the mean target, and how many
        prototypes were someone's favourite."""
        if self.mean_target is None or self.used is None:
            return {}
        total = dist.sum_over_ranks(self.mean_target)
        mean = total / total.sum()
        self.used = dist.max_over_ranks(self.used.float()) > 0
        entropy = dist.sum_over_ranks(torch.stack(self.entropies).mean()) / dist.world_size()
        values = {
            "teacher/entropy": float(entropy),
            "teacher/mean_entropy": float(-torch.xlogy(mean, mean).sum()),
            "teacher/prototypes_used": float(self.used.sum()),
        }
        self.entropies, self.mean_target, self.used, self.rows = [], None, None, 0
        return values


@dataclass(frozen=True)
class Probe:
    """Looks at held-out images with the teacher's backbone."""

    held_out: HeldOut
    mean: tuple[float, float, float]  # in units of [0, 1]
    std: tuple[float, float, float]
    device: torch.device
    precision: torch.dtype
    neighbours: int

    @torch.no_grad()
    def look(self, backbone: nn.Module) -> dict[str, float]:
        """RankMe of [CLS], share of patch tokens with outlying norms, and k-NN where there are labels.

        Under ranks all call: each looks at its share of the images, and all get the figures of the whole.

        Empty when no held-out image could be read: the training loop reports the images themselves.
        """
        if len(self.held_out.images) == 0:
            return {}
        cls, norms = self._features(backbone, self.held_out.images)
        values = {"rank": rankme(cls), "outlier_share": outlier_share(norms)}
        h = self.held_out
        if h.labels is not None and h.bank is not None and h.bank_labels is not None:
            bank, _ = self._features(backbone, h.bank)
            k = min(self.neighbours, len(bank))
            scores = knn_accuracy(bank, h.bank_labels, cls, h.labels, ks=(k,), num_classes=h.num_classes)
            values["knn"] = 100.0 * scores[k]
        return values

    def _features(
        self, backbone: nn.Module, images: UInt8[Tensor, "Q 3 S S"]
    ) -> tuple[Float[Tensor, "Q D"], Float[Tensor, "Q N"]]:
        cls, norms = [], []
        ranks = dist.world_size()
        each = -(-len(images) // ranks)  # the same on all ranks; the last ones see some image twice
        own = torch.arange(each * dist.rank(), each * (dist.rank() + 1)).clamp_max(len(images) - 1)
        mean = 255.0 * torch.tensor(self.mean, device=self.device).view(3, 1, 1)
        std = 255.0 * torch.tensor(self.std, device=self.device).view(3, 1, 1)
        for chunk in images[own].split(CHUNK):
            x = (chunk.to(self.device).float() - mean) / std
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision is torch.bfloat16):
                raw, normed = backbone.before_and_after_norm(x)  # type: ignore[operator]
            cls.append(normed.cls.float())
            # Artifacts show before the final norm (Vision Transformers Need Registers, section 2).
            norms.append(raw.patches.flatten(1, 2).float().norm(dim=-1))
        whole, all_norms = (dist.gather_rows(torch.cat(rows))[: len(images)].cpu() for rows in (cls, norms))
        return whole, all_norms


def verdicts(values: dict[str, float], *, embed_dim: int, prototypes: int, progress: float) -> list[str]:
    """Plain sentences about figures that mean trouble; empty when there is nothing to say.

    The bounds are ours: a collapsed model has rank 1 to 3 and one prototype, a healthy one tens and hundreds. The first
    tenth of a run is left in peace.
    """
    said: list[str] = []
    if progress < 0.1:
        return said
    if values.get("rank", math.inf) < max(2.0, 0.02 * embed_dim):
        said.append(
            f"collapsing, or not started yet: the features fill {values['rank']:.1f} of {embed_dim} dimensions. If "
            "they filled more before, the learning rate is likely too high or the batch too small: halve optim.lr"
        )
    entropy = values.get("teacher/mean_entropy")
    if entropy is not None and entropy < 0.1 * math.log(prototypes):
        said.append(
            f"the teacher uses few prototypes (its mean target has entropy {entropy:.2f} of "
            f"{math.log(prototypes):.2f}): fewer prototypes (objective.head.num_prototypes) or "
            "objective.centering=sinkhorn_knopp"
        )
    single = values.get("teacher/entropy")
    if single is not None and single > 0.98 * math.log(prototypes):
        said.append(
            "the teacher's targets are still uniform, nothing is learnt yet: fewer prototypes, a lower teacher.temp "
            "or objective.head.init=xavier start small models"
        )
    return said
