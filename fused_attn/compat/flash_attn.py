"""The functions of flash-attn 2.8, with the same names, arguments and meanings.

    from fused_attn.compat.flash_attn import flash_attn_func

Layout (B, S, H, D), or (T, H, D) for packed sequences. The number of key-value heads divides that of the query heads.
Masks are aligned bottom-right: with d = S_k - S_q, causal lets row i attend to keys j <= i + d, window_size to
i + d - left <= j <= i + d + right (a negative side is unbounded), and ALiBi, causal or not, subtracts
slope * |i + d - j|. Dao, "FlashAttention-2", 2023.

Beyond flash-attn: every device, dtype and head dim of `fused_attn.attention`, a separate head dim of v, and softcap
together with dropout. Differences:

- A fully masked row gives zeros, as in flash-attn, and a log-sum-exp of -inf; flash-attn writes +inf.
- The log-sum-exp is that of the documented scores; under causal, flash-attn leaves slope * (i + d) out of it.
- S_dmask is (B, Hq, Sq, Sk), or (B, Hq, max_seqlen_q, max_seqlen_k), without padding to tiles and in q's dtype. It
  holds the softmax weights, negated where dropped (-0.0 for a weight of 0: torch.signbit reads the whole pattern), and
  0 beyond a sequence. It is computed separately, needs memory for every pair, and has no derivative. Without dropout it
  is None.
- Dropout drops the same share of the weights, but not the same weights.
- With pages or caches, q may require grad, as in flash-attn; backward through the result raises.
- A wrong argument raises ValueError or TypeError, which are also RuntimeErrors.
- deterministic=False allows an unordered backward; an ordered one may run nevertheless.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..api.attention import attention
from ..api.decode import attention_decode
from ..api.varlen import attention_varlen
from ..runtime.no_derivative import without_derivative
from ..spec.checks import as_bool, as_int, as_starts
from ..spec.problem import describe
from . import flash_arguments as arguments
from .flash_errors import as_flash_attn
from .flash_pages import over_pages
from .flash_passes import backward as _flash_attn_backward  # noqa: F401  other libraries import these four
from .flash_passes import forward as _flash_attn_forward  # noqa: F401
from .flash_passes import varlen_backward as _flash_attn_varlen_backward  # noqa: F401
from .flash_passes import varlen_forward as _flash_attn_varlen_forward  # noqa: F401
from .flash_probabilities import dense_weights, packed_weights

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

__version__ = "2.8.3+fused.attn"  # the release reproduced here; the local part marks that this is not flash-attn

Result = Tensor | tuple[Tensor, Tensor, Tensor | None]
Window = Sequence[int] | Tensor
NO_DERIVATIVE = "{}: its result has no derivative; call {} on the keys and values instead of a cache"


@as_flash_attn
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """q (B, Sq, Hq, D), k and v (B, Sk, Hkv, D) -> out (B, Sq, Hq, D), or (out, lse (B, Hq, Sq), S_dmask or None).

    softmax_scale: None: D ** -0.5. window_size: (left, right), -1: unbounded; also a tensor or array of two. softcap:
    c > 0 makes a score c * tanh(s / c); c <= 0: no softcap. alibi_slopes: (Hq,) or (B, Hq). return_attn_probs: also
    return the log-sum-exp and, with dropout, S_dmask (B, Hq, Sq, Sk) as described in the module. Raises the errors of
    `fused_attn.attention`.

    >>> import torch
    >>> from fused_attn.compat.flash_attn import flash_attn_func
    >>> q, k, v = torch.randn(2, 7, 8, 64), torch.randn(2, 9, 2, 64), torch.randn(2, 9, 2, 64)
    >>> flash_attn_func(q, k, v, causal=True, window_size=(4, 0)).shape
    torch.Size([2, 7, 8, 64])
    """
    seed, wanted = arguments.seed(dropout_p, q), as_bool("return_attn_probs", return_attn_probs)
    options = arguments.scores(softmax_scale, causal, window_size, softcap, alibi_slopes)
    result: Any = attention(
        q, k, v, layout="bshd", alignment="bottom_right", dropout_p=dropout_p, seed=seed, deterministic=deterministic,
        return_lse=wanted, **options,
    )  # fmt: skip
    if not wanted:
        return result
    dropout = arguments.dropout(dropout_p, seed)
    return (*result, None if dropout is None else dense_weights(q, k, dropout, options))


@as_flash_attn
def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of q (B, Sq, Hq, D) and kv (B, Sk, 2, Hkv, D), keys before values.

    >>> import torch
    >>> from fused_attn.compat.flash_attn import flash_attn_kvpacked_func
    >>> flash_attn_kvpacked_func(torch.randn(2, 7, 8, 64), torch.randn(2, 9, 2, 2, 64)).shape
    torch.Size([2, 7, 8, 64])
    """
    k, v = arguments.unpacked("kv", kv, "B, S", 2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


@as_flash_attn
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of qkv (B, S, 3, H, D): queries, keys, values.

    >>> import torch
    >>> from fused_attn.compat.flash_attn import flash_attn_qkvpacked_func
    >>> flash_attn_qkvpacked_func(torch.randn(2, 7, 3, 8, 64), causal=True).shape
    torch.Size([2, 7, 8, 64])
    """
    q, k, v = arguments.unpacked("qkv", qkv, "B, S", 3)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


@as_flash_attn
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """q (Tq, Hq, D), k and v (Tk, Hkv, D), packed -> out (Tq, Hq, D), or (out, lse (Hq, Tq), S_dmask or None).

    cu_seqlens_q, cu_seqlens_k: int32 (B + 1,), the starts of the sequences, ascending from 0 to Tq and Tk. Each
    sequence is aligned bottom-right. max_seqlen_q, max_seqlen_k: upper bounds of the lengths.
    block_table: int32 (B, pages); k and v are then pages (P, page, Hkv, D) of a cache, and cu_seqlens_k gives only the
    lengths. Dropout is not supported with it, and backward raises.
    S_dmask: (B, Hq, max_seqlen_q, max_seqlen_k); it reads the starts, which synchronizes.
    The other arguments are those of `flash_attn_func`.

    >>> import torch
    >>> from fused_attn.compat.flash_attn import flash_attn_varlen_func
    >>> x, starts = torch.randn(7, 8, 64), torch.tensor([0, 5, 5, 7], dtype=torch.int32)
    >>> flash_attn_varlen_func(x, x, x, starts, starts, 5, 5, causal=True).shape
    torch.Size([7, 8, 64])
    """
    seed, wanted = arguments.seed(dropout_p, q), as_bool("return_attn_probs", return_attn_probs)
    options = arguments.scores(softmax_scale, causal, window_size, softcap, alibi_slopes)
    cu_seqlens_q, cu_seqlens_k = as_starts(cu_seqlens_q, cu_seqlens_k)
    if block_table is not None:
        arguments.no_dropout(dropout_p)
        with torch.no_grad():
            pair = over_pages(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, options)
        message = NO_DERIVATIVE.format("flash_attn_varlen_func with block_table", "it without block_table")
        out, lse = without_derivative(message, pair, q, k, v, *options.values())
        return (out, lse.T, None) if wanted else out
    longest_q = arguments.longest("max_seqlen_q", max_seqlen_q)
    longest_k = arguments.longest("max_seqlen_k", max_seqlen_k)
    result: Any = attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=longest_q, max_seqlen_k=longest_k, alignment="bottom_right",
        dropout_p=dropout_p, seed=seed, deterministic=deterministic, return_lse=wanted, **options,
    )  # fmt: skip
    if not wanted:
        return result
    out, lse = result
    dropout = arguments.dropout(dropout_p, seed)
    if dropout is None:
        return out, lse.T, None
    longest = as_int("max_seqlen_q", max_seqlen_q), as_int("max_seqlen_k", max_seqlen_k)
    return out, lse.T, packed_weights(q, k, cu_seqlens_q, cu_seqlens_k, longest, dropout, options)


@as_flash_attn
def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of q (Tq, Hq, D) and kv (Tk, 2, Hkv, D), keys before values.

    >>> import torch
    >>> from fused_attn.compat.flash_attn import flash_attn_varlen_kvpacked_func
    >>> starts = torch.tensor([0, 5, 5, 7], dtype=torch.int32)
    >>> flash_attn_varlen_kvpacked_func(torch.randn(7, 8, 64), torch.randn(7, 2, 2, 64), starts, starts, 5, 5).shape
    torch.Size([7, 8, 64])
    """
    k, v = arguments.unpacked("kv", kv, "T", 2)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


@as_flash_attn
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of qkv (T, 3, H, D): queries, keys, values.

    >>> import torch
    >>> from fused_attn.compat.flash_attn import flash_attn_varlen_qkvpacked_func
    >>> flash_attn_varlen_qkvpacked_func(torch.randn(7, 3, 8, 64), torch.tensor([0, 5, 7], dtype=torch.int32), 5).shape
    torch.Size([7, 8, 64])
    """
    q, k, v = arguments.unpacked("qkv", qkv, "T", 3)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


@as_flash_attn
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """q (B, Sq, Hq, D) over caches (B, Sk, Hkv, D), or pages (P, page, Hkv, D) -> out, or (out, lse (B, Hq, Sq)).

    Forward only, by `fused_attn.attention_decode`; backward raises. Pages may have any size.

    k, v: (B, Snew, Hkv, D), written into the caches in place after the first cache_seqlens keys; they require
        cache_seqlens.
    rotary_cos, rotary_sin: (S, R / 2). They rotate k at positions cache_seqlens + t, and q at the same positions if the
        call is causal or windowed, else all of q at cache_seqlens.
    rotary_interleaved: pairs are dims 0 & 1, 2 & 3, ...; else 0 & R / 2, 1 & R / 2 + 1, ...
    cache_seqlens: an int, or int32 (B,): the number of keys before k; None: the caches are full.
    cache_batch_idx: int32 (B,), the row of the caches of each sequence.
    cache_leftpad: int32 (B,), the position of each sequence's first key.
    block_table: int32 (B, pages). num_splits: 0: chosen automatically.
    The other arguments are those of `flash_attn_func`.

    >>> import torch
    >>> from fused_attn.compat.flash_attn import flash_attn_with_kvcache
    >>> k_cache, v_cache = torch.zeros(2, 64, 2, 16), torch.zeros(2, 64, 2, 16)
    >>> q, k, v = torch.randn(2, 1, 8, 16), torch.randn(2, 1, 2, 16), torch.randn(2, 1, 2, 16)
    >>> flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=10, causal=True).shape
    torch.Size([2, 1, 8, 16])
    """
    if k is not None and cache_seqlens is None:
        raise ValueError("cache_seqlens: required with k, whose first position it is, got None")
    rotary = None
    if rotary_cos is not None and rotary_sin is not None:
        rotary = (rotary_cos, rotary_sin, rotary_interleaved)
        if k is None:
            raise ValueError("rotary_cos: requires k, which it rotates together with q, got None for k")
    elif rotary_cos is not None or rotary_sin is not None:
        raise ValueError(f"rotary_sin: expected a tensor if and only if rotary_cos is one, got {describe(rotary_sin)}")
    options = arguments.scores(softmax_scale, causal, window_size, softcap, alibi_slopes)
    splits, wanted = as_int("num_splits", num_splits) or None, as_bool("return_softmax_lse", return_softmax_lse)
    with torch.no_grad():
        result: Any = attention_decode(
            q, k_cache, v_cache, cache_seqlens=cache_seqlens, page_table=block_table, k_new=k, v_new=v, rotary=rotary,
            cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad, num_splits=splits, return_lse=True, **options,
        )  # fmt: skip
    message = NO_DERIVATIVE.format("flash_attn_with_kvcache", "flash_attn_func")
    out, lse = without_derivative(message, result, q, k_cache, v_cache, k, v, *options.values())
    return (out, lse) if wanted else out
