"""Linear grid and k-NN on stored features: 52 heads side by side against one by one, and time and memory of k-NN.

    python benchmarks/classification.py            both, on this machine's CPU
    python benchmarks/classification.py --quick    fewer steps, fewer images
    python benchmarks/classification.py --device cuda   the heads trained there; features stay in host memory
    ... --part heads | knn --json OUT              default: both; benchmarks/results/classification-<date>.json

Heads. The same 52 heads with the same starting weights take the same batches in the same order, three ways: side by
side (`train_heads` on all groups, what the task does); one by one by the same code (`train_heads` on a group of one
head); one by one as usually written (a DataLoader over the rows, nn.Linear, cross-entropy, autograd, torch's SGD and
cosine schedule). The two others are timed on a few of the 52 heads of each of the four widths, spread over the rates,
and counted 13 times over; their accuracies must be those of the same heads trained side by side. Beside these stands
what one by one would cost without stored features, each head with a pass of the model for each of its batches: reckoned
from the time of a few images. Times are wall-clock, and processor time beside them, since a busy machine disturbs the
former; on the CPU heads get one thread.

k-NN. A process of its own makes the vectors, finds the class scores of all queries and reports its greatest resident
size (VmHWM), in which Python and torch are counted too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from quietvit.backbones import make_backbone
from quietvit.features.knn import knn_scores
from quietvit.files import write_text
from quietvit.train.environment import environment, hardware
from quietvit_eval.head_grid import LRS, HeadGroup, make_groups
from quietvit_eval.linear import Rows, accuracies, train_heads

RESULTS = Path(__file__).parent / "results"
LIMIT_GIB = 2.0  # what k-NN may take


@dataclass(frozen=True)
class Heads:
    """One setting of the grid: features of 5 columns (4 [CLS] and the mean patch) of `width` numbers each."""

    images: int
    width: int
    classes: int
    batch: int
    steps: int


FULL = (Heads(20_000, 384, 100, 1024, 10), Heads(20_000, 384, 10, 1024, 20), Heads(20_000, 96, 10, 256, 100))
QUICK = (Heads(4_000, 96, 10, 256, 40), Heads(4_000, 96, 100, 256, 20))
MODELS = {
    384: {"size": "small", "patch_size": 14, "image_size": 224},
    96: {"size": "nano", "patch_size": 4, "image_size": 32},
}
FORWARD = 16  # images in a timed pass of the model
TIMED_RATES = (0, 6, 12)  # of the 13: both ends and the middle


@dataclass(frozen=True)
class Neighbours:
    """One setting of k-NN."""

    bank: int
    queries: int
    width: int
    classes: int


FULL_KNN = Neighbours(100_000, 10_000, 384, 1000)
QUICK_KNN = Neighbours(20_000, 1_000, 384, 1000)


# ---- heads


def make_rows(case: Heads) -> tuple[Rows, Rows]:
    """Train and test rows: every class a centre, under noise that leaves heads room to differ."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(case.classes, (case.images,), generator=generator)
    centres = torch.randn(case.classes, 5 * case.width, generator=generator)
    features = torch.randn(case.images, 5 * case.width, generator=generator).mul_(8).add_(centres[labels])
    order = torch.randperm(case.images, generator=generator)
    held = case.images // 10
    return Rows(features, labels, order[held:].sort().values), Rows(features, labels, order[:held].sort().values)


def grid(case: Heads, device: torch.device, **chosen: Any) -> list[HeadGroup]:
    """All 52 heads, or those chosen. A group starts from the seed alone, so a head of it starts alike everywhere."""
    groups = []
    for blocks in chosen.get("blocks", (1, 4)):
        for pooled in chosen.get("pooled", (False, True)):
            generator = torch.Generator().manual_seed(1)
            groups += make_groups(
                4, case.width, case.classes, blocks=(blocks,), lrs=chosen.get("lrs", LRS), pooled=(pooled,),
                generator=generator, device=device,
            )  # fmt: skip
    return groups


def by_our_code(groups: list[HeadGroup], rows: Rows, case: Heads) -> None:
    """As the task trains them."""
    order = torch.Generator().manual_seed(2)
    train_heads(groups, rows, batch_size=case.batch, steps=case.steps, generator=order)


