"""What a model makes of a few images, checkpoint by checkpoint: patch features as colours, attention, norms."""

from __future__ import annotations

import base64
import io
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from quietvit.config.schema import DataConfig
from quietvit.data.sources import Source, open_source
from quietvit.train import checkpoint
from quietvit.train.held_out import val_split
from quietvit.weights.extractor import BackboneExtractor, load, random_like
from quietvit_eval.blocks import read_blocks
from quietvit_eval.inspect.attention import read_attention
from quietvit_eval.inspect.grids import heat
from quietvit_eval.inspect.pca import check_varied, colours, component_scores
from quietvit_eval.inspect.sample import Looks, Sample, Seen, panels_of
from quietvit_eval.inspect.tokens import norms_by_block
from quietvit_eval.run_report.folder import RunFolder
from quietvit_eval.views import normalised

# All ours.
MOST_MODELS = 6  # columns of a map
MOST_SIDE = 160  # pixels of an image on the page
SECONDS = 45.0  # after which no other checkpoint is begun
LEAST_SCALE = 2.0  # times the median, at least the top of the scale of norms: an even map is not to look wild

Pixels = UInt8[np.ndarray, "H W 3"]


@dataclass(frozen=True)
class Picture:
    """An image of the page: its address holds all of it."""

    uri: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Strip:
    """One image and its maps over training."""

    name: str
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Kind:
    """One kind of map."""

    title: str
    caption: str
    strips: Sequence[Strip]


@dataclass(frozen=True)
class Maps:
    """The section of the page. Without `kinds` the notes say why."""

    kinds: Sequence[Kind] = ()
    about: str = ""
    notes: Sequence[str] = ()


@dataclass
class _Look:
    """What one model shows; None where it has nothing to show."""

    step: int
    scores: list[Float[Tensor, "h w 3"]] | None
    attention: Float[Tensor, "b h w"] | None  # mean over heads
    mass: list[float]  # share of attention on patches
    norms: Float[Tensor, "b h w"]  # over their median
    notes: list[str] = field(default_factory=list)


def open_images(data: DataConfig) -> tuple[Source, bool]:
    """The images to look at, and whether training never saw them. Raises ValueError and OSError as `open_source`."""
    held_out = val_split(data.source, data.path, data.split, data.options)
    if held_out is not None and len(held_out):
        return held_out, True
    return open_source(data.source, data.path, split=data.split, **data.options), False


def make_maps(run: RunFolder, *, images: int, console: Console | None, seconds: float = SECONDS) -> Maps:
    """Maps of `images` images by the kept checkpoints, on the CPU. After `seconds` no further one is begun.

    What cannot be done is said in the notes: nothing is raised for a run without checkpoints, images that are gone, or
    files that are broken.
    """
    if images < 1:
        return Maps(notes=["No maps were asked for."])
    if run.config is None:
        return Maps(notes=["Without readable settings (config.yaml) nobody knows where the images are."])
    try:
        source, held_out = open_images(run.config.data)
    except (ValueError, OSError) as error:
        return Maps(notes=[f"The images of this run are not there any more: {error}"])
    models, notes = _models(run)
    looks: list[_Look] = []
    seen: Seen | None = None
    began = time.monotonic()
    shown = console is not None and console.is_terminal
    with Progress(console=console, transient=True, disable=not shown) as progress:
        bar = progress.add_task("maps", total=len(models))
        for step, make in models:
            if looks and time.monotonic() - began > seconds:
                notes.append(
                    f"{len(looks)} of {len(models)} checkpoints are shown: a page is to be made in about a minute."
                )
                break
            try:
                extractor = make()
                seen = seen or Sample(extractor, source, Looks(images=images)).all("images")
                looks.append(_look(extractor, seen, step))
            except (ValueError, OSError) as error:
                notes.append(f"Step {step:,} is left out: {error}")
            progress.advance(bar)
    if seen is None or not looks:
        return Maps(notes=notes or ["There is no checkpoint yet to make maps with."])
    looks.sort(key=lambda look: look.step)
    notes += [note for look in looks for note in look.notes]
    kept = "training never saw them" if held_out else "there is no held-out part, so training saw them"
    side = seen.pixels.shape[-1]
    about = (
        f"Images of {source.name} at {side} x {side} pixels; {kept}. Drawn with seed 0, the same for every checkpoint."
    )
    return Maps(_kinds(looks, seen), about, notes)


def _models(run: RunFolder) -> tuple[list[tuple[int, Callable[[], BackboneExtractor]]], list[str]]:
    """Steps and how to get their models, the most telling first: the last, the untrained one, the others."""
    found: list[tuple[int, Callable[[], BackboneExtractor]]] = [
        (checkpoint.step_of(folder), _loader(folder)) for folder in run.checkpoints
    ]
    provenance = run.teacher.get("provenance")
    provenance = provenance if isinstance(provenance, dict) else {}
    if not found and (run.path / "teacher.safetensors").exists():
        found = [(int(provenance.get("step") or 0), _loader(run.path))]
    if not found:
        return [], ["There is no checkpoint yet to make maps with."]
    notes = []
    fresh = "seed" in provenance and "init" not in provenance and found[0][0] > 0
    room = MOST_MODELS - fresh
    if len(found) > room:
        notes.append(f"{room} of {len(found)} kept checkpoints are shown.")
        found = [found[i] for i in np.linspace(0, len(found) - 1, room).round().astype(int)]
    *others, last = found
    return [last, *([(0, lambda: random_like(last[1]()))] if fresh else []), *others], notes


