"""Intervals of keys per row, and the offset of the diagonal they are relative to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .checks import check_choice
from .ragged import Ragged

ALIGNMENTS = ("top_left", "bottom_right")

Shape = tuple[int, int, int, int]  # (B, Hq, M, N)


def diagonal_offset(alignment: str | None, m: int, n: int, what: Any, ragged: Ragged | None = None) -> int:
    """The offset of the diagonal j = i + offset: 0 for "top_left", N - M for "bottom_right".

    Ragged sequences share one alignment; for them it is 0, relative to each sequence's own diagonal. what: the keyword
    or the part of a `Mask` that needs it, for the error message.
    """
    if ragged is not None:
        own = ragged.alignment
        if own is None and not ragged.square:
            raise ValueError(
                f'alignment: {what} needs "top_left" or "bottom_right", got None; without, queries and keys must share '
                "one tensor of starts"
            )
        if not ragged.square and alignment not in (None, own):
            raise ValueError(f"alignment: expected that of all sequences, {own!r}, for {what}, got {alignment!r}")
        return 0
    if alignment is None:
        if m != n:
            own = "" if isinstance(what, str) else "one of its own, "
            needs = f'{what} with M = {m} and N = {n} needs {own}"top_left" or "bottom_right", got None'
            grouped = f'; if {m} and {n} count heads, pass layout="bshd"' if m > n > 0 == m % n else ""
            raise ValueError(f"alignment: {needs}{grouped}")
        return 0
    check_choice("alignment", alignment, ALIGNMENTS)
    return 0 if alignment == "top_left" else n - m


def _tighter(a: Any, b: Any, pick: Callable) -> Any:
    """The intersection of two bounds, where None is no bound."""
    if a is None or b is None:
        return b if a is None else a
    return pick(a, b)


@dataclass(frozen=True)
class Span:
    """An interval of keys per row, plus the sinks: row i may attend to key j where

        (i + left <= j  or  j < sinks)   and   j <= i + right   and   lo[b, i] <= j < hi[b, i].

    None is no bound. lo and hi are int32 (B or 1, M), and neither decreases with i, so the rows of a tile of keys are
    an interval too. A row whose bounds cross is fully masked.
    """

    left: int | None = None
    right: int | None = None
    lo: Tensor | None = None
    hi: Tensor | None = None
    sinks: int = 0

    def __and__(self, other: Span) -> Span:
        """The intersection; `excess` is the part of it that one span cannot hold."""
        narrow, wide = self._windows(other)
        sinks = narrow.sinks if wide.left is None or narrow.left != wide.left else min(narrow.sinks, wide.sinks)
        return Span(
            narrow.left,
            _tighter(self.right, other.right, min),
            _tighter(self.lo, other.lo, torch.maximum),
            _tighter(self.hi, other.hi, torch.minimum),
            sinks,
        )

    def excess(self, other: Span) -> Span | None:
        """A condition in addition to `self & other`: the wider window, if the narrower one has more sinks."""
        narrow, wide = self._windows(other)
        included = wide.left is None or narrow.left == wide.left or narrow.sinks <= wide.sinks
        return None if included else Span(left=wide.left, sinks=wide.sinks)

    def _windows(self, other: Span) -> tuple[Span, Span]:
        """Both spans, the one with the narrower left bound first."""
        if self.left is None or (other.left is not None and other.left > self.left):
            return other, self
        return self, other

    @property
    def unbounded(self) -> bool:
        return self.left is None and self.right is None and self.lo is None and self.hi is None

    def bounds(self, rows: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """lo, hi (B or 1, len(rows)) int64: every visible key lies in lo <= j < hi; without sinks, all of these are."""
        lo, hi = torch.zeros_like(rows)[None], torch.full_like(rows, n)[None]
        if self.right is not None:
            hi = torch.minimum(hi, rows + self.right + 1)
        if self.lo is not None:
            lo = torch.maximum(lo, self.lo[:, rows])
        if self.hi is not None:
            hi = torch.minimum(hi, self.hi[:, rows])
        if self.left is not None:
            near = torch.maximum(lo, rows + self.left)
            lo = torch.where(lo < self.sinks, lo, near) if self.sinks else near
        return lo, hi

    def materialize(self, rows: Tensor, cols: Tensor, n: int) -> Tensor:
        """bool (B or 1, 1, rows, cols), True where the row may attend to the column."""
        lo, hi = self.bounds(rows, n)
        grid = (cols >= lo[..., None]) & (cols < hi[..., None])
        if self.sinks and self.left is not None:
            grid = grid & ((cols < self.sinks) | (cols >= (rows + self.left)[..., None]))
        return grid[:, None]

    def shifted(self, by: Any) -> Span:
        """A copy with the diagonal moved right by a number, or by int64 (B, 1) for each batch. With a tensor, only
        `bounds`, `materialize` and `row_bounds` work."""
        left, right = (None if x is None else x + by for x in (self.left, self.right))
        return replace(self, left=left, right=right)

    def columns(self, n: int) -> tuple[Tensor | None, Tensor | None]:
        """The transpose of lo and hi: start, stop int32 (B or 1, N); they allow key j to the rows start <= i < stop."""
        start = None if self.hi is None else _rows_up_to(self.hi, n)
        stop = None if self.lo is None else _rows_up_to(self.lo, n)
        return start, stop

    def row_bounds(self, m: int, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The transpose of this span: start, stop (B or 1, N) int64; key j is visible to the rows start <= i < stop.

        keys: all key indices, ascending. The rows of a sink are an interval too.
        """
        start, stop = torch.zeros_like(keys)[None], torch.full_like(keys, m)[None]
        if self.right is not None:
            start = torch.maximum(start, keys - self.right)
        if self.left is not None:
            stop = torch.minimum(stop, torch.where(keys < self.sinks, m, keys - self.left + 1))
        first, last = self.columns(len(keys))
        return _tighter(start, first, torch.maximum), _tighter(stop, last, torch.minimum)


def _rows_up_to(bounds: Tensor, n: int) -> Tensor:
    """int32 (B or 1, N): for each key j, the number of ascending bounds (B or 1, M) that are at most j.

    The keys are computed from the bounds: vmap would expand an unbatched tensor, and searchsorted needs contiguous
    ones.
    """
    keys = bounds.new_zeros(bounds.shape[0], n) + torch.arange(n, device=bounds.device, dtype=bounds.dtype)
    return torch.searchsorted(bounds.contiguous(), keys, right=True, out_int32=True)
