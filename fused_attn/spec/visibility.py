"""The keys that some query may attend to; the others have no influence, even as NaN."""

from __future__ import annotations

import torch
from torch import Tensor

from .masks import padded_span
from .problem import Problem, Span
from .ragged import Ragged, locate


def has_tensor_bounds(p: Problem) -> bool:
    """True if tensors other than the mask bound visibility: lo, hi or the pattern."""
    return p.span.lo is not None or p.span.hi is not None or p.pattern is not None


def tensor_visibility(p: Problem) -> tuple[Tensor, Tensor] | None:
    """`visibility` if tensors bound it, else None: tiles apply scalar bounds by themselves."""
    return visibility(p) if has_tensor_bounds(p) else None


def visibility(p: Problem) -> tuple[Tensor, Tensor]:
    """bool (B or 1, 1, M, 1) and (B or 1, 1, N, 1): the rows with a key in their span, and `Problem.visible_keys`.

    Padding may hold NaN, which a product with a zero weight would propagate. Packed, for ragged sequences.
    """
    if p.ragged is None:
        rows, keys = _visibility(p, p.span)
    elif has_tensor_bounds(p):
        padded = _visibility(p, padded_span(p.span, p.ragged))
        rows, keys = (
            x.expand(p.ragged.batch, -1)[locate(starts, like.shape[2])][None]
            for x, starts, like in zip(padded, (p.ragged.q, p.ragged.k), (p.q, p.k), strict=True)
        )
    else:
        rows, keys = _scalar_visibility(p, p.ragged)
    return rows[:, None, :, None], keys[:, None, :, None]


def _visibility(p: Problem, span: Span) -> tuple[Tensor, Tensor]:
    (m, n), device = p.shape[2:], p.q.device
    lo, hi = span.bounds(torch.arange(m, device=device), n)
    start, stop = span.row_bounds(m, torch.arange(n, device=device))
    return lo < hi, start < stop if p.pattern is None or p.empty else p.pattern.visible_keys(start, stop)


def _scalar_visibility(p: Problem, ragged: Ragged) -> tuple[Tensor, Tensor]:
    """Computed per packed row and key: without tensor bounds the longest lengths need not be known."""
    (bq, i), (bk, j) = locate(ragged.q, p.q.shape[2]), locate(ragged.k, p.k.shape[2])
    offsets = ragged.offsets()
    of_rows, of_keys = (offsets, offsets) if isinstance(offsets, int) else (offsets[bq, 0], offsets[bk, 0])
    lo, hi = p.span.shifted(of_rows).bounds(i, p.shape[3])
    start, stop = p.span.shifted(of_keys).row_bounds(p.shape[2], j)
    return lo < torch.minimum(hi, ragged.k.diff()[bq]), start < torch.minimum(stop, ragged.q.diff()[bk])
