"""The keys that some query may attend to; the others have no influence, even as NaN."""

from __future__ import annotations

import torch
from torch import Tensor

from .masks import padded_span
from .problem import Problem, Span
from .ragged import Ragged, places


def masked_by_tensors(p: Problem) -> bool:
    """True if tensors other than the mask bound visibility: lo, hi or the pattern."""
    return p.span.lo is not None or p.span.hi is not None or p.pattern is not None


def seen(p: Problem) -> tuple[Tensor, Tensor] | None:
    """`reached` if tensors bound visibility, else None: tiles apply scalar bounds by themselves."""
    return reached(p) if masked_by_tensors(p) else None


def reached(p: Problem) -> tuple[Tensor, Tensor]:
    """bool (B or 1, 1, M, 1) and (B or 1, 1, N, 1): the rows with a key in their span, and `Problem.reached`.

    Padding may hold NaN, which a product with a zero weight would propagate. Packed, for ragged sequences.
    """
    if p.ragged is None:
        rows, keys = _reached(p, p.span)
    elif masked_by_tensors(p):
        padded = _reached(p, padded_span(p.span, p.ragged))
        rows, keys = (
            x.expand(p.ragged.batch, -1)[places(starts, like.shape[2])][None]
            for x, starts, like in zip(padded, (p.ragged.q, p.ragged.k), (p.q, p.k), strict=True)
        )
    else:
        rows, keys = _reached_by_numbers(p, p.ragged)
    return rows[:, None, :, None], keys[:, None, :, None]


def _reached(p: Problem, span: Span) -> tuple[Tensor, Tensor]:
    (m, n), device = p.shape[2:], p.q.device
    lo, hi = span.bounds(torch.arange(m, device=device), n)
    start, stop = span.seers(m, torch.arange(n, device=device))
    return lo < hi, start < stop if p.pattern is None or p.empty else p.pattern.reaches(start, stop)


def _reached_by_numbers(p: Problem, ragged: Ragged) -> tuple[Tensor, Tensor]:
    """Computed per packed row and key: without tensor bounds the longest lengths need not be known."""
    (bq, i), (bk, j) = places(ragged.q, p.q.shape[2]), places(ragged.k, p.k.shape[2])
    offsets = ragged.offsets()
    of_rows, of_keys = (offsets, offsets) if isinstance(offsets, int) else (offsets[bq, 0], offsets[bk, 0])
    lo, hi = p.span.shifted(of_rows).bounds(i, p.shape[3])
    start, stop = p.span.shifted(of_keys).seers(p.shape[2], j)
    return lo < torch.minimum(hi, ragged.k.diff()[bq]), start < torch.minimum(stop, ragged.q.diff()[bk])
