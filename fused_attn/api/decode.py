"""`attention_decode`: attention of new queries over a cache of keys and values, and the checks of its arguments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..runtime import call_cache, decode_ops, dispatch
from ..runtime.autocast import autocasts, no_autocast
from ..spec.checks import as_bool, as_int, as_int32, check_dense, check_parameter, check_shape, describe
from ..spec.decoding import Cache, Decode, Rotary
from ..spec.options import Options
from ..spec.problem import DTYPES, Problem, TransformError
from ..spec.transforms import forward_mode
from . import keywords
from .bind import bind


@keywords.closed
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *extra: NoReturn,
    cache_seqlens: int | Tensor | None = None,
    page_table: Tensor | None = None,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    rotary: tuple[Tensor, Tensor, bool] | None = None,
    tree_mask: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    scale: float | Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | Tensor | None = None,
    sink: Tensor | None = None,
    normalizer: str = "softmax",
    num_splits: int | None = None,
    batch_invariant: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T * scale) v over the keys and values of a cache, after writing new ones into it; forward only.

    Sequence b has the keys j < length in its part of the cache, or leftpad <= j < length. Its M queries are its last M
    positions: row i is at length - M + i ("bottom_right"), and causal, window and ALiBi are relative to it. M = 1 is a
    generation step; M > 1 is a chunk of a prompt, or a tree of speculative tokens.

    Args:
        q: (B, M, Hq, D), any strides; float16, bfloat16, float32, or float64 on the CPU backends.
        k_cache: (C, N, Hkv, D), in q's dtype; C = B without cache_batch_idx. Hkv divides Hq, and query head h reads
            key-value head h // (Hq // Hkv). With page_table: pages, (P, page, Hkv, D), of at least 1 key.
        v_cache: (C, N, Hkv, Dv) or (P, page, Hkv, Dv).
        cache_seqlens: integers (B,), or an int for all (slower on a GPU): the number of keys of each sequence, without
            those of k_new. None: the capacity of the cache. Later slots are never read.
        page_table: integers (B, pages): key j of sequence b is row j % page of page page_table[b, j // page]. Entries
            after a sequence's last key are never read.
        k_new, v_new: (B, T, Hkv, D) and (B, T, Hkv, Dv), written into the caches in place, as keys cache_seqlens[b] + t
            of each sequence, before attention is computed.
        rotary: (cos, sin, interleaved), cos and sin (S, R / 2) with R <= D, in float32 or q's dtype: rotary embedding
            of the first R dims of k_new at cache_seqlens + t, and of q at cache_seqlens + i with causal or window, else
            all at cache_seqlens. Dims d and d + R / 2 are a pair; interleaved, 2 d and 2 d + 1. Su et al., "RoFormer",
            2021. Only with k_new.
        tree_mask: bool (B, M, M) or (1, M, M): which of a sequence's last M keys each row may attend to, for
            speculative decoding; earlier keys are not affected.
        cache_batch_idx: integers (B,): the row of each sequence in the caches. Not with page_table.
        cache_leftpad: integers (B,): the first key of each sequence; earlier keys are never read.
        scale: multiplies the score, D ** -0.5 when None; a float, or a tensor () or (Hq,).
        causal: row i attends to no key after its own position.
        window: (left, right), the numbers of keys before and after a row's position; None is unbounded.
        alibi_slopes: (Hq,) or (B, Hq). softcap: c > 0 makes a score c * tanh(s / c). sink: (Hq,) logits added to the
            denominator. normalizer: "softmax" or "softmax1". As in `attention`.
        num_splits: the number of parts into which the kernels split the keys of a sequence, to compute them in parallel
            and merge them in a fixed order; None: chosen from shapes to fill the device. Other backends ignore it.
        batch_invariant: split a sequence at positions that depend only on its own length, so that its result is bitwise
            independent of the rest of the batch and of its index there. Not with num_splits.
        return_lse: also return lse.
        backend: "triton", "tiled" or "reference"; None takes the first that can run the call.

    Sequences that append must not share slots: with k_new, the rows of cache_batch_idx must be distinct, a slot that is
    written must belong to one sequence alone, and k_cache and v_cache must be neither expanded nor overlap.

    Returns:
        out (B, M, Hq, Dv) in q's dtype and memory order; or (out, lse) with lse (B, Hq, M) float32 (float64 for
        float64), the natural log of the whole denominator. A fully masked row gives zeros and lse -inf (with a sink or
        softmax1, the log of its term).

    Raises:
        TypeError, ValueError: an invalid argument, by name; tensors that require grad, while gradients are enabled.
        Values of index tensors (lengths, pages, rows) are checked on the CPU, and on a GPU inside `fused_attn.debug()`,
        because reading them synchronizes with the device. BackendError: the chosen backend cannot run the call, with
        every reason.

    >>> import torch, fused_attn
    >>> cache = torch.zeros(2, 2, 128, 4, 64)
    >>> lengths = torch.tensor([100, 7], dtype=torch.int32)
    >>> q, k, v = torch.randn(2, 1, 16, 64), torch.randn(2, 1, 4, 64), torch.randn(2, 1, 4, 64)
    >>> out = fused_attn.attention_decode(q, cache[0], cache[1], cache_seqlens=lengths, k_new=k, v_new=v)
    >>> out.shape, torch.equal(cache[0, 1, 7], k[1, 0])
    (torch.Size([2, 1, 16, 64]), True)
    """
    if extra or unknown:
        keywords.check(attention_decode, unknown, extra)
    arguments = (
        q, k_cache, v_cache, cache_seqlens, page_table, k_new, v_new, rotary, tree_mask, cache_batch_idx,
        cache_leftpad, scale, causal, window, alibi_slopes, softcap, sink, normalizer, num_splits, batch_invariant,
    )  # fmt: skip
    if isinstance(cache_seqlens, int):  # as a part of the key it would make every step of generation a new call
        out, lse = _decode(*arguments, backend, untraced=False)
    else:
        alias = (None, None) if k_new is None else (k_cache, v_cache)
        out, lse = call_cache.replayed(_decode, arguments, backend, alias)
    return (out, lse) if as_bool("return_lse", return_lse) else out


