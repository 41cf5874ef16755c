"""Tensors as the tuples of kernels/types.py: encoded strides, alignment, and whether offsets need int64."""

from __future__ import annotations

import functools
import math
from typing import Any

import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...kernels.types import Additive, Dropout, Scalar, Score, Span, Vector, View
from ...spec.problem import Problem
from ...spec.problem import Span as Interval
from ...tuning.select import padded
from . import launch_cache

# A tile is at most this long, so offsets inside it fit int32 up to a stride of 2**31 divided by it.
LONGEST_TILE = 512
FAR = 2**28


def encode_int(x: int) -> int:
    """4 * x + 3: never 1 and never divisible by 16, so Triton never specialises on it. See `memory.decode_int`."""
    return 4 * x + 3


@functools.lru_cache(None, typed=True)
def constant(x: Any) -> tl.constexpr:
    return tl.constexpr(x)


_constants = {n: constant(n) for n in (0, 1, 2, 4, 8, 16)}
_booleans = {x: tl.constexpr(x) for x in (False, True)}


def strides_of(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in which dims of size 1 have stride 0, so that they cause no further specialisation."""
    return tuple(0 if n == 1 else s for n, s in zip(shape, strides, strict=True))


@functools.lru_cache(4096)
def _layout(
    shape: tuple[int, ...], strides: tuple[int, ...], target: tuple[int, ...], size: int, aligned: bool
) -> tuple[tuple[int, ...], Any, Any, Any, Any]:
    """Every field of View but the pointer, for elements of `size` bytes. aligned: the pointer is a multiple of 16
    bytes."""
    strides = strides_of(shape, strides)
    rows = int(shape[2] == target[2])
    adjacent = strides[3] == 1 or target[3] == 1
    columns = 0 if shape[3] != target[3] else 1 if adjacent else 2
    per = 16 // size
    unit = per if aligned and columns == 1 and all(s % per == 0 for s in strides[:3]) else 1
    wide = max(strides[2:]) * LONGEST_TILE >= 2**31
    encoded = tuple(encode_int(s // unit) for s in strides)
    return encoded, _constants[unit], _constants[rows], _constants[columns], _booleans[wide]


def view(x: Tensor) -> View:
    """A tensor (B, H, rows, columns)."""
    shape = x.shape
    return View(x, *_layout(shape, x.stride(), shape, x.element_size(), x.data_ptr() % 16 == 0))


def descriptor(x: Tensor, rows: int) -> TensorDescriptor | None:
    """A TMA descriptor of x, with boxes of `rows` whole rows of one head; None if TMA cannot copy x.

    Elements of a box outside of x read as zeros.
    """
    unit = view(x).unit.value
    apart = [(n, s) for n, s in zip(x.shape[:3], x.stride(), strict=False)]
    if unit * x.element_size() != 16 or any(n > 1 and s == 0 for n, s in apart):
        return None
    strides = [unit if n == 1 else s for n, s in apart]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, padded(x.shape[3])])


def plane_view(x: Tensor | None, shape: tuple[int, ...]) -> View | None:
    """An input that broadcasts to `shape`, (B, H, M, N).

    Its strides depend on lengths, and kernels are compiled for the alignment of rows. Contiguous rows that are not
    aligned are therefore copied into aligned ones; expanded dims stay expanded.
    """
    if x is None:
        return None
    size = x.element_size()
    found = _layout(x.shape, x.stride(), shape, size, x.data_ptr() % 16 == 0)
    if found[3].value == 1 and found[1].value * size < 16:
        per = 16 // size
        once = x[tuple(slice(None) if s else slice(1) for s in x.stride())]
        roomy = once.new_empty((*once.shape[:3], -(-once.shape[3] // per) * per))[..., : once.shape[3]]
        x = roomy.copy_(once).expand(x.shape)
        found = _layout(x.shape, x.stride(), shape, size, x.data_ptr() % 16 == 0)
    return View(x, *found)


def plane_output(x: Tensor, shape: tuple[int, ...]) -> View:
    """An output, with its own strides; always compiled as unaligned."""
    return View(x, *_layout(x.shape, x.stride(), shape, x.element_size(), False))


def scalar(x: float | Tensor) -> Scalar:
    """A float, or a tensor (), (H,) or (B, H)."""
    if not isinstance(x, Tensor):
        return Scalar(float(x), (encode_int(0), encode_int(0)), _booleans[False])
    return Scalar(x, tuple(encode_int(s) for s in (0, 0, *strides_of(x.shape, x.stride()))[-2:]), _booleans[True])


def vector(x: Tensor | None) -> Vector | None:
    """int32 (B or 1, length)."""
    if x is None:
        return None
    x = x.contiguous()
    return Vector(x, encode_int(0 if x.shape[0] == 1 else x.shape[1]))


def _bound(x: int | None) -> int | None:
    return None if x is None else encode_int(max(-FAR, min(FAR, x)))


# Intervals without a left bound, by their right one.
_spans = {right: launch_cache.keep(Span(right=_bound(right))) for right in (None, 0)}


def span(s: Interval) -> Span:
    """Rows over keys."""
    if s.right in _spans and s.left is None and s.lo is None and s.hi is None and not s.sinks:
        return _spans[s.right]
    return Span(_bound(s.left), _bound(s.right), vector(s.lo), vector(s.hi), _bound(s.sinks or None))


def transposed_span(s: Interval, n: int) -> Span:
    """Keys over rows: j sees j - right <= i <= j - left, and the rows between its start and its stop."""
    start, stop = s.columns(n)
    left, right = (None if x is None else _bound(-x) for x in (s.right, s.left))
    return Span(left, right, vector(start), vector(stop))


@functools.lru_cache(64)
def _unmodified(scale: float, sigmoid: bool, folds: bool) -> Score:
    absent = (None,) * 7
    return launch_cache.keep(Score(scalar(scale), *absent, _booleans[sigmoid], _booleans[folds]))


def score(p: Problem, additive: Additive | None) -> Score:
    """additive: see `additive.operands` of this package."""
    modified = not (p.softcap is p.bias is p.slopes is p.row_terms is None)
    folds = not (modified or p.sigmoid) and isinstance(p.scale, float) and 0 < p.scale < math.inf
    if not modified and p.key_terms is None and additive is None and isinstance(p.scale, float):
        return _unmodified(p.scale, p.sigmoid, folds)
    return Score(
        scalar(p.scale),
        None if p.softcap is None else scalar(p.softcap),
        plane_view(p.bias, p.shape),
        None if p.slopes is None else scalar(p.slopes),
        None if p.slopes is None else encode_int(p.offset),
        None if p.row_terms is None else p.row_terms.contiguous(),
        None if p.key_terms is None else p.key_terms.contiguous(),
        additive,
        _booleans[p.sigmoid],
        _booleans[folds],
    )


def dropout(p: Problem) -> Dropout | None:
    if p.dropout is None:
        return None
    return Dropout(p.dropout.rng.contiguous(), p.dropout.threshold - 2**31, p.dropout.rescale)
