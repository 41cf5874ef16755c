"""torch.nn.functional.scaled_dot_product_attention, with the modifiers that it lacks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime import call_cache
from ..runtime.autocast import autocast, no_autocast
from ..spec.checks import as_bool, axes_advice, check_dense, is_integers, one_of
from ..spec.options import Options
from ..spec.problem import Problem, describe
from . import keywords, nested
from .bind import bind, check_qkv


@keywords.closed
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    enable_gqa: bool = False,
    *,
    softcap: float | Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    backend: str | None = None,
    **unknown: NoReturn,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, with the modifiers that it lacks.

    query (..., M, D), key (..., N, D), value (..., N, Dv) with leading dims that broadcast; any dim may be 0. With
    enable_gqa dim -3 counts heads, and those of key and value must divide query's. attn_mask: bool (True = may attend)
    or float (added), broadcastable to (..., M, N). is_causal, which excludes attn_mask, and window are aligned
    top-left, as in torch. torch.nn.attention.sdpa_kernel changes no result. A fully masked row gives zeros. softcap,
    window, alibi_slopes, sink and backend are those of `attention`. Jagged nested tensors (B, H, j, D) are supported,
    without an attn_mask.

    Returns (..., M, Dv). Raises TypeError and ValueError that name the argument.

    >>> import torch, fused_attn
    >>> x = torch.randn(2, 8, 128, 64)
    >>> fused_attn.scaled_dot_product_attention(x, x, x, is_causal=True).shape
    torch.Size([2, 8, 128, 64])
    """
    if unknown:
        keywords.check(scaled_dot_product_attention, unknown)
    is_mask = isinstance(attn_mask, Tensor) and attn_mask.dtype == torch.bool
    mask, bias = (attn_mask, None) if is_mask else (None, attn_mask)
    options = Options(bias, alibi_slopes, sink, mask, "dot", scale, is_causal, window, "top_left", softcap, dropout_p)
    if nested.is_nested(query, key, value):
        query, key, value = autocast(query, key, value)
        return nested.scaled_dot_product_attention(query, key, value, options, enable_gqa, backend)
    out, _ = _attend(query, key, value, options, "sdpa", backend, (), enable_gqa)
    if out.shape[-1] != value.shape[-1]:  # a head dim of 0 was padded
        out = out[..., : value.shape[-1]]
    if query.ndim == key.ndim == value.ndim == 4:
        return out
    lead = _lead(query, key, value, as_bool("enable_gqa", enable_gqa))
    return out if len(lead) == 2 else out.reshape(*lead, *out.shape[-2:])


def _bind(
    query: Tensor, key: Tensor, value: Tensor, options: Options, layout: str, starts: tuple[()], enable_gqa: bool
) -> Problem:
    query, key, value = autocast(query, key, value)
    check_qkv(query, key, value, layout)
    attn_mask = options.bias if options.mask is None else options.mask
    if as_bool("is_causal", options.causal) and attn_mask is not None:
        raise ValueError("attn_mask: must be None when is_causal is True")
    enable_gqa = as_bool("enable_gqa", enable_gqa)
    if not query.shape[-1] or not value.shape[-1]:
        query, key, value = (x if x.shape[-1] else F.pad(x, (0, 1)) for x in (query, key, value))
    lead = _lead(query, key, value, enable_gqa)
    if enable_gqa and key.shape[-3] != value.shape[-3]:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    q, k, v = (_four_dims(x, lead, enable_gqa) for x in (query, key, value))
    if attn_mask is not None:
        attn_mask = _four_dim_mask(attn_mask, query, (*lead, query.shape[-2], key.shape[-2]))
        mask, bias = (attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask)
        options = options._replace(mask=mask, bias=bias)
    with no_autocast(q):
        return bind(q, k, v, options)


_attend = call_cache.cached(_bind)


def _lead(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, ...]:
    """The leading dims of the result: broadcast, except the heads under enable_gqa, which are query's."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if enable_gqa and x.ndim < 3:
            raise ValueError(f"{name}: enable_gqa needs at least 3 dimensions, got shape {tuple(x.shape)}")
    tail = 3 if enable_gqa else 2
    leads = [x.shape[:-tail] for x in (query, key, value)]
    try:  # broadcast_shapes is slow, and most often the dims are equal
        lead = leads[0] if leads[0] == leads[1] == leads[2] else torch.broadcast_shapes(*leads)
    except RuntimeError:
        shapes = ", ".join(f"{n} {tuple(x.shape)}" for n, x in (("query", query), ("key", key), ("value", value)))
        hint = "" if enable_gqa or query.ndim < 3 else "; key and value with fewer heads need enable_gqa=True"
        raise ValueError(f"query, key, value: leading dims do not broadcast: {shapes}{hint}") from None
    if not enable_gqa:
        return tuple(lead)
    heads = query.shape[-3]
    for name, x in (("key", key), ("value", value)):
        if heads and (x.shape[-3] == 0 or heads % x.shape[-3]):
            raise ValueError(f"{name}: {x.shape[-3]} key-value heads do not divide the {heads} query heads")
    return (*lead, heads)


def _four_dims(x: Tensor, lead: tuple[int, ...], enable_gqa: bool) -> Tensor:
    """x as (B, H, length, dim): leading dims are broadcast; the last is H, the others are flattened into B."""
    if enable_gqa:
        lead = (*lead[:-1], x.shape[-3])
    if x.shape[:-2] != lead:
        x = x.expand(*lead, *x.shape[-2:])
    if len(lead) > 2:
        return x.reshape(_product(lead[:-1]), *x.shape[-3:])
    return x if len(lead) == 2 else x[(None,) * (2 - len(lead))]


def _product(sizes: Iterable[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def _four_dim_mask(mask: Any, query: Tensor, shape: tuple[int, ...]) -> Tensor:
    """attn_mask as a 4-d view with flattened leading dims, broadcast dims kept at size 1 where possible."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask: expected a tensor, got {describe(mask)}")
    check_dense("attn_mask", mask)
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        advice = "; pass attn_mask != 0" if is_integers(mask) else ""
        raise TypeError(f"attn_mask: expected bool, float32 or query's {query.dtype}, got {mask.dtype}{advice}")
    if mask.device != query.device:
        raise ValueError(f"attn_mask: expected query's device {query.device}, got {mask.device}")
    fits = mask.ndim <= len(shape) and all(
        one_of(have, (1, want)) for have, want in zip(mask.shape[::-1], shape[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"attn_mask: shape {tuple(mask.shape)} does not broadcast to {shape}{axes_advice('attn_mask', mask, shape)}"
        )
    if mask.ndim == 4 == len(shape):
        return mask
    mask = mask[(None,) * (max(4, len(shape)) - mask.ndim)]
    if _product(mask.shape[:-3]) == 1:
        return mask.reshape(1, *mask.shape[-3:])
    if mask.ndim == 4:
        return mask
    return mask.expand(*shape[:-3], *mask.shape[-3:]).reshape(_product(shape[:-3]), *mask.shape[-3:])
