"""Performer attention against its formula: every weight of the n x n matrix written out, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from quietvit.nn.performer import performer_attention, random_features
from quietvit.nn.tokens_to_token import OFFICIAL_EPSILON, TokenPerformer

STDS = (0.3, 0.5, 1.0, 2.0, 4.0, 8.0)
DIM, FEATURES, TOKENS = 64, 32, 97  # T2T-ViT's widths, and a number of tokens that is no multiple of anything

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs(std: float, *, tokens: int = TOKENS, norm: float = DIM**0.5, dtype: torch.dtype = torch.float32) -> Inputs:
    """q, k of standard deviation `std`, v, and random features with rows of length `norm`."""
    generator = torch.Generator().manual_seed(int(100 * std))
    q, k, v = torch.randn(3, 2, tokens, DIM, generator=generator)
    w = random_features(FEATURES, DIM, norm, generator)
    return (std * q).to(dtype), (std * k).to(dtype), v.to(dtype), w.to(dtype)


def some_visible(ratio: float = 0.5, tokens: int = TOKENS) -> Tensor:
    visible = torch.rand(2, tokens, generator=torch.Generator().manual_seed(1)) < ratio
    visible[:, 0] = True
    return visible


def exponents(x: Tensor, w: Tensor) -> Tensor:
    return x @ w.T - x.square().sum(-1, keepdim=True) / 2


def kernel(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """phi(q_i)'phi(k_j), phi(x)_m = exp(w_m'x - |x|^2 / 2) / sqrt(m), as it is written: [b n n]."""

    def phi(x: Tensor) -> Tensor:
        return exponents(x, w).exp() / math.sqrt(len(w))

    return torch.einsum("bim,bjm->bij", phi(q), phi(k))


def naive(q: Tensor, k: Tensor, v: Tensor, w: Tensor, visible: Tensor | None = None) -> Tensor:
    """The quotient in float64, from the logarithm of each kernel value: from std 4 on e^-700 is not enough."""
    q, k, v, w = (x.double() for x in (q, k, v, w))
    logs = torch.logsumexp(exponents(q, w)[:, :, None] + exponents(k, w)[:, None], dim=-1)
    if visible is not None:
        logs = logs.masked_fill(~visible[:, None], -math.inf)
    return logs.softmax(-1) @ v


def naive_official(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """T2T-ViT's form in float64: 1e-8 beside the denominator. Nothing in it can overflow or divide by 0."""
    q, k, v, w = (x.double() for x in (q, k, v, w))
    weights = kernel(q, k, w)
    return weights @ v / (weights.sum(-1, keepdim=True) + 1e-8)


