"""Arguments of attention_decode: numbers and flags of any type, and the errors of wrong ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fused_attn
from fused_attn import BackendError, PagedKVCache, attention_decode


def tensors(b: int = 2, m: int = 1, n: int = 32, hq: int = 4, hkv: int = 2, d: int = 16) -> tuple[Tensor, ...]:
    return torch.randn(b, m, hq, d), torch.randn(b, n, hkv, d), torch.randn(b, n, hkv, d)


def ints(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


TRANSPOSE = r"it looks heads-first: transpose\(1, 2\) it$"
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q_rank": ({"q": torch.zeros(2, 4, 16)}, ValueError,
               r"q: expected \(B, M, Hq, D\), got shape \(2, 4, 16\); pass q\[:, None\] for one query"),
    "q_type": ({"q": [1]}, TypeError, "q: expected a tensor, got list"),
    "k_dtype": ({"k_cache": torch.zeros(2, 32, 2, 16).half()}, TypeError, "k_cache: expected q's torch.float32"),
    "k_dim": ({"k_cache": torch.zeros(2, 32, 2, 8)}, ValueError,
              r"k_cache: expected q's head dim 16 in \(B, N, Hkv, D\), got shape \(2, 32, 2, 8\)"),
    "k_batch": ({"k_cache": torch.zeros(3, 32, 2, 16), "v_cache": torch.zeros(3, 32, 2, 16)}, ValueError,
                r"k_cache: expected q's batch size 2 in .*, got shape \(3, .*; for pages, pass page_table"),
    "v_shape": ({"v_cache": torch.zeros(2, 31, 2, 16)}, ValueError,
                r"v_cache: expected shape \(B, N, Hkv, Dv\) = \(2, 32, 2, Dv\), got \(2, 31, 2, 16\)$"),
    "v_heads_first": ({"v_cache": torch.zeros(2, 2, 32, 16)}, ValueError,
                      rf"v_cache: expected shape .* = \(2, 32, 2, Dv\), got \(2, 2, 32, 16\); {TRANSPOSE}"),
    "v_pages": ({"v_cache": torch.zeros(2, 31, 2, 16), "page_table": ints([0], [1])}, ValueError,
                r"v_cache: expected shape \(P, page size, Hkv, Dv\) = \(2, 32, 2, Dv\), got \(2, 31, 2, 16\)$"),
    "heads": ({"q": torch.zeros(2, 1, 3, 16)}, ValueError, "2 key-value heads do not divide the 3 query heads"),
    "lengths_dtype": ({"cache_seqlens": torch.zeros(2)}, TypeError, "cache_seqlens: expected an integer tensor"),
    "lengths_shape": ({"cache_seqlens": ints(1, 2, 3)}, ValueError, r"cache_seqlens: expected shape \(2,\)"),
    "lengths_negative": ({"cache_seqlens": ints(3, -1)}, ValueError, r"cache_seqlens: .* got -1 at \(1,\)"),
    "lengths_beyond": ({"cache_seqlens": ints(33, 1)}, ValueError, r"cache_seqlens: .*room for 32, got 33 at \(0,\)"),
    "no_room": ({"cache_seqlens": ints(3, 32), "k_new": torch.zeros(2, 1, 2, 16), "v_new": torch.zeros(2, 1, 2, 16)},
                ValueError, "cache_seqlens: expected 0 <= cache_seqlens <= 31 with 1 new keys and room for 32, got 32"),
    "new_alone": ({"cache_seqlens": ints(1, 1), "k_new": torch.zeros(2, 1, 2, 16)}, ValueError,
                  "v_new: expected a tensor beside k_new"),
    "new_without_lengths": ({"k_new": torch.zeros(2, 1, 2, 16), "v_new": torch.zeros(2, 1, 2, 16)}, ValueError,
                            "cache_seqlens: expected an int or integers"),
    "new_shape": ({"cache_seqlens": ints(1, 1), "k_new": torch.zeros(2, 1, 2, 16), "v_new": torch.zeros(2, 2, 2, 16)},
                  ValueError, r"v_new: expected shape \(B, T, Hkv, Dv\) = \(2, 1, 2, 16\), got \(2, 2, 2, 16\)$"),
    "k_new_heads_first": ({"cache_seqlens": 1, "k_new": torch.zeros(2, 2, 3, 16), "v_new": torch.zeros(2, 2, 3, 16)},
                          ValueError,
                          r"k_new: .* \(B, T, Hkv, D\) = \(2, T, 2, 16\), got \(2, 2, 3, 16\); " + TRANSPOSE),
    "v_new_heads_first": ({"cache_seqlens": 1, "k_new": torch.zeros(2, 3, 2, 16), "v_new": torch.zeros(2, 2, 3, 16)},
                          ValueError,
                          r"v_new: expected shape .* = \(2, 3, 2, 16\), got \(2, 2, 3, 16\); " + TRANSPOSE),
    "new_rank": ({"cache_seqlens": 1, "k_new": torch.zeros(2, 2, 16), "v_new": torch.zeros(2, 2, 16)}, ValueError,
                 r"k_new: expected \(B, T, Hkv, D\), got shape \(2, 2, 16\)"),
    "rotary_alone": ({"rotary": (torch.zeros(9, 4), torch.zeros(9, 4), False)}, ValueError, "rotary: only with k_new"),
    "rotary_pair": ({"rotary": (1, 2)}, TypeError, "rotary: expected"),
    "tree_shape": ({"tree_mask": torch.ones(2, 2, 2, dtype=torch.bool)}, ValueError, "tree_mask: expected shape"),
    "tree_dtype": ({"tree_mask": torch.ones(2, 1, 1)}, TypeError, "tree_mask: expected a bool tensor"),
    "index_beyond": ({"cache_batch_idx": ints(0, 2)}, ValueError, r"cache_batch_idx: expected .* got 2 at \(1,\)"),
    "index_and_table": ({"cache_batch_idx": ints(0, 1), "page_table": ints([0], [1])}, ValueError, "not with"),
    "leftpad": ({"cache_seqlens": ints(3, 3), "cache_leftpad": ints(0, 4)}, ValueError, "cache_leftpad: .* got 4"),
    "page_beyond": ({"page_table": ints([0], [2])}, ValueError, r"page_table: .*0 <= id < 2.*got 2 at \(1, 0\)"),
    "page_negative": ({"page_table": ints([0, -1], [1, 0])}, ValueError, r"page_table: .*got -1 at \(0, 1\)"),
    "lengths_beyond_int32": ({"cache_seqlens": torch.tensor([0, 2**32])}, ValueError,
                             "cache_seqlens: expected 0 <= cache_seqlens <= 32 .* got .* at \\(1,\\)"),
    "lengths_below_int32": ({"cache_seqlens": torch.tensor([0, -(2**32)])}, ValueError,
                            "cache_seqlens: expected 0 <= cache_seqlens <= 32 .* got -.* at \\(1,\\)"),
    "page_beyond_int32": ({"page_table": torch.tensor([[0], [2**32]])}, ValueError, "page_table: .*0 <= id < 2.* got"),
    "table_dtype": ({"page_table": torch.zeros(2, 1)}, TypeError, "page_table: expected an integer tensor, got"),
    "index_dtype": ({"cache_batch_idx": torch.ones(2) > 0}, TypeError, "cache_batch_idx: .* integer tensor, got"),
    "leftpad_dtype": ({"cache_leftpad": [0, 1]}, TypeError, "cache_leftpad: expected an integer tensor, got list"),
    "lengths_elsewhere": ({"cache_seqlens": ints(1, 1).to("meta")}, ValueError,
                          "cache_seqlens: expected q's device cpu, got meta"),
    "leftpad_elsewhere": ({"cache_leftpad": ints(1, 1).to("meta")}, ValueError,
                          "cache_leftpad: expected q's device cpu, got meta"),
    "splits_float": ({"num_splits": 2.0}, TypeError, "num_splits: expected an int, got float 2.0"),
    "splits_bool": ({"num_splits": np.True_}, TypeError, "num_splits: expected an int, got"),
    "invariant": ({"batch_invariant": "no"}, TypeError, "batch_invariant: expected a bool, got str 'no'"),
    "lse": ({"return_lse": 1}, TypeError, "return_lse: expected a bool, got int 1"),
    "heads_first": ({"q": torch.zeros(2, 4, 1, 16), "k_cache": torch.zeros(2, 2, 32, 16),
                     "v_cache": torch.zeros(2, 2, 32, 16)}, ValueError,
                    r"k_cache: 32 key-value heads do not divide the 1 query heads; expected q \(B, M, Hq, D\), k_cache"
                    r" \(B, N, Hkv, D\), got \(2, 4, 1, 16\) and \(2, 2, 32, 16\); q, k_cache and v_cache look heads-"
                    r"first: transpose\(1, 2\) them$"),
    "q_heads_first": ({"q": torch.zeros(2, 4, 1, 16)}, ValueError,
                      r"2 key-value heads do not divide the 1 query .*; q looks heads-first: transpose\(1, 2\) it$"),
    "caches_heads_first": ({"k_cache": torch.zeros(2, 2, 32, 16), "v_cache": torch.zeros(2, 2, 32, 16)}, ValueError,
                           r"32 key-value heads .*; k_cache and v_cache look heads-first: transpose\(1, 2\) them$"),
    "keys_heads_first": ({"k_cache": torch.zeros(2, 2, 32, 16)}, ValueError,
                         r"^k_cache: 32 key-value heads do not divide the 4 query heads; .*; k_cache and v_cache look"),
    "pages_rank": ({"k_cache": torch.zeros(4, 2, 16), "page_table": ints([0], [1])}, ValueError,
                   r"k_cache: expected pages \(P, page size, Hkv, D\), got shape \(4, 2, 16\)$"),
    "splits": ({"num_splits": 0}, ValueError, "num_splits: must be at least 1, got 0"),
    "splits_invariant": ({"num_splits": 2, "batch_invariant": True}, ValueError, "num_splits: not with"),
    "sigmoid": ({"normalizer": "sigmoid"}, ValueError, "normalizer: expected"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap: must be None"),
    "window": ({"window": (-1, 0)}, ValueError, "window: left must be None"),
    "backend": ({"backend": "sdpa"}, BackendError, "sdpa.*does not decode from a cache"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    given, kind, message = WRONG[name]
    q, k, v = (torch.zeros(2, n, h, 16) for n, h in ((1, 4), (32, 2), (32, 2)))
    arguments = {"q": q, "k_cache": k, "v_cache": v, "backend": "tiled"} | given
    with pytest.raises(kind, match=message):
        attention_decode(**arguments)


@pytest.mark.parametrize("table", (None, ints([0], [1])))
def test_a_multi_layer_paged_cache_is_refused(table: Tensor | None) -> None:
    cache, q = PagedKVCache(2, 32, 2, 16), tensors()[0]
    with pytest.raises(
        ValueError, match=r"k_cache: .* \(1, 2, 32, 2, 16\); of a PagedKVCache, k\[layer\] and v\[layer\]"
    ):
        attention_decode(q, cache.k, cache.v, page_table=table)


@pytest.mark.parametrize(
    "two", (np.int8(2), np.uint64(2), torch.tensor(2), torch.tensor(2, dtype=torch.int16)), ids=repr
)
def test_numbers_and_flags_of_any_kind(two: Any) -> None:
    q, k, v = tensors()
    new, angles = torch.randn(2, 1, 2, 16), torch.randn(40, 4)
    words = {"cache_seqlens": ints(3, 9), "k_new": new, "v_new": new}

    def run(splits: Any, yes: Any) -> tuple[Tensor, ...]:
        return attention_decode(
            q, k.clone(), v.clone(), **words, num_splits=splits, rotary=(angles, angles, yes), return_lse=yes,
        )  # fmt: skip

    for yes in (np.True_, torch.tensor(True)):
        assert all(torch.equal(x, y) for x, y in zip(run(two, yes), run(2, True), strict=True))


@pytest.mark.parametrize("page", (None, 8))
@pytest.mark.parametrize("six", (6, np.uint8(6), torch.tensor(6)), ids=repr)
def test_one_length_for_every_sequence(six: Any, page: int | None) -> None:
    q, k, v = tensors()
    words = {}
    if page is not None:
        k, v = (x.reshape(-1, page, 2, 16) for x in (k, v))
        words["page_table"] = torch.arange(8, dtype=torch.int32).view(2, 4)
    expected = attention_decode(q, k, v, cache_seqlens=ints(6, 6), **words)
    assert torch.equal(attention_decode(q, k, v, cache_seqlens=six, **words), expected)
    with pytest.raises(ValueError, match=r"cache_seqlens: expected 0 <= cache_seqlens <= 32 .* room for 32.*, got 33"):
        attention_decode(q, k, v, cache_seqlens=33, **words)


@pytest.mark.parametrize("backend", ("triton", "tiled", "reference"))
@pytest.mark.parametrize("dtype", (torch.uint8, torch.int64, torch.uint32), ids=str)
@pytest.mark.parametrize("paged", (False, True))
def test_indices_are_integers_of_any_width(backend: str, dtype: torch.dtype, paged: bool) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    q, k, v = tensors()
    new = torch.randn(2, 1, 2, 16)
    where = {"cache_batch_idx": ints(1, 0)}
    if paged:
        k, v = (x.reshape(-1, 8, 2, 16) for x in (k, v))
        where = {"page_table": torch.arange(8, dtype=torch.int32).flip(0).view(2, 4)}
    where |= {"cache_seqlens": ints(3, 9), "cache_leftpad": ints(1, 0)}

    def run(where: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        keys = k.clone()
        return attention_decode(q, keys, v.clone(), k_new=new, v_new=new, backend=backend, **where), keys

    for x, y in zip(run({name: x.to(dtype) for name, x in where.items()}), run(where), strict=True):
        assert torch.equal(x, y)


def test_page_table_entries_beyond_the_keys_are_ignored() -> None:
    q, k, v = tensors()
    table = ints([0, 99], [1, -7])
    attention_decode(q, k, v, page_table=table, cache_seqlens=ints(32, 3))
    with pytest.raises(ValueError, match="page_table"):
        attention_decode(q, k, v, page_table=table, cache_seqlens=ints(33, 3))


def test_rotary_needs_every_position() -> None:
    q, k, v = tensors(m=3)
    new, angles = torch.zeros(2, 1, 2, 16), torch.zeros(10, 4)
    words = {"cache_seqlens": ints(9, 2), "k_new": new, "v_new": new, "rotary": (angles, angles, False)}
    attention_decode(q, k, v, **words)
    with pytest.raises(ValueError, match="rotary: expected cos and sin of at least 12 positions, got 10"):
        attention_decode(q, k, v, **words, causal=True)


@pytest.mark.parametrize("name", ("q", "k_cache", "sink"))
def test_gradients_are_refused(name: str) -> None:
    q, k, v = tensors()
    given = {"q": q, "k_cache": k, "v_cache": v, "sink": torch.zeros(4)}
    given[name] = given[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name}: decoding has no backward"):
        attention_decode(**given)
    with torch.no_grad():
        attention_decode(**given)


def test_autocast_casts_all_but_the_caches() -> None:
    q, k, v = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention_decode(q, k.bfloat16(), v.bfloat16()).dtype == torch.bfloat16
        with pytest.raises(TypeError, match="k_cache"):
            attention_decode(q, k.half(), v.half())


def test_transforms_are_refused() -> None:
    q, k, v = tensors()
    with pytest.raises(NotImplementedError, match=r"does not support torch\.func transforms of decoding"):
        torch.func.vmap(lambda q: attention_decode(q[None], k[:1], v[:1]))(q)
    assert fused_attn.attention_decode is attention_decode
