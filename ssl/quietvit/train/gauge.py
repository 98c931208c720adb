"""The artifact gauge: norms of the teacher's tokens after every block, on the crops it sees anyway, while it trains.

On a gauge step an observer counts them in histograms on the device; afterwards one reduction over the ranks and one
copy to the host give the verdict of quietvit.features.norms for every block. On all other steps nothing is done.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from quietvit import dist
from quietvit.backbones import Trunk
from quietvit.features.norms import NormHistogram, NormVerdict
from quietvit.files import write_text
from quietvit.nn.packing import Groups, unpack
from quietvit.train.metrics import Value

__all__ = ["ArtifactGauge", "Episode", "Episodes"]

PATIENCE = 2  # readings in a row before artifacts are said to have begun or ended (ours: one may be a single batch)
PREFIX = "artifacts/"


class ArtifactGauge:
    """Reads norms on the steps that it is due at. All ranks use it alike.

    Args:
        backbone: the teacher's; sharded, compiled or neither.
        every: steps between two readings; 0: none.
        steps: length of the run, whose last step is always read.
    """

    def __init__(self, backbone: Trunk, *, every: int, steps: int) -> None:
        self.backbone, self.every, self.steps = backbone, every, steps
        self._patches: NormHistogram | None = None
        self._others: list[list[Tensor]] = []

    def due(self, step: int) -> bool:
        """Whether the norms of `step` (counted from 1) are read."""
        return self.every > 0 and (step % self.every == 0 or step == self.steps)

    @contextlib.contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Around a training step: counts norms if it is due. Nothing waits for the device, and nothing that the step
        computes changes."""
        if not self.due(step):
            yield
            return
        self._patches, self._others = None, [[] for _ in range(self.backbone.num_blocks)]
        with self.backbone.observing(self._count):
            yield

    @torch.no_grad()
    def _count(self, block: int, tokens: Tensor, groups: Groups) -> None:
        if self._patches is None:
            self._patches = NormHistogram(self.backbone.num_blocks, device=tokens.device)
        first = 1 + self.backbone.num_registers
        for norms in unpack(torch.linalg.vector_norm(tokens.detach().float(), dim=-1, keepdim=True), groups):
            self._patches.add(norms[:, first:], block)
            self._others[block].append(norms[:, :first, 0])

    def read(self) -> dict[str, float]:
        """The figures of the step that was watched, those of all ranks together; all ranks must call. Keys:

        - `share/block_07`, `spread/...`, `median/...`: outlier share, standard deviation of the log norms and median
          norm of the patch tokens after each block, from 0
        - `cls/block_07`, `registers/block_07`: median norms of these tokens
        - `share`, `max_share`: of the last block, and the greatest of all; where that is above 0 `ratio`, outliers to
          usual norm in the block of the greatest

        Empty when nothing was counted.
        """
        if self._patches is None:
            return {}
        patches = self._patches.over_ranks()
        patches.counts = patches.counts.cpu()
        others = dist.gather_rows(torch.stack([torch.cat(rows) for rows in self._others], dim=1)).cpu()  # [b, L, 1+R]
        self._patches, self._others = None, []
        verdicts = [patches.judge(block) for block in range(len(patches.counts))]
        values: dict[str, float] = {}
        for block, verdict in enumerate(verdicts):
            at = f"block_{block:02d}"
            values |= {f"share/{at}": _share(verdict), f"spread/{at}": verdict.spread, f"median/{at}": verdict.median}
            values[f"cls/{at}"] = float(others[:, block, 0].median())
            if self.backbone.num_registers:
                values[f"registers/{at}"] = float(others[:, block, 1:].median())
        shares = [_share(v) for v in verdicts]
        values |= {"share": shares[-1], "max_share": math.nan if any(map(math.isnan, shares)) else max(shares)}
        if values["max_share"] > 0:
            values["ratio"] = verdicts[shares.index(max(shares))].ratio
        return {PREFIX + name: value for name, value in values.items()}


def _share(verdict: NormVerdict) -> float:
    return 0.0 if verdict.kind == "suspicious" else verdict.share


