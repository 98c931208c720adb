"""DINOv2: a student learns from its own moving average (arXiv 2304.07193; DINO + iBOT + KoLeo).

Read `teach`, `study` and `follow`: the three calls of a training step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from quietvit import dist
from quietvit.contracts import Batch, Targets
from quietvit.losses.centering import SoftmaxCentering, sinkhorn_knopp
from quietvit.losses.dino import dino_losses
from quietvit.losses.ibot import ibot_loss
from quietvit.losses.koleo import koleo_over_views
from quietvit.nn.heads import ProjectionHead

__all__ = ["DinoV2"]


class DinoV2(nn.Module):
    """Student and teacher, each a backbone with one head for class and patch tokens, or with one for each.

    `head` and `ibot_head` hold keywords of ProjectionHead other than its width; without `ibot_head` one head serves
    both. Defaults are those of the short recipe, with Sinkhorn-Knopp in place of centering: section 4 of the paper,
    and steadier with small batches. `centering="softmax"` is the recipe's own.

    Raises ValueError for an unknown `centering`, `ibot_denominator` or `koleo_crops`.
    """

    mean: Float[Tensor, "3 1 1"]
    std: Float[Tensor, "3 1 1"]

    def __init__(
        self,
        make_backbone: Callable[[], nn.Module],
        *,
        head: Mapping[str, Any],
        ibot_head: Mapping[str, Any] | None = None,
        centering: str = "sinkhorn_knopp",
        sinkhorn_iterations: int = 3,  # DINOv2, section 4
        center_momentum: float = 0.9,  # DINO; used by centering="softmax"
        student_temp: float = 0.1,  # short recipe
        dino_weight: float = 1.0,  # short recipe
        ibot_weight: float = 1.0,  # short recipe
        koleo_weight: float = 0.1,  # short recipe
        # Every published ibot_weight was found under "all_crops": each crop of the batch counts, masked or not.
        # "masked_crops" counts the masked ones only, so that the weight keeps its meaning whatever their share.
        ibot_denominator: str = "all_crops",
        koleo_crops: str = "both",  # reference code; "first": the paper's text
        koleo_across_ranks: bool = False,  # DINOv2 looks for neighbours on each GPU alone, DINOv3 on all
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),  # ImageNet, RGB in [0, 1]
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        if centering not in ("sinkhorn_knopp", "softmax"):
            raise ValueError(f"centering must be 'sinkhorn_knopp' or 'softmax', not {centering!r}")
        if ibot_denominator not in ("all_crops", "masked_crops"):
            raise ValueError(f"ibot_denominator must be 'all_crops' or 'masked_crops', not {ibot_denominator!r}")
        if koleo_crops not in ("both", "first"):
            raise ValueError(f"koleo_crops must be 'both' or 'first', not {koleo_crops!r}")
        backbone = make_backbone()
        width: int = backbone.embed_dim  # type: ignore[assignment]
        self.student = nn.ModuleDict({"backbone": backbone, "dino_head": ProjectionHead(width, **head)})
        if ibot_head is not None:
            self.student["ibot_head"] = ProjectionHead(width, **ibot_head)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        patch_head = head if ibot_head is None else ibot_head
        self.cls_center, self.patch_center = (
            SoftmaxCentering(h["num_prototypes"], momentum=center_momentum) if centering == "softmax" else None
            for h in (head, patch_head)
        )
        self.sinkhorn_iterations = sinkhorn_iterations
        self.student_temp = student_temp
        self.ibot_denominator = ibot_denominator
        self.koleo_crops = koleo_crops
        self.koleo_across_ranks = koleo_across_ranks
        self.loss_weights = {
            "dino_local": dino_weight,
            "dino_global": dino_weight,
            "ibot": ibot_weight,
            "koleo": koleo_weight,
        }
        self.masked_share = torch.ones(())  # of the global crops of the effective batch; set by teach
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> DinoV2:
        """Only the student trains: the teacher always answers in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def trainable(self) -> dict[str, nn.Module]:
        """The student's submodules: each is clipped on its own."""
        return dict(self.student.items())

    def normalise(self, crops: UInt8[Tensor, "B 3 H W"] | Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """Bytes become zero-mean, unit-variance float32 on their device; crops that are floats already pass
        untouched."""
        if crops.is_floating_point():
            return crops
        return (crops.float() - 255 * self.mean) / (255 * self.std)

    @torch.no_grad()
    def teach(self, batches: Sequence[Batch], *, temp: float) -> list[Targets]:
        """Targets for the micro-batches of one effective batch, one Targets each.

        Centering sees the rows of all of them (and of all ranks) at once, as if the batch had not been cut. Held in
        memory: (2 B + M) x K float32 of the whole effective batch.
        """
        cls, patches = zip(*(self._scores_of_teacher(batch) for batch in batches), strict=True)
        cls_targets = self._center(torch.cat(cls), self.cls_center, temp).split([len(c) for c in cls])
        patch_targets = self._center(torch.cat(patches), self.patch_center, temp).split([len(p) for p in patches])
        if self.ibot_denominator == "masked_crops":
            masked = torch.cat([batch.masks for batch in batches]).any(1).float()
            counts = dist.sum_over_ranks(torch.stack([masked.sum(), torch.ones_like(masked).sum()]))
            self.masked_share = counts[0].clamp_min(1.0) / counts[1]
        return [
            # The first view learns from the teacher's second, and the other way round.
            Targets(cls=c.unflatten(0, (2, -1)).flip(0), patches=p)
            for c, p in zip(cls_targets, patch_targets, strict=True)
        ]

    def _scores_of_teacher(self, batch: Batch) -> tuple[Float[Tensor, "G*B K"], Float[Tensor, "M K"]]:
        """Prototype scores of class tokens and of masked patches, seen unmasked."""
        [features] = self.teacher["backbone"]([self.normalise(batch.global_crops)], [None])
        hidden = features.patches.flatten(0, 2)[batch.mask_indices]
        [cls], patches = self._apply_heads(self.teacher, [features.cls], hidden)
        return cls, patches

    def _center(
        self, scores: Float[Tensor, "rows K"], center: SoftmaxCentering | None, temp: float
    ) -> Float[Tensor, "rows K"]:
        if center is None:
            return sinkhorn_knopp(scores, temp, iterations=self.sinkhorn_iterations)
        targets: Tensor = center(scores, temp)
        return targets

    def study(self, batch: Batch, targets: Targets) -> dict[str, Float[Tensor, ""]]:
        """The student's losses on one micro-batch, before `loss_weights`; their means over micro-batches are the
        batch's.

        "dino_local" + "dino_global" is the mean over all pairs of distinct views, "ibot" the masked patches, "koleo"
        the spread of the class tokens of the (masked) global crops before the head, neighbours within the
        micro-batch.
        """
        images: list[Tensor] = [self.normalise(batch.global_crops)]
        masks: list[Tensor | None] = [batch.masks]
        if len(batch.local_crops):
            images.append(self.normalise(batch.local_crops))
            masks.append(None)
        features = self.student["backbone"](images, masks)
        hidden = features[0].patches.flatten(0, 2)[batch.mask_indices]
        cls, patches = self._apply_heads(self.student, [f.cls for f in features], hidden)
        by_view = [rows.unflatten(0, (-1, batch.num_images)) for rows in cls]
        local, globals_ = by_view[1] if len(by_view) > 1 else by_view[0][:0], by_view[0]
        dino_local, dino_global = dino_losses(local, globals_, targets.cls, temp=self.student_temp)
        num_crops = len(batch.masks) * (self.masked_share if self.ibot_denominator == "masked_crops" else 1.0)
        return {
            "dino_local": dino_local,
            "dino_global": dino_global,
            "ibot": ibot_loss(
                patches, targets.patches, batch.mask_weights, num_crops=num_crops, temp=self.student_temp
            ),
            "koleo": koleo_over_views(
                features[0].cls.unflatten(0, (-1, batch.num_images)),
                crops=self.koleo_crops,
                across_ranks=self.koleo_across_ranks,
            ),
        }

    @staticmethod
    def _apply_heads(
        model: nn.ModuleDict, cls: list[Float[Tensor, "_ D"]], hidden: Float[Tensor, "M D"]
    ) -> tuple[list[Float[Tensor, "_ K"]], Float[Tensor, "M K"]]:
        """One call of the class head on all class tokens, and on the masked patches too if they share it."""
        shared = "ibot_head" not in model
        rows = [*cls, hidden] if shared else cls
        *scores, last = model["dino_head"](torch.cat(rows)).split([len(r) for r in rows])
        return (scores, last) if shared else ([*scores, last], model["ibot_head"](hidden))

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student, for every parameter; buffers are copied."""
        teacher, student = ([dist.own_part(p) for p in m.parameters()] for m in (self.teacher, self.student))
        torch._foreach_lerp_(teacher, student, 1.0 - momentum)
        buffers = list(self.teacher.buffers())
        if buffers:
            torch._foreach_copy_(buffers, list(self.student.buffers()))
