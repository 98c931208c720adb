"""The second look at the images, when high tokens are known: neighbours, probes, one token of each image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from quietvit.contracts import Extractor
from quietvit_eval.inspect.one_token import TokenTable, draw_tokens, score_table
from quietvit_eval.inspect.places import Similarities, neighbour_similarity
from quietvit_eval.inspect.probes import Answers, PixelFit, distance_of_a_guess, fit_positions, patch_pixels
from quietvit_eval.inspect.tokens import ImageSet, Seen, look_at, stem_tokens, tokens_of
from quietvit_eval.views import normalised

TRAIN_SHARE = 0.7  # of the images, for all probes (ours)
LEAST_IMAGES = 10  # below it nothing is probed (ours)
TOKENS_MEMORY = 1024**3  # bytes of tokens held for the probe of places (ours); of each image so many at random places


@dataclass
class SecondLook:
    """What is found over images whose high tokens, `high` [M N], are known. Rows number images from 0."""

    extractor: Extractor
    images: ImageSet
    high: Bool[np.ndarray, "M N"]
    grid: tuple[int, int]
    block: int  # whose tokens are probed, through the final norm
    seed: int
    draws: int  # of one token from each image
    probes: bool
    similarities: Similarities = field(default_factory=Similarities.none, init=False)
    table: TokenTable = field(default_factory=TokenTable, init=False)
    pixels: PixelFit = field(default_factory=PixelFit, init=False)
    train: Bool[np.ndarray, " M"] = field(init=False)
    _drawn: dict[str, Int64[np.ndarray, "draws M"]] = field(init=False)
    _device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.images)
        order = np.random.default_rng(self.seed).permutation(count)
        self.train = np.zeros(count, bool)
        self.train[order[: round(TRAIN_SHARE * count)]] = True
        self._drawn = draw_tokens(self.high, draws=self.draws, seed=self.seed)
        device = getattr(self.extractor, "device", torch.device("cpu"))
        self._device = device if device.type == "cuda" else torch.device("cpu")  # MPS has no float64

    def run(self, labels: Int64[np.ndarray, " M"] | None) -> dict[str, Any]:
        """Everything for result.json: "neighbours", "local" and "one_token", each a mapping or {"skipped": why}."""
        too_few = len(self.images) < LEAST_IMAGES
        if not self.probes or too_few:
            for seen, x in self._look(np.arange(len(self.images)), "neighbours"):
                self._neighbours(seen, x)
            why = f"{len(self.images)} images are too few: probes need {LEAST_IMAGES}" if too_few else "not asked for"
            return {"neighbours": self._about_neighbours(), "local": {"skipped": why}, "one_token": {"skipped": why}}
        local = self._local()
        return {"neighbours": self._about_neighbours(), "local": local, "one_token": self._one_token(labels)}

    def _look(self, rows: Int64[np.ndarray, " m"], what: str) -> Iterator[tuple[Seen, Tensor]]:
        for seen in look_at(self.images, rows, what=what):
            if seen.bad:
                raise ValueError(f"{seen.bad[0][1].name} could be read a moment ago: {seen.bad[0][1].reason}")
            yield seen, normalised(self.extractor, seen.images)

    def _local(self) -> dict[str, Any]:
        """Probes of place and pixels; on the way, tokens for the table and similarities of neighbours."""
        train, test = np.flatnonzero(self.train), np.flatnonzero(~self.train)
        count = self.grid[0] * self.grid[1]
        generator = torch.Generator().manual_seed(self.seed)
        taken: list[tuple[Tensor, Tensor]] = []
        for seen, x in self._look(train, "tokens of the train part"):
            tokens = self._tokens(seen, x)
            self.pixels.add(tokens.flatten(0, 1), patch_pixels(x, self.extractor.stride).to(tokens).flatten(0, 1))
            each = min(count, max(1, TOKENS_MEMORY // (4 * tokens.shape[2] * len(train))))
            places = torch.rand(len(tokens), count, generator=generator).argsort(1)[:, :each].to(tokens.device)
            taken.append((tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[2])), places))
        place_probe = None
        if count > 1:
            values, places = (torch.cat([part[i].flatten(0, 1) for part in taken]) for i in (0, 1))
            place_probe = fit_positions(values, places, count, seed=self.seed)
        pixel_probe, answers = self.pixels.solve(), Answers(self.grid)
        for seen, x in self._look(test, "tokens of the test part"):
            tokens = self._tokens(seen, x)
            pixels = patch_pixels(x, self.extractor.stride).to(tokens)
            found = answers.ask_pixels(pixel_probe, self.pixels.mean_pixels, tokens, pixels)
            if place_probe is not None:
                found |= answers.ask_places(place_probe, tokens)
            answers.add(found, self.high[seen.rows])
        return {
            "trained_on": {
                "images": len(train),
                "tokens_pixels": self.pixels.tokens,
                "tokens_places": sum(t.numel() for _, t in taken),
            },
            "chance": {"top1": 1 / count, "distance": distance_of_a_guess(self.grid)},
            **answers.about(seed=self.seed),
        }

    def _tokens(self, seen: Seen, x: Tensor) -> Tensor:
        """Patch tokens [b N D] of a batch, after its share in the table and the similarities is taken."""
        features = tokens_of(self.extractor, x, self.block)
        patches = features.patches.flatten(1, 2).to(self._device)
        rows, total = seen.rows, len(self.images)
        host = patches.cpu().numpy()
        self.table.put("[CLS]", rows, features.cls.cpu().numpy()[None], total)
        self.table.put("mean of patches", rows, host.mean(axis=1)[None], total)
        for kind, drawn in self._drawn.items():
            number = drawn[:, rows]
            chosen = host[np.arange(len(rows)), np.maximum(number, 0)]
            self.table.put(kind, rows, np.where(number[..., None] < 0, np.nan, chosen), total)
        registers = features.registers.cpu().numpy()
        for register in range(registers.shape[1]):
            self.table.put(f"register {register}", rows, registers[None, :, register], total)
        self._neighbours(seen, x)
        return patches

    def _neighbours(self, seen: Seen, x: Tensor) -> None:
        stem = stem_tokens(self.extractor, x)
        if stem is not None:
            self.similarities.add(neighbour_similarity(stem).flatten(1), self.high[seen.rows])

    def _about_neighbours(self) -> dict[str, Any]:
        about = self.similarities.about()
        if about is not None:
            return about
        alone = self.grid == (1, 1)
        return {"skipped": "a grid of one patch has no neighbours" if alone else "this model does not show its stem"}

    def _one_token(self, labels: Int64[np.ndarray, " M"] | None) -> dict[str, Any]:
        if labels is None:
            return {"skipped": "the data have no labels of that name"}
        if not self.table.has("high").any():
            self.table.kept.pop("high")

        return score_table(self.table, labels, self.train, needs="high", seed=self.seed)
