"""Argument checks of the layers, and torch.nn's masks translated to those of `fused_attn.attention`."""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..spec.checks import as_bool, as_int, check_dense, describe, one_of


class InputError(ValueError, AssertionError, RuntimeError):
    """A wrong size: a ValueError, and also the exceptions that torch.nn.MultiheadAttention raises."""


class InputTypeError(TypeError, AssertionError, RuntimeError):
    """A wrong type: a TypeError, and also the exceptions that torch.nn.MultiheadAttention raises."""


def not_scriptable(layer: nn.Module) -> NoReturn:
    """`__prepare_scriptable__` of the layers, which torch.jit.script calls first."""
    raise NotImplementedError(
        f"torch.jit.script cannot compile fused_attn.modules.{type(layer).__name__}; torch.compile and torch.export "
        "can, and torch.jit.trace records it"
    )


def checked_sizes(**sizes: Any) -> list[int]:
    """The sizes of a layer as ints of at least 1."""
    checked = [as_int(name, size) for name, size in sizes.items()]
    for name, size in zip(sizes, checked, strict=True):
        if size < 1:
            raise InputError(f"{name}: must be at least 1, got {size}")
    return checked


def as_flag(name: str, x: Any) -> bool:
    """A bool; 0 and 1 are accepted too, because torch's layers accept them."""
    return bool(x) if type(x) is int and x in (0, 1) else as_bool(name, x)


def check_inputs(
    query: Any, key: Any, value: Any, widths: tuple[int, int, int | None], batch_first: bool = True
) -> tuple[int, int, int]:
    """Check query, key and value of these widths (None: any width) and return (B, M, N).

    Shapes: (length, width), where B = 1; (B, length, width); or (length, B, width) if batch_first is False.
    """
    sizes = []
    for name, x, width in zip(("query", "key", "value"), (query, key, value), widths, strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {describe(x)}")
        check_dense(name, x)
        if x.ndim not in (2, 3) or x.ndim != query.ndim or width not in (None, x.shape[-1]):
            raise InputError(_wrong_shape(name, x, query, width, batch_first))
        b, length = (1, x.shape[0]) if x.ndim == 2 else x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
        sizes.append((b, length))
    (b, m), (batch, n), values = sizes
    if batch != b:
        raise InputError(f"key: expected query's batch size {b}, got shape {tuple(key.shape)}")
    if values != (batch, n):
        raise InputError(f"value: expected key's batch and length {(batch, n)}, got shape {tuple(value.shape)}")
    return b, m, n


def _wrong_shape(name: str, x: Tensor, query: Tensor, width: int | None, batch_first: bool) -> str:
    """The error message for a tensor of another width, or with another number of dimensions than query."""
    if name == "key" and (query.ndim, x.ndim) == (2, 3):
        advice = "query[:, None]" if batch_first else "query[None]"
        return f"query: expected 3 dimensions as key has, got shape {tuple(query.shape)}; a length axis is {advice}"
    last = "any" if width is None else width
    alone, batched = f"(length, {last})", f"(B, length, {last})" if batch_first else f"(length, B, {last})"
    if query.ndim in (2, 3):
        allowed = (alone if query.ndim == 2 else batched) + ("" if name == "query" else ", dimensions as query's")
    else:
        allowed = f"{alone} or {batched}"
    return f"{name}: expected {allowed}, got shape {tuple(x.shape)}"


def check_mask(name: str, mask: Any, query: Tensor, *shapes: tuple[int, ...]) -> None:
    """Check that a mask is None, or a bool or float tensor of one of the shapes."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise InputTypeError(f"{name}: expected a bool or float tensor, got {describe(mask)}")
    check_dense(name, mask)
    if not one_of(tuple(mask.shape), shapes):
        raise InputError(f"{name}: expected shape {' or '.join(map(str, shapes))}, got {tuple(mask.shape)}")
    if mask.device != query.device:
        raise ValueError(f"{name}: expected query's device {query.device}, got {mask.device}")


def mask_and_bias(q: Tensor, masks: dict[str, Tensor], added: int = 0) -> tuple[Tensor | None, Tensor | None]:
    """Join masks to one bool mask (True = may attend) and one bias, each None where no mask is of its kind.

    masks: by name, broadcastable to (B, H, M, N), bool (True = ignored) or float. The results broadcast likewise.
    added: number of keys appended to the masked ones; they stay visible, with bias 0.
    """
    masks = {name: _unexpanded(x) for name, x in masks.items()}
    ignored = [x for x in masks.values() if x.dtype == torch.bool]
    floats = {name: x for name, x in masks.items() if x.dtype != torch.bool}
    for name, x in floats.items():
        if x.dtype not in (torch.float32, q.dtype):
            raise InputTypeError(f"{name}: expected bool, float32 or query's {q.dtype}, got {x.dtype}")
    allowed = ~functools.reduce(torch.logical_or, ignored) if ignored else None
    bias = functools.reduce(torch.add, floats.values()) if floats else None
    if added and allowed is not None:
        allowed = F.pad(allowed, (0, added), value=True)
    if added and bias is not None:
        bias = F.pad(bias, (0, added))
    return allowed, bias


def _unexpanded(x: Tensor) -> Tensor:
    """x with size 1 in its expanded dims (stride 0), which still broadcasts."""
    return x[tuple(slice(1) if stride == 0 else slice(None) for stride in x.stride())]
