"""A folder that transformers opens: config.json, model.safetensors under the published names, preprocessor_config.json.

`AutoModel.from_pretrained` and `AutoImageProcessor.from_pretrained` do, without a network. Mapping: NAMES in
quietvit/weights/transformers_folder.py, the other way round.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from quietvit.backbones import Trunk
from quietvit.backbones.trunk import TrunkOptions
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
from quietvit.weights.hub_folder import CONFIG_NAME, WEIGHTS_NAME
from quietvit.weights.transformers_folder import PROCESSOR_NAME

__all__ = ["TARGET", "OpenedTransformers", "transformers_config", "transformers_tensors"]

TOLERANCE = 1e-4  # ours: at 24 blocks fp32 is 4e-6 from fp64 whoever computes it; a wrong weight shows in 1e-2
BICUBIC = 3  # PIL's number, which image processors are configured with
TOP: dict[str, str] = {  # ours -> names of published files
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}


def transformers_config(backbone: Trunk) -> dict[str, Any]:
    """config.json of the backbone. Raises ValueError for an MLP whose width is no multiple of the model's.

    Of the two models of transformers, only Dinov2WithRegistersModel resizes positions with antialiasing; it takes 0
    registers too.
    """
    o = backbone.options
    registers = o.num_registers > 0 or (o.pos_interpolation == "size" and o.pos_antialias)
    name = "Dinov2WithRegistersModel" if registers else "Dinov2Model"
    ratio = _whole_ratio(o)
    if ratio is None:
        raise ValueError(f"transformers allows whole numbers as mlp_ratio, and this model has {o.mlp_ratio:g}")
    return {
        "architectures": [name],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "torch_dtype": "float32",
        "hidden_size": o.embed_dim,
        "num_hidden_layers": o.depth,
        "num_attention_heads": o.num_heads,
        "mlp_ratio": ratio,
        "hidden_act": o.activation,
        "layer_norm_eps": o.norm_eps,
        "image_size": o.image_size,
        "patch_size": backbone.stride,
        "num_channels": 3,
        "qkv_bias": o.qkv_bias,
        "layerscale_value": o.layer_scale or 1.0,
        "drop_path_rate": 0.0,
        "use_swiglu_ffn": o.ffn == "swiglu",
        **({"num_register_tokens": o.num_registers} if registers else {}),
    }


def transformers_tensors(backbone: Trunk) -> dict[str, Tensor]:
    """The tensors of model.safetensors, fp32 on the CPU. Biases that are lacking are zeros, layer scales ones."""
    o = backbone.options
    state = {k: fp32(v) for k, v in backbone.state_dict().items() if not k.startswith("head.")}
    tensors = {theirs: state[ours] for ours, theirs in TOP.items() if ours in state}
    if "embeddings.register_tokens" not in tensors and "num_register_tokens" in transformers_config(backbone):
        tensors["embeddings.register_tokens"] = state["cls_token"].new_zeros(1, 0, o.embed_dim)
    for block in range(o.depth):
        ours = {k.removeprefix(f"blocks.{block}."): v for k, v in state.items() if k.startswith(f"blocks.{block}.")}
        tensors |= {f"encoder.layer.{block}.{k}": v for k, v in _layer(ours, o).items()}
    return tensors


def _layer(ours: dict[str, Tensor], options: TrunkOptions) -> dict[str, Tensor]:
    """One block under published names."""
    layer = {k: ours[k] for k in (f"norm{n}.{part}" for n in (1, 2) for part in ("weight", "bias"))}
    for part in ("weight", *(["bias"] if options.qkv_bias else [])):
        thirds = ours[f"attn.qkv.{part}"].chunk(3)
        layer |= {
            f"attention.attention.{name}.{part}": third.clone()
            for name, third in zip(("query", "key", "value"), thirds, strict=True)
        }
    swiglu = {"mlp.w12": "mlp.weights_in", "mlp.w3": "mlp.weights_out"}
    mlp = swiglu if options.ffn == "swiglu" else {name: name for name in ("mlp.fc1", "mlp.fc2")}
    for name, theirs in {"attn.proj": "attention.output.dense", **mlp}.items():
        weight = ours[f"{name}.weight"]
        layer[f"{theirs}.weight"] = weight
        layer[f"{theirs}.bias"] = ours.get(f"{name}.bias", weight.new_zeros(len(weight)))
    for n in (1, 2):
        layer[f"layer_scale{n}.lambda1"] = ours.get(f"ls{n}.gamma", torch.ones_like(layer[f"norm{n}.weight"]))
    return layer


def _whole_ratio(options: TrunkOptions) -> int | None:
    """The mlp_ratio as the whole number that transformers wants, or None if there is none for this width."""
    o = options
    hidden, near = int(o.embed_dim * o.mlp_ratio), round(o.mlp_ratio)
    if o.ffn != "swiglu":
        return near if near * o.embed_dim == hidden else None
    return next((n for n in (near, near + 1) if swiglu_width(n * o.embed_dim) == swiglu_width(hidden)), None)


def _processor(extractor: BackboneExtractor) -> dict[str, Any]:
    """preprocessor_config.json: as in the published folders, at the size that the model was trained at."""
    side = extractor.image_size
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(side / CROP_SHARE)},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(extractor.mean),
        "image_std": list(extractor.std),
    }


def _refusal(extractor: BackboneExtractor, options: ExportOptions) -> str | None:
    if reason := not_a_plain_vit(extractor, "transformers"):
        return reason
    o = _backbone(extractor).options
    if o.pre_norm:
        return "transformers' DINOv2 has no norm before its blocks: export it to timm, safetensors, onnx or torch"
    if _whole_ratio(o) is None:
        return (
            f"transformers allows whole numbers as mlp_ratio, and this model has {o.mlp_ratio:g}: export it to timm, "
            "safetensors, onnx or torch"
        )
    return missing_extra("transformers")


def _write(extractor: BackboneExtractor, folder: Path, options: ExportOptions) -> None:
    backbone = _backbone(extractor)
    for name, content in ((CONFIG_NAME, transformers_config(backbone)), (PROCESSOR_NAME, _processor(extractor))):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save_file(transformers_tensors(backbone), folder / WEIGHTS_NAME, metadata={"format": "pt"})


class OpenedTransformers:
    """A model of transformers as `Target.reopen` returns it: normalised images [B 3 H W] -> features after the norm."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Features:
        config = self.model.config
        grid = (images.shape[2] // config.patch_size, images.shape[3] // config.patch_size)
        tokens = self.model(pixel_values=images).last_hidden_state
        return split_tokens(tokens, grid, getattr(config, "num_register_tokens", 0))


def _reopen(folder: Path, options: ExportOptions) -> OpenedTransformers:
    """As a user would; what transformers would only warn of is an error. The image processor is opened too."""
    transformers = importlib.import_module("transformers")
    with _quiet(transformers):
        transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        model, report = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )  # fmt: skip
    if odd := {kind: sorted(map(str, names)) for kind, names in report.items() if names}:
        raise ValueError(f"transformers {transformers.__version__} did not take every tensor of the export: {odd}")
    return OpenedTransformers(model.float())


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' progress bars."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _every_size(extractor: BackboneExtractor) -> bool:
    registers = "num_register_tokens" in transformers_config(_backbone(extractor))
    return positions_are(extractor, antialias=registers)


