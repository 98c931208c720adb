"""Attention against its formula written as loops, and the choice among backends."""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from quietvit.nn import attention
from quietvit.nn.attention import ATTENTION, AUTO_ORDER, Attention, AttentionBackend, choose_attention
from quietvit.nn.packing import Groups, pack, unpack

GROUPS: Groups = ((2, 5), (3, 2), (1, 7))


def packed_qkv(groups: Groups = GROUPS, heads: int = 2, width: int = 8, dtype: torch.dtype = torch.double) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(sum(b * n for b, n in groups), 3, heads, width, dtype=dtype)


def attention_as_loops(qkv: Tensor, lengths: list[int]) -> Tensor:
    """softmax(q k' / sqrt(d)) v, one sequence, head and query at a time."""
    out = torch.zeros(qkv.shape[0], *qkv.shape[2:], dtype=qkv.dtype)
    start = 0
    for length in lengths:
        for head in range(qkv.shape[2]):
            q, k, v = qkv[start : start + length, :, head].unbind(1)
            for i in range(length):
                logits = torch.stack([q[i] @ k[j] for j in range(length)]) / math.sqrt(qkv.shape[3])
                weights = logits.exp() / logits.exp().sum()
                out[start + i, head] = sum(weights[j] * v[j] for j in range(length))
        start += length
    return out


LENGTHS = [5, 5, 2, 2, 2, 7]


def test_sdpa_is_the_formula() -> None:
    qkv = packed_qkv()
    torch.testing.assert_close(ATTENTION["sdpa"].attend(qkv, GROUPS), attention_as_loops(qkv, LENGTHS))


def test_varlen_describes_the_sequences_rightly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA kernel replaced by loops: what is checked is how the packed tokens are described to it."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, max_q: int, max_k: int) -> Tensor:
        assert starts_q.dtype == torch.int32
        assert starts_q[0] == 0
        assert torch.equal(starts_q, starts_k)
        lengths = starts_q.diff().tolist()
        assert max_q == max_k == max(lengths)
        return attention_as_loops(torch.stack((q, k, v), dim=1), lengths)

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    qkv = packed_qkv()
    torch.testing.assert_close(ATTENTION["varlen"].attend(qkv, GROUPS), attention_as_loops(qkv, LENGTHS))


def test_xformers_describes_the_sequences_rightly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for xFormers: its documented calls, answered by loops."""

    class Mask:
        @classmethod
        def from_seqlens(cls, lengths: list[int], *, device: torch.device) -> SimpleNamespace:
            return SimpleNamespace(lengths=lengths)

    def kernel(q: Tensor, k: Tensor, v: Tensor, attn_bias: SimpleNamespace) -> Tensor:
        assert q.ndim == 4  # [1 T A d]
        return attention_as_loops(torch.stack((q[0], k[0], v[0]), dim=1), attn_bias.lengths)[None]

    modules = {name: ModuleType(name) for name in ("xformers", "xformers.ops", "xformers.ops.fmha.attn_bias")}
    modules["xformers.ops"].memory_efficient_attention = kernel  # type: ignore[attr-defined]
    modules["xformers.ops.fmha.attn_bias"].BlockDiagonalMask = Mask  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    attention._block_diagonal.cache_clear()
    qkv = packed_qkv()
    torch.testing.assert_close(ATTENTION["xformers"].attend(qkv, GROUPS), attention_as_loops(qkv, LENGTHS))
    attention._block_diagonal.cache_clear()


def test_images_never_attend_to_each_other() -> None:
    torch.manual_seed(0)
    layer = Attention(16, 2)
    sequences = [torch.randn(b, n, 16) for b, n in GROUPS]
    x, groups = pack(sequences)
    before = unpack(layer(x, groups), groups)
    sequences[0][1] += 1.0
    after = unpack(layer(pack(sequences)[0], groups), groups)
    changed = [[bool((a[i] != b[i]).any()) for i in range(len(a))] for a, b in zip(before, after, strict=True)]
    assert changed == [[False, True], [False, False, False], [False]]


@pytest.mark.parametrize("name", ["auto", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_cpu_gets_sdpa(name: str, dtype: torch.dtype) -> None:
    assert choose_attention(name, torch.device("cpu"), dtype, 64, 2).name == "sdpa"


@pytest.mark.parametrize("name", ["varlen", "xformers"])
def test_cuda_backends_say_why_they_cannot_run(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' cannot run here: it has CUDA kernels only .* cpu. Use attention"):
        choose_attention(name, torch.device("cpu"), torch.bfloat16, 64, 2)


def test_varlen_wants_half_precision_and_a_fitting_head() -> None:
    cuda = torch.device("cuda")
    assert "half precision" in ATTENTION["varlen"].available(cuda, torch.float32, 64)[1]
    assert "multiple of 8" in ATTENTION["varlen"].available(cuda, torch.bfloat16, 20)[1]
    assert "multiple of 8" in ATTENTION["varlen"].available(cuda, torch.bfloat16, 264)[1]


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="unknown attention 'flash'; known: auto, sdpa"):
        choose_attention("flash", torch.device("cpu"), torch.float32, 64, 1)


@pytest.mark.parametrize("able", [("varlen", "xformers"), ("xformers",), ()])
def test_auto_takes_the_first_that_can_when_there_is_something_to_pack(
    monkeypatch: pytest.MonkeyPatch, able: tuple[str, ...]
) -> None:
    cuda = torch.device("cuda")
    table = {
        n: AttentionBackend(n, lambda *_, n=n: (n in (*able, "sdpa"), "no"), row.attend) for n, row in ATTENTION.items()
    }
    monkeypatch.setattr(attention, "ATTENTION", table)
    choose_attention.cache_clear()
    assert choose_attention("auto", cuda, torch.bfloat16, 64, 2).name == (*able, "sdpa")[0]
    assert choose_attention("auto", cuda, torch.bfloat16, 64, 1).name == "sdpa"
    assert choose_attention("auto", cuda, torch.float32, 64, 2).name == "sdpa"
    choose_attention.cache_clear()


def test_auto_order_names_every_row() -> None:
    assert sorted(AUTO_ORDER) == sorted(ATTENTION)
    assert all(name == row.name for name, row in ATTENTION.items())


def test_packing_is_undone_and_costs_nothing_for_one_group() -> None:
    sequences = [torch.randn(b, n, 4) for b, n in GROUPS]
    x, groups = pack(sequences)
    assert groups == GROUPS
    assert all(torch.equal(a, b) for a, b in zip(unpack(x, groups), sequences, strict=True))
    alone, _ = pack(sequences[:1])
    assert alone.data_ptr() == sequences[0].data_ptr()