def _loader(folder: Path) -> Callable[[], BackboneExtractor]:
    return lambda: load(folder, "cpu")


@torch.no_grad()
def _look(extractor: BackboneExtractor, seen: Seen, step: int) -> _Look:
    images = normalised(extractor, seen.pixels)
    last = extractor.num_blocks - 1
    notes = []
    features = read_blocks(extractor, images, [last], norm=True)[0].patches
    scores = None
    try:
        maps = list(features.float().cpu())
        check_varied(torch.cat([m.flatten(0, 1) for m in maps]))
        scores = component_scores(maps, None)[1]
    except ValueError as error:
        notes.append(f"Step {step:,} has no colours: {error}")
    attention, mass = None, [math.nan] * len(images)
    try:
        read = read_attention(extractor, images)
        attention, mass = read.maps[:, :, 0].mean(1), read.mass[:, :, 0, 2].mean(1).tolist()
    except ValueError as error:
        notes.append(f"Step {step:,} has no attention maps: {error}")
    norms = norms_by_block(extractor, images, [last])[last].patches.cpu()
    norms = (norms / norms.median().clamp_min(torch.finfo(norms.dtype).tiny)).unflatten(1, features.shape[1:3])
    return _Look(step, scores, attention, mass, norms, notes)


def _kinds(looks: Sequence[_Look], seen: Seen) -> list[Kind]:
    panels = [picture_uri(_fitted(panel)) for panel in panels_of(seen.pixels)]

    def strips(what: str, one: Callable[[_Look, int], tuple[Pixels, str, str] | None]) -> list[Strip]:
        out = []
        for i, name in enumerate(seen.names):
            pictures = [Picture(panels[i], f"image {name}", "image")]
            for look in looks:
                drawn = one(look, i)
                if drawn is not None:
                    pixels, caption, told = drawn
                    step = f"step {look.step:,}"
                    alt = f"{what} of {name}, {step}" + (f": {told}" if told else "")
                    pictures.append(Picture(picture_uri(pixels), alt, f"{step}{caption}"))
            out.append(Strip(name, pictures))
        return out

    rgb = _aligned_colours(looks)
    top = max(LEAST_SCALE, *(float(look.norms.max()) for look in looks))

    def colour(look: _Look, i: int) -> tuple[Pixels, str, str] | None:
        return (rgb[look.step][i], "", "") if look.step in rgb else None

    def attention(look: _Look, i: int) -> tuple[Pixels, str, str] | None:
        if look.attention is None:
            return None
        values = look.attention[i].numpy()
        share = f"{look.mass[i]:.0%}"
        return (
            heat(values, low=0.0, high=float(values.max())),
            f" · {share}",
            f"{share} of the attention lies on patches",
        )

    def norm(look: _Look, i: int) -> tuple[Pixels, str, str]:
        values = look.norms[i].numpy()
        most = f"{values.max():.2g}"
        return heat(values, low=0.0, high=top), f" · {most} times", f"the greatest is {most} times the median"

    return [
        Kind(
            "Patch features as colours",
            "The first three principal components of the patch tokens of these images as red, green "
            "and blue; alike colours, alike features. Components of earlier steps are put in the order and sign that "
            "fit those of the last step best.",
            strips("patch features as colours", colour),
        ),
        Kind(
            "Attention of the class token",
            "Last block, mean over heads, each map from 0 (dark) to its greatest value. The "
            "percentage is the share that lies on patches; the rest goes to the class token and registers.",
            strips("attention of the class token", attention),
        ),
        Kind(
            "Norms of patch tokens",
            f"Before the final norm, from 0 (dark) to {top:.2g} times the median of the step (bright). "
            "Artifacts are single bright patches on even ground; the figure is the greatest of the map.",
            strips("norms of patch tokens", norm),
        ),
    ]


def _aligned_colours(looks: Sequence[_Look]) -> dict[int, list[Pixels]]:
    """Colours by step; components of earlier steps are reordered and turned to go with those of the last."""
    with_scores = [(look.step, look.scores) for look in looks if look.scores is not None]
    if not with_scores:
        return {}
    target = with_scores[-1][1]
    out = {}
    for step, scores in with_scores:
        order, signs = best_fit(
            torch.cat([s.flatten(0, 1) for s in scores]), torch.cat([s.flatten(0, 1) for s in target])
        )
        turned = [s[..., order] * signs for s in scores]
        out[step] = [(255 * c).round().clip(0, 255).astype(np.uint8) for c in colours(turned, None)]
    return out


def best_fit(scores: Float[Tensor, "n k"], target: Float[Tensor, "n k"]) -> tuple[list[int], Float[Tensor, " k"]]:
    """The order of the columns of `scores`, and their signs, that correlate best with those of `target` in sum."""
    x, y = ((s - s.mean(0)) / s.std(0).clamp_min(1e-12) for s in (scores.double(), target.double()))
    fit = x.T @ y / len(x)
    columns = range(fit.shape[1])
    order = max(itertools.permutations(columns), key=lambda p: sum(float(fit[p[c], c].abs()) for c in columns))
    signs = torch.tensor([-1.0 if fit[order[c], c] < 0 else 1.0 for c in columns], dtype=torch.float64)
    return list(order), signs


def picture_uri(pixels: Pixels) -> str:
    """A PNG as an address that holds it."""
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode("ascii")


def _fitted(pixels: Pixels) -> Pixels:
    """Not larger than the page needs."""
    if pixels.shape[0] <= MOST_SIDE:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((MOST_SIDE, MOST_SIDE), Image.Resampling.BICUBIC))
