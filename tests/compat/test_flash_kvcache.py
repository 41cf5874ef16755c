"""flash_attn_with_kvcache: values, cache reads and writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn.compat import flash_attn as flash
from tests.compat.flash import DIM, HEADS, KV_HEADS, WORDS, documented
from tests.parity import within_budget


@pytest.fixture(params=["tiled", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The functions take no backend; the environment names it."""
    monkeypatch.setenv("FUSED_ATTN_BACKEND", request.param)
    yield request.param


def turned(x: Tensor, places: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (S, H, D), each row's pairs of dims turned by the angles of its place."""
    half = cos.shape[1]
    c, s = (y.to(x.dtype)[places][:, None] for y in (cos, sin))
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    )
    a, b = x[..., first], x[..., second]
    found = x.clone()
    found[..., first], found[..., second] = a * c - b * s, a * s + b * c
    return found


CACHE_WORDS = {name: WORDS[name] for name in ("plain", "causal", "window", "all")}
CACHES = {
    "read": {},
    "append": {"new": 3},
    "rotary": {"new": 3, "interleaved": True},
    "neox": {"new": 3, "interleaved": False},
    "rows": {"new": 3, "rows": [4, 0, 2]},
    "leftpad": {"leftpad": [2, 0, 3]},
    "leftpad-rotary": {"new": 3, "interleaved": True, "leftpad": [2, 0, 3]},
    "pages": {"page": 4},
    "pages-append": {"new": 3, "interleaved": False, "page": 4},
}  # fmt: skip


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("words", CACHE_WORDS)
def test_kvcache(backend: str, words: str, cache: str) -> None:
    given, said = CACHES[cache], dict(CACHE_WORDS[words])
    said.pop("deterministic", None)
    torch.manual_seed(0)
    b, m, room, before = 3, 3, 20, [9, 6, 12]
    rows, new = given.get("rows", list(range(b))), given.get("new", 0)
    q, k, v = torch.randn(b, m, HEADS, DIM), torch.randn(b, new, KV_HEADS, DIM), torch.randn(b, new, KV_HEADS, DIM)
    caches = [torch.randn(5, room, KV_HEADS, DIM) for _ in range(2)]
    angles = torch.randn(room + new, 3)
    cos, sin = angles.cos(), angles.sin()
    options: dict[str, Any] = {"cache_seqlens": torch.tensor(before, dtype=torch.int32), **said}
    if "alibi_slopes" in said:
        options["alibi_slopes"] = said["alibi_slopes"] = said["alibi_slopes"][:b]
    if new:
        options |= {"k": k, "v": v}
    if "interleaved" in given:
        options |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": given["interleaved"]}
    if "rows" in given:
        options["cache_batch_idx"] = torch.tensor(rows, dtype=torch.int32)
    if "leftpad" in given:
        options["cache_leftpad"] = torch.tensor(given["leftpad"], dtype=torch.int32)
    held = [x[:b].clone() for x in caches] if "rows" not in given else [x.clone() for x in caches]
    if "page" in given:
        order = torch.randperm(b * room // given["page"])
        options["block_table"] = order.argsort().view(b, -1).int()
        held = [x.unflatten(1, (-1, given["page"])).flatten(0, 1)[order] for x in held]

    def contents() -> list[Tensor]:
        if "page" in given:
            return [x[options["block_table"].long()].flatten(1, 2) for x in held]
        return held

    out, lse = flash.flash_attn_with_kvcache(q, *held, **options, return_softmax_lse=True)

    moves = said.get("causal", False) or said.get("window_size", (-1, -1)) != (-1, -1)

    def oracle(dtype: torch.dtype, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """out, lse and the keys of one sequence."""
        mine, fresh = q[i].to(dtype), k[i].to(dtype)
        if "interleaved" in given:
            mine = turned(mine, before[i] + torch.arange(m) * moves, cos, sin, given["interleaved"])
            fresh = turned(fresh, before[i] + torch.arange(new), cos, sin, given["interleaved"])
        old_k, old_v = (x[rows[i], given.get("leftpad", [0] * b)[i] : before[i]].to(dtype) for x in caches)
        slopes = said.get("alibi_slopes")
        keys, values = torch.cat((old_k, fresh)), torch.cat((old_v, v[i].to(dtype)))
        return *documented(mine, keys, values, said, None if slopes is None else slopes[i]), fresh

    for i in range(b):
        exact, plain = oracle(torch.float64, i), oracle(torch.float32, i)
        within_budget("out", out[i], exact[0], plain[0])
        within_budget("lse", lse[i].T, exact[1], plain[1])
        after = contents()
        written = slice(before[i], before[i] + new)
        within_budget("keys", after[0][rows[i], written], exact[2], plain[2])
        assert torch.equal(after[1][rows[i], written], v[i])
        for x, original in zip(after, caches, strict=True):
            assert torch.equal(x[rows[i], : before[i]], original[rows[i], : before[i]])
            assert torch.equal(x[rows[i], before[i] + new :], original[rows[i], before[i] + new :])


def test_kvcache_lengths_as_a_number_or_none() -> None:
    q, k, v = torch.randn(2, 1, HEADS, DIM), torch.randn(2, 9, KV_HEADS, DIM), torch.randn(2, 9, KV_HEADS, DIM)
    full = flash.flash_attn_with_kvcache(q, k, v)
    assert torch.equal(full, flash.flash_attn_with_kvcache(q, k, v, cache_seqlens=9))
    six = flash.flash_attn_with_kvcache(q, k, v, cache_seqlens=6)
    assert torch.equal(six, flash.flash_attn_with_kvcache(q, k[:, :6], v[:, :6]))
    split = flash.flash_attn_with_kvcache(q, k, v, num_splits=2)
    within_budget("split", split, flash.flash_attn_with_kvcache(q.double(), k.double(), v.double()), full)
