"""A frozen backbone behind the one evaluable signature, and `load`, which finds it whatever the path points at."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from quietvit.backbones import make_backbone
from quietvit.contracts import Features
from quietvit.train.device import pick_device
from quietvit.weights.family import Hints, Triple
from quietvit.weights.native import METADATA_KEY, WEIGHTS_NAME, load_backbone, read_meta, weights_hash
from quietvit.weights.released import is_released_folder, load_released
from quietvit.weights.tensors_file import is_safetensors, read_metadata

STEP_FOLDER = re.compile(r"step_(\d+)")
BROKEN_SHOWN = 4  # tensors named in an error (ours)


class BackboneExtractor:
    """A backbone as `contracts.Extractor`: eval mode, no gradients, fp32 features, images moved to its device.

    `meta` is the description that `native.load_backbone` returns: backbone, normalisation, image_size, provenance.
    `bf16` runs the backbone under bfloat16 autocast on CUDA (elsewhere it is fp32 in any case).
    """

    def __init__(
        self, backbone: nn.Module, meta: Mapping[str, Any], *, device: torch.device, bf16: bool = False
    ) -> None:
        self.backbone = backbone.to(device).eval().requires_grad_(False)
        self.meta = dict(meta)
        self.device = device
        self.bf16 = bf16 and device.type == "cuda"
        self.embed_dim = cast(int, backbone.embed_dim)
        self.num_blocks = cast(int, backbone.num_blocks)
        self.stride = cast(int, backbone.stride)
        self.image_size: int = meta["image_size"]
        self.num_classes = cast(int, meta["backbone"]["arguments"].get("num_classes", 0))  # 0: no supervised head
        self.mean = cast(Triple, tuple(meta["normalisation"]["mean"]))
        self.std = cast(Triple, tuple(meta["normalisation"]["std"]))

    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Features:
        """Features after the final norm. Raises ValueError for sides that are no multiple of `stride`.

        They may be used in autograd (no_grad, not inference mode): dense heads train on them.
        """
        with torch.no_grad(), self._autocast():
            return _fp32(self.backbone(images.to(self.device)))

    def last_blocks(self, images: Float[Tensor, "B 3 H W"], num: int) -> Sequence[Features]:
        """Features of the last `num` blocks, earliest first, each through the final norm. Raises ValueError as a call,
        and for more blocks than there are."""
        with torch.no_grad(), self._autocast():
            blocks = self.backbone.last_blocks(images.to(self.device), num)  # type: ignore[operator]
            return [_fp32(f) for f in blocks]

    def blocks(self, images: Float[Tensor, "B 3 H W"], which: Sequence[int], *, norm: bool) -> Sequence[Features]:
        """Features after the blocks with the listed indices (from 0), earliest first, through the final norm or not.

        Raises ValueError as a call, and for blocks that are not there.
        """
        with torch.no_grad(), self._autocast():
            blocks = self.backbone.last_blocks(images.to(self.device), which, norm=norm)  # type: ignore[operator]
            return [_fp32(f) for f in blocks]

    def attention_inputs(
        self, images: Float[Tensor, "B 3 H W"], block: int = -1
    ) -> tuple[Float[Tensor, "B A T d"], Float[Tensor, "B A T d"], Float[Tensor, "B A T d"]]:
        """Queries, keys and values of one block (from 0; -1 is the last) by head, fp32; see Trunk.attention_inputs.

        Tokens are [cls | registers | patches]. Raises ValueError as a call, and for a block without attention.
        """
        with torch.no_grad(), self._autocast():
            q, k, v = self.backbone.attention_inputs(images.to(self.device), block)  # type: ignore[operator]
            return q.float(), k.float(), v.float()

    def classify(self, cls: Float[Tensor, "B D"]) -> Float[Tensor, "B classes"]:
        """Class scores by the supervised head that came with the weights, from [CLS] after the final norm; fp32.

        Raises ValueError for a model without a head (`num_classes` is 0 then).
        """
        if not self.num_classes:
            raise ValueError("this model has no supervised head: its weights came without one")
        cls = cls.to(self.device)
        none = cls.new_empty(len(cls), 0, cls.shape[1])
        with torch.no_grad():
            scores = self.backbone.logits(Features(cls, none, none[:, :, None]))  # type: ignore[operator]
        return cast(Tensor, scores)

    def logits(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B classes"]:
        """Class scores of images. Raises ValueError as a call, and for a model without a head."""
        return self.classify(self(images).cls)

    def identity(self) -> dict[str, Any]:
        """What a result card says about the model: weights hash, architecture, provenance, precision."""
        return {
            "hash": self._hash,
            "backbone": self.meta["backbone"],
            "provenance": self.meta["provenance"],
            "precision": "bf16" if self.bf16 else "fp32",
        }

    @cached_property
    def _hash(self) -> str:
        return weights_hash(self.backbone)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)


def _fp32(features: Features) -> Features:
    return Features(features.cls.float(), features.registers.float(), features.patches.float())


def load(
    path: Path | str,
    device: str = "auto",
    *,
    bf16: bool = False,
    num_heads: int | None = None,
    num_registers: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    activation: str | None = None,
) -> BackboneExtractor:
    """The frozen model at `path`, whoever trained it. Nothing is downloaded and no code in a file is run.

    `path`: a run folder (its newest complete teacher), a folder with `teacher.safetensors`, that file itself; a
    safetensors or torch file of DINOv2, T2T-ViT, open_clip (its visual tower) or timm; a folder of timm, open_clip or
    transformers. What a file is, is told by its content, never by its name.

    `device`: "auto", "cpu", "cuda", "cuda:1", "mps". `bf16`: autocast on CUDA. The others are for files of others only,
    where they cannot tell: `num_heads` (None: 64 wide each, but 16 of the huge widths, see `vit_shapes`); `mean` and
    `std` of the input, RGB in units of [0, 1] (None: as the family's, or as a configuration beside the file says);
    `activation` of the MLPs, "gelu" or "quick_gelu" (OpenAI's CLIP and what was trained like it); `num_registers` to
    be added, untrained, to a T2T-ViT.

    Raises FileNotFoundError, saying what was looked for and what is there, if there is no such model; ValueError if the
    file is truncated, of another kind or architecture, holds values that are not finite, or does not tell enough.
    """
    path = Path(path).expanduser()
    if not path.exists():
        beside = _contents(path.parent) if path.parent.is_dir() else "nor that folder"
        raise FileNotFoundError(f"no model at {path}. Its folder holds: {beside}")
    hints = Hints(num_heads, num_registers, _triple(mean, "mean"), _triple(std, "std"), activation)
    backbone, meta = _open(path, hints)
    _check_finite(backbone, path)
    return BackboneExtractor(backbone, meta, device=pick_device(device), bf16=bf16)


def _open(path: Path, hints: Hints) -> tuple[nn.Module, dict[str, Any]]:
    """The backbone and its description, from quietvit's own file or folder, or somebody else's."""
    if path.is_dir():
        if not (path / WEIGHTS_NAME).is_file() and is_released_folder(path):
            return load_released(path, hints)
        path = newest_teacher(path)
    elif not (is_safetensors(path) and METADATA_KEY in read_metadata(path)):
        return load_released(path, hints)
    if hints != Hints():
        raise ValueError(
            f"{path} says itself how many heads and registers it has, its activation and its normalisation: leave "
            "num_heads, num_registers, activation, mean and std out"
        )
    return load_backbone(path)


def _triple(values: Sequence[float] | None, what: str) -> Triple | None:
    if values is None:
        return None
    if len(values) != 3:
        raise ValueError(f"{what} must be three numbers, for RGB in units of [0, 1], not {values}")
    return cast(Triple, tuple(float(v) for v in values))


def _check_finite(backbone: nn.Module, path: Path) -> None:
    broken = [key for key, value in backbone.state_dict().items() if not bool(value.isfinite().all())]
    if broken:
        more = f" and {len(broken) - BROKEN_SHOWN} more" if len(broken) > BROKEN_SHOWN else ""
        raise ValueError(
            f"{path} holds values that are not finite in {', '.join(broken[:BROKEN_SHOWN])}{more}: its training had "
            "diverged, or the file is broken. Use an earlier checkpoint, or copy it again"
        )


def newest_teacher(folder: Path) -> Path:
    """The newest complete `teacher.safetensors` of a run folder, or of a folder that holds one.

    A file cut short by a full disk or an interrupted copy is passed over for the one before it. Raises
    FileNotFoundError if there is none, ValueError if there are only broken ones (each with what is wrong).
    """
    steps = [d for d in (folder / "checkpoints").glob("step_*") if STEP_FOLDER.fullmatch(d.name)]
    steps.sort(key=lambda d: int(d.name.removeprefix("step_")), reverse=True)
    candidates = [f for f in (d / WEIGHTS_NAME for d in [folder, *steps]) if f.is_file()]
    problems = []
    for file in candidates:
        try:
            read_meta(file)
        except ValueError as error:
            problems.append(str(error))
        else:
            return file
    if problems:
        raise ValueError(f"no usable teacher in {folder}: " + "; ".join(problems))
    raise FileNotFoundError(
        f"no model in {folder}: looked for {WEIGHTS_NAME} and checkpoints/step_*/{WEIGHTS_NAME}, and for "
        f"config.json, of a folder of timm or transformers. It holds: {_contents(folder)}"
    )


def _contents(folder: Path) -> str:
    names = sorted(p.name + ("/" if p.is_dir() else "") for p in folder.iterdir())
    return (", ".join(names[:12]) + (f", and {len(names) - 12} more" if len(names) > 12 else "")) or "nothing"


def random_like(extractor: BackboneExtractor, seed: int | None = None) -> BackboneExtractor:
    """The same architecture with fresh weights by the same rule: the control that every score must beat.

    `seed` None: the run's own where its provenance tells it (the very weights training started from, as long as the
    backbone was the first thing built after `torch.manual_seed(seed)`), else 0. The global random state is left alone.
    """
    spec, of = extractor.meta["backbone"], extractor.meta["provenance"]
    known = None if "init" in of else of.get("seed")  # a run that began with a model did not begin with its seed
    seed = seed if seed is not None else int(known or 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = make_backbone(spec["name"], **spec["arguments"])
    meta = {**extractor.meta, "provenance": {"random_init": True, "seed": seed, "seed_of_run": known == seed}}
    return BackboneExtractor(backbone, meta, device=extractor.device, bf16=extractor.bf16)