def _decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: int | Tensor | None,
    page_table: Tensor | None,
    k_new: Tensor | None,
    v_new: Tensor | None,
    rotary: tuple[Tensor, Tensor, bool] | None,
    tree_mask: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    scale: float | Tensor | None,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    alibi_slopes: Tensor | None,
    softcap: float | Tensor | None,
    sink: Tensor | None,
    normalizer: str,
    num_splits: int | None,
    batch_invariant: bool,
    backend: str | None,
    untraced: bool,
) -> tuple[Tensor, Tensor]:
    """(out, lse). untraced: nothing traces the call, so the torch operators are bypassed."""
    batch_invariant = as_bool("batch_invariant", batch_invariant)
    q, k_new, v_new = _autocast(q, k_cache, k_new, v_new)
    _check_caches(q, k_cache, v_cache, page_table is not None, cache_batch_idx is not None)
    _check_no_gradient(
        q=q, k_cache=k_cache, v_cache=v_cache, k_new=k_new, v_new=v_new, scale=scale, alibi_slopes=alibi_slopes,
        softcap=softcap, sink=sink,
    )  # fmt: skip
    added = k_new.shape[1] if isinstance(k_new, Tensor) and k_new.ndim == 4 else 0
    cache = _cache(q, k_cache, v_cache, cache_seqlens, page_table, cache_batch_idx, added)
    with torch.no_grad(), no_autocast(q):
        options = Options(
            alibi_slopes=alibi_slopes, sink=sink, scale=scale, causal=causal, window=window, alignment="bottom_right",
            softcap=softcap, normalizer=normalizer,
        )  # fmt: skip
        p = _problem(q, k_cache, v_cache, options)
        if cache_leftpad is not None:
            cache_leftpad = _indices("cache_leftpad", cache_leftpad, q, q.shape[0])
        if tree_mask is not None:
            _check_tree(tree_mask, q)
        rotation = None if rotary is None else _rotary(rotary, q, k_new is not None)
        if k_new is not None or v_new is not None:
            _check_new(k_new, v_new, cache, q.shape[0])
        num_splits = None if num_splits is None else _splits(num_splits, batch_invariant)
        name, p = dispatch.choose(p, backend, task="decoding")
        left, right = p.span.left, p.span.right
        if k_new is not None and v_new is not None:
            advance = left is not None or right is not None
            q = decode_ops.append(cache, cache_leftpad, k_new, v_new, q, rotation, advance, name, untraced)
            cache = replace(cache, added=added)
        step = Decode(
            q, cache, p.scale, p.softcap, p.slopes, p.sink, None if left is None else -left, right,
            cache_leftpad, tree_mask, num_splits, batch_invariant,
        )  # fmt: skip
        return decode_ops.decode(step, name, untraced)


