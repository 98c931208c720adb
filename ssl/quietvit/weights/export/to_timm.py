"""A folder that timm opens: model.safetensors under timm's names, and config.json in the form of its hub.

`timm.create_model(architecture, checkpoint_path=..., **model_args)` and `timm.create_model("local-dir:FOLDER")` both
do. Mapping: "timm" in quietvit/weights/timm.py, the other way round.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from quietvit.backbones import Trunk
from quietvit.contracts import Features
from quietvit.nn.feed_forward import swiglu_width
from quietvit.weights.export.plain_vit import (
    CROP_SHARE,
    fp32,
    missing_extra,
    not_a_plain_vit,
    positions_are,
    sizes_to_compare,
    split_tokens,
)
from quietvit.weights.export.target import ExportOptions, Size, Target
from quietvit.weights.extractor import BackboneExtractor
from quietvit.weights.family import ratio_of
from quietvit.weights.hub_folder import CONFIG_NAME, WEIGHTS_NAME, read_json
from quietvit.weights.timm import NORM_EPS, PACKED, PRE_NORM_EPS

__all__ = ["TARGET", "OpenedTimm", "architecture", "timm_tensors"]

TOLERANCE = 1e-4  # ours: at 24 blocks fp32 is 4e-6 from fp64 whoever computes it; a wrong weight shows in 1e-2
WIDTHS = {"small": 384, "base": 768, "large": 1024}  # of the names below


def architecture(backbone: Trunk) -> tuple[str, dict[str, Any]]:
    """The nearest architecture that timm has a name for, and the arguments that make it exactly this one.

    A name stands for what no argument in a JSON file can say: the epsilon of the norms and the kind of MLP.
    """
    o = backbone.options
    size = min(WIDTHS, key=lambda name: abs(WIDTHS[name] - o.embed_dim))
    arguments: dict[str, Any] = {
        "patch_size": backbone.stride,
        "embed_dim": o.embed_dim,
        "depth": o.depth,
        "num_heads": o.num_heads,
        "img_size": o.image_size,
        "qkv_bias": o.qkv_bias,
        "mlp_ratio": o.mlp_ratio,
        "reg_tokens": o.num_registers,
        "no_embed_class": o.num_registers > 0,
        "pre_norm": o.pre_norm,
        "init_values": o.layer_scale,  # 0: none. The values come from the file
        "num_classes": o.num_classes,
        "dynamic_img_size": True,
    }
    registers = "reg4_" if o.num_registers else ""
    if o.ffn == "swiglu":
        width = swiglu_width(int(o.embed_dim * o.mlp_ratio))
        return f"vit_giant_patch14_{registers}dinov2", {**arguments, "mlp_ratio": ratio_of(2 * width, o.embed_dim)}
    if o.activation != "gelu":
        arguments["act_layer"] = o.activation
    if o.norm_eps == PRE_NORM_EPS:
        return "vit_base_patch16_clip_224", arguments
    if o.layer_scale:
        return f"vit_{size}_patch14_{registers}dinov2", arguments
    return f"vit_{size}_patch16_224", arguments


def timm_tensors(backbone: Trunk) -> dict[str, Tensor]:
    """The state dict of timm's model, fp32 on the CPU, without the mask token.

    With registers timm's table has no row for the class token: that row is added to `cls_token`. A norm before the
    blocks leaves timm's patch stem without a bias, which is added to the table then: resizing keeps constants. Biases
    that this model lacks are zeros.
    """
    o = backbone.options
    tensors = {k: fp32(v) for k, v in backbone.state_dict().items()}
    del tensors["mask_token"]
    if o.pre_norm:
        tensors["pos_embed"][:, 1:] += tensors.pop("patch_embed.proj.bias")
    if o.num_registers:
        tensors["reg_token"] = tensors.pop("register_tokens")
        tensors["cls_token"] = tensors["cls_token"] + tensors["pos_embed"][:, :1]
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:].contiguous()
    for block in range(o.depth):
        for layer in (
            "attn.proj",
            *(f"mlp.{name}" for name in (("w12", "w3") if o.ffn == "swiglu" else ("fc1", "fc2"))),
        ):
            weight = tensors[f"blocks.{block}.{layer}.weight"]
            tensors.setdefault(f"blocks.{block}.{layer}.bias", weight.new_zeros(len(weight)))
    return {_timm_name(k): v for k, v in tensors.items()}


def _timm_name(key: str) -> str:
    for theirs, ours in PACKED.items():
        key = key.replace(ours, theirs)
    return key


def _refusal(extractor: BackboneExtractor, options: ExportOptions) -> str | None:
    if reason := not_a_plain_vit(extractor, "timm"):
        return reason
    o = _backbone(extractor).options
    known = (NORM_EPS,) if o.ffn == "swiglu" else (NORM_EPS, PRE_NORM_EPS)
    if o.norm_eps not in known:
        return (
            f"timm's ViTs with {o.ffn} norm with an epsilon of {' or '.join(f'{eps:g}' for eps in known)}, and this "
            f"one with {o.norm_eps:g}: export it to safetensors, transformers, onnx or torch"
        )
    return missing_extra("timm")


def _write(extractor: BackboneExtractor, folder: Path, options: ExportOptions) -> None:
    o = _backbone(extractor).options
    name, arguments = architecture(_backbone(extractor))
    config = {
        "architecture": name,
        "num_classes": o.num_classes,
        "num_features": o.embed_dim,
        "global_pool": "token",
        "model_args": arguments,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, extractor.image_size, extractor.image_size],
            "fixed_input_size": False,
            "pool_size": None,
            "interpolation": "bicubic",
            "crop_pct": CROP_SHARE,
            "crop_mode": "center",
            "mean": list(extractor.mean),
            "std": list(extractor.std),
            "num_classes": o.num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            **({"license": options.license} if options.license else {}),
        },
    }
    save_file(timm_tensors(_backbone(extractor)), folder / WEIGHTS_NAME, metadata={"format": "pt"})
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class OpenedTimm:
    """A model of timm as `Target.reopen` returns it: normalised images [B 3 H W] -> features after the final norm."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Features:
        height, width = self.model.patch_embed.patch_size
        grid = (images.shape[2] // height, images.shape[3] // width)
        return split_tokens(self.model.forward_features(images), grid, self.model.num_reg_tokens)

    @torch.no_grad()
    def logits(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B classes"]:
        """Class scores, of a model with a head."""
        return cast(Tensor, self.model(images))


def _reopen(folder: Path, options: ExportOptions) -> OpenedTimm:
    config = read_json(folder / CONFIG_NAME)
    weights = str(folder / WEIGHTS_NAME)
    timm = importlib.import_module("timm")
    return OpenedTimm(timm.create_model(config["architecture"], checkpoint_path=weights, **config["model_args"]))


def _sizes(extractor: BackboneExtractor, options: ExportOptions) -> Sequence[Size]:
    return sizes_to_compare(extractor, every_size=positions_are(extractor, antialias=True))


def _usage(extractor: BackboneExtractor, options: ExportOptions) -> str:
    side, first = extractor.image_size, 1 + _backbone(extractor).num_registers
    lines = [
        "import json",
        "",
        "import timm",
        "import torch",
        "",
        f'config = json.load(open("{CONFIG_NAME}"))',
        f'model = timm.create_model(config["architecture"], checkpoint_path="{WEIGHTS_NAME}", **config["model_args"])',
        "model.eval()  # or, from anywhere: timm.create_model('local-dir:FOLDER', pretrained=True)",
        f"images = torch.zeros(1, 3, {side}, {side})  # RGB in [0, 1], less the mean, over the std of config.json",
        "with torch.no_grad():",
        "    tokens = model.forward_features(images)  # [B, tokens, D], after the final norm",
        f"cls, registers, patches = tokens[:, 0], tokens[:, 1:{first}], tokens[:, {first}:]",
    ]
    if extractor.num_classes:
        lines.append("scores = model(images)  # [B, classes], by the supervised head")
    return "\n".join(lines)


def _remarks(extractor: BackboneExtractor, options: ExportOptions) -> str:
    told = ["timm has no mask token, so that masked pretraining cannot go on from this folder."]
    if not positions_are(extractor, antialias=True):
        side = _backbone(extractor).image_size
        told.append(
            f"Features are equal at {side} px only: at other sizes timm resizes positions by a rule of its own (to a "
            "given size, with antialiasing), which is not the one of this model."
        )
    return " ".join(told)


def _backbone(extractor: BackboneExtractor) -> Trunk:
    return cast(Trunk, extractor.backbone)


TARGET = Target(
    name="timm",
    about="a folder that timm.create_model opens (ViT only)",
    tolerance=TOLERANCE,
    refusal=_refusal,
    write=_write,
    reopen=_reopen,
    sizes=_sizes,
    usage=_usage,
    remarks=_remarks,
)
