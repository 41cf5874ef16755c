"""flash-attn's arguments translated to those of `fused_attn.attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..spec.checks import as_float, as_int, as_int32, check_starts, describe, readable
from ..spec.dropout import Dropout


def scores(
    softmax_scale: float | None, causal: bool, window_size: Any, softcap: float, alibi_slopes: Tensor | None
) -> dict[str, Any]:
    """The options of `attention` that change a score."""
    cap = softcap if isinstance(softcap, Tensor) else as_float("softcap", softcap)
    return {
        "scale": softmax_scale,
        "causal": causal,
        "window": window(window_size),
        "alibi_slopes": alibi_slopes,
        "softcap": cap if cap > 0 else None,
    }


def window(window_size: Any) -> tuple[int | None, int | None] | None:
    """(left, right) from a pair of ints, or a tensor or array of two; None: unbounded."""
    pair = window_size.tolist() if hasattr(window_size, "tolist") else window_size
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"window_size: expected a pair (left, right), got {describe(window_size)}")
    sides = (as_int("window_size", x, "two ints, -1 for unbounded") for x in pair)
    left, right = (x if x >= 0 else None for x in sides)
    return None if left is None and right is None else (left, right)


def unpacked(name: str, packed: Tensor, lead: str, parts: int) -> tuple[Tensor, ...]:
    """Views of the tensors packed in the dim before the heads."""
    ndim = lead.count(",") + 4
    if not isinstance(packed, Tensor) or packed.ndim != ndim or packed.shape[-3] != parts:
        raise ValueError(f"{name}: expected shape ({lead}, {parts}, H, D), got {describe(packed)}")
    return packed.unbind(-3)


def longest(name: str, most: Any) -> int | None:
    """The length as an int; None for a tensor on a device, because reading it would synchronize."""
    return None if isinstance(most, Tensor) and not readable(most) else as_int(name, most)


def seed(dropout_p: Any, q: Any) -> Tensor | None:
    """A dropout seed from the default generator of q's device; None without dropout."""
    if as_float("dropout_p", dropout_p) <= 0 or not isinstance(q, Tensor):
        return None
    return torch.randint(2**63 - 1, (), device=q.device)


def lengths(name: str, starts: Any, total: int | None, most: Any, device: torch.device) -> Tensor:
    """Lengths int32 (B,) of the sequences that begin at `starts`, checked against the longest allowed, `most`."""
    check_starts(name, starts, total, device, longest(f"max_seqlen_{name}", most))
    return starts.diff()


def each(name: str, x: Any, lengths: Tensor) -> Tensor:
    """Check a number of keys per sequence, at most its length; int32 (B,)."""
    x = as_int32(name, x)
    if x.shape != lengths.shape or x.device != lengths.device:
        raise ValueError(f"{name}: expected shape {tuple(lengths.shape)} on {lengths.device}, got {describe(x)}")
    wrong = (x < 0) | (x > lengths)
    if readable(x) and bool(wrong.any()):
        b = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: expected 0 <= {name} <= {int(lengths[b])}, the keys of sequence {b}, got {int(x[b])}"
        )
    return x


def dropout(dropout_p: float, seed: Tensor | None) -> Dropout | None:
    """The dropout of a call with this seed."""
    return None if seed is None else Dropout(float(dropout_p), torch.stack((seed, torch.zeros_like(seed))))


def no_dropout(dropout_p: float) -> None:
    if as_float("dropout_p", dropout_p) > 0:
        raise NotImplementedError(f"dropout_p: must be 0 with block_table, got {dropout_p}")
