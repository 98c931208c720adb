"""Python for the model card that reads `teacher.safetensors` with torch and safetensors alone, and computes features.

It is put together for the one architecture that the card describes, and run in a process of its own before an export
gets its name.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from quietvit.backbones.trunk import Trunk
from quietvit.contracts import Features
from quietvit.nn.performer import MAX_EXPONENT
from quietvit.nn.tokens_to_token import OFFICIAL_EPSILON, SOFT_SPLITS

__all__ = ["needs_quietvit", "plain_code", "run_plain_code"]

HEADER = """\
import json

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

weights = load_file("teacher.safetensors")
with open("teacher.json", encoding="utf-8") as file:
    about = json.load(file)
arguments = about["backbone"]["arguments"]


def layer_norm(x, name):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], arguments["norm_eps"])


def linear(x, name):
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def attention(x, name):
    qkv = linear(x, f"{name}.qkv").unflatten(-1, (3, arguments["num_heads"], -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, tokens, width of a head]
    return linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), f"{name}.proj")
"""

MLP = """

def feed_forward(x, name):
ACTIVATION
"""
ACTIVATIONS = {
    "gelu": '    return linear(F.gelu(linear(x, f"{name}.fc1")), f"{name}.fc2")',
    "quick_gelu": """\
    hidden = linear(x, f"{name}.fc1")
    return linear(hidden * torch.sigmoid(1.702 * hidden), f"{name}.fc2")""",
}

SWIGLU = """

def feed_forward(x, name):
    gate, value = linear(x, f"{name}.w12").chunk(2, dim=-1)
    return linear(F.silu(gate) * value, f"{name}.w3")
"""

# Attention of the tokens-to-token stem; see quietvit/nn/tokens_to_token.py and performer.py for the formulas.
STEM_TRANSFORMER = """

