"""The conditions of a mask: a row may attend to a key if all of them hold.

A condition is data. `resolve` converts it, for a problem of a given shape, to a Span (an interval of keys per row), a
Pattern (equal ids, allowed blocks) or a bool tensor. It reads the condition's tensors at each call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .checks import check_batch, check_broadcastable, check_lengths, one_of, readable
from .description import Description
from .patterns import Pattern, as_ids
from .ragged import Ragged
from .spans import Shape, Span, diagonal_offset


class Condition(Description):
    """One condition of a Mask."""

    def resolve(self, shape: Shape, ragged: Ragged | None) -> Span | Pattern | Tensor:
        """The condition for a problem (B, Hq, M, N); for ragged sequences, M and N are the longest lengths."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False, repr=False)
class Window(Condition):
    """Row i attends to `left` keys before its diagonal, `right` keys after it, and the first `sinks` keys."""

    prefix: ClassVar[str] = "Mask.window"
    left: int | None
    right: int | None
    alignment: str | None = None
    sinks: int = 0

    def resolve(self, shape: Shape, ragged: Ragged | None) -> Span:
        offset = diagonal_offset(self.alignment, *shape[2:], self, ragged)
        above = None if self.right is None else offset + self.right
        return Span(right=above) if self.left is None else Span(offset - self.left, above, sinks=self.sinks)

    def __repr__(self) -> str:
        if self.left is None and self.right == 0:
            return f"Mask.causal({'' if self.alignment is None else repr(self.alignment)})"
        return super().__repr__()


@dataclass(frozen=True, eq=False, repr=False)
class Prefix(Condition):
    """Every row of batch b attends to the first lengths[b] keys, and causally to the others."""

    prefix: ClassVar[str] = "Mask.prefix"
    lengths: Tensor
    alignment: str | None = None

    def resolve(self, shape: Shape, ragged: Ragged | None) -> Span:
        b, _, m, n = shape
        check_batch("Mask.prefix(lengths)", self.lengths, b)
        lengths = check_lengths("Mask.prefix(lengths)", self.lengths, n, "N")
        offset: Any = diagonal_offset(self.alignment, m, n, self, ragged)
        offset = offset if ragged is None else ragged.offsets()
        rows = torch.arange(m, device=lengths.device)
        hi = torch.maximum(lengths[:, None], rows + offset + 1).clamp(0, n)
        return Span(hi=hi.int())


@dataclass(frozen=True, eq=False, repr=False)
class Lengths(Condition):
    """Batch b has kv[b] keys and, when q is given, q[b] queries."""

    prefix: ClassVar[str] = "Mask.lengths"
    kv: Tensor
    q: Tensor | None = None

    def resolve(self, shape: Shape, ragged: Ragged | None) -> Span:
        b, _, m, n = shape
        check_batch("Mask.lengths(kv)", self.kv, b)
        hi = check_lengths("Mask.lengths(kv)", self.kv, n, "N")[:, None].expand(-1, m)
        if self.q is None:
            return Span(hi=hi.int().contiguous())
        check_batch("Mask.lengths(q)", self.q, b)
        tail = torch.arange(m, device=hi.device) >= check_lengths("Mask.lengths(q)", self.q, m, "M")[:, None]
        # The empty interval of a padded row is at N, so that neither bound decreases.
        return Span(lo=(tail * n).int(), hi=torch.where(tail, n, hi).int())


@dataclass(frozen=True, eq=False, repr=False)
class Segments(Condition):
    """A row attends to the keys with its own id."""

    prefix: ClassVar[str] = "Mask.segments"
    q_ids: Tensor
    kv_ids: Tensor | None = None
    sorted: bool | None = None

    def resolve(self, shape: Shape, ragged: Ragged | None) -> Span | Pattern:
        b, _, m, n = shape
        keys = self.q_ids if self.kv_ids is None else self.kv_ids
        for name, ids, length in (("Mask.segments(q_ids)", self.q_ids, m), ("Mask.segments(kv_ids)", keys, n)):
            if ids.shape[-1] != length or (ids.ndim == 2 and not one_of(ids.shape[0], (1, b))):
                raise ValueError(f"{name}: expected shape ({length},) or ({b}, {length}), got {tuple(ids.shape)}")
        if not self._in_order():
            return Pattern(*as_ids(*(x if x.ndim == 2 else x[None] for x in (self.q_ids, keys))))
        q, k = (_ordered(x if x.ndim == 2 else x[None]) for x in (self.q_ids, keys))
        batch = max(q.shape[0], k.shape[0])
        q, k = (x.expand(batch, -1).contiguous() for x in (q, k))
        lo = torch.searchsorted(k, q, out_int32=True)
        hi = torch.searchsorted(k, q, right=True, out_int32=True)
        return Span(lo=lo, hi=hi)

    def _in_order(self) -> bool:
        """True if the ids are treated as sorted. They are checked if `readable`; otherwise only `sorted=True` counts,
        because a pattern is correct for all ids."""
        if self.sorted is False:
            return False
        for name, ids in (("Mask.segments(q_ids)", self.q_ids), ("Mask.segments(kv_ids)", self.kv_ids)):
            if ids is None:
                continue
            if not readable(ids):
                return bool(self.sorted)
            if _decrease(ids):
                if self.sorted:
                    raise ValueError(f"{name}: sorted=True promises ids that never decrease, got some that do")
                return False
        return True


@dataclass(frozen=True, eq=False, repr=False)
class Blocks(Condition):
    """Blocks of block[0] rows by block[1] keys are visible where allowed is True."""

    prefix: ClassVar[str] = "Mask.blocks"
    allowed: Tensor
    block: tuple[int, int]

    def resolve(self, shape: Shape, ragged: Ragged | None) -> Pattern:
        (b, h, m, n), (height, width) = shape, self.block
        grid = f"(B, Hq, ceil(M / {height}), ceil(N / {width}))"
        shape = b, h, -(-m // height), -(-n // width)
        blocks = check_broadcastable("Mask.blocks(allowed)", self.allowed, shape, grid)
        rows, cols = blocks.shape[2:]
        # A single row or column of blocks covers all rows or keys.
        high, wide = max(m, 1) if rows == 1 else height, max(n, 1) if cols == 1 else width
        return Pattern(blocks=blocks, height=high, width=wide)


@dataclass(frozen=True, eq=False, repr=False)
class Allowed(Condition):
    """A row attends to a key where a bool tensor, broadcastable to (B, Hq, M, N), is True."""

    prefix: ClassVar[str] = "Mask.tensor"
    allowed: Tensor

    def resolve(self, shape: Shape, ragged: Ragged | None) -> Tensor:
        return check_broadcastable("mask", self.allowed, shape)


def _decrease(ids: Tensor) -> bool:
    """True if ids decrease anywhere along a row."""
    ids = _ordered(ids)
    return bool((ids[..., 1:] < ids[..., :-1]).any())


def _ordered(ids: Tensor) -> Tensor:
    """int64 in the same order as the ids: of the unsigned types, torch compares and searches only uint8."""
    return ids.long() ^ -(2**63) if ids.dtype == torch.uint64 else ids.long()
