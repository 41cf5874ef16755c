"""flash-attn's functions, by the names, arguments and meanings of its version 2.8.

    from fused_attn.compat.flash_attn import flash_attn_func

Layout (B, S, H, D), and (T, H, D) where sequences are packed; key-value heads divide the query heads. Where S_q and S_k
differ, everything is placed from the bottom right: with d = S_k - S_q, causal lets row i see keys j <= i + d,
window_size lets it see i + d - left <= j <= i + d + right (a negative side is unbounded), and ALiBi, causal or not,
subtracts slope * |i + d - j|. Dao, "FlashAttention-2", 2023.

Wider than there: every device, dtype and head dim of `fused_attn.attention`, a v of its own head dim, softcap together
with dropout. Different from there:

- A row that may see nothing gives zeros, as there, and a log-sum-exp of -inf, where flash-attn writes +inf.
- The log-sum-exp is that of the scores as documented; under causal, flash-attn leaves slope * (i + d) out of it.
- S_dmask is (B, Hq, Sq, Sk), or (B, Hq, max_seqlen_q, max_seqlen_k), not rounded up to tiles, in q's dtype: the softmax
  weights themselves, negative where dropped (-0.0 where the weight is 0: torch.signbit reads all of the pattern), 0
  beyond a sequence. It is formed beside the call, in memory for every pair, and has no derivative. Without dropout,
  None stands in its place.
- Dropout drops the same share of the weights, but not the same weights.
- Over pages and caches a q that requires grad is taken, as there; backward through the result raises.
- A wrong argument raises ValueError or TypeError, which are RuntimeErrors too.
- deterministic=False allows an unordered backward, and may run an ordered one all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..api.attention import attention
from ..api.decode import attention_decode
from ..api.varlen import attention_varlen
from ..runtime.no_derivative import underived
from ..spec.checks import as_bool, as_int, as_starts
from ..spec.problem import describe
from . import flash_arguments as arguments
from .flash_errors import as_flash_attn
from .flash_pages import over_pages
from .flash_passes import backward as _flash_attn_backward  # noqa: F401  other libraries import the four
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

__version__ = "2.8.3+fused.attn"  # the release whose functions these are; the part after + says that it is not that one

Answer = Tensor | tuple[Tensor, Tensor, Tensor | None]
Window = Sequence[int] | Tensor
NO_DERIVATIVE = "{}: its result has no derivative; call {} on the keys and values themselves"


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
) -> Answer:
    """q (B, Sq, Hq, D), k and v (B, Sk, Hkv, D) -> out (B, Sq, Hq, D), or (out, lse (B, Hq, Sq), S_dmask or None).

    softmax_scale: None is D ** -0.5. window_size: (left, right), -1 is unbounded; a tensor or array of two, too.
    softcap: c > 0 makes a score c * tanh(s / c); 0 and less is none. alibi_slopes: (Hq,) or (B, Hq). return_attn_probs:
    also return the log-sum-exp, and with dropout S_dmask (B, Hq, Sq, Sk), see above. Raises what `fused_attn.attention`
    raises.

    >>> import torch
    >>> from fused_attn.compat.flash_attn import flash_attn_func
    >>> q, k, v = torch.randn(2, 7, 8, 64), torch.randn(2, 9, 2, 64), torch.randn(2, 9, 2, 64)
    >>> flash_attn_func(q, k, v, causal=True, window_size=(4, 0)).shape
    torch.Size([2, 7, 8, 64])
    """
    seed, wanted = arguments.seed(dropout_p, q), as_bool("return_attn_probs", return_attn_probs)
    words = arguments.scores(softmax_scale, causal, window_size, softcap, alibi_slopes)
    result: Any = attention(
        q, k, v, layout="bshd", alignment="bottom_right", dropout_p=dropout_p, seed=seed, deterministic=deterministic,
        return_lse=wanted, **words,
    )  # fmt: skip
    if not wanted:
        return result
    dropout = arguments.dropout(dropout_p, seed)
    return (*result, None if dropout is None else dense_weights(q, k, dropout, words))


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
) -> Answer:
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
) -> Answer:
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
) -> Answer:
    """q (Tq, Hq, D), k and v (Tk, Hkv, D), packed -> out (Tq, Hq, D), or (out, lse (Hq, Tq), S_dmask or None).

    cu_seqlens_q, cu_seqlens_k: int32 (B + 1,), where the sequences start, ascending from 0 to Tq and Tk; placement is
    bottom-right in each sequence by its own lengths. max_seqlen_q, max_seqlen_k: no sequence is longer.
    block_table: int32 (B, pages); k and v are then pages (P, page, Hkv, D) of a cache, and cu_seqlens_k gives only the
    lengths. Without dropout and without a derivative: backward raises.
    S_dmask: (B, Hq, max_seqlen_q, max_seqlen_k); forming it reads where the sequences begin.
    The others mean what they mean in `flash_attn_func`.

    >>> import torch
    >>> from fused_attn.compat.flash_attn import flash_attn_varlen_func
    >>> x, starts = torch.randn(7, 8, 64), torch.tensor([0, 5, 5, 7], dtype=torch.int32)
    >>> flash_attn_varlen_func(x, x, x, starts, starts, 5, 5, causal=True).shape
    torch.Size([7, 8, 64])
    """
    seed, wanted = arguments.seed(dropout_p, q), as_bool("return_attn_probs", return_attn_probs)
    words = arguments.scores(softmax_scale, causal, window_size, softcap, alibi_slopes)
    cu_seqlens_q, cu_seqlens_k = as_starts(cu_seqlens_q, cu_seqlens_k)
    if block_table is not None:
        arguments.no_dropout(dropout_p)
        with torch.no_grad():
            found = over_pages(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, words)
        message = NO_DERIVATIVE.format("flash_attn_varlen_func with block_table", "it without block_table")
        out, lse = underived(message, found, q, k, v, *words.values())
        return (out, lse.T, None) if wanted else out
    longest_q = arguments.longest("max_seqlen_q", max_seqlen_q)
    longest_k = arguments.longest("max_seqlen_k", max_seqlen_k)
    result: Any = attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=longest_q, max_seqlen_k=longest_k, alignment="bottom_right",
        dropout_p=dropout_p, seed=seed, deterministic=deterministic, return_lse=wanted, **words,
    )  # fmt: skip
    if not wanted:
        return result
    out, lse = result
    dropout = arguments.dropout(dropout_p, seed)
    if dropout is None:
        return out, lse.T, None
    longest = as_int("max_seqlen_q", max_seqlen_q), as_int("max_seqlen_k", max_seqlen_k)
    return out, lse.T, packed_weights(q, k, cu_seqlens_q, cu_seqlens_k, longest, dropout, words)


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
) -> Answer:
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
) -> Answer:
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

    Forward only; `fused_attn.attention_decode` does the work, and backward raises. Any page size is taken.

    k, v: (B, Snew, Hkv, D), written into the caches in place, behind the cache_seqlens keys that are there. Needed
        with them: cache_seqlens. rotary_cos, rotary_sin: (S, R / 2); turn k at positions cache_seqlens + t, and q at
        the same where the call is causal or windowed, else all of q at cache_seqlens. rotary_interleaved: pairs are
        dims 0 & 1, 2 & 3, ...; else 0 & R / 2, 1 & R / 2 + 1, ...
    cache_seqlens: an int, or int32 (B,), the keys there are before k; None takes the caches as full.
    cache_batch_idx: int32 (B,), the row of the caches that a sequence has. cache_leftpad: int32 (B,), the places before
        a sequence's first key. block_table: int32 (B, pages). num_splits: 0 chooses.
    The others mean what they mean in `flash_attn_func`.

    >>> import torch
    >>> from fused_attn.compat.flash_attn import flash_attn_with_kvcache
    >>> k_cache, v_cache = torch.zeros(2, 64, 2, 16), torch.zeros(2, 64, 2, 16)
    >>> q, k, v = torch.randn(2, 1, 8, 16), torch.randn(2, 1, 2, 16), torch.randn(2, 1, 2, 16)
    >>> flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=10, causal=True).shape
    torch.Size([2, 1, 8, 16])
    """
    if k is not None and cache_seqlens is None:
        raise ValueError("cache_seqlens: with k it says where k begins, got None")
    rotary = None
    if rotary_cos is not None and rotary_sin is not None:
        rotary = (rotary_cos, rotary_sin, rotary_interleaved)
        if k is None:
            raise ValueError("rotary_cos: turns k and the q that comes with it, got it without k")
    elif rotary_cos is not None or rotary_sin is not None:
        raise ValueError(f"rotary_sin: expected with rotary_cos and not without, got {describe(rotary_sin)}")
    words = arguments.scores(softmax_scale, causal, window_size, softcap, alibi_slopes)
    splits, wanted = as_int("num_splits", num_splits) or None, as_bool("return_softmax_lse", return_softmax_lse)
    with torch.no_grad():
        found: Any = attention_decode(
            q, k_cache, v_cache, cache_seqlens=cache_seqlens, page_table=block_table, k_new=k, v_new=v, rotary=rotary,
            cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad, num_splits=splits, return_lse=True, **words,
        )  # fmt: skip
    message = NO_DERIVATIVE.format("flash_attn_with_kvcache", "flash_attn_func")
    out, lse = underived(message, found, q, k_cache, v_cache, k, v, *words.values())
    return (out, lse) if wanted else out