@dataclass(frozen=True)
class Episode:
    """A time with artifacts. Blocks count from 0; shares are of the patch tokens after the last block."""

    began_step: int
    layer: int  # first block with outliers up to the last one, at the beginning
    blocks: tuple[int, ...]  # all blocks with outliers at the beginning
    share: float  # at the beginning
    ratio: float  # outliers to usual norm, at the beginning
    max_share: float  # the greatest after the last block so far
    ended_step: int | None = None


class Episodes:
    """When artifacts began and ended: the last block has outliers, or has none any more, in PATIENCE readings in a row.

    A function of the readings alone: a resumed run feeds those of metrics.jsonl again and goes on from there. The
    record is `<run>/artifacts.json`: {"num_registers", "episodes": [fields of Episode]}; there is none before artifacts
    were seen.
    """

    def __init__(self, run_dir: Path, *, num_registers: int) -> None:
        self.path = run_dir / "artifacts.json"
        self.num_registers = num_registers
        self.episodes: list[Episode] = []
        self._row: list[
            tuple[int, Sequence[float], float]
        ] = []  # latest readings of the same kind: step, shares, ratio

    def replay(self, records: Sequence[Mapping[str, Value]]) -> None:
        """Take in what a run had read before (records of metrics.jsonl), and write the record anew."""
        for record in records:
            values = {k: v for k, v in record.items() if k.startswith(PREFIX) and isinstance(v, float | int)}
            if PREFIX + "share" in values:
                self._feed(int(cast(int, record["step"])), values)
        self._write()

    def add(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Take in a reading (`ArtifactGauge.read`): sentences about what began or ended, with the record written."""
        said = self._feed(step, values)
        self._write()
        return said

    def _feed(self, step: int, values: Mapping[str, float]) -> list[str]:
        if not math.isfinite(values.get(PREFIX + "share", math.nan)):
            return []
        shares = [v for k, v in sorted(values.items()) if k.startswith(PREFIX + "share/")]
        has = shares[-1] > 0
        if self._row and (self._row[-1][1][-1] > 0) != has:
            self._row = []
        self._row.append((step, shares, values.get(PREFIX + "ratio", math.nan)))
        now = self.episodes[-1] if self.episodes and self.episodes[-1].ended_step is None else None
        if has and now is not None:
            self.episodes[-1] = replace(now, max_share=max(now.max_share, shares[-1]))
        if len(self._row) < PATIENCE or has == (now is not None):
            return []
        first, at_first, ratio = self._row[0]
        if now is not None:
            self.episodes[-1] = replace(now, ended_step=first)
            return [f"no artifacts any more since step {first}: they had begun at step {now.began_step}"]
        blocks = tuple(block for block, share in enumerate(at_first) if share > 0)
        layer = max((b + 1 for b, share in enumerate(at_first) if share == 0), default=0)
        most = max(row[1][-1] for row in self._row)
        self.episodes.append(Episode(first, layer, blocks, at_first[-1], ratio, most))
        return [self._sentence(self.episodes[-1], last=len(at_first) - 1)]

    def _sentence(self, episode: Episode, *, last: int) -> str:
        where = f"blocks {episode.layer}-{last}" if episode.layer < last else f"block {last}"
        cure = (
            f"the {self.num_registers} registers of this model do not take them in, more may (model.num_registers)"
            if self.num_registers
            else "registers (model.num_registers=4) remove them"
        )
        return (
            f"artifacts since step {episode.began_step}, {where}, {100 * episode.share:.1f} % of the patch tokens at "
            f"{episode.ratio:.0f} times the usual norm: {cure}"
        )

    def _write(self) -> None:
        if not self.episodes:
            self.path.unlink(missing_ok=True)
            return
        record = {"num_registers": self.num_registers, "episodes": [asdict(e) for e in self.episodes]}
        text = json.dumps(record, indent=1) + "\n"
        if not self.path.exists() or self.path.read_text(encoding="utf-8") != text:
            write_text(self.path, text)