def _autocast(q: Any, cache: Any, *new: Any) -> tuple[Any, ...]:
    """Under autocast, q and new keys in the cache's dtype, if that is autocast's. Caches are never cast."""
    tensors = (q, *new)
    if not isinstance(cache, Tensor) or not autocasts(cache.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(cache.device.type)
    if cache.dtype != dtype:
        return tensors
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in tensors)


def _check_kind(name: str, x: Any, like: Tensor | None = None, shape: str = "4 dimensions", hint: str = "") -> None:
    """Check for a 4-d floating tensor with the dtype and device of `like`, which is q."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {describe(x)}")
    check_dense(name, x)
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected one of {', '.join(map(str, DTYPES))}, got {x.dtype}")
    if like is not None and x.dtype != like.dtype:
        raise TypeError(f"{name}: expected q's {like.dtype}, got {x.dtype}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name}: expected q's device {like.device}, got {x.device}")
    if x.ndim != 4:
        raise ValueError(f"{name}: expected {shape}, got shape {tuple(x.shape)}{hint}")
    if x.shape[-1] == 0:
        raise ValueError(f"{name}: the head dim must be at least 1, got shape {tuple(x.shape)}")


def _check_caches(q: Any, k: Any, v: Any, paged: bool, indexed: bool) -> None:
    expected = "pages (P, page size, Hkv, D)" if paged else "(B, N, Hkv, D)"
    layered = isinstance(k, Tensor) and k.ndim == 5
    layer_hint = "; of a PagedKVCache, k[layer] and v[layer] are taken, with page_table" if layered else ""
    query_hint = "; pass q[:, None] for one query of each sequence" if isinstance(q, Tensor) and q.ndim == 3 else ""
    _check_kind("q", q, shape="(B, M, Hq, D)", hint=query_hint)
    _check_kind("k_cache", k, q, expected, layer_hint)
    _check_kind("v_cache", v, q, expected, layer_hint)
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k_cache: expected q's head dim {q.shape[3]} in {expected}, got shape {tuple(k.shape)}")
    if paged and k.shape[1] == 0:
        raise ValueError(f"k_cache: a page must hold at least 1 key, got shape {tuple(k.shape)}")
    if not paged and not indexed and k.shape[0] != q.shape[0]:
        raise ValueError(
            f"k_cache: expected q's batch size {q.shape[0]} in {expected}, got shape {tuple(k.shape)}; for pages, "
            "pass page_table"
        )
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads and (kv_heads == 0 or heads % kv_heads):
        where = "(B, M, Hq, D), k_cache " + expected
        raise ValueError(
            f"k_cache: {kv_heads} key-value heads do not divide the {heads} query heads; expected q {where}, got"
            f" {tuple(q.shape)} and {tuple(k.shape)}{_heads_first(q, k)}"
        )
    check_shape("v_cache", v, ("P, page size" if paged else "B, N") + ", Hkv, Dv", (*k.shape[:3], None))


def _heads_first(q: Tensor, k: Tensor) -> str:
    """A hint for the error message: which of q and the caches look like (B, H, length, D)."""
    for hint, heads, kv_heads in (
        ("q, k_cache and v_cache look heads-first: transpose(1, 2) them", q.shape[1], k.shape[1]),
        ("q looks heads-first: transpose(1, 2) it", q.shape[1], k.shape[2]),
        ("k_cache and v_cache look heads-first: transpose(1, 2) them", q.shape[2], k.shape[1]),
    ):
        if heads and kv_heads and heads % kv_heads == 0:
            return f"; {hint}"
    return ""


def _indices(name: str, x: Any, q: Tensor, *shape: int | None) -> Tensor:
    """Integers of any width on q's device as int32; None in shape allows any size."""
    x = as_int32(name, x)
    if x.device != q.device:
        raise ValueError(f"{name}: expected q's device {q.device}, got {x.device}")
    if x.ndim != len(shape) or any(want not in (None, have) for want, have in zip(shape, x.shape, strict=True)):
        wanted = f"({', '.join('pages' if n is None else str(n) for n in shape)}{',' * (len(shape) == 1)})"
        raise ValueError(f"{name}: expected shape {wanted}, got {tuple(x.shape)}")
    return x


def _cache(q: Tensor, k: Tensor, v: Tensor, lengths: Any, table: Any, index: Any, added: int) -> Cache:
    """The cache before `added` keys are appended."""
    b = q.shape[0]
    if table is not None:
        table = _indices("page_table", table, q, b, None)
    if index is not None:
        index = _indices("cache_batch_idx", index, q, b)
        if table is not None:
            raise ValueError("cache_batch_idx: not with page_table, which has a row for each sequence; got both")
    cache = Cache(k, v, None, table, index, added)
    return replace(cache, added=0, lengths=None if lengths is None else _lengths(lengths, q, cache))


