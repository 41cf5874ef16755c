"""An appending decode writes to its own sequences only, in every cache layout and on every backend."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attn
from fused_attn import attention_decode
from fused_attn.compat.flash_attn import flash_attn_with_kvcache
from fused_attn.spec import decoding
from fused_attn.spec.storage import overlap, overlaps_itself

ALL = ("reference", "tiled", "triton")
B, N, HEADS, D, PAGE = 3, 8, 2, 8, 4


def ints(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def call(k: Tensor, v: Tensor, lengths: Tensor, tokens: int = 1, **words: Any) -> Tensor:
    torch.manual_seed(0)
    q, new = torch.randn(B, 1, HEADS, D), torch.randn(2, B, tokens, HEADS, D)
    return attention_decode(q, k, v, cache_seqlens=lengths, k_new=new[0], v_new=new[1], **words)


@pytest.fixture(params=ALL)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


# who has which page; how long each is; tokens that each appends; the sequences that collide, or none
TABLES: dict[str, tuple[list[list[int]], list[int], int, str]] = {
    "one page": ([[0, 1], [0, 2], [3, 4]], [0, 0, 0], 1, "page 0 holds keys of sequences 0, 1"),
    "a last page": ([[0, 1], [2, 1], [3, 4]], [5, 6, 0], 1, "page 1 holds keys of sequences 0, 1"),
    "a page that another has filled": ([[0, 1], [2, 3], [3, 4]], [0, 5, 4], 1, "page 3 holds keys of sequences 1, 2"),
    "at the last of many tokens": ([[0, 1], [2, 3], [4, 3]], [0, 0, 0], 5, "page 3 holds keys of sequences 1, 2"),
    "all three": ([[0, 1], [0, 1], [0, 1]], [4, 4, 4], 2, "page 1 holds keys of sequences 0, 1, 2"),
    "one sequence twice": ([[0, 0], [1, 2], [3, 4]], [4, 0, 0], 1, "page 0 holds keys of sequences 0, 0"),
    "a full prefix": ([[0, 1], [0, 2], [0, 3]], [4, 5, 7], 1, ""),
    "behind the keys": ([[0, 5], [1, 5], [2, 5]], [0, 2, 3], 1, ""),
    "nothing new": ([[0, 1], [0, 1], [0, 1]], [4, 4, 4], 0, ""),
}


@pytest.mark.parametrize("name", TABLES)
def test_appends_to_one_page_are_refused(name: str, backend: str) -> None:
    table, lengths, tokens, said = TABLES[name]
    k, v = torch.zeros(2, 6, PAGE, HEADS, D)
    words = {"page_table": ints(*table), "backend": backend}
    if not said:
        call(k, v, ints(*lengths), tokens, **words)
        return
    with pytest.raises(ValueError, match=f"page_table: {said} where one of them appends"):
        call(k, v, ints(*lengths), tokens, **words)
    assert not k.any() and not v.any()


def test_page_table_entries_before_a_leftpad_are_ignored(backend: str) -> None:
    """Their entries may name anything, pages in use or none."""
    k, v = torch.zeros(2, 6, PAGE, HEADS, D)
    words = {"cache_leftpad": ints(4, 0, 4), "backend": backend}
    call(k, v, ints(5, 4, 6), page_table=ints([2, 0], [1, 2], [99, 3]), **words)
    assert k.flatten(2).any(-1).nonzero().tolist() == [[0, 1], [2, 0], [3, 2]]
    with pytest.raises(ValueError, match="page_table: page 2 holds keys of sequences 0, 1"):
        call(k, v, ints(5, 4, 6), page_table=ints([0, 2], [1, 2], [99, 3]), **words)


def test_appends_to_one_row_are_refused(backend: str) -> None:
    k, v = torch.zeros(2, 5, N, HEADS, D)
    with pytest.raises(ValueError, match="cache_batch_idx: sequences 0, 2 append to row 4"):
        call(k, v, ints(3, 0, 5), cache_batch_idx=ints(4, 1, 4), backend=backend)
    assert not k.any() and not v.any()
    call(k, v, ints(3, 0, 5), 0, cache_batch_idx=ints(4, 1, 4), backend=backend)  # reading is free to share
    q = torch.randn(B, 1, HEADS, D)
    attention_decode(q, k, v, cache_batch_idx=ints(4, 1, 4), backend=backend)
    call(k, v, ints(3, 0, 5), cache_batch_idx=ints(4, 1, 2), backend=backend)


def expanded(name: str) -> tuple[Tensor, Tensor]:
    """k and v that share memory."""
    own, base = torch.zeros(B, N, HEADS, D), torch.zeros(B, N + 2, HEADS, D)
    return {
        "k over sequences": (torch.zeros(1, N, HEADS, D).expand(B, N, HEADS, D), own),
        "v over heads": (own, torch.zeros(B, N, 1, D).expand(B, N, HEADS, D)),
        "v over dims": (own, torch.zeros(B, N, HEADS, 1).expand(B, N, HEADS, D)),
        "k unfolded": (torch.zeros(40, HEADS, D).as_strided((B, N, HEADS, D), (4 * HEADS * D, HEADS * D, D, 1)), own),
        "one tensor": (own, own),
        "a shift": (base[:, :N], base[:, 2:]),
    }[name]


@pytest.mark.parametrize(
    "name", ("k over sequences", "v over heads", "v over dims", "k unfolded", "one tensor", "a shift")
)
def test_caches_that_overlap_themselves_are_refused(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen from strides and addresses, so also where index tensors are not read."""
    k, v = expanded(name)
    monkeypatch.setattr(decoding, "readable", lambda x: False)
    with pytest.raises(ValueError, match=f"{'k_cache' if name[0] == 'k' else 'v_cache'}: expected .*memory"):
        call(k, v, ints(0, 1, 2), backend=backend)
    assert not k.any()
    attention_decode(torch.randn(B, 1, HEADS, D), k, v, backend=backend)


