"""The memory of the tokens-to-token stem: never an n x n matrix, and less of everything with `recompute`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quietvit.backbones import Trunk, make_backbone
from quietvit.nn.tokens_to_token import SOFT_SPLITS, STEM_ATTENTION, TokensToToken

every_attention = pytest.mark.parametrize("attention", STEM_ATTENTION)


def stem(attention: str, recompute: bool = False) -> TokensToToken:
    module = TokensToToken(
        16, splits=SOFT_SPLITS[16], token_dim=8, attention=attention, norm_eps=1e-6, recompute=recompute
    )
    module.init_weights(lambda linear, _: None, torch.Generator().manual_seed(0))  # linear layers: PyTorch's own
    return module


def backbone(attention: str, recompute: bool) -> Trunk:
    """A tiny one with lively weights."""
    torch.manual_seed(0)
    model = make_backbone(
        "t2t_vit",
        embed_dim=16,
        depth=1,
        num_heads=2,
        layer_scale=0.5,
        image_size=32,
        token_dim=8,
        stem_attention=attention,
        recompute=recompute,
    )
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@contextmanager
def saved_values(parameters: Iterator[nn.Parameter]) -> Iterator[dict[int, int]]:
    """Storages that autograd saves for the backward pass, with their sizes in numbers; parameters are not counted."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is given out twice

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes() // x.element_size()
            alive.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield sizes


class Largest(TorchDispatchMode):
    """The most numbers that a single tensor held of all that were computed."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.numbers = max(self.numbers, value.numel())
        return out


@every_attention
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("masked", [False, True])
def test_recompute_changes_nothing(attention: str, masked: bool, autocast: bool) -> None:
    x = torch.randn(2, 3, 48, 64)
    mask = torch.arange(24).view(2, 12) % 5 < 2 if masked else None
    results = []
    for recompute in (False, True):
        model = backbone(attention, recompute)
        image = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            features = model(image, mask)
        outputs = (features.cls, features.registers, features.patches)
        loss = sum(t.float().square().sum() for t in outputs)
        leaves = [image, *(p for n, p in model.named_parameters() if masked or n != "mask_token")]
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_attention
def test_recompute_saves_memory(attention: str) -> None:
    """Nothing is saved but the image and the two maps: an eighth of the whole, even for tokens as narrow as these."""
    kept = []
    x = torch.randn(1, 3, 128, 128)
    for recompute in (False, True):
        module = stem(attention, recompute)
        with saved_values(module.parameters()) as sizes:
            module(x)
        kept.append(sum(sizes.values()))
    assert kept[1] == 3 * 128**2 + 8 * (32**2 + 16**2)
    assert kept[1] < 0.2 * kept[0]
    with torch.no_grad(), saved_values(module.parameters()) as sizes:
        module(x)
    assert sizes == {}


@every_attention
@pytest.mark.parametrize("masked", [False, True])
def test_memory_is_linear_in_the_number_of_windows(attention: str, masked: bool) -> None:
    """Twice the side: four times as much at most, saved or passing, forward or backward; n x n would be 16 times."""
    module = stem(attention)
    saved, largest = [], []
    for side in (64, 128):
        x = torch.randn(1, 3, side, side, requires_grad=True)
        visible = torch.ones(1, side, side, dtype=torch.bool) if masked else None
        if visible is not None:
            visible[:, : side // 2, : side // 2] = False
        with Largest() as computed, saved_values(module.parameters()) as sizes:
            module(x, visible)[0].square().sum().backward()
        saved.append(max(sizes.values()))
        largest.append(computed.numbers)
    windows = (128 // 4) ** 2
    assert saved[1] <= 4 * saved[0]
    assert largest[1] <= 4 * largest[0]
    assert max(saved[1], largest[1]) < windows**2 / 4