def _lengths(lengths: Any, q: Tensor, cache: Cache) -> Tensor:
    """int32 (B,), from a tensor or one number for all."""
    if isinstance(lengths, Tensor) and lengths.ndim:
        return _indices("cache_seqlens", lengths, q, q.shape[0])
    length = as_int("cache_seqlens", lengths, "an integer tensor or an int")
    longest = cache.capacity - cache.added
    if not 0 <= length <= longest:
        raise ValueError(f"cache_seqlens: expected 0 <= cache_seqlens <= {longest} {cache.room()}, got {length}")
    return torch.full((q.shape[0],), length, dtype=torch.int32, device=q.device)


def _problem(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Problem:
    """Check the options shared with `attention` by binding them to a problem with one key per query."""
    if options.normalizer == "sigmoid":
        raise ValueError('normalizer: expected "softmax" or "softmax1", got \'sigmoid\'')
    b, m, _, _ = q.shape
    keys, values = (x.new_empty(()).expand(b, x.shape[2], m, x.shape[3]) for x in (k, v))
    return bind(q.transpose(1, 2), keys, values, options).lower()


def _check_tree(tree: Any, q: Tensor) -> None:
    b, m = q.shape[:2]
    if not isinstance(tree, Tensor) or tree.dtype != torch.bool:
        raise TypeError(f"tree_mask: expected a bool tensor, got {describe(tree)}")
    check_dense("tree_mask", tree)
    if tree.device != q.device:
        raise ValueError(f"tree_mask: expected q's device {q.device}, got {tree.device}")
    if tuple(tree.shape) not in ((b, m, m), (1, m, m)):
        raise ValueError(f"tree_mask: expected shape {(b, m, m)} or {(1, m, m)}, got {tuple(tree.shape)}")


def _check_new(k: Any, v: Any, cache: Cache, b: int) -> None:
    if k is None or v is None:
        given, missing = ("v_new", "k_new") if k is None else ("k_new", "v_new")
        raise ValueError(f"{missing}: expected a tensor beside {given}, got None")
    if cache.lengths is None:
        raise ValueError("cache_seqlens: expected an int or integers (B,), the keys before k_new, got None")
    _check_kind("k_new", k, cache.k, "(B, T, Hkv, D)")
    check_shape("k_new", k, "B, T, Hkv, D", (b, None, *cache.k.shape[2:]))
    _check_kind("v_new", v, cache.v, "(B, T, Hkv, Dv)")
    check_shape("v_new", v, "B, T, Hkv, Dv", (b, k.shape[1], *cache.v.shape[2:]))
    if k.shape[1] > cache.capacity:
        raise ValueError(f"k_new: {k.shape[1]} new keys, and the cache has room for {cache.capacity}")


def _rotary(rotary: Any, q: Tensor, appends: bool) -> Rotary:
    if not isinstance(rotary, (tuple, list)) or len(rotary) != 3:
        raise TypeError(f"rotary: expected (cos, sin, interleaved), got {describe(rotary)}")
    if not appends:
        raise ValueError("rotary: only with k_new, got k_new None")
    cos, sin, interleaved = rotary
    for name, x in (("cos", cos), ("sin", sin)):
        if not isinstance(x, Tensor):
            raise TypeError(f"rotary: expected a tensor for {name}, got {describe(x)}")
        check_parameter(f"rotary's {name}", x, q)
        if x.ndim != 2 or x.shape != cos.shape or not 1 <= x.shape[1] <= q.shape[3] // 2:
            raise ValueError(
                f"rotary: expected {name} of shape (S, R / 2) with R <= {q.shape[3]}, like cos, got {tuple(x.shape)}"
            )
    return Rotary(cos, sin, as_bool("rotary's interleaved", interleaved))


def _splits(num_splits: Any, batch_invariant: bool) -> int:
    splits = as_int("num_splits", num_splits)
    if splits < 1:
        raise ValueError(f"num_splits: must be at least 1, got {splits}")
    if batch_invariant:
        raise ValueError(f"num_splits: not with batch_invariant, which cuts at fixed places; got {splits}")
    return splits


def _check_no_gradient(**tensors: Any) -> None:
    for name, x in tensors.items():
        if isinstance(x, Tensor) and forward_mode(x):
            raise TransformError(
                f"{name}: decoding has no forward-mode derivative; expected a tensor without a tangent"
            )
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: decoding has no backward; expected a tensor that requires no grad; detach() it")