def stem_attention(x, name):
    q, k, v = linear(layer_norm(x, f"{name}.norm1"), f"{name}.attn.qkv").chunk(3, dim=-1)
    mixed = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=x.shape[-1] ** -0.5)[:, 0]
    y = v + linear(mixed, f"{name}.attn.proj")
    return y + linear(F.gelu(linear(layer_norm(y, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
"""
STEM_PERFORMER = """

def stem_attention(x, name):
    k, q, v = linear(layer_norm(x, f"{name}.norm1"), f"{name}.kqv").chunk(3, dim=-1)
    k, q = k * k.shape[-1] ** -0.25, q * q.shape[-1] ** -0.25
    random_features = weights[f"{name}.w"].T
    keys = k @ random_features - k.square().sum(-1, keepdim=True) / 2
    largest = keys.amax(1, keepdim=True)  # exponents relative to the largest: nothing overflows
    queries = q @ random_features + largest
    keys, queries = (keys - largest).exp(), (queries - queries.amax(-1, keepdim=True)).exp()
    mixed = queries @ (keys.transpose(1, 2) @ v) / (queries @ keys.sum(1)[..., None])
    y = v + linear(mixed, f"{name}.proj")
    return y + linear(F.gelu(linear(layer_norm(y, f"{name}.norm2"), f"{name}.mlp.0")), f"{name}.mlp.2")
"""
STEM_PERFORMER_OFFICIAL = """

def stem_attention(x, name):
    k, q, v = linear(layer_norm(x, f"{name}.norm1"), f"{name}.kqv").chunk(3, dim=-1)
    random_features = weights[f"{name}.w"].T
    keys = k @ random_features - k.square().sum(-1, keepdim=True) / 2
    largest_key = keys.amax(1, keepdim=True)  # exponents relative to the largest: nothing overflows
    queries = q @ random_features + largest_key - q.square().sum(-1, keepdim=True) / 2
    largest = queries.amax(-1, keepdim=True)
    keys, queries = (keys - largest_key).exp(), (queries - largest).exp()
    epsilon = EPSILON * random_features.shape[1] * (-largest).clamp(max=MAX_EXPONENT).exp()
    mixed = queries @ (keys.transpose(1, 2) @ v) / (queries @ keys.sum(1)[..., None] + epsilon)
    y = v + linear(mixed, f"{name}.proj")
    return y + linear(F.gelu(linear(layer_norm(y, f"{name}.norm2"), f"{name}.mlp.0")), f"{name}.mlp.2")
"""
STEMS = {
    "transformer": STEM_TRANSFORMER,
    "performer": STEM_PERFORMER,
    "performer_official": STEM_PERFORMER_OFFICIAL.replace("MAX_EXPONENT", f"{MAX_EXPONENT:g}").replace(
        "EPSILON", f"{OFFICIAL_EPSILON:g}"
    ),
}

PATCHES = """\
    x = F.conv2d(images, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=STRIDE)
    x = x.flatten(2).transpose(1, 2)
"""
SPLITS = """\
    x = images
    for name, (side, stride, padding) in {WINDOWS}.items():
        rows = x.shape[2] // stride
        windows = F.unfold(x, side, stride=stride, padding=padding).transpose(1, 2)
        x = stem_attention(windows, f"tokens_to_token.{name}").transpose(1, 2).unflatten(2, (rows, -1))
    project = weights["tokens_to_token.project.weight"].unflatten(1, (x.shape[1], SIDE, SIDE))  # windows once more
    x = F.conv2d(x, project, weights["tokens_to_token.project.bias"], STEPS).flatten(2).transpose(1, 2)
"""


def needs_quietvit(backbone: Trunk) -> str | None:
    """Why there is no plain code for a backbone, as the end of a sentence; None if there is."""
    o = backbone.options
    if o.dense_groups:
        return "its blocks have dense connections"
    if o.register_neurons:
        return "it has test-time registers"
    if o.attention_layer != "plain":
        return f"its attention layers are of the kind '{o.attention_layer}'"
    if o.ffn not in ("mlp", "swiglu"):
        return f"its feed-forward layers are of the kind '{o.ffn}'"
    return None


def plain_code(backbone: Trunk) -> str:
    """Python that runs in the folder of a `teacher.safetensors` and its `teacher.json`, importing torch, safetensors
    and json; `features(images)` in it gives cls, registers and patches of images of the native size.

    The backbone must be one that `needs_quietvit` has no objection to.
    """
    assert needs_quietvit(backbone) is None
    options = backbone.arguments
    feed_forward = SWIGLU if options["ffn"] == "swiglu" else MLP
    feed_forward = feed_forward.replace("ACTIVATION", ACTIVATIONS[options.get("activation", "gelu")])
    stem = STEMS[options["stem_attention"]] if "stem_attention" in options else ""
    return HEADER + feed_forward + stem + _features(backbone) + _example(backbone)


def _features(backbone: Trunk) -> str:
    options, side, registers = backbone.arguments, backbone.image_size, backbone.num_registers
    first = 1 + registers
    scale = {n: f'weights[f"blocks.{{i}}.ls{n}.gamma"] * ' if options["layer_scale"] else "" for n in (1, 2)}
    parts = ["cls", *(['weights["register_tokens"]'] if registers else [])]
    heads = ", ".join(f"{p}.expand(len(x), -1, -1)" for p in parts)
    pre_norm = '    x = layer_norm(x, "norm_pre")\n' if options.get("pre_norm") else ""
    return f"""

@torch.inference_mode()
def features(images):  # [B, 3, {side}, {side}], normalised; for other sizes pos_embed has to be resized
{_stem(backbone)}\
    x = x + weights["pos_embed"][:, 1:]
    cls = weights["cls_token"] + weights["pos_embed"][:, :1]
    x = torch.cat(({heads}, x), dim=1)
{pre_norm}\
    for i in range(arguments["depth"]):
        x = x + {scale[1]}attention(layer_norm(x, f"blocks.{{i}}.norm1"), f"blocks.{{i}}.attn")
        x = x + {scale[2]}feed_forward(layer_norm(x, f"blocks.{{i}}.norm2"), f"blocks.{{i}}.mlp")
    x = layer_norm(x, "norm")
    return x[:, 0], x[:, 1:{first}], x[:, {first}:].unflatten(1, {backbone.native_grid})
"""


def _stem(backbone: Trunk) -> str:
    if "stem_attention" not in backbone.arguments:
        return PATCHES.replace("STRIDE", str(backbone.stride))
    splits = [tuple(split) for split in SOFT_SPLITS[backbone.arguments["patch_size"]]]
    windows = ", ".join(f'"attention{i}": {split}' for i, split in enumerate(splits[:-1], start=1))
    kernel, stride, padding = splits[-1]
    steps = f"stride={stride}, padding={padding}"
    return SPLITS.replace("{WINDOWS}", f"{{{windows}}}").replace("SIDE", str(kernel)).replace("STEPS", steps)


def _example(backbone: Trunk) -> str:
    side = backbone.image_size
    scores = '\nscores = linear(cls, "head")' if backbone.options.num_classes else ""
    return f"""

mean, std = (torch.tensor(about["normalisation"][key]).view(3, 1, 1) for key in ("mean", "std"))
images = torch.rand(1, 3, {side}, {side})  # yours: RGB from 0 to 1
cls, registers, patches = features((images - mean) / std)  # [B, D], [B, R, D], [B, h, w, D]{scores}
"""


# Runs the code it reads from its input, out of reach of quietvit, then `features` on each batch of a file.
DRIVER = """
import sys
class WithoutQuietvit:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("quietvit", "quietvit_eval", "quietvit_launch"):
            raise ImportError(f"the code of a model card must do without {name}")
sys.meta_path.insert(0, WithoutQuietvit())
names = {}
exec(compile(sys.stdin.read(), "README.md", "exec"), names)
from safetensors.torch import load_file, save_file
answers = {}
for key, images in load_file(sys.argv[1]).items():
    for output, value in zip(("cls", "registers", "patches"), names["features"](images), strict=True):
        answers[f"{key} {output}"] = value.contiguous()
save_file(answers, sys.argv[2])
"""


def run_plain_code(code: str, folder: Path, batches: Sequence[Tensor]) -> list[Features]:
    """Features of normalised images of the native size by `code`, run in `folder` by a fresh Python without quietvit.

    Raises ValueError with the last line that it printed if it fails.
    """
    with tempfile.TemporaryDirectory() as place:
        asked, answered = Path(place, "images.safetensors"), Path(place, "features.safetensors")
        save_file({str(i): batch.contiguous() for i, batch in enumerate(batches)}, asked)
        command = [sys.executable, "-I", "-c", DRIVER, str(asked), str(answered)]
        done = subprocess.run(command, input=code, cwd=folder, capture_output=True, text=True, encoding="utf-8")
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise ValueError(f"the plain PyTorch code of the model card does not run: {said}")
        answers: Mapping[str, Any] = load_file(answered)
    return [
        Features(*(answers[f"{i} {name}"] for name in ("cls", "registers", "patches"))) for i in range(len(batches))
    ]
