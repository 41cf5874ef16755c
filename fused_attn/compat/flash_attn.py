"""flash-attn's functions, by the names, arguments and meanings of its version 2.8.

    from fused_attn.compat.flash_attn import flash_attn_func

Layout (B, S, H, D); key-value heads divide the query heads. Where S_q and S_k differ, everything is placed from the
bottom right: with d = S_k - S_q, causal lets row i see keys j <= i + d, window_size lets it see
i + d - left <= j <= i + d + right (a negative side is unbounded), and ALiBi, causal or not, subtracts
slope * |i + d - j|. Dao, "FlashAttention-2", 2023.

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

from torch import Tensor

from ..api import attention
from ..spec import describe

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
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
