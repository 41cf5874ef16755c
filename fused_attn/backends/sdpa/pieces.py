"""An attention problem as a few dense ones: which rows see one interval of keys, so that nothing else is computed.

Only for the CPU, where lengths, sequence starts and masks can be read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...spec.checks import readable
from ...spec.problem import Problem, Shape, Span

FEW, SMALL = 16, 4096  # more pieces than FEW, of less than SMALL scores each, cost more than tiles
VECTOR = 16  # keys in a vector register of float32
PADDED = 2**20  # scores of a problem from which its mask is searched for padding
FULL = 0.9  # share of keys in sight above which leaving out the others gains less than it costs


ALL = slice(None)


class Piece(NamedTuple):
    """One call of the kernel: rows of some sequences that see exactly these keys, or those up to their diagonal.

    read: keys and some behind them, hidden by a mask: the kernel is slow where the last vector of keys is not full.
    """

    batch: slice
    rows: slice
    keys: slice
    read: slice
    causal: bool

    @property
    def tail(self) -> int:
        """How many keys are read that nothing but a mask hides."""
        if self.causal and self.rows.stop - self.rows.start <= self.keys.stop - self.keys.start:
            return 0
        return self.read.stop - self.keys.stop

    def rows_of(self, batch: int) -> int:
        """How many rows of so many sequences are in it."""
        length = self.rows.stop - self.rows.start
        return length * (batch if self.batch is ALL else self.batch.stop - self.batch.start)


Run = tuple[slice, tuple[int, int], tuple[int, int]]  # batch, rows and keys: rows that have the same bounds


def pieces_of_problem(p: Problem) -> list[Piece] | None:
    """The calls that compute p, disjoint in rows and in keys; rows of none of them see nothing. None: there are no
    such. Reads lengths and sequence starts, once for each problem."""
    held = p.__dict__  # of a frozen dataclass, as functools.cached_property uses it
    if "_pieces" not in held:
        held["_pieces"] = _pieces(p)
    return held["_pieces"]


def _pieces(p: Problem) -> list[Piece] | None:
    if p.ragged is not None:
        found: list[Piece] = []
        for one, alone in p.sequences():
            own = pieces_of_problem(alone)
            if own is None:
                return None
            for x in own:
                # Exactly its keys: then its bits are those of a call of its own, whatever it is packed with.
                own_keys = _within(x.keys, one.keys)
                found.append(Piece(ALL, _within(x.rows, one.rows), own_keys, own_keys, x.causal))
        return found
    if p.empty:
        return []
    _, _, m, n = p.shape
    if p.span.lo is None and p.span.hi is None:
        return _pieces_of_run(p.span, n, ALL, (0, m), (0, n))
    return _pieces_of_runs(p.span, p.shape, _runs(p))


def pieces_of_lengths(span: Span, shape: Shape, lengths: list[int]) -> list[Piece] | None:
    """The same for a batch whose sequences see so many of their first keys, as far as the numbers of the span allow."""
    own = zip(_batches(len(lengths)), lengths, strict=True)
    return _pieces_of_runs(span, shape, [(batch, (0, shape[2]), (0, n)) for batch, n in own])


def _pieces_of_runs(span: Span, shape: Shape, runs: list[Run]) -> list[Piece] | None:
    found: list[Piece] = []
    scores, last = 0, dict[int | None, int]()
    for batch, rows, keys in runs:
        own = _pieces_of_run(span, shape[3], batch, rows, keys)
        if own is None or (own and own[0].keys.start < last.get(batch.start, 0)):
            return None
        for piece in own:
            last[batch.start] = piece.keys.stop
            scores += (piece.rows.stop - piece.rows.start) * (piece.keys.stop - piece.keys.start)
        found += own
    return found if len(found) <= FEW or scores * shape[1] >= SMALL * len(found) else None


def _within(part: slice, whole: slice) -> slice:
    return slice(whole.start + part.start, whole.start + part.stop)


def _runs(p: Problem) -> list[Run]:
    """Rows one after another that have the same lo and hi: (batch, rows, keys) each."""
    span, (_, _, m, n) = p.span, p.shape
    batch = max(len(x) for x in (span.lo, span.hi) if x is not None)
    whole = _batches(batch)
    ends = [_ends(x, default, batch) for x, default in ((span.lo, 0), (span.hi, n))]
    if all(x[0] == x[-1] for bound in ends for x in bound):  # they never decrease: all rows have the same
        return [(own, (0, m), (max(lo[0], 0), min(hi[0], n))) for own, lo, hi in zip(whole, *ends, strict=True)]
    lo, hi = (
        p.q.new_full((batch, m), value, dtype=torch.int32) if x is None else x.expand(batch, m)
        for x, value in ((span.lo, 0), (span.hi, n))
    )
    starts = torch.ones_like(lo, dtype=torch.bool)
    starts[:, 1:] = (lo[:, 1:] != lo[:, :-1]) | (hi[:, 1:] != hi[:, :-1])
    where = starts.nonzero()
    begins = where.tolist()
    b, i = where.unbind(1)
    bounds = torch.stack((lo[b, i], hi[b, i]), 1).tolist()
    stops = [begin for _, begin in begins[1:]] + [0]
    return [
        (whole[number], (begin, stop or m), (max(first, 0), min(last, n)))
        for (number, begin), stop, (first, last) in zip(begins, stops, bounds, strict=True)
    ]


def _ends(bound: Tensor | None, default: int, batch: int) -> list[list[int]]:
    """The first and the last row's bound of each sequence."""
    if bound is None:
        return [[default, default]] * batch
    found = bound[:, :: max(1, bound.shape[1] - 1)].tolist()
    return found * batch if len(found) == 1 else found


