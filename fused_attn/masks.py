"""Who may attend to whom: an interval of keys per row, a pattern where it is no interval, a bool tensor for the rest.

Row i counts queries, column j keys. `materialize()` is the executable meaning of a noun; what else it says of itself it
says without a whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .checks import check_batch, check_broadcastable, check_integers, check_window, describe, one_of
from .patterns import Pattern, as_ids
from .ragged import Ragged

ALIGNMENTS = ("top_left", "bottom_right")

Shape = tuple[int, int, int, int]  # (B, Hq, M, N)


def diagonal_offset(alignment: str | None, m: int, n: int, what: str, ragged: Ragged | None = None) -> int:
    """The offset of the diagonal j = i + offset: 0 for "top_left", N - M for "bottom_right".

    Of ragged sequences, which have one alignment for all that is said of them, it is 0, and counts from each one's own.
    """
    if ragged is not None:
        own = ragged.alignment
        if own is None and not ragged.square:
            raise ValueError(f'alignment: {what} needs "top_left" or "bottom_right", got None')
        if not ragged.square and alignment not in (None, own):
            raise ValueError(f"alignment: sequences have one for all, {own!r}, and {what} asks for {alignment!r}")
        return 0
    if alignment is None:
        if m != n:
            needs = f'{what} with M = {m} and N = {n} needs "top_left" or "bottom_right", got None'
            grouped = f'; if {m} and {n} count heads, pass layout="bshd"' if m > n > 0 == m % n else ""
            raise ValueError(f"alignment: {needs}{grouped}")
        return 0
    if alignment not in ALIGNMENTS:
        raise ValueError(f"alignment: expected one of {ALIGNMENTS}, got {describe(alignment)}")
    return 0 if alignment == "top_left" else n - m


def _tighter(a: Any, b: Any, pick: Callable) -> Any:
    """Intersection of two bounds of which None is no bound."""
    if a is None or b is None:
        return b if a is None else a
    return pick(a, b)


@dataclass(frozen=True)
class Span:
    """An interval of keys per row, and the first keys beside it: row i may see j where

        (i + left <= j  or  j < sinks)   and   j <= i + right   and   lo[b, i] <= j < hi[b, i].

    None is no bound. lo and hi are int32 (B or 1, M), and neither decreases with i; that is what lets a tile of keys
    find its rows. A row whose bounds cross sees nothing.
    """

    left: int | None = None
    right: int | None = None
    lo: Tensor | None = None
    hi: Tensor | None = None
    sinks: int = 0

    def __and__(self, other: Span) -> Span:
        """The intersection, or what `excess` leaves to be taken from it."""
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
        """What must hold beside `self & other`: the wider window, where the narrower one has more sinks."""
        narrow, wide = self._windows(other)
        said = wide.left is None or narrow.left == wide.left or narrow.sinks <= wide.sinks
        return None if said else Span(left=wide.left, sinks=wide.sinks)

    def _windows(self, other: Span) -> tuple[Span, Span]:
        """Both, the one that looks less far to the left first."""
        if self.left is None or (other.left is not None and other.left > self.left):
            return other, self
        return self, other

    @property
    def unbounded(self) -> bool:
        return self.left is None and self.right is None and self.lo is None and self.hi is None

    def bounds(self, rows: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """lo, hi (B or 1, len(rows)) int64: row i sees nothing outside lo <= j < hi, and without sinks all inside."""
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
        """bool (B or 1, 1, rows, cols), True where row may see column."""
        lo, hi = self.bounds(rows, n)
        grid = (cols >= lo[..., None]) & (cols < hi[..., None])
        if self.sinks and self.left is not None:
            grid = grid & ((cols < self.sinks) | (cols >= (rows + self.left)[..., None]))
        return grid[:, None]

    def shifted(self, by: Any) -> Span:
        """With its diagonal so much further right: a number, or int64 (B, 1) for one of each batch, which nothing but
        `bounds`, `materialize` and `seers` takes."""
        left, right = (None if x is None else x + by for x in (self.left, self.right))
        return replace(self, left=left, right=right)

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

    def seers(self, m: int, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The transpose of this span: start, stop (B or 1, N) int64, key j is seen by the rows start <= i < stop.

        keys is every key in order. A sink's rows are an interval too.
        """
        start, stop = torch.zeros_like(keys)[None], torch.full_like(keys, m)[None]
        if self.right is not None:
            start = torch.maximum(start, keys - self.right)
        if self.left is not None:
            stop = torch.minimum(stop, torch.where(keys < self.sinks, m, keys - self.left + 1))
        first, last = self.columns(len(keys))
        return _tighter(start, first, torch.maximum), _tighter(stop, last, torch.minimum)


