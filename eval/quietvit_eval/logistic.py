"""Task `logistic`: L2-regularised multinomial logistic regression on [CLS] (DINOv2's protocol).

Minimises |w|^2 / 2 + C times the sum over images of the cross-entropy, the biases free, in float64 by scikit-learn's
L-BFGS on the CPU. With two classes that is the logistic function of one w, as there. Features are not normalised to
unit length. They are centred and divided by one common scale, and C is multiplied by its square: the same minimum, with
a `tol` that means the same for every model. Where C is large and classes can be separated, the slope falls below `tol`
long before the minimum: such fits count as converged, and resemble those of a smaller C.

A fit holds the train features in float64 and each iteration reads them all: for a million images and a thousand classes
that is hours for each C, so use `per_class`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int, Int64
from rich.console import Console
from rich.progress import track
from torch import Tensor

from quietvit.contracts import Extractor
from quietvit_eval.accuracy import Answers, hits_of, scores_of_logits
from quietvit_eval.data import EvalData
from quietvit_eval.few_shot import draw_per_class
from quietvit_eval.resampling import PerImage
from quietvit_eval.result import Result

LEAST_C, MOST_C = 1e-6, 1e5  # DINOv2
CHUNK = 8192  # images scored at a time (ours: 65 MB at 1,000 classes)
SELECT = ("held_out", "val")


@dataclass(frozen=True)
class LogisticOptions:
    """Settings of the task. Raises ValueError for values that cannot be."""

    num_c: int = 45  # DINOv2; evenly spread in the exponent from 1e-6 to 1e5
    select: str = "held_out"  # DINOv2: C is chosen on train images held out; "val": on the test images
    held_out: float = 0.1  # share of the train images; DINOv2
    per_class: int | None = None  # few-shot: so many train images of each class; None: all
    tries: int = 3  # of few-shot, drawn with the seeds 0, 1, ... (ours)
    max_iter: int = 1000  # DINOv2
    # Greatest slope of the mean loss at which a search ends; scikit-learn. DINOv2 has 1e-12. On 1,500 drawn features of
    # 10 classes the whole grid took 1,900 iterations instead of 22,000 with 1e-6, and the best C scored 81.4 % and
    # 81.6 % of 500 test images; the curves part by up to 2 points where C is large.
    tol: float = 1e-4

    def __post_init__(self) -> None:
        if self.select not in SELECT:
            raise ValueError(f"logistic: select must be one of {', '.join(SELECT)}, not {self.select!r}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"logistic: held_out is a share of the train images between 0 and 1, not {self.held_out}")
        if self.num_c < 2 or self.tries < 1 or self.max_iter < 1:
            raise ValueError("logistic: needs num_c of at least 2, and tries and max_iter of at least 1")
        if self.per_class is not None and self.per_class < 1:
            raise ValueError(f"logistic: per_class is a number of images from 1, not {self.per_class}")
        if not self.tol > 0:
            raise ValueError(f"logistic: tol must be positive, not {self.tol}")

    @property
    def cs(self) -> list[float]:
        """The grid, from strong to weak regularisation."""
        return [float(c) for c in np.logspace(math.log10(LEAST_C), math.log10(MOST_C), self.num_c)]


@dataclass(frozen=True)
class Fitted:
    """The minimum for one C, for features as they come."""

    classes: Int64[np.ndarray, " k"]  # those with train images
    weight: Float64[np.ndarray, "k D"]
    bias: Float64[np.ndarray, " k"]
    iterations: int
    converged: bool

    def logits(self, x: Float32[np.ndarray, "Q D"], num_classes: int) -> Float32[Tensor, "Q C"]:
        """-inf for classes without train images."""
        out = torch.full((len(x), num_classes), -math.inf)
        for start in range(0, len(x), CHUNK):
            scores = x[start : start + CHUNK].astype(np.float64) @ self.weight.T + self.bias
            out[start : start + CHUNK, torch.from_numpy(self.classes)] = torch.from_numpy(scores).float()
        return out


def fit_path(
    x: Float32[np.ndarray, "M D"],
    labels: Int64[np.ndarray, " M"],
    cs: Sequence[float],
    *,
    max_iter: int,
    tol: float,
) -> Iterator[Fitted]:
    """The minimum for each C, each search beginning where the one before it ended.

    Raises ValueError if there are fewer than 2 classes.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(labels)) < 2:
        raise ValueError("logistic regression needs train images of at least 2 classes")
    x = x.astype(np.float64)
    mean = x.mean(axis=0)
    x -= mean
    scale = float(np.sqrt(np.mean(x**2))) or 1.0
    x /= scale
    model = LogisticRegression(max_iter=max_iter, tol=tol, warm_start=True)
    for c in cs:
        model.set_params(C=c * scale**2)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", ConvergenceWarning)
            model.fit(x, labels)
        weight, bias = model.coef_ / scale, model.intercept_
        if len(model.classes_) == 2:
            weight, bias = np.concatenate([0 * weight, weight]), np.array([0.0, bias[0]])
        yield Fitted(
            model.classes_,
            weight,
            bias - weight @ mean,
            iterations=int(model.n_iter_[0]),
            converged=not any(issubclass(w.category, ConvergenceWarning) for w in told),
        )