def _sizes(extractor: BackboneExtractor, options: ExportOptions) -> Sequence[Size]:
    return sizes_to_compare(extractor, every_size=_every_size(extractor))


def _usage(extractor: BackboneExtractor, options: ExportOptions) -> str:
    first = 1 + _backbone(extractor).num_registers
    return "\n".join(
        (
            "import torch",
            "from PIL import Image",
            "from transformers import AutoImageProcessor, AutoModel",
            "",
            'processor = AutoImageProcessor.from_pretrained("./")',
            'model = AutoModel.from_pretrained("./").eval()',
            'image = Image.new("RGB", (640, 480))  # your image',
            'pixels = processor(image, return_tensors="pt")["pixel_values"]',
            "with torch.no_grad():",
            "    tokens = model(pixel_values=pixels).last_hidden_state  # [B, tokens, D], after the final norm",
            f"cls, registers, patches = tokens[:, 0], tokens[:, 1:{first}], tokens[:, {first}:]",
        )
    )


def _remarks(extractor: BackboneExtractor, options: ExportOptions) -> str:
    told = []
    side = _backbone(extractor).image_size
    if not _every_size(extractor):
        told.append(
            f"Features are equal at {side} px only: at other sizes transformers resizes positions by a rule of its "
            "own, which is not the one of this model."
        )
    if extractor.num_classes:
        told.append(
            "The supervised head is left out: transformers' classifier reads the class token and the mean patch, and "
            "this one the class token alone."
        )
    return " ".join(told)


def _backbone(extractor: BackboneExtractor) -> Trunk:
    return cast(Trunk, extractor.backbone)


TARGET = Target(
    name="transformers",
    about="a folder that transformers' AutoModel and AutoImageProcessor open (ViT only)",
    tolerance=TOLERANCE,
    refusal=_refusal,
    write=_write,
    reopen=_reopen,
    sizes=_sizes,
    usage=_usage,
    remarks=_remarks,
)