@pytest.mark.parametrize("dim", (0, 2, 3, 4))
def test_keys_and_values_may_interleave(dim: int) -> None:
    """One allocation for both, cut in any dim."""
    shape = [B, N, HEADS, D]
    k, v = torch.zeros(*shape[:dim], 2, *shape[dim:]).unbind(dim)
    own = torch.zeros(2, *shape)
    assert torch.equal(call(k, v, ints(0, 1, 2)), call(*own, ints(0, 1, 2)))
    assert torch.equal(k, own[0]) and torch.equal(v, own[1])


def test_through_flash_attn() -> None:
    k, v = torch.zeros(2, B, N, HEADS, D)
    q = torch.randn(B, 1, HEADS, D)
    with pytest.raises(ValueError, match="cache_batch_idx: sequences 0, 1 append to row 1"):
        flash_attn_with_kvcache(q, k, v, q, q, cache_seqlens=3, cache_batch_idx=ints(1, 1, 0))
    with pytest.raises(ValueError, match="block_table: page 1 holds keys of sequences 0, 2"):
        flash_attn_with_kvcache(q, k, v, q, q, cache_seqlens=3, block_table=ints([1], [2], [1]))


def test_indices_on_a_device_are_checked_under_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    k, v = torch.zeros(2, B, N, HEADS, D)
    words = {"cache_batch_idx": ints(1, 1, 0)}
    monkeypatch.setattr(decoding, "readable", lambda x: fused_attn.spec.checks._debugging.get())
    call(k, v, ints(0, 1, 2), **words)
    with fused_attn.debug(), pytest.raises(ValueError, match="cache_batch_idx"):
        call(k, v, ints(0, 1, 2), **words)


def test_compiled() -> None:
    torch._dynamo.reset()
    k, v = torch.zeros(2, 6, PAGE, HEADS, D)
    q, table = torch.randn(B, 1, HEADS, D), ints([0, 1], [2, 1], [3, 4])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(lengths: Tensor) -> Tensor:
        return attention_decode(q, k, v, cache_seqlens=lengths, page_table=table, k_new=q, v_new=q, backend="tiled")

    with pytest.raises(ValueError, match="page_table: page 1 holds keys of sequences 0, 1"):
        step(ints(5, 6, 0))


def test_overlaps_are_exact() -> None:
    """Against the addresses themselves, of random strided views of one tensor."""
    draw, base, seen = random.Random(0), torch.arange(400), set()
    for _ in range(400):
        views = []
        for _ in range(2):
            dims = range(draw.randint(1, 4))
            shape, steps = [draw.randint(1, 4) for _ in dims], [draw.choice((0, 1, 2, 3, 4, 6, 12, 24)) for _ in dims]
            views.append(base.as_strided(shape, steps, draw.randint(0, 40)))
        x, y = views
        itself = x.unique().numel() < x.numel()
        both = bool(torch.isin(x.flatten(), y.flatten()).any())
        assert (overlaps_itself(x), overlap(x, y)) == (itself, both)
        seen.add((itself, both))
    assert len(seen) == 4
    assert not overlap(base, base.clone()) and not overlap(base[:0], base)
