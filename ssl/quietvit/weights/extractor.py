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
from quietvit.weights.native import WEIGHTS_NAME, load_backbone, read_meta, weights_hash
from quietvit.weights.released import SUFFIXES, load_released

STEP_FOLDER = re.compile(r"step_(\d+)")
Triple = tuple[float, float, float]


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
) -> BackboneExtractor:
    """The frozen model at `path`: a run folder (its newest complete teacher), a folder with `teacher.safetensors`, that
    file itself, or a torch file of DINOv2 or T2T-ViT. Nothing is downloaded and no code in the file is run.

    `device`: "auto", "cpu", "cuda", "cuda:1", "mps". `bf16`: autocast on CUDA. `num_heads`, `num_registers`: for
    T2T-ViT's files only, whose shapes do not tell the heads, and to which registers can be added: see `load_t2t`.
    Raises FileNotFoundError, saying what was looked for and what is there, if there is no such model; ValueError if the
    file is truncated or of another kind or architecture.
    """
    path = Path(path).expanduser()
    if not path.exists():
        beside = _contents(path.parent) if path.parent.is_dir() else "nor that folder"
        raise FileNotFoundError(f"no model at {path}. Its folder holds: {beside}")
    file = newest_teacher(path) if path.is_dir() else path
    if file.suffix == ".safetensors":
        if num_heads is not None or num_registers:
            raise ValueError(f"{file} says itself how many heads and registers it has; leave both out")
        backbone, meta = load_backbone(file)
    elif file.name.endswith(SUFFIXES):
        backbone, meta = load_released(file, num_heads=num_heads, num_registers=num_registers)
    else:
        raise ValueError(
            f"{file}: a model is a run folder, a {WEIGHTS_NAME}, or a file of DINOv2 or T2T-ViT, whose name ends in "
            f"{', '.join(SUFFIXES)}"
        )
    return BackboneExtractor(backbone, meta, device=pick_device(device), bf16=bf16)


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
        f"no model in {folder}: looked for {WEIGHTS_NAME} and checkpoints/step_*/{WEIGHTS_NAME}. It holds: "
        f"{_contents(folder)}"
    )


def _contents(folder: Path) -> str:
    names = sorted(p.name + ("/" if p.is_dir() else "") for p in folder.iterdir())
    return (", ".join(names[:12]) + (f", and {len(names) - 12} more" if len(names) > 12 else "")) or "nothing"


def random_like(extractor: BackboneExtractor, seed: int | None = None) -> BackboneExtractor:
    """The same architecture with fresh weights by the same rule: the control that every score must beat.

    `seed` None: the run's own where its provenance tells it (the very weights training started from, as long as the
    backbone was the first thing built after `torch.manual_seed(seed)`), else 0. The global random state is left alone.
    """
    spec, known = extractor.meta["backbone"], extractor.meta["provenance"].get("seed")
    seed = seed if seed is not None else int(known or 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = make_backbone(spec["name"], **spec["arguments"])
    meta = {**extractor.meta, "provenance": {"random_init": True, "seed": seed, "seed_of_run": known == seed}}
    return BackboneExtractor(backbone, meta, device=extractor.device, bf16=extractor.bf16)
