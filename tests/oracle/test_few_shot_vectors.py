"""Few-shot banks of k-NN: the images that the original draws, and for which k it scores them."""

from __future__ import annotations

import pytest
import torch

from quietvit_eval.accuracy import Answers
from quietvit_eval.few_shot import draw_per_class
from quietvit_eval.knn import KnnOptions, Search, few_shot_hits, few_shot_ks
from reference import case

KNN = case("08_eval/knn")
RUNS = [run for run in KNN.info["runs"] if run != "full"]


@pytest.mark.parametrize("run", RUNS)
def test_the_drawn_images_and_the_ks(run: str) -> None:
    settings = KNN.info["runs"][run]["settings"]
    rows = draw_per_class(KNN.inputs("full")["train_labels"], settings["n_per_class"], settings["try"])
    assert rows.tolist() == KNN.inputs(run)["chosen_train_indices"].tolist()
    assert few_shot_ks(KNN.info["constructor"]["nb_knn"], settings["n_per_class"]) == settings["k_list"]


def test_the_accuracies_of_the_tries() -> None:
    x = KNN.inputs("full")
    search = Search(x["test_features"], Answers(x["test_labels"], 10), 0.07, torch.device("cpu"))
    options = KnnOptions(per_class=(5, 12), tries=2)
    found = few_shot_hits(search, x["train_features"], x["train_labels"], options)
    assert found.keys() == {"top1@5/5per", "top1@10/12per", "top1@12/12per"}
    for run in RUNS:
        settings = KNN.info["runs"][run]["settings"]
        for k in settings["k_list"]:
            expected = KNN.outputs(run)[f"probas_k{k}"].argmax(dim=1) == x["test_labels"]
            ours = found[f"top1@{k}/{settings['n_per_class']}per"][settings["try"]]
            assert ours.tolist() == expected.tolist()
