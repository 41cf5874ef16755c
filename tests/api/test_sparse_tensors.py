"""Sparse tensors raise ValueError, which names the argument, at every function."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fused_attn
from fused_attn import Mask
from tests.api.test_errors import DV, HKV, HQ, B, D, M, N, call, sdpa, zeros


def sparse(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return zeros(*shape, dtype=dtype).to_sparse()


def cached(**changed: Any) -> Any:
    given = {"q": zeros(B, 1, HQ, D), "k_cache": zeros(B, N, HKV, D), "v_cache": zeros(B, N, HKV, DV)} | changed
    return fused_attn.attention_decode(given.pop("q"), given.pop("k_cache"), given.pop("v_cache"), **given)


def packed(**changed: Any) -> Any:
    starts = {f"cu_seqlens_{x}": torch.tensor([0, n], dtype=torch.int32) for x, n in (("q", M), ("k", N))}
    given = {"q": zeros(M, HQ, D), "k": zeros(N, HKV, D), "v": zeros(N, HKV, DV)} | starts | changed
    return fused_attn.attention_varlen(**given)


def merged(**changed: Any) -> Any:
    return fused_attn.merge_states(
        [changed.get("outs[0]", zeros(B, HQ, M, D))], [changed.get("lses[0]", zeros(B, HQ, M))]
    )


def appended(**changed: Any) -> None:
    cache = fused_attn.PagedKVCache(2, 4, HKV, D)
    given = {"k": zeros(1, 1, HKV, D), "v": zeros(1, 1, HKV, D)} | changed
    cache.append([cache.allocate()], **given)


def mapped(**changed: Any) -> Any:
    return fused_attn.attention_map(zeros(B, HQ, M, D), zeros(B, HKV, N, D), **changed)


def multihead(**changed: Any) -> Any:
    x = zeros(M, B, D)
    given = {"query": x, "key": x, "value": x} | changed
    return fused_attn.modules.MultiheadAttention(D, 2)(**given)


LENGTHS = zeros(B, dtype=torch.int64).to_sparse()
SPARSE: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (call, {"q": sparse(B, HQ, M, D)}, "q"),
    (call, {"k": sparse(B, HKV, N, D).coalesce()}, "k"),
    (call, {"v": sparse(B, HKV, N, DV)}, "v"),
    (call, {"mask": sparse(M, N, dtype=torch.bool)}, "mask"),
    (call, {"bias": sparse(M, N)}, "bias"),
    (call, {"scale": sparse(HQ)}, "scale"),
    (call, {"sink": sparse(HQ)}, "sink"),
    (call, {"alibi_slopes": sparse(HQ), "alignment": "top_left"}, "alibi_slopes"),
    (sdpa, {"query": sparse(B, HQ, M, D)}, "query"),
    (sdpa, {"attn_mask": sparse(M, N)}, "attn_mask"),
    (sdpa, {"attn_mask": sparse(M, N, dtype=torch.bool)}, "attn_mask"),
    (packed, {"k": sparse(N, HKV, D)}, "k"),
    (packed, {"cu_seqlens_q": torch.tensor([0, M]).to_sparse()}, "cu_seqlens_q"),
    (cached, {"q": sparse(B, 1, HQ, D)}, "q"),
    (cached, {"k_cache": sparse(B, N, HKV, D)}, "k_cache"),
    (cached, {"cache_seqlens": LENGTHS}, "cache_seqlens"),
    (cached, {"tree_mask": sparse(B, 1, 1, dtype=torch.bool)}, "tree_mask"),
    (call, {"dropout_p": 0.5, "seed": torch.tensor(3).to_sparse()}, "seed"),
    (merged, {"outs[0]": sparse(B, HQ, M, D)}, "outs[0]"),
    (merged, {"lses[0]": sparse(B, HQ, M)}, "lses[0]"),
    (appended, {"v": sparse(1, 1, HKV, D)}, "v"),
    (mapped, {"rows": torch.tensor([1]).to_sparse()}, "rows"),
    (multihead, {"value": sparse(M, B, D)}, "value"),
    (multihead, {"attn_mask": sparse(M, M)}, "attn_mask"),
]


@pytest.mark.parametrize(("function", "changed", "name"), SPARSE, ids=[f"{x[0].__name__}-{x[2]}" for x in SPARSE])
def test_sparse_tensors(function: Callable, changed: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(name)}: expected a dense tensor, got layout torch.sparse_coo"):
        function(**changed)


@pytest.mark.parametrize(
    ("make", "name"),
    (
        (lambda: Mask.tensor(sparse(M, N, dtype=torch.bool)), "mask"),
        (lambda: Mask.lengths(LENGTHS), "Mask.lengths(kv)"),
        (lambda: Mask.prefix(LENGTHS), "Mask.prefix(lengths)"),
        (lambda: Mask.segments(zeros(M, dtype=torch.int32), LENGTHS), "Mask.segments(kv_ids)"),
        (lambda: Mask.blocks(sparse(2, 2, dtype=torch.bool), 4), "Mask.blocks(allowed)"),
    ),
)
def test_sparse_masks(make: Callable, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(name)}: expected a dense tensor, got layout torch.sparse_coo"):
        make()