@dataclass(frozen=True, eq=False)
class Mask:
    """Who may attend to whom: an interval of keys per row, wherever it can be said so, and a bool tensor for the rest.

    Build one with `Mask.causal`, `window`, `prefix`, `segments`, `lengths`, `blocks` or `tensor`, and intersect them
    with `&`. What is no tensor costs no memory for all pairs, and lets kernels skip what nobody may see: intervals
    (causal, windows, prefixes, sorted segments, lengths) by arithmetic; unsorted segments, sinks and blocks by a table
    of the tiles to visit, which is made on the device at each call.

    One intersection falls back to a bool tensor of all M x N pairs: of two windows, where the narrower one has more
    sinks. Blocks of two sizes become blocks of a size that divides both.

    A key that no row's interval holds never matters, whatever it holds, NaN included; nor does one that no row whose
    interval holds it has the id of, or shares an allowed block with in any head. What a tensor hides is computed and
    thrown away, so NaN there may come out.

    >>> import torch, fused_attn
    >>> x = torch.randn(1, 2, 16, 8)
    >>> near = fused_attn.Mask.causal() & fused_attn.Mask.window(4, 0)
    >>> fused_attn.attention(x, x, x, mask=near).shape
    torch.Size([1, 2, 16, 8])
    """

    parts: tuple[Callable[[Shape, Ragged | None], Span | Pattern], ...] = ()
    remainder: tuple[Tensor, ...] = ()

    @staticmethod
    def causal(alignment: str | None = None) -> Mask:
        """Row i sees keys j <= i + offset; alignment "top_left" puts offset at 0, "bottom_right" at N - M."""
        return Mask.window(None, 0, alignment)

    @staticmethod
    def window(left: int | None, right: int | None, alignment: str | None = None, sinks: int = 0) -> Mask:
        """Row i sees `left` keys before its diagonal and `right` after it; None is unbounded.

        sinks: how many of the first keys stay in sight however far they lie to the left. Xiao et al., "Efficient
        streaming language models with attention sinks", 2024.

        >>> from fused_attn import Mask
        >>> Mask.window(1, 0, sinks=2).materialize((1, 1, 5, 5)).long()[0, 0]
        tensor([[1, 0, 0, 0, 0],
                [1, 1, 0, 0, 0],
                [1, 1, 1, 0, 0],
                [1, 1, 1, 1, 0],
                [1, 1, 0, 1, 1]])
        """
        left, right = check_window((left, right))
        if isinstance(sinks, bool) or not isinstance(sinks, int):
            raise TypeError(f"sinks: expected an int, got {describe(sinks)}")
        if sinks < 0:
            raise ValueError(f"sinks: must be >= 0, got {sinks}")

        def part(shape: Shape, ragged: Ragged | None) -> Span:
            if left is None and right is None:
                return Span()
            offset = diagonal_offset(alignment, *shape[2:], "a causal mask or window", ragged)
            above = None if right is None else offset + right
            return Span(right=above) if left is None else Span(offset - left, above, sinks=sinks)

        return Mask((part,))

    @staticmethod
    def prefix(lengths: Tensor, alignment: str | None = None) -> Mask:
        """Every row of batch b sees the first lengths[b] keys, and the rest causally. lengths: int (B,)."""
        check_integers("lengths", lengths, 1)

        def part(shape: Shape, ragged: Ragged | None) -> Span:
            b, _, m, n = shape
            check_batch("lengths", lengths, b)
            offset: Any = diagonal_offset(alignment, m, n, "a prefix mask", ragged)
            offset = offset if ragged is None else ragged.offsets()
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

        def part(shape: Shape, ragged: Ragged | None) -> Span:
            b, _, m, n = shape
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
    def segments(q_ids: Tensor, kv_ids: Tensor | None = None, *, sorted: bool | None = None) -> Mask:
        """A row sees the keys of its own segment. Ids: int (M,) or (B, M), and (N,) or (B, N); kv_ids None: q_ids.

        Ids that never decrease along a row make intervals, which cost less; others, with any number of segments in
        any order, a pattern. sorted: None looks which they are, and waits for a GPU to say so; True promises that
        they do not decrease (where they do, the answer is wrong); False takes the pattern without looking.

        >>> import torch
        >>> from fused_attn import Mask
        >>> Mask.segments(torch.tensor([0, 1, 0, 1])).materialize((1, 1, 4, 4)).long()[0, 0]
        tensor([[1, 0, 1, 0],
                [0, 1, 0, 1],
                [1, 0, 1, 0],
                [0, 1, 0, 1]])
        """
        keys = q_ids if kv_ids is None else kv_ids
        for name, value in (("q_ids", q_ids), ("kv_ids", keys)):
            check_integers(name, value, 1, 2)
            if value.device != q_ids.device:
                raise ValueError(f"{name}: expected q_ids' device {q_ids.device}, got {value.device}")
        if sorted is not None and not isinstance(sorted, bool):
            raise TypeError(f"sorted: expected None or a bool, got {describe(sorted)}")
        if sorted is None:
            sorted = not bool(_decrease(q_ids) if kv_ids is None else _decrease(q_ids) | _decrease(keys))

        def part(shape: Shape, ragged: Ragged | None) -> Span | Pattern:
            b, _, m, n = shape
            for name, value, length in (("q_ids", q_ids, m), ("kv_ids", keys, n)):
                if value.shape[-1] != length or (value.ndim == 2 and not one_of(value.shape[0], (1, b))):
                    raise ValueError(f"{name}: expected shape ({length},) or ({b}, {length}), got {tuple(value.shape)}")
            q, k = (x if x.ndim == 2 else x[None] for x in (q_ids, keys))
            if not sorted:
                return Pattern(*as_ids(q, k))
            batch, dtype = max(q.shape[0], k.shape[0]), torch.promote_types(q.dtype, k.dtype)
            wanted, in_order = (x.to(dtype).expand(batch, -1).contiguous() for x in (q, k))
            lo = torch.searchsorted(in_order, wanted, out_int32=True)
            hi = torch.searchsorted(in_order, wanted, right=True, out_int32=True)
            return Span(lo=lo, hi=hi)

        return Mask((part,))

    @staticmethod
    def blocks(allowed: Tensor, block: int | tuple[int, int]) -> Mask:
        """Whole blocks of scores, `block` rows and keys in size (or a pair of sizes), seen where allowed is True.

        allowed: bool, broadcastable to (B, Hq, ceil(M / block[0]), ceil(N / block[1])). Tiles in which no block is
        allowed are skipped, wherever they lie; blocks that are multiples of 128 suit the kernels' tiles best.

        >>> import torch
        >>> from fused_attn import Mask
        >>> Mask.blocks(torch.tensor([[True, False], [False, True]]), 2).materialize((1, 1, 3, 4)).long()[0, 0]
        tensor([[1, 1, 0, 0],
                [1, 1, 0, 0],
                [0, 0, 1, 1]])
        """
        if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
            raise TypeError(f"allowed: expected a bool tensor, got {describe(allowed)}")
        sizes = (block, block) if isinstance(block, int) else block
        if not isinstance(sizes, (tuple, list)) or len(sizes) != 2 or not all(type(x) is int for x in sizes):
            raise TypeError(f"block: expected an int or a pair of ints, got {describe(block)}")
        if min(sizes) < 1:
            raise ValueError(f"block: must be >= 1, got {block}")
        height, width = sizes

        def part(shape: Shape, ragged: Ragged | None) -> Pattern:
            b, h, m, n = shape
            grid = f"(B, Hq, ceil(M / {height}), ceil(N / {width}))"
            blocks = check_broadcastable("allowed", allowed, (b, h, -(-m // height), -(-n // width)), grid)
            rows, cols = blocks.shape[2:]
            # One row or column of blocks is one for all.
            high, wide = max(m, 1) if rows == 1 else height, max(n, 1) if cols == 1 else width
            return Pattern(blocks=blocks, height=high, width=wide)

        return Mask((part,))

    @staticmethod
    def tensor(allowed: Tensor) -> Mask:
        """A bool tensor broadcastable to (B, Hq, M, N), True where a row may attend."""
        if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
            added = isinstance(allowed, Tensor) and allowed.is_floating_point()
            advice = "; what is added to the scores is bias=" if added else ""
            raise TypeError(f"mask: expected a bool tensor, got {describe(allowed)}{advice}")
        return Mask(remainder=(allowed,))

    def __and__(self, other: Mask | Tensor) -> Mask:
        other = other if isinstance(other, Mask) else Mask.tensor(other)
        return Mask(self.parts + other.parts, self.remainder + other.remainder)

    __rand__ = __and__

    def resolve(
        self, shape: Shape, device: Any = None, ragged: Ragged | None = None
    ) -> tuple[Span, Pattern | None, Tensor | None]:
        """The span, the pattern and the bool remainder, (B, Hq, M, N)-broadcastable, of this mask on such a problem.

        Of ragged sequences M and N are the longest ones', and the numbers of a span count from each one's diagonal.
        """
        m, n = shape[2:]
        span, pattern, rest = Span(), None, [check_broadcastable("mask", x, shape) for x in self.remainder]
        for part in self.parts:
            found = part(shape, ragged)
            if isinstance(found, Pattern):
                pattern = found if pattern is None else pattern.meet(found, m, n)
                continue
            excess = span.excess(found)
            if excess is not None:
                excess = excess if ragged is None else excess.shifted(ragged.offsets())
                rest.append(excess.materialize(*_indices(shape, device), n))
            span = span & found
        allowed = None
        for tensor in rest:
            allowed = tensor if allowed is None else allowed & tensor
        return span, pattern, allowed

    def materialize(self, shape: Shape, device: Any = None) -> Tensor:
        """bool (B, Hq, M, N), True where the row may attend."""
        span, pattern, allowed = self.resolve(shape, device)
        rows, cols = _indices(shape, device)
        grid = span.materialize(rows, cols, shape[3])
        for other in (None if pattern is None else pattern.materialize(rows, cols), allowed):
            grid = grid if other is None else grid & other
        return grid.expand(shape)


def padded_span(span: Span, ragged: Ragged) -> Span:
    """A span of ragged sequences as that of a dense batch of the longest ones, for `bounds` and `seers`."""
    lengths = Mask.lengths(ragged.k.diff(), ragged.q.diff())
    within, _, _ = lengths.resolve((ragged.batch, 1, ragged.max_q, ragged.max_k))
    return span.shifted(ragged.offsets()) & within


def _indices(shape: Shape, device: Any) -> tuple[Tensor, Tensor]:
    """Of rows and of keys."""
    return torch.arange(shape[2], device=device), torch.arange(shape[3], device=device)


def _decrease(ids: Tensor) -> Tensor:
    """bool (): somewhere along a row they do."""
    return (ids[..., 1:] < ids[..., :-1]).any()
