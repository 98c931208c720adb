"""Weighted k-nearest-neighbour classification on frozen features (DINO's protocol, as in DINOv2's evaluation).

score(c) = sum over the k nearest bank images j with label c of softmax_j(cos(query, j) / temp), where the softmax runs
once over the max(ks) nearest. The scores of a smaller k therefore do not sum to one; their ranking is that of
exp(cos / temp) votes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

KS = (10, 20, 100, 200)  # DINOv2 evaluation; 20 is the figure usually quoted
TEMP = 0.07  # DINO and DINOv2
CHUNK = 2048  # ours: 2048 x 2048 similarities and their sort keys take about 120 MB


@torch.no_grad()
def knn_scores(
    bank: Float[Tensor, "M D"],
    bank_labels: Int[Tensor, " M"],
    queries: Float[Tensor, "Q D"],
    *,
    ks: Sequence[int] = KS,
    temp: float = TEMP,
    num_classes: int,
    chunk: int = CHUNK,
) -> dict[int, Float[Tensor, "Q C"]]:
    """Class scores of every query, for each k (its key as asked for, even where the bank is smaller than k).

    Features need not be normalised. Only `chunk` queries meet `chunk` bank rows at a time, on the device of `queries`;
    the bank may stay on another. Bank rows of equal similarity rank by their index.

    Raises ValueError for an empty bank, labels outside [0, num_classes), or a k below one.
    """
    parts = list(_scores_by_chunk(bank, bank_labels, queries, ks=ks, temp=temp, num_classes=num_classes, chunk=chunk))
    if not parts:
        return {k: queries.new_zeros(0, num_classes, dtype=torch.float32) for k in ks}
    return {k: torch.cat([scores[k] for _, scores in parts]) for k in ks}


@torch.no_grad()
def knn_accuracy(
    bank: Float[Tensor, "M D"],
    bank_labels: Int[Tensor, " M"],
    queries: Float[Tensor, "Q D"],
    query_labels: Int[Tensor, " Q"],
    *,
    ks: Sequence[int] = KS,
    temp: float = TEMP,
    num_classes: int | None = None,
    chunk: int = CHUNK,
) -> dict[int, float]:
    """Share of queries whose highest score is their own class, in [0, 1], for each k. Equal scores: lowest class wins.

    `num_classes` None: one more than the greatest label. Raises ValueError as `knn_scores`, and without queries.
    """
    if len(queries) == 0:
        raise ValueError("k-NN needs at least one query image")
    if num_classes is None:
        num_classes = int(max(bank_labels.max(), query_labels.max())) + 1 if len(bank_labels) else 1
    right = dict.fromkeys(ks, 0)
    labels = query_labels.to(queries.device)
    parts = _scores_by_chunk(bank, bank_labels, queries, ks=ks, temp=temp, num_classes=num_classes, chunk=chunk)
    for rows, scores in parts:
        for k in ks:
            right[k] += int((scores[k].argmax(dim=1) == labels[rows]).sum())
    return {k: right[k] / len(queries) for k in ks}


def _scores_by_chunk(
    bank: Float[Tensor, "M D"],
    bank_labels: Int[Tensor, " M"],
    queries: Float[Tensor, "Q D"],
    *,
    ks: Sequence[int],
    temp: float,
    num_classes: int,
    chunk: int,
) -> Iterator[tuple[slice, dict[int, Float[Tensor, "q C"]]]]:
    if len(bank) == 0:
        raise ValueError("k-NN needs at least one labelled bank image")
    if not ks or min(ks) < 1:
        raise ValueError(f"k-NN needs k of at least 1, got {tuple(ks)}")
    if int(bank_labels.min()) < 0 or int(bank_labels.max()) >= num_classes:
        raise ValueError(
            f"bank labels run from {int(bank_labels.min())} to {int(bank_labels.max())}, but there are {num_classes} "
            "classes: leave unlabelled images out of the bank"
        )
    labels = bank_labels.to(queries.device)
    for start in range(0, len(queries), chunk):
        rows = slice(start, min(start + chunk, len(queries)))
        similarities, nearest = _nearest(bank, queries[rows], min(max(ks), len(bank)), chunk)
        yield rows, _votes(similarities, labels[nearest], ks, temp, num_classes)


def _nearest(
    bank: Float[Tensor, "M D"], queries: Float[Tensor, "q D"], count: int, chunk: int
) -> tuple[Float[Tensor, "q K"], Int[Tensor, "q K"]]:
    """The `count` most similar bank rows of each query, best first: cosine similarities and bank indices."""
    with torch.autocast(queries.device.type, enabled=False):  # half precision would make ties of near neighbours
        queries = F.normalize(queries.float(), dim=1)
        best = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        for start in range(0, len(bank), chunk):
            rows = F.normalize(bank[start : start + chunk].to(queries.device).float(), dim=1)
            keys = torch.cat([best, _rank_keys(queries @ rows.T, start)], dim=1)
            best = keys.topk(min(count, keys.shape[1]), dim=1).values
    return _similarity_of(best), 0xFFFFFFFF - (best & 0xFFFFFFFF)


def _rank_keys(similarities: Float[Tensor, "q m"], start: int) -> Int[Tensor, "q m"]:
    """One integer per pair that orders by similarity, then by lower bank index.

    The order in which topk returns equal values is not defined; these keys are all different, so the neighbours do not
    depend on device or chunk. High 32 bits: the float's bits, made monotone; low 32 bits: the index, counted downwards.
    """
    bits = (similarities + 0.0).view(torch.int32)  # + 0.0: -0.0 becomes 0.0, else equal values would differ in bits
    monotone = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    index = torch.arange(start, start + similarities.shape[1], device=similarities.device)
    return (monotone << 32) | (0xFFFFFFFF - index)


def _similarity_of(keys: Int[Tensor, "q K"]) -> Float[Tensor, "q K"]:
    monotone = (keys >> 32).to(torch.int32)
    return torch.where(monotone < 0, monotone ^ 0x7FFFFFFF, monotone).view(torch.float32)


def _votes(
    similarities: Float[Tensor, "q K"], labels: Int[Tensor, "q K"], ks: Sequence[int], temp: float, num_classes: int
) -> dict[int, Float[Tensor, "q C"]]:
    weights = torch.softmax(similarities / temp, dim=1)
    scores = weights.new_zeros(len(weights), num_classes)
    kept: dict[int, Tensor] = {}
    for j in range(weights.shape[1]):
        # One neighbour per query at a time: no two additions meet, so the sum has one order on every device.
        scores.scatter_add_(1, labels[:, j : j + 1], weights[:, j : j + 1])
        if j + 1 in ks:
            kept[j + 1] = scores.clone()
    return {k: kept.get(k, scores) for k in ks}
