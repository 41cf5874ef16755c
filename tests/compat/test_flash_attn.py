"""flash-attn's functions against their documentation: values and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn.compat import flash_attn as flash
from tests.compat.flash import (
    DIM,
    HEADS,
    KV_HEADS,
    LENGTHS,
    PACKED,
    RAGGED,
    WORDS,
    check,
    dense,
    of_batch,
    paged,
    starts_of,
    varlen,
)
from tests.parity import within_budget


@pytest.fixture(params=["tiled", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The functions take no backend; the environment names it."""
    monkeypatch.setenv("FUSED_ATTN_BACKEND", request.param)
    yield request.param


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("words", WORDS)
def test_dense(backend: str, words: str, lengths: str) -> None:
    check(dense("flash_attn_func"), LENGTHS[lengths], WORDS[words])


@pytest.mark.parametrize("words", ["plain", "all"])
@pytest.mark.parametrize(("name", "kv_heads"), PACKED)
def test_packed(backend: str, name: str, kv_heads: int, words: str) -> None:
    check(dense(name), LENGTHS["alike"], WORDS[words], kv_heads)


@pytest.mark.parametrize("words", WORDS)
def test_varlen(backend: str, words: str) -> None:
    check(varlen("flash_attn_varlen_func"), RAGGED, WORDS[words])


@pytest.mark.parametrize("words", ["plain", "all"])
@pytest.mark.parametrize(("name", "kv_heads"), [(name.replace("attn_", "attn_varlen_"), h) for name, h in PACKED])
def test_varlen_packed(backend: str, name: str, kv_heads: int, words: str) -> None:
    check(varlen(name), [(5, 5), (0, 0), (1, 1), (7, 7)], WORDS[words], kv_heads)


def test_on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("FUSED_ATTN_BACKEND", "triton")
    check(dense("flash_attn_func"), LENGTHS["more queries"], WORDS["all"])
    check(varlen("flash_attn_varlen_func"), RAGGED, WORDS["all"])


def test_varlen_lengths_of_any_integer_type() -> None:
    """Transformers hands over what it read off a tensor as a tensor."""
    q, starts = torch.randn(7, 2, 8), starts_of([3, 4])
    expected = flash.flash_attn_varlen_func(q, q, q, starts, starts, 4, 4, causal=True)
    longest = starts.diff().max()
    assert torch.equal(flash.flash_attn_varlen_func(q, q, q, starts, starts, longest, longest, causal=True), expected)


@pytest.mark.parametrize("words", ["plain", "causal", "window", "all"])
def test_varlen_over_pages(backend: str, words: str) -> None:
    rows, cols = ([x[side] for x in RAGGED] for side in (0, 1))
    q, k, v = (
        torch.randn(sum(rows), HEADS, DIM),
        torch.randn(sum(cols), KV_HEADS, DIM),
        torch.randn(sum(cols), KV_HEADS, DIM),
    )
    torch.manual_seed(1)
    k_pages, table = paged(k, cols, 4)
    torch.manual_seed(1)
    v_pages, _ = paged(v, cols, 4)
    where = starts_of(rows), starts_of(cols), torch.tensor(max(rows)), max(cols)
    out, lse, _ = flash.flash_attn_varlen_func(
        q, k_pages, v_pages, *where, **WORDS[words], return_attn_probs=True, block_table=table
    )
    oracle = of_batch(RAGGED, WORDS[words])
    exact, plain = oracle(q.double(), k.double(), v.double()), oracle(q, k, v)
    within_budget("out", out, exact[0], plain[0])
    within_budget("lse", lse.T, exact[1], plain[1])


def test_documented_masks() -> None:
    """The two pictures of flash-attn's documentation, read off by values that are one-hot."""
    pictures = {(2, 5): [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], (5, 2): [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]}
    for (m, n), picture in pictures.items():
        q, k, v = torch.zeros(1, m, 1, 8), torch.zeros(1, n, 1, 8), torch.eye(n, 8)[None, :, None]
        seen = flash.flash_attn_func(q, k, v, causal=True)[0, :, 0, :n] > 0
        assert seen.long().tolist() == picture


def test_half_precision_and_wider_inputs() -> None:
    """bfloat16, and what flash-attn refuses: float32, a head dim of its own for v."""
    q, k, v = (torch.randn(1, 5, 2, d, dtype=torch.bfloat16) for d in (24, 24, 40))
    out: Any = flash.flash_attn_func(q, k, v)
    assert out.shape == (1, 5, 2, 40)
    assert out.dtype == torch.bfloat16


def test_dropout() -> None:
    """Seeded by the default generator; a share p of the weights goes, and the others grow."""
    q, k, v = (
        torch.zeros(1, 32, 2, 16),
        torch.zeros(1, 16, 2, 16),
        torch.eye(16).expand(2, 16, 16).transpose(0, 1)[None],
    )

    def run() -> Tensor:
        torch.manual_seed(3)
        return flash.flash_attn_func(q, k, v, dropout_p=0.25)

    weights = run()
    assert torch.equal(weights, run())
    kept = weights > 0
    assert abs(kept.double().mean().item() - 0.75) < 5 * (0.25 * 0.75 / kept.numel()) ** 0.5
    within_budget("kept", weights[kept], torch.full_like(weights[kept], 1 / 12).double(),
                  torch.full_like(weights[kept], 1 / 16) / 0.75)  # fmt: skip


def test_dropout_of_packed_sequences() -> None:
    """The same as of a batch of them."""
    x = torch.randn(2, 9, 4, 8)
    starts = starts_of([9, 9])

    def batch(dtype: torch.dtype) -> Tensor:
        torch.manual_seed(5)
        return flash.flash_attn_func(*(x.to(dtype),) * 3, dropout_p=0.5, causal=True).flatten(0, 1)

    torch.manual_seed(5)
    packed = flash.flash_attn_varlen_func(*(x.flatten(0, 1),) * 3, starts, starts, 9, 9, dropout_p=0.5, causal=True)
    within_budget("packed", packed, batch(torch.float64), batch(torch.float32))
