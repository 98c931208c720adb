"""Class-token loss: views of one image must agree on their prototypes (DINO, arXiv 2104.14294, eq. 3)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from quietvit.losses.cross_entropy import soft_cross_entropy

__all__ = ["dino_losses", "view_cross_entropy"]


def view_cross_entropy(
    logits: Float[Tensor, "S B K"], targets: Float[Tensor, "T B K"], *, temp: float, pairs: str = "all"
) -> Float[Tensor, ""]:
    """Mean over images and over pairs (s, t) of views of H(targets[t], softmax(logits[s] / temp)).

    `pairs`: "all" S*T of them; "distinct": those with s != t (DINOv3's form, teacher views in the student's order);
    "matched": those with s == t, S == T (DINOv2's form, where row t of the targets already is the *other* view).
    DINOv2's own class adds pairs up instead of averaging: multiply by S*T.

    Raises ValueError for another `pairs`.
    """
    num_students, num_teachers = len(logits), len(targets)
    if pairs == "matched":
        return soft_cross_entropy(logits, targets, temp=temp).mean()
    # Targets of a student view are added up first: one pass over its K-wide logits, however many teachers.
    total = targets.float().sum(0)
    if pairs == "all":
        summed = soft_cross_entropy(logits, total.expand_as(logits), temp=temp, mass=num_teachers)
        return summed.mean() / num_teachers
    if pairs != "distinct":
        raise ValueError(f"pairs must be 'all', 'distinct' or 'matched', not {pairs!r}")
    sums = []
    for s, view in enumerate(logits):
        same = s < num_teachers
        others = total - targets[s].float() if same else total
        if num_teachers - same:
            sums.append(soft_cross_entropy(view, others, temp=temp, mass=num_teachers - same).mean())
    num_pairs = num_students * num_teachers - min(num_students, num_teachers)
    return torch.stack(sums).sum() / num_pairs


def dino_losses(
    local_logits: Float[Tensor, "l B K"],
    global_logits: Float[Tensor, "G B K"],
    targets: Float[Tensor, "G B K"],
    *,
    temp: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Local and global part of the multi-crop loss; their sum is the mean over all l*G + G(G-1) pairs of distinct
    views.

    With G = 2 and l = 8 the denominator is 18 (DINOv2): every local view meets both teacher views, every global view
    only the other one. `targets[g]` belongs to student view g and comes from the other view (contracts.Targets).
    Without local views the local part is zero.
    """
    num_global = len(global_logits)
    assert num_global == 2, "targets of 'the other view' are defined for two global crops"
    local_pairs, global_pairs = len(local_logits) * num_global, num_global * (num_global - 1)
    num_pairs = local_pairs + global_pairs
    global_loss = view_cross_entropy(global_logits, targets, temp=temp, pairs="matched")
    local_loss = (
        view_cross_entropy(local_logits, targets, temp=temp, pairs="all") if local_pairs else global_loss.new_zeros(())
    )
    return local_loss * (local_pairs / num_pairs), global_loss * (global_pairs / num_pairs)