def as_usually_written(group: HeadGroup, rows: Rows, case: Heads) -> None:
    """One head by autograd, from a DataLoader that hands out row by row; the batches of `train_heads`."""
    head, device = group.heads[0], group.weight.device
    order = torch.Generator().manual_seed(2)
    batches: list[list[int]] = []
    while len(batches) < case.steps:
        count = len(rows) // case.batch * case.batch
        batches += torch.randperm(len(rows), generator=order)[:count].view(-1, case.batch).tolist()
    batches = [rows.chosen[torch.tensor(b)].tolist() for b in batches[: case.steps]]
    linear = nn.Linear(len(group.weight), case.classes).to(device)
    with torch.no_grad():
        linear.weight.copy_(group.weight[:, 0].T)
        linear.bias.zero_()
    sgd = torch.optim.SGD(linear.parameters(), lr=head.lr * case.batch / 256, momentum=0.9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, case.steps)
    for x, y in DataLoader(TensorDataset(rows.features, rows.labels), batch_sampler=batches):
        loss = nn.functional.cross_entropy(linear(x[:, group.columns].to(device)), y.to(device))
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        cosine.step()
    with torch.no_grad():
        group.weight.copy_(linear.weight.T[:, None])
        group.bias.copy_(linear.bias[None])


def timed(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Wall-clock seconds, and seconds of processor time."""
    wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wait(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of_a_pass(case: Heads, device: torch.device) -> tuple[float, float]:
    """Of one image through the model that makes features of this width: wall-clock and processor time."""
    model = make_backbone("vit", **MODELS[case.width]).eval().to(device)
    images = torch.randn(FORWARD, 3, model.image_size, model.image_size, device=device)
    with torch.no_grad():
        model(images)
        wall, cpu = timed(lambda: model(images), device)
    return wall / FORWARD, cpu / FORWARD


def measure_heads(case: Heads, device: torch.device) -> dict[str, Any]:
    """Milliseconds of a step of all 52 heads, by each way, and the greatest difference of their accuracies."""
    rows, test = make_rows(case)
    by_our_code(grid(case, device), rows, Heads(case.images, case.width, case.classes, case.batch, 2))  # sets things up
    together = grid(case, device)
    seconds = {"side by side": timed(lambda: by_our_code(together, rows, case), device)}
    expected = dict(zip([h for g in together for h in g.heads], accuracies(together, test), strict=True))
    off = 0.0
    for way in ("one by one", "one by one, as usually written"):
        total = [0.0, 0.0]
        for blocks in (1, 4):
            for pooled in (False, True):
                for rate in TIMED_RATES:
                    alone = grid(case, device, blocks=(blocks,), pooled=(pooled,), lrs=(LRS[rate],))
                    if way == "one by one":
                        found = timed(lambda alone=alone: by_our_code(alone, rows, case), device)
                    else:
                        found = timed(lambda alone=alone: as_usually_written(alone[0], rows, case), device)
                    total = [t + f * len(LRS) / len(TIMED_RATES) for t, f in zip(total, found, strict=True)]
                    off = max(off, abs(accuracies(alone, test)[0] - expected[alone[0].heads[0]]))
        seconds[way] = (total[0], total[1])
    passes = len(expected) * case.batch * case.steps
    one_image, ours = seconds_of_a_pass(case, device), seconds["one by one"]
    seconds["one by one, from images"] = (ours[0] + passes * one_image[0], ours[1] + passes * one_image[1])
    assert off <= 2 / len(test), f"heads trained alone score {off} otherwise than side by side"
    wall, cpu = seconds["side by side"]
    return {
        **asdict(case),
        "ms_per_step": {way: 1000 * s[0] / case.steps for way, s in seconds.items()},
        "cpu_ms_per_step": {way: 1000 * s[1] / case.steps for way, s in seconds.items()},
        "times_faster": {way: s[0] / wall for way, s in seconds.items()},
        "times_faster_cpu": {way: s[1] / cpu for way, s in seconds.items()},
        "gflop_per_step": 4e-9 * case.batch * case.classes * len(LRS) * 12 * case.width,  # 1 + 2 + 4 + 5 columns
        "best_accuracy": max(expected.values()),
        "worst_accuracy": min(expected.values()),
        "largest_difference_of_accuracies": off,
        "test_images": len(test),
    }


# ---- k-NN


def measure_knn(case: Neighbours, threads: int) -> dict[str, Any]:
    """Seconds and greatest resident size, in a fresh process."""
    words = [sys.executable, __file__, "--knn-worker", json.dumps(asdict(case)), str(threads)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def knn_worker(case: Neighbours, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    started = resident("VmRSS")
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(n, case.width, generator=generator) for n in (case.bank, case.queries))
    labels = torch.randint(case.classes, (case.bank,), generator=generator)
    scores: dict[int, Tensor] = {}

    def work() -> None:
        scores.update(knn_scores(bank, labels, queries, num_classes=case.classes))

    wall, cpu = timed(work, torch.device("cpu"))
    assert all(s.shape == (case.queries, case.classes) for s in scores.values())
    return {
        **asdict(case),
        "ks": list(scores),
        "threads": threads,
        "seconds": wall,
        "cpu_seconds": cpu,
        "peak_gib": resident("VmHWM"),
        "gib_of_vectors": (bank.nbytes + queries.nbytes) / 1024**3,
        "gib_before_vectors": started,
    }


def resident(name: str) -> float:
    """GiB by /proc/self/status: VmRSS now, or VmHWM at most since this program began."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024**2
    raise ValueError(f"this system does not tell {name}: the k-NN part needs Linux")


# ---- results


def as_text(report: dict[str, Any]) -> str:
    lines = [f"Linear grid and k-NN on stored features. {report['date']}, {report['hardware']}.", ""]
    lines += ["    " + report["command"], "", report["note"]] if report["note"] else ["    " + report["command"]]
    if report["heads"]:
        lines += ["", "52 linear heads: milliseconds of a step of all of them, wall-clock (processor time).", ""]
        lines += [
            "| images, classes, batch | side by side | one by one | usually written | from images | GFLOP | differ |"
        ]
        lines += ["|---|---|---|---|---|---|---|"]
        lines += [_head_row(case) for case in report["heads"]]
        lines += ["", HEADS_NOTE]
    if report["knn"]:
        k = report["knn"]
        lines += [
            "",
            f"k-NN of {k['queries']:,} queries, {k['bank']:,} in the bank, {k['width']} wide, {k['classes']} classes, "
            f"{k['threads']} threads: {k['seconds']:.1f} s ({k['cpu_seconds']:.1f} s of processor time), greatest "
            f"resident size {k['peak_gib']:.2f} GiB, of which vectors {k['gib_of_vectors']:.2f} and Python with torch "
            f"{k['gib_before_vectors']:.2f}.",
        ]
    return "\n".join(lines) + "\n"


HEADS_NOTE = (
    "In brackets behind the milliseconds: how many times faster side by side is, by the wall clock and by processor "
    "time. Side by side the features are read once instead of 52 times and the products are wide; the arithmetic is "
    "the same, and where it is all the time (many classes on a CPU) little can be gained. From images: without stored "
    "features, reckoned (ViT-S/14 at 224 pixels for 384, nano at 32 pixels for 96). `differ`: the greatest "
    "difference of a head's test accuracy between side by side and alone."
)


def _head_row(case: dict[str, Any]) -> str:
    cells = [f"{case['images']:,} x 5 x {case['width']}, {case['classes']}, {case['batch']}"]
    for way, ms in case["ms_per_step"].items():
        cpu = case["cpu_ms_per_step"][way]
        cell = f"{ms:.1f} ({cpu:.1f})" if ms < 1e4 else f"{ms / 1000:,.0f} s ({cpu / 1000:,.0f} s)"
        if way != "side by side":
            cell += f" [**{case['times_faster'][way]:,.1f}**, {case['times_faster_cpu'][way]:,.1f}]"
        cells.append(cell)
    cells += [f"{case['gflop_per_step']:.2f}", f"{case['largest_difference_of_accuracies']:.4f}"]
    return "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--part", choices=("heads", "knn"), help="only this part")
    parser.add_argument("--device", default="cpu", help="where heads are trained")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of k-NN")
    parser.add_argument("--note", default="", help="a sentence for the results, e.g. that the machine was shared")
    parser.add_argument("--json", type=Path, help="write the results here, and a table beside them (.md)")
    parser.add_argument("--knn-worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.knn_worker:
        print(json.dumps(knn_worker(Neighbours(**json.loads(args.knn_worker[0])), int(args.knn_worker[1]))))
        return
    torch.set_num_threads(1)
    device = torch.device(args.device)
    cases, neighbours = (QUICK, QUICK_KNN) if args.quick else (FULL, FULL_KNN)
    date = datetime.date.today().isoformat()
    report = {
        "date": date,
        "hardware": hardware(device),
        "environment": environment(device),
        "command": "python benchmarks/" + " ".join([Path(__file__).name, *sys.argv[1:]]),
        "note": args.note,
        "heads": [measure_heads(case, device) for case in cases] if args.part != "knn" else [],
        "knn": measure_knn(neighbours, args.threads) if args.part != "heads" else None,
    }
    text = as_text(report)
    print(text)
    if report["knn"] and report["knn"]["peak_gib"] > LIMIT_GIB:
        print(f"k-NN took more than {LIMIT_GIB} GiB", file=sys.stderr)
    path = args.json or RESULTS / f"classification-{date}.json"
    write_text(path, json.dumps(report, indent=1) + "\n")
    write_text(path.with_suffix(".md"), text)


if __name__ == "__main__":
    main()
