"""Jagged nested tensors: their values and offsets as packed sequences, and the result as a jagged tensor.

A jagged q is (B, Hq, j, D), as torch has it for attention, or (B, j, Hq, D) with layout "bshd". j is the dim of varying
length; tensors with the same offsets have equal j.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ..spec.checks import check_choice, describe
from ..spec.options import Options
from ..spec.problem import Mask
from ..spec.torch_internals import jagged_bounds, jagged_dim, jagged_longest
from .bind import check_qkv
from .varlen import attend_packed

LAYOUTS = {"bhsd": 2, "bshd": 1}  # the jagged dim
# torch 2.10 to 2.15 logs a warning about its own code at the first call of the public nested_tensor_from_jagged.
logging.getLogger("torch.fx._symbolic_trace").addFilter(lambda record: "is_fx_tracing will" not in str(record.msg))


def is_nested(*tensors: Any) -> bool:
    q, k, v = map(type, tensors)
    if q is k is v is Tensor:  # jagged tensors are of a subclass
        return False
    return any(isinstance(x, Tensor) and x.is_nested for x in tensors)


def attention(
    q: Any,
    k: Any,
    v: Any,
    options: Options,
    layout: str,
    backend: str | None,
    names: tuple[str, str, str] = ("q", "k", "v"),
) -> Tensor | tuple[Tensor, Tensor]:
    """`fused_attn.attention` of jagged q, k and v: out and lse (B, Hq, j) have q's offsets.

    k and v share their offsets, which may differ from q's. `alignment` applies to each sequence, and may be None if q
    has the same offsets. A tensor mask and a bias are refused: they have no jagged form.
    """
    check_choice("layout", layout, tuple(LAYOUTS))
    for name, x in zip(names, (q, k, v), strict=True):
        _check(name, x, layout)
    rows, keys, values = (x.shape[LAYOUTS[layout]] for x in (q, k, v))  # equal where offsets are shared
    if keys != values:
        raise ValueError(f"{names[2]}: expected {names[1]}'s offsets, lengths {keys}, got lengths {values}")
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"{names[1]}: expected {names[0]}'s {q.shape[0]} sequences, got {k.shape[0]}")
    mask = options.mask
    if isinstance(mask, Tensor) or (isinstance(mask, Mask) and mask.remainder):
        raise NotImplementedError("mask: a tensor mask has no jagged form; use causal, window or another Mask")
    if options.bias is not None:
        raise NotImplementedError("bias: it has no jagged form; use alibi_slopes")
    starts = q.offsets().int()
    starts_k = starts if keys == rows else k.offsets().int()
    packed_q, packed_k, packed_v = (_packed(x, layout) for x in (q, k, v))
    longest_q, longest_k = (_longest(x, needed=mask is not None) for x in (q, k))
    result: Any = attend_packed(packed_q, packed_k, packed_v, options, starts, starts_k, longest_q, longest_k, backend)
    if not options.return_lse:
        return _jagged(result, q, layout)
    out, lse = result
    return _jagged(out, q, layout), _jagged(lse, q, "bhsd")


def scaled_dot_product_attention(
    query: Any, key: Any, value: Any, options: Options, enable_gqa: bool, backend: str | None
) -> Tensor:
    """`scaled_dot_product_attention` of jagged tensors (B, H, j, D), already in autocast's dtype."""
    names = ("query", "key", "value")
    for name, x in zip(names, (query, key, value), strict=True):
        _check(name, x, "bhsd")
    check_qkv(query.values(), key.values(), value.values(), "sdpa")
    if options.mask is not None or options.bias is not None:
        raise NotImplementedError("attn_mask: it has no jagged form; use is_causal, window or alibi_slopes")
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError(f"key: expected query's {query.shape[1]} heads without enable_gqa, got {key.shape[1]}")
    out: Any = attention(query, key, value, options, "bhsd", backend, names)
    return out


def _check(name: str, x: Any, layout: str) -> None:
    """Check for a jagged tensor without holes, its dims in the layout's order."""
    shape = "(B, H, j, D)" if layout == "bhsd" else "(B, j, H, D)"
    if not isinstance(x, Tensor) or not x.is_nested:
        raise TypeError(f"{name}: expected a jagged tensor like the others, got {describe(x)}")
    if x.layout != torch.jagged:
        raise TypeError(f"{name}: expected a nested tensor of layout torch.jagged, got {x.layout}")
    nested: Any = x
    if x.ndim != 4 or jagged_dim(x) != LAYOUTS[layout]:
        raise ValueError(f"{name}: expected shape {shape} with layout {layout!r}, got {tuple(x.shape)}")
    if nested.lengths() is not None:
        raise NotImplementedError(
            f"{name}: a jagged tensor with holes (lengths in addition to offsets) is not supported; as (B, j, H, D),"
            " .contiguous() packs it"
        )


def _longest(x: Any, needed: bool) -> int | None:
    """The longest length if known without synchronization, else None; if needed, it is read from the device once."""
    return jagged_longest(x) if needed else jagged_bounds(x)["max_seqlen"]


def _packed(x: Tensor, layout: str) -> Tensor:
    """(T, H, D), a view."""
    return x.values().transpose(0, 1) if layout == "bhsd" else x.values()


def _jagged(packed: Tensor, like: Any, layout: str) -> Tensor:
    """packed (T, H, ...) with the offsets of like, in the layout."""
    values = packed.transpose(0, 1) if layout == "bhsd" else packed
    return torch.nested.nested_tensor_from_jagged(
        values, like.offsets(), jagged_dim=LAYOUTS[layout], **jagged_bounds(like)
    )
