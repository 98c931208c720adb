"""The teacher's logits become targets: Sinkhorn-Knopp, or a softmax around a running center."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from quietvit import dist

__all__ = ["SoftmaxCentering", "sinkhorn_knopp"]


@torch.no_grad()
def sinkhorn_knopp(logits: Float[Tensor, "rows K"], temp: float, *, iterations: int = 3) -> Float[Tensor, "rows K"]:
    """Assign rows of all ranks evenly to prototypes: exp(t / temp), scaled by turns (SwAV, arXiv 2006.09882, eq. 3).

    Each iteration divides every prototype by its sum over the rows of all ranks, then every row by its sum, so that
    rows sum to one at the end. Here in the log domain, where no logit is too large to exponentiate and no prototype's
    sum vanishes; constant factors of the usual statement (number of rows, of prototypes) cancel in the last division.
    Float32 throughout. Ranks may hold different numbers of rows, also none, but all must call. Three iterations:
    DINOv2, section 4.
    """
    with torch.autocast(logits.device.type, enabled=False):
        log_q = logits.float() / temp
        for _ in range(iterations):
            log_q -= _logsumexp_over_ranks(log_q)
            log_q -= log_q.logsumexp(1, keepdim=True)
        return log_q.exp_()


def _logsumexp_over_ranks(x: Float[Tensor, "rows K"]) -> Float[Tensor, "1 K"]:
    """log sum exp over the rows of all ranks."""
    own = x.logsumexp(0, keepdim=True)  # -inf where this rank has no rows
    if not dist.is_distributed():
        return own
    largest = dist.max_over_ranks(own)
    return largest + dist.sum_over_ranks((own - largest).exp()).log()


class SoftmaxCentering(nn.Module):
    """q = softmax((t - c) / temp), where the center c follows the mean of the teacher's logits (DINO, eq. 4).

    The center that a batch moves is used from the next batch on. Over several ranks the mean is that of all rows
    (`average="rows"`), or, as in DINOv2's patch loss, the mean of the ranks' means whatever their counts ("ranks").
    """

    center: Float[Tensor, "1 K"]

    def __init__(self, num_prototypes: int, *, momentum: float = 0.9, average: str = "rows") -> None:
        super().__init__()
        if average not in ("rows", "ranks"):
            raise ValueError(f"average must be 'rows' or 'ranks', not {average!r}")
        self.momentum = momentum  # 0.9: DINO
        self.average = average
        self.register_buffer("center", torch.zeros(1, num_prototypes))

    @torch.no_grad()
    def forward(self, logits: Float[Tensor, "rows K"], temp: float) -> Float[Tensor, "rows K"]:
        """Targets with the center of earlier batches; then move the center. All ranks must call, also with no
        rows."""
        with torch.autocast(logits.device.type, enabled=False):
            targets = (logits.float() - self.center).div_(temp).softmax(-1)
            self._move_center(logits)
        return targets

    def _move_center(self, logits: Float[Tensor, "rows K"]) -> None:
        total = logits.sum(0, keepdim=True, dtype=torch.float32)
        count = torch.full((1, 1), float(len(logits)), device=total.device)
        if self.average == "ranks":
            total, count = total / count.clamp_min(1.0), torch.ones_like(count)
        sums = dist.sum_over_ranks(torch.cat([total, count], 1))  # one collective for both
        total, count = sums[:, :-1], sums[:, -1:]
        # A batch without rows, or with a broken logit, leaves the center be: it would never recover from a NaN.
        usable = (count > 0) & total.isfinite().all()
        mean = torch.where(usable, total / count.clamp_min(1.0), self.center)
        self.center.lerp_(mean, 1.0 - self.momentum)

    def extra_repr(self) -> str:
        return f"num_prototypes={self.center.shape[1]}, momentum={self.momentum}, average={self.average}"
