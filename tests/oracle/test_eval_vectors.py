"""k-NN, linear probe inputs, grid and accuracies against numbers of the original evaluation code."""

from __future__ import annotations

import math

import pytest
import torch

from quietvit.contracts import Features
from quietvit.features.knn import knn_accuracy, knn_scores
from quietvit_eval.accuracy import mean_per_class, per_class, top_k_hits
from quietvit_eval.extract import Reading, extract
from quietvit_eval.linear import LRS, make_groups
from quietvit_eval.transform import EvalTransform
from reference import case

KNN = case("08_eval/knn")


def test_knn_scores_and_accuracies() -> None:
    x = KNN.inputs("full")
    bank, labels, queries = x["train_features"], x["train_labels"], x["test_features"]
    for chunk in (64, 4096):
        scores = knn_scores(bank, labels, queries, num_classes=10, chunk=chunk)
        accuracy = knn_accuracy(bank, labels, queries, x["test_labels"], num_classes=10, chunk=chunk)
        for k, value in scores.items():
            KNN.check("full", f"probas_k{k}", value)
            KNN.check("full", f"micro_top1_k{k}", torch.tensor(accuracy[k]))
            top5 = top_k_hits(value.masked_fill(value == 0, -math.inf), x["test_labels"], 5)
            KNN.check("full", f"micro_top5_k{k}", top5.float().mean())
            top1 = top_k_hits(value, x["test_labels"], 1)
            KNN.check("full", f"macro_top1_k{k}", torch.tensor(mean_per_class(top1, x["test_labels"], 10)))


@pytest.mark.parametrize("run", [r for r in KNN.info["runs"] if r != "full"])
def test_knn_on_few_images_per_class(run: str) -> None:
    x, rows = KNN.inputs("full"), KNN.inputs(run)["chosen_train_indices"]
    ks = KNN.info["runs"][run]["settings"]["k_list"]
    scores = knn_scores(x["train_features"][rows], x["train_labels"][rows], x["test_features"], ks=ks, num_classes=10)
    for k in ks:
        KNN.check(run, f"probas_k{k}", scores[k])


class Given:
    """An extractor that returns the stored tokens, whatever the image."""

    embed_dim, num_blocks, stride, image_size = 12, 4, 1, 4
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def __init__(self, tokens: dict[str, torch.Tensor]) -> None:
        self.tokens = tokens

    def last_blocks(self, images: torch.Tensor, num: int) -> list[Features]:
        none = torch.empty(len(images), 0, 12)
        wanted = range(4 - num, 4)
        return [Features(self.tokens[f"cls_{i}"], none, self.tokens[f"patch_{i}"][:, None]) for i in wanted]


class Blank:
    """Three black images."""

    name, labels, classes = "blank", {}, {}

    def __len__(self) -> int:
        return 3

    def load(self, index: int, *, min_side: int | None = None) -> object:
        return torch.zeros(4, 4, 3, dtype=torch.uint8).numpy()


def test_linear_inputs_and_logits() -> None:
    probe = case("08_eval/linear_probe")
    view = EvalTransform(4, 4, "none")
    tokens = extract(Given(probe.inputs("n1_avg0")), Blank(), range(3), view, blocks=4, reading=Reading())
    rows = tokens.values.flatten(1)
    groups = make_groups(4, 12, 9, lrs=(0.1,), generator=torch.Generator(), device=torch.device("cpu"))
    for group in groups:
        head = group.heads[0]
        run = f"n{head.blocks}_avg{int(head.avgpool)}"
        probe.check(run, "input", rows[:, group.columns])
        weights = probe.weights(f"weights_{run}")
        group.weight, group.bias = weights["linear.weight"].T[:, None].contiguous(), weights["linear.bias"][None]
        probe.check(run, "logits", group.logits(rows)[:, 0])


def test_the_grid_of_rates_and_widths() -> None:
    info = case("08_eval/linear_probe_grid").info
    assert info["settings"]["lrs"] == pytest.approx(LRS)
    batch_share = info["settings"]["batch_size"] * info["settings"]["world_size"] / 256
    groups = make_groups(4, 8, 5, generator=torch.Generator(), device=torch.device("cpu"))
    ours = [h.lr * batch_share for g in groups for h in g.heads]
    assert ours == pytest.approx(info["optimizer_group_lrs"])
    # The original names heads by rates rounded to five decimals, so that it trains 52 and keeps 48; ours keep all.
    assert len(info["classifiers"]) == 48
    assert {c["in_features"] for c in info["classifiers"]} == {len(g.weight) for g in groups}


def test_accuracies() -> None:
    stored = case("08_eval/accuracy")
    x = stored.inputs("accuracy")
    for top in (1, 5):
        hits = top_k_hits(x["preds"], x["target"], top)
        stored.check("accuracy", f"mean_accuracy/top-{top}", hits.float().mean())
        stored.check(
            "accuracy", f"mean_per_class_accuracy/top-{top}", torch.tensor(mean_per_class(hits, x["target"], 8))
        )
        stored.check("accuracy", f"per_class_accuracy/top-{top}", per_class(hits, x["target"], 8))
