"""Who may attend to whom: intervals of keys, and a bool tensor for the rest.

Row i counts queries, column j keys. `materialize()` is the executable meaning of a noun.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import check_batch, check_broadcastable, check_integers, check_window, describe

ALIGNMENTS = ("top_left", "bottom_right")


def diagonal_offset(alignment: str | None, m: int, n: int, what: str) -> int:
    """The offset of the diagonal j = i + offset: 0 for "top_left", N - M for "bottom_right"."""
    if alignment is None:
        if m != n:
            raise ValueError(f'alignment: {what} with M = {m} and N = {n} needs "top_left" or "bottom_right", got None')
        return 0
    if alignment not in ALIGNMENTS:
        raise ValueError(f"alignment: expected one of {ALIGNMENTS}, got {alignment!r}")
    return 0 if alignment == "top_left" else n - m


def _tighter(a: Any, b: Any, pick: Callable) -> Any:
    """Intersection of two bounds of which None is no bound."""
    if a is None or b is None:
        return b if a is None else a
    return pick(a, b)


@dataclass(frozen=True)
class Span:
    """An interval of keys per row: row i may see j where

        i + left <= j <= i + right   and   lo[b, i] <= j < hi[b, i].

    None is no bound. lo and hi are int32 (B or 1, M), and neither decreases with i; that is what lets a tile of keys
    find its rows. A row whose bounds cross sees nothing.
    """

    left: int | None = None
    right: int | None = None
    lo: Tensor | None = None
    hi: Tensor | None = None

    def __and__(self, other: Span) -> Span:
        return Span(
            _tighter(self.left, other.left, max),
            _tighter(self.right, other.right, min),
            _tighter(self.lo, other.lo, torch.maximum),
            _tighter(self.hi, other.hi, torch.minimum),
        )

    @property
    def unbounded(self) -> bool:
        return self.left is None and self.right is None and self.lo is None and self.hi is None

    def bounds(self, rows: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """lo, hi (B or 1, len(rows)) int64: row i may see lo <= j < hi, with every bound of this span joined."""
        lo, hi = torch.zeros_like(rows)[None], torch.full_like(rows, n)[None]
        if self.left is not None:
            lo = torch.maximum(lo, rows + self.left)
        if self.right is not None:
            hi = torch.minimum(hi, rows + self.right + 1)
        if self.lo is not None:
            lo = torch.maximum(lo, self.lo[:, rows])
        if self.hi is not None:
            hi = torch.minimum(hi, self.hi[:, rows])
        return lo, hi

    def materialize(self, rows: Tensor, cols: Tensor, n: int) -> Tensor:
        """bool (B or 1, 1, rows, cols), True where row may see column."""
        lo, hi = self.bounds(rows, n)
        return ((cols >= lo[..., None]) & (cols < hi[..., None]))[:, None]

    def columns(self, n: int) -> tuple[Tensor | None, Tensor | None]:
        """The transpose of lo and hi: int32 (B or 1, N), key j is seen by rows start <= i < stop as far as they say."""
        keys = None
        start = stop = None
        if self.hi is not None:
            keys = torch.arange(n, device=self.hi.device, dtype=torch.int32).expand(self.hi.shape[0], n).contiguous()
            start = torch.searchsorted(self.hi.contiguous(), keys, right=True, out_int32=True)
        if self.lo is not None:
            keys = torch.arange(n, device=self.lo.device, dtype=torch.int32).expand(self.lo.shape[0], n).contiguous()
            stop = torch.searchsorted(self.lo.contiguous(), keys, right=True, out_int32=True)
        return start, stop


UNBOUNDED = Span()


@dataclass(frozen=True, eq=False)
class Mask:
    """Who may attend to whom: an interval of keys per row, wherever it can be said so, and a bool tensor for the rest.

    Build one with `Mask.causal`, `Mask.window`, `Mask.prefix`, `Mask.segments`, `Mask.lengths` or `Mask.tensor`, and
    intersect them with `&`. The intervals cost no memory and let kernels skip what nobody may see.

    >>> import torch, fused_attn
    >>> x = torch.randn(1, 2, 16, 8)
    >>> near = fused_attn.Mask.causal() & fused_attn.Mask.window(4, 0)
    >>> fused_attn.attention(x, x, x, mask=near).shape
    torch.Size([1, 2, 16, 8])
    """

    parts: tuple[Callable[[int, int, int], Span], ...] = ()
    remainder: tuple[Tensor, ...] = ()

    @staticmethod
    def causal(alignment: str | None = None) -> Mask:
        """Row i sees keys j <= i + offset; alignment "top_left" puts offset at 0, "bottom_right" at N - M."""
        return Mask.window(None, 0, alignment)

    @staticmethod
    def window(left: int | None, right: int | None, alignment: str | None = None) -> Mask:
        """Row i sees `left` keys before its diagonal and `right` after it; None is unbounded."""
        left, right = check_window((left, right))

        def part(b: int, m: int, n: int) -> Span:
            if left is None and right is None:
                return Span()
            offset = diagonal_offset(alignment, m, n, "a causal mask or window")
            return Span(None if left is None else offset - left, None if right is None else offset + right)

        return Mask((part,))

    @staticmethod
    def prefix(lengths: Tensor, alignment: str | None = None) -> Mask:
        """Every row of batch b sees the first lengths[b] keys, and the rest causally. lengths: int (B,)."""
        check_integers("lengths", lengths, 1)

        def part(b: int, m: int, n: int) -> Span:
            check_batch("lengths", lengths, b)
            offset = diagonal_offset(alignment, m, n, "a prefix mask")
            rows = torch.arange(m, device=lengths.device)
            hi = torch.maximum(lengths[:, None].long(), rows + offset + 1).clamp(0, n)
            return Span(hi=hi.int())

        return Mask((part,))

    @staticmethod
    def lengths(kv: Tensor, q: Tensor | None = None) -> Mask:
        """Batch b has kv[b] keys and, when q is given, q[b] queries; what lies beyond is padding. int (B,)."""
        check_integers("kv", kv, 1)
        if q is not None:
            check_integers("q", q, 1)

        def part(b: int, m: int, n: int) -> Span:
            check_batch("kv", kv, b)
            hi = kv[:, None].clamp(0, n).expand(-1, m)
            if q is None:
                return Span(hi=hi.int().contiguous())
            check_batch("q", q, b)
            tail = torch.arange(m, device=kv.device) >= q[:, None]
            # A padded row is empty at the far end, so that neither bound decreases.
            return Span(lo=(tail * n).int(), hi=torch.where(tail, n, hi).int())

        return Mask((part,))

    @staticmethod
    def segments(q_ids: Tensor, kv_ids: Tensor | None = None) -> Mask:
        """A row sees the keys of its own segment. Ids: int (M,) or (B, M) and (N,) or (B, N), non-decreasing."""
        kv_ids = q_ids if kv_ids is None else kv_ids
        ids = {"q_ids": q_ids, "kv_ids": kv_ids}
        for name, value in ids.items():
            check_integers(name, value, 1, 2)
            if value.shape[-1] > 1 and bool((value[..., 1:] < value[..., :-1]).any()):
                raise ValueError(f"{name}: segment ids must not decrease along a row")

        def part(b: int, m: int, n: int) -> Span:
            for (name, value), length in zip(ids.items(), (m, n), strict=True):
                if value.shape[-1] != length or (value.ndim == 2 and value.shape[0] not in (1, b)):
                    raise ValueError(f"{name}: expected shape ({length},) or ({b}, {length}), got {tuple(value.shape)}")
            batch = max(x.shape[0] if x.ndim == 2 else 1 for x in ids.values())
            wanted = q_ids.expand(batch, m).contiguous()
            sorted_keys = kv_ids.expand(batch, n).to(wanted.dtype).contiguous()
            lo = torch.searchsorted(sorted_keys, wanted, out_int32=True)
            hi = torch.searchsorted(sorted_keys, wanted, right=True, out_int32=True)
            return Span(lo=lo, hi=hi)

        return Mask((part,))

    @staticmethod
    def tensor(allowed: Tensor) -> Mask:
        """A bool tensor broadcastable to (B, Hq, M, N), True where a row may attend."""
        if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
            raise TypeError(f"mask: expected a bool tensor, got {describe(allowed)}")
        return Mask(remainder=(allowed,))

    def __and__(self, other: Mask | Tensor) -> Mask:
        other = other if isinstance(other, Mask) else Mask.tensor(other)
        return Mask(self.parts + other.parts, self.remainder + other.remainder)

    __rand__ = __and__

    def resolve(self, shape: tuple[int, int, int, int]) -> tuple[Span, Tensor | None]:
        """The span and the bool remainder, (B, Hq, M, N)-broadcastable, of this mask on a problem of that shape."""
        b, _, m, n = shape
        span = Span()
        for part in self.parts:
            span = span & part(b, m, n)
        allowed = None
        for tensor in self.remainder:
            tensor = check_broadcastable("mask", tensor, shape)
            allowed = tensor if allowed is None else allowed & tensor
        return span, allowed

    def materialize(self, shape: tuple[int, int, int, int], device: Any = None) -> Tensor:
        """bool (B, Hq, M, N), True where the row may attend."""
        span, allowed = self.resolve(shape)
        grid = span.materialize(torch.arange(shape[2], device=device), torch.arange(shape[3], device=device), shape[3])
        return (grid if allowed is None else grid & allowed).expand(shape)