def hold_out(
    labels: Int[Tensor, " M"], share: float, generator: torch.Generator
) -> tuple[Int[Tensor, " m"], Int[Tensor, " h"]]:
    """Rows to fit on and rows held out, ascending: a share of every class as nearly as whole images allow.

    Every class keeps an image to fit on. Raises ValueError if no class has two.
    """
    counts = torch.bincount(labels)
    spare = (counts - 1).clamp(min=0)
    if int(spare.sum()) == 0:
        raise ValueError("no class has 2 train images, so that none can be held out: use more, or select: val")
    wanted = share * counts.double()
    held = wanted.floor().long().minimum(spare)
    missing = min(max(1, round(share * len(labels))), int(spare.sum())) - int(held.sum())
    order = torch.randperm(len(counts), generator=generator)  # among equal claims chance decides
    order = order[(wanted - held)[order].argsort(descending=True, stable=True)]
    while missing > 0:
        open_to = order[held[order] < spare[order]][:missing]
        held[open_to] += 1
        missing -= len(open_to)
    shuffled = torch.randperm(len(labels), generator=generator)
    shuffled = shuffled[labels[shuffled].argsort(stable=True)]  # class by class
    within = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[shuffled]]
    chosen = within < held[labels[shuffled]]
    return shuffled[~chosen].sort().values, shuffled[chosen].sort().values


@dataclass(frozen=True)
class _Images:
    """Features and what is right for them."""

    x: Float32[np.ndarray, "M D"]
    answers: Answers

    def part(self, rows: Int[Tensor, " m"]) -> _Images:
        return _Images(self.x[rows.numpy()], Answers(self.answers.labels[rows], self.answers.num_classes))

    def fit_path(self, cs: Sequence[float], options: LogisticOptions) -> Iterator[Fitted]:
        return fit_path(self.x, self.answers.labels.numpy(), cs, max_iter=options.max_iter, tol=options.tol)

    def top1(self, fitted: Fitted) -> float:
        hits = 0
        for start in range(0, len(self.x), CHUNK):
            rows = slice(start, start + CHUNK)
            logits = fitted.logits(self.x[rows], self.answers.num_classes)
            hits += int(hits_of(logits, self.answers.part(rows, logits.device), 1).sum())
        return hits / len(self.x)


_CHOICE = {
    "held_out": "C chosen on {share:.0%} of the train images, held out by class; then refit on all of them",
    "val": "C chosen on the test images themselves: optimistic",
}


class LogisticTask:
    """Top-1, top-5 and mean per class of logistic regression."""

    blocks = 1
    target = "labels"
    splits = ("train", "test")
    options = LogisticOptions

    def check(self, extractor: Extractor, num_classes: int, options: LogisticOptions) -> None:
        """Every model can be scored."""

    def run(self, extractor: Extractor, data: EvalData, options: LogisticOptions) -> Result:
        """Choose C, refit on all train images, score the test images; with `per_class` the mean over tries.

        Raises ValueError if the train images are of one class, or none can be held out.
        """
        features = data.features(extractor, "train"), data.features(extractor, "test")
        train = _Images(features[0].cls.numpy(), Answers(features[0].labels, data.num_classes))
        test = _Images(features[1].cls.numpy(), data.answers(features[1].tokens.indices))
        draws = [train]
        if options.per_class is not None:
            rows = [draw_per_class(train.answers.labels, options.per_class, t) for t in range(options.tries)]
            draws = [train.part(r.sort().values) for r in rows]
        tries = [self._one_try(images, test, options, data.seed, data.reading.console) for images in draws]
        scores = {name: float(np.mean([t[0][name] for t in tries])) for name in tries[0][0]}
        hits = {name: np.mean([t[1][name] for t in tries], axis=0) for name in tries[0][1]}
        details = tries[0][2]
        if options.per_class is not None:
            std = {name: float(np.std([t[0][name] for t in tries])) for name in scores}
            details = {"std": std, "tries": [{**t[2], "scores": t[0]} for t in tries]}
        protocol = {
            "name": "L2-regularised logistic regression on [CLS] of the last block, not normalised",
            "cs": [LEAST_C, MOST_C, options.num_c],
            "max_iter": options.max_iter,
            "tol": options.tol,
            "select": options.select,
            "choice": _CHOICE[options.select].format(share=options.held_out),
            "per_class": options.per_class,
            "tries": len(tries),
        }
        return Result(scores, "top1", protocol, details, PerImage(data.names("test"), hits))

    def _one_try(
        self, train: _Images, test: _Images, options: LogisticOptions, seed: int, console: Console | None
    ) -> tuple[dict[str, float], dict[str, np.ndarray], dict[str, Any]]:
        """Scores, hits and details with these train images."""
        fit, choose = train, test
        if options.select == "held_out":
            rows = hold_out(train.answers.labels, options.held_out, torch.Generator().manual_seed(seed))
            fit, choose = train.part(rows[0]), train.part(rows[1])
        path: Any = zip(options.cs, fit.fit_path(options.cs, options), strict=True)
        if console is not None and console.is_terminal:
            path = track(path, "logistic regression", total=options.num_c, console=console, transient=True)
        curve = [
            {"c": c, "chosen_by": choose.top1(f), "iterations": f.iterations, "converged": f.converged} for c, f in path
        ]
        best = max(range(len(curve)), key=lambda i: float(curve[i]["chosen_by"]))  # of equal ones the smallest C
        (final,) = train.fit_path([options.cs[best]], options)
        scores, hits = scores_of_logits(final.logits(test.x, train.answers.num_classes), test.answers)
        details = {
            "c": options.cs[best],
            "chosen_by": curve[best]["chosen_by"],
            "at_edge_of_cs": best in (0, len(curve) - 1),
            "iterations": final.iterations,
            "converged": final.converged,
            "curve": curve,
            "trained_on": len(train.x),
            "chosen_on": len(choose.x),
        }
        return scores, hits, details
