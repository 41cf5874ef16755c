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
- S_dmask, the weights and their dropout pattern, is never formed: without dropout, None stands in its place, and
  return_attn_probs with dropout_p > 0 raises NotImplementedError.
- Dropout drops the same share of the weights, but not the same weights.
- deterministic=False allows an unordered backward, and may run an ordered one all the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..api import attention
from ..checks import check_starts, readable
from ..decode import attention_decode
from ..ragged import places
from ..spec import describe
from ..varlen import attention_varlen

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Answer = Tensor | tuple[Tensor, Tensor, None]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Answer:
    """q (B, Sq, Hq, D), k and v (B, Sk, Hkv, D) -> out (B, Sq, Hq, D), or (out, lse (B, Hq, Sq), None).

    softmax_scale: None is D ** -0.5. window_size: (left, right), -1 is unbounded. softcap: c > 0 makes a score
    c * tanh(s / c); 0 and less is none. alibi_slopes: (Hq,) or (B, Hq). return_attn_probs: also return the log-sum-exp,
    and None for the weights. Raises what `fused_attn.attention` raises.

    >>> import torch
    >>> from fused_attn.compat.flash_attn import flash_attn_func
    >>> q, k, v = torch.randn(2, 7, 8, 64), torch.randn(2, 9, 2, 64), torch.randn(2, 9, 2, 64)
    >>> flash_attn_func(q, k, v, causal=True, window_size=(4, 0)).shape
    torch.Size([2, 7, 8, 64])
    """
    result: Any = attention(
        q, k, v, layout="bshd", alignment="bottom_right", dropout_p=dropout_p, deterministic=deterministic,
        return_lse=_lse_asked(return_attn_probs, dropout_p),
        **_scores(softmax_scale, causal, window_size, softcap, alibi_slopes),
    )  # fmt: skip
    return (*result, None) if return_attn_probs else result


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
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
    k, v = _unpacked("kv", kv, "B, S", 2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
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
    q, k, v = _unpacked("qkv", qkv, "B, S", 3)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


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
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Answer:
    """q (Tq, Hq, D), k and v (Tk, Hkv, D): packed sequences -> out (Tq, Hq, D), or (out, lse (Hq, Tq), None).

    cu_seqlens_q, cu_seqlens_k: int32 (B + 1,), where the sequences start, ascending from 0 to Tq and Tk; placement is
    bottom-right in each sequence by its own lengths. max_seqlen_q, max_seqlen_k: no sequence is longer.
    block_table: int32 (B, pages); k and v are then pages (P, page, Hkv, D) of a cache, and cu_seqlens_k says the
    lengths alone. Pages are read as `fused_attn.attention_decode` reads them: without dropout and gradients.
    The others mean what they mean in `flash_attn_func`.

    >>> import torch
    >>> from fused_attn.compat.flash_attn import flash_attn_varlen_func
    >>> x, starts = torch.randn(7, 8, 64), torch.tensor([0, 5, 5, 7], dtype=torch.int32)
    >>> flash_attn_varlen_func(x, x, x, starts, starts, 5, 5, causal=True).shape
    torch.Size([7, 8, 64])
    """
    result: Any
    scores = _scores(softmax_scale, causal, window_size, softcap, alibi_slopes)
    wanted = _lse_asked(return_attn_probs, dropout_p)
    if block_table is None:
        result = attention_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=_longest(max_seqlen_q),
            max_seqlen_k=_longest(max_seqlen_k), alignment="bottom_right", dropout_p=dropout_p,
            deterministic=deterministic, return_lse=wanted, **scores,
        )  # fmt: skip
    elif dropout_p > 0:
        raise NotImplementedError(f"dropout_p: 0 with block_table, whose pages are for inference, got {dropout_p}")
    else:
        result = _over_pages(q, k, v, cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), block_table, scores)
        result = result if wanted else result[0]
    return (result[0], result[1].T, None) if wanted else result


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
    window_size: tuple[int, int] = (-1, -1),
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
    k, v = _unpacked("kv", kv, "T", 2)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
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
    q, k, v = _unpacked("qkv", qkv, "T", 3)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


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
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """q (B, Sq, Hq, D) over caches (B, Sk, Hkv, D), or pages (P, page, Hkv, D) -> out, or (out, lse (B, Hq, Sq)).

    Forward only; `fused_attn.attention_decode` does the work. Any page size is taken.

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
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=k_cache.device)
    return attention_decode(
        q, k_cache, v_cache, cache_seqlens=cache_seqlens, page_table=block_table, k_new=k, v_new=v,
        rotary=rotary, cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad, num_splits=num_splits or None,
        return_lse=return_softmax_lse, **_scores(softmax_scale, causal, window_size, softcap, alibi_slopes),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- translation


def _scores(
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    """What becomes of a score, in our words."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"window_size: expected a pair (left, right), got {describe(window_size)}")
    if not all(isinstance(x, int) for x in window_size):
        raise TypeError(f"window_size: expected ints, -1 for unbounded, got {window_size!r}")
    left, right = (x if x >= 0 else None for x in window_size)
    return {
        "scale": softmax_scale,
        "causal": causal,
        "window": None if left is None and right is None else (left, right),
        "alibi_slopes": alibi_slopes,
        "softcap": softcap if softcap > 0 else None,
    }


def _lse_asked(return_attn_probs: bool, dropout_p: float) -> bool:
    if return_attn_probs and dropout_p > 0:
        raise NotImplementedError(
            f"return_attn_probs: the weights and their dropout pattern are never formed, got it with dropout_p ="
            f" {dropout_p}; without dropout the log-sum-exp is returned"
        )
    return return_attn_probs


def _unpacked(name: str, packed: Tensor, lead: str, parts: int) -> tuple[Tensor, ...]:
    """Views of the tensors that are packed in the dim before the heads."""
    ndim = lead.count(",") + 4
    if not isinstance(packed, Tensor) or packed.ndim != ndim or packed.shape[-3] != parts:
        raise ValueError(f"{name}: expected shape ({lead}, {parts}, H, D), got {describe(packed)}")
    return packed.unbind(-3)


def _longest(most: int | Tensor) -> int | None:
    """A tensor is not read: that would wait for the device, and nothing here needs it."""
    return None if isinstance(most, Tensor) else most


def _over_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    block_table: Tensor,
    scores: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """(out (Tq, Hq, D), lse (Tq, Hq)): queries of a sequence stand at the end of max_seqlen_q rows, so that one
    bottom right is that of all sequences."""
    check_starts("cu_seqlens_q", cu_seqlens_q, q.shape[0], q.device)
    if not isinstance(cu_seqlens_k, Tensor) or cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"cu_seqlens_k: expected cu_seqlens_q's shape {tuple(cu_seqlens_q.shape)}, got {describe(cu_seqlens_k)}"
        )
    lengths = cu_seqlens_q.diff()
    if readable(lengths) and bool((lengths > max_seqlen_q).any()):
        raise ValueError(f"max_seqlen_q: a sequence is {int(lengths.max())} long, got {max_seqlen_q}")
    sequence, row = places(cu_seqlens_q, q.shape[0])
    row = row + (max_seqlen_q - lengths)[sequence]
    rows = q.new_zeros(len(lengths), max_seqlen_q, *q.shape[1:]).index_put((sequence, row), q)
    out, lse = attention_decode(
        rows, k, v, cache_seqlens=cu_seqlens_k.diff(), page_table=block_table, return_lse=True, **scores
    )
    return out[sequence, row], lse.transpose(1, 2)[sequence, row]