def error(value: Tensor, reference: Tensor) -> float:
    return ((value.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("std", [0.3, 0.5, 1.0, 2.0])
def test_the_reference_is_the_formula(std: float) -> None:
    q, k, v, w = inputs(std, dtype=torch.double)
    weights = kernel(q, k, w)
    torch.testing.assert_close(naive(q, k, v, w), weights @ v / weights.sum(-1, keepdim=True), rtol=1e-9, atol=1e-12)


# float32 holds an exponent of 2000 (std 8) to 1e-4, and no formula can give back what is lost there. Measured, at most:
# 1.2e-6 up to std 1, 2e-6 at 2, 4.4e-6 at 4, 1.2e-5 at 8 (of the norm; 50 to 784 tokens).
@pytest.mark.parametrize("norm", [DIM**0.5, FEATURES**0.5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("std", STDS)
def test_against_the_naive_evaluation(std: float, masked: bool, norm: float) -> None:
    q, k, v, w = inputs(std, norm=norm)
    visible = some_visible() if masked else None
    reference = naive(q, k, v, w, visible)
    assert error(performer_attention(q, k, v, w, visible), reference) < (4e-6 if std <= 2 else 3e-5)
    double = performer_attention(q.double(), k.double(), v.double(), w.double(), visible)
    assert error(double, reference) < 1e-12


@pytest.mark.parametrize("std", [0.3, 0.5, 0.65, 0.7, 0.8, 1.0, 1.5])
def test_official_epsilon(std: float) -> None:
    q, k, v, w = inputs(std, norm=FEATURES**0.5)
    reference = naive_official(q, k, v, w)
    assert error(performer_attention(q, k, v, w, epsilon=OFFICIAL_EPSILON), reference) < 6e-6
    double = performer_attention(q.double(), k.double(), v.double(), w.double(), epsilon=OFFICIAL_EPSILON)
    assert error(double, reference) < 2e-11


@pytest.mark.parametrize(
    ("std", "least", "most"),
    [(0.3, 0.999, 1), (0.8, 0.4, 0.7), (1.0, 0, 1e-3), (2.0, 0, 1e-20), (4.0, 0, 1e-20), (8.0, 0, 1e-20)],
)
def test_official_epsilon_is_a_gate(std: float, least: float, most: float) -> None:
    """Long queries and keys shut it: nothing comes out, neither attention nor anything that is no number."""
    q, k, v, w = inputs(std, norm=FEATURES**0.5)
    value = performer_attention(q, k, v, w, epsilon=OFFICIAL_EPSILON)
    assert torch.isfinite(value).all()
    assert least <= value.norm() / performer_attention(q, k, v, w).norm() <= most


def gradients(function: Callable[[Tensor, Tensor, Tensor], Tensor], *leaves: Tensor) -> list[Tensor]:
    leaves = tuple(x.detach().requires_grad_() for x in leaves)
    out = function(*leaves)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    return list(torch.autograd.grad((out.double() * probe).sum(), leaves))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("std", STDS)
def test_gradients(std: float, masked: bool) -> None:
    """What is subtracted from the exponents takes no part in them; and keys out of sight get none at all."""
    *qkv, w = inputs(std, tokens=41)
    visible = some_visible(tokens=41) if masked else None
    reference = gradients(lambda q, k, v: naive(q, k, v, w, visible), *(x.double() for x in qkv))
    double = gradients(lambda q, k, v: performer_attention(q, k, v, w.double(), visible), *(x.double() for x in qkv))
    single = gradients(lambda q, k, v: performer_attention(q, k, v, w, visible), *qkv)
    scale = max(x.norm() for x in reference)
    for exact, twice, once in zip(reference, double, single, strict=True):
        assert (twice - exact).norm() < 1e-11 * scale
        assert torch.isfinite(once).all()
        assert (once.double() - exact).norm() < (1e-5 if std <= 2 else 4e-4) * scale  # measured: 5e-6 and, at 8, 1.2e-4
    if visible is not None:
        for gradient in single[1:]:
            assert torch.count_nonzero(gradient[~visible]) == 0


@pytest.mark.parametrize("std", [0.3, 0.5, 0.65, 0.8])
def test_gradients_of_the_official_form(std: float) -> None:
    *qkv, w = inputs(std, tokens=41, norm=FEATURES**0.5)
    reference = gradients(lambda q, k, v: naive_official(q, k, v, w), *(x.double() for x in qkv))
    w = w.double()
    value = gradients(
        lambda q, k, v: performer_attention(q, k, v, w, epsilon=OFFICIAL_EPSILON), *(x.double() for x in qkv)
    )
    for a, b in zip(value, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, OFFICIAL_EPSILON])
@pytest.mark.parametrize("std", STDS)
def test_finite_under_bfloat16(std: float, epsilon: float) -> None:
    q, k, v, w = inputs(std)
    leaves = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        out = performer_attention(*leaves, w, some_visible(), epsilon=epsilon)
    assert out.dtype == torch.float32
    assert torch.isfinite(out).all()
    if not epsilon:  # bfloat16 rounds the inputs; nothing after that is rounded again
        assert error(out, naive(*leaves, w, some_visible()).detach()) < 3e-5
    out.square().sum().backward()
    assert all(x.grad is not None and torch.isfinite(x.grad).all() for x in leaves)


@pytest.mark.parametrize("epsilon", [0.0, OFFICIAL_EPSILON])
@pytest.mark.parametrize("ratio", [0.02, 0.3, 0.65, 0.9, 1.0])
def test_masked_is_visible_tokens_alone(ratio: float, epsilon: float) -> None:
    q, k, v, w = inputs(0.5)
    visible = some_visible(ratio)
    masked = performer_attention(q, k, v, w, visible, epsilon=epsilon)
    for image, keep in enumerate(visible):
        alone = performer_attention(*(x[image : image + 1, keep] for x in (q, k, v)), w, epsilon=epsilon)
        torch.testing.assert_close(masked[image, keep], alone[0], rtol=1e-5, atol=2e-6)


def test_what_is_out_of_sight_changes_nothing() -> None:
    q, k, v, w = inputs(1.0)
    visible = some_visible()
    reference = performer_attention(q, k, v, w, visible)
    k = torch.where(visible[..., None], k, 1e4)
    v = torch.where(visible[..., None], v, -1e4)
    assert torch.equal(performer_attention(q, k, v, w, visible), reference)


def test_images_never_mix() -> None:
    q, k, v, w = inputs(1.0)
    reference = performer_attention(q, k, v, w)
    for changed in (torch.randn_like(q[1]), torch.full_like(q[1], 1e3)):
        q[1], k[1], v[1] = changed, changed, changed
        out = performer_attention(q, k, v, w)
        assert torch.equal(out[0], reference[0])
        assert not torch.equal(out[1], reference[1])


# ---- the module


def lively(*, official: bool, dim: int = 27, token_dim: int = DIM) -> TokenPerformer:
    torch.manual_seed(3)
    module = TokenPerformer(dim, token_dim, norm_eps=1e-6, official=official)
    module.reset_features(torch.Generator().manual_seed(4))
    for linear in (module.kqv, module.proj):
        nn.init.normal_(linear.weight, std=0.1)
        nn.init.normal_(linear.bias, std=0.1)
    return module


@pytest.mark.parametrize("official", [False, True])
def test_module_is_its_formula(official: bool) -> None:
    module = lively(official=official)
    x = torch.randn(2, 30, 27)
    k, q, v = module.kqv(module.norm1(x)).chunk(3, dim=-1)
    short = DIM**-0.25
    mixed = naive_official(q, k, v, module.w) if official else naive(q * short, k * short, v, module.w)
    y = v + module.proj(mixed.float())
    y = y + module.mlp(module.norm2(y))
    torch.testing.assert_close(module(x), y, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("official", [False, True])
def test_module_masked_is_visible_tokens_alone(official: bool) -> None:
    module = lively(official=official)
    x, visible = torch.randn(2, TOKENS, 27), some_visible(0.4)
    masked = module(x, visible)
    for image, keep in enumerate(visible):
        torch.testing.assert_close(masked[image, keep], module(x[image : image + 1, keep])[0], rtol=1e-5, atol=5e-6)
    assert not torch.allclose(masked[visible], module(x)[visible], atol=1e-3)


@pytest.mark.parametrize("official", [False, True])
def test_module_with_long_keys_under_bfloat16(official: bool) -> None:
    module = lively(official=official)
    with torch.no_grad():
        module.kqv.weight.mul_(8 / module.kqv(module.norm1(torch.randn(1, 500, 27))).std())
    x = torch.randn(2, TOKENS, 27, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    out.float().square().mean().backward()
    assert torch.isfinite(out).all()
    leaves = (x, *module.parameters())
    assert all(leaf.grad is not None and torch.isfinite(leaf.grad).all() for leaf in leaves)


@pytest.mark.parametrize("official", [False, True])
def test_module_features(official: bool) -> None:
    """A buffer that checkpoints carry and no optimizer sees, with rows as long as each form wants them."""
    module = lively(official=official)
    assert "w" in module.state_dict()
    assert "w" not in dict(module.named_parameters())
    assert module.w.shape == (FEATURES, DIM)
    norm = math.sqrt(FEATURES if official else DIM)
    torch.testing.assert_close(module.w.norm(dim=1), torch.full((FEATURES,), norm))


# ---- random features


@pytest.mark.parametrize(("features", "dim"), [(8, 16), (16, 16), (40, 16), (1, 3), (5, 1)])
def test_rows_are_orthogonal_in_blocks(features: int, dim: int) -> None:
    w = random_features(features, dim, 2.5, torch.Generator().manual_seed(0))
    assert w.shape == (features, dim)
    for block in w.split(dim):
        torch.testing.assert_close(block @ block.T, 6.25 * torch.eye(len(block)), rtol=0, atol=1e-5)


def test_the_generator_decides() -> None:
    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed + 100)  # must not matter
        return random_features(24, 16, 4.0, torch.Generator().manual_seed(seed // 2))

    assert torch.equal(draw(0), draw(1))
    assert not torch.allclose(draw(1), draw(2))


def test_rows_favour_no_direction() -> None:
    """Each entry has mean 0 and variance 1 / dim: over 4000 draws within 5 standard errors."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([random_features(3, 4, 1.0, generator) for _ in range(4000)])
    assert draws.mean(0).abs().max() < 5 * 0.5 / math.sqrt(4000)
    # of a coordinate x of a unit vector in dimension 4: E x^4 = 3 / (4 * 6) = 1/8, so that x^2 has variance 1/16
    assert (draws.square().mean(0) - 0.25).abs().max() < 5 * 0.25 / math.sqrt(4000)


def sphere_mean(norm: float, length: float, dim: int) -> float:
    """E exp(w'x), w uniform on the sphere of radius `norm`, |x| = `length`: sum over k of z^k / (k! (dim/2)_k)."""
    z, term, total = (norm * length) ** 2 / 4, 1.0, 1.0
    for k in range(200):
        term *= z / ((k + 1) * (dim / 2 + k))
        total += term
    return total


def test_the_kernel_estimates_the_exponential() -> None:
    """The mean over 1500 draws of 32 rows is that over the sphere, within 4 standard errors (each below 1.5 %).

    With rows of length sqrt(dim) that is exp(q'k) but for a factor of about exp(-|q + k|^4 / (4 (dim + 2))), which
    goes to 1 for short q and k or many dimensions; rows of length sqrt(m), T2T-ViT's, fall far short of it.
    """
    generator = torch.Generator().manual_seed(5)
    draws = torch.stack([random_features(FEATURES, DIM, 1.0, generator) for _ in range(1500)]).double()
    for aligned in (0.0, 0.8, -0.8):
        q, k = torch.randn(2, DIM, generator=generator, dtype=torch.double) * 0.7 * DIM**-0.5  # about as long as 0.7
        k = aligned * q + (1 - abs(aligned)) * k
        length, target = (q + k).norm().item(), (q @ k).exp().item()
        for norm in (DIM**0.5, FEATURES**0.5):
            values = torch.stack([kernel(q[None, None], k[None, None], norm * w) for w in draws])
            standard_error = values.std().item() / math.sqrt(len(draws))
            exact = sphere_mean(norm, length, DIM) * math.exp(-(q @ q + k @ k).item() / 2)
            assert standard_error < 0.015 * exact
            assert abs(values.mean().item() - exact) < 4 * standard_error
            if norm == DIM**0.5:
                assert exact == pytest.approx(target, rel=0.06)
                assert math.log(exact / target) == pytest.approx(-(length**4) / (4 * (DIM + 2)), rel=0.1)
            elif aligned == 0.8:
                assert exact < 0.75 * target