def run(span: Span, rows: tuple[int, int], keys: tuple[int, int]) -> tuple[int, bool] | None:
    """Of rows that see these keys as far as the numbers of the span allow: the first one that sees any, and whether
    they see a triangle and not all. None: it is neither."""
    (top, bottom), (first, last) = rows, keys
    if span.right is not None and span.right + top < first:
        top = min(bottom, first - span.right)
    if span.left is not None and (span.sinks or bottom - 1 + span.left > first):
        return None
    if span.right is None:
        return top, False
    ahead = top + span.right - first  # keys that the first row sees beside its first
    if ahead >= last - first - 1:
        return top, False
    return (top, True) if ahead == 0 else None


def _pieces_of_run(
    span: Span, total: int, batch: slice, rows: tuple[int, int], keys: tuple[int, int]
) -> list[Piece] | None:
    """The piece of such rows, or none where they see nothing; None: it is not one. total: of keys."""
    (top, bottom), (first, last) = rows, keys
    if bottom <= top or last <= first:
        return []
    found = run(span, rows, keys)
    if found is None:
        return None
    top, causal = found
    last = min(last, first + bottom - top) if causal else last  # no row sees what lies behind the last diagonal
    return [_piece(batch, slice(top, bottom), slice(first, last), causal, total)] if top < bottom else []


def _piece(batch: slice, rows: slice, keys: slice, causal: bool, total: int) -> Piece:
    read = keys
    if keys.stop != total:
        end = keys.stop + (keys.start - keys.stop) % VECTOR
        read = slice(keys.start, end) if end <= total else keys
    return Piece(batch, rows, keys, read, causal)


def searched(p: Problem) -> bool:
    """Whether to look in the mask for padding, keys at either end that no row of a sequence sees."""
    mask, (b, heads, m, n) = p.mask, p.shape
    if mask is None or mask.shape[1] > 1 or mask.shape[3] != n or p.ragged is not None:
        return False
    return p.span.lo is None and p.span.hi is None and b * heads * m * n >= PADDED and readable(mask)


def looks_padded(mask: Tensor) -> bool:
    """Whether the mask, without heads, may be padding that is worth leaving out: read at its first and last rows."""
    first = mask[:, :, 0]
    if mask.shape[2] > 1 and not torch.equal(first, mask[:, :, -1]):
        return False
    return first.sum().item() <= FULL * first.numel()


def seen_by_all(mask: Tensor) -> Tensor | None:
    """bool (B or 1, N): the keys that every row of a sequence sees, of a mask without heads that is worth looking at.
    None: it is not, or its rows differ."""
    if looks_padded(mask) and (mask.shape[2] == 1 or torch.equal(mask[:, :, :1].expand_as(mask), mask)):
        return mask[:, 0, 0]
    return None


def pieces_of_seen(span: Span, shape: Shape, seen: Tensor) -> list[Piece] | None:
    """The pieces of a problem whose sequences see these keys alone, as far as the numbers of the span allow; None:
    they are no interval, or there are no such pieces."""
    (_, _, m, n), bits = shape, seen.byte()
    count = bits.sum(1).tolist()
    first, last = bits.argmax(1).tolist(), [n - x for x in bits.flip(1).argmax(1).tolist()]
    if any(c and c != z - a for c, a, z in zip(count, first, last, strict=True)):
        return None
    found: list[Piece] = []
    for batch, begin, keys in zip(_batches(len(count)), first, count, strict=True):
        own = _pieces_of_run(span, n, batch, (0, m), (begin, begin + keys))
        if own is None:
            return None
        found += own
    return found


def _batches(count: int) -> list[slice]:
    """Each of so many sequences; one stands for all."""
    return [ALL] if count == 1 else [slice(x, x + 1) for x in range(count)]
