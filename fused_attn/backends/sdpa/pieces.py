"""Split a problem into pieces: rows that see the same interval of keys, full or causal, each one dense kernel call.

Only for the CPU, where reading lengths, sequence starts and masks is cheap. Functions return None for a problem that
cannot be split.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...spec.checks import readable
from ...spec.problem import Problem, Shape, Span

FEW, SMALL = 16, 4096  # more than FEW pieces with under SMALL scores each are slower than the tiled backend
VECTOR = 16  # keys per vector register of float32
PADDED = 2**20  # fewest scores of a problem for which its mask is searched for padding
FULL = 0.9  # fraction of visible keys above which skipping padding does not pay


ALL = slice(None)


class Piece(NamedTuple):
    """One call of the kernel: rows of some sequences that see exactly these keys, or those up to their diagonal.

    read: keys, rounded up to full vectors, because the kernel is slow otherwise; a mask hides the extra ones.
    """

    batch: slice
    rows: slice
    keys: slice
    read: slice
    causal: bool

    @property
    def tail(self) -> int:
        """Number of keys read beyond `keys` that need a mask, because no diagonal hides them."""
        if self.causal and self.rows.stop - self.rows.start <= self.keys.stop - self.keys.start:
            return 0
        return self.read.stop - self.keys.stop

    def rows_of(self, batch: int) -> int:
        """Number of rows in this piece, in a batch of so many sequences."""
        length = self.rows.stop - self.rows.start
        return length * (batch if self.batch is ALL else self.batch.stop - self.batch.start)


Run = tuple[slice, tuple[int, int], tuple[int, int]]  # batch, rows and keys: consecutive rows with equal lo and hi


def pieces_of_problem(p: Problem) -> list[Piece] | None:
    """Pieces that compute p, disjoint in rows and in keys. Rows in no piece are fully masked. Reads lengths and
    sequence starts once per problem."""
    cache = p.__dict__  # writable in a frozen dataclass too, as for functools.cached_property
    if "_pieces" not in cache:
        cache["_pieces"] = _pieces(p)
    return cache["_pieces"]


def _pieces(p: Problem) -> list[Piece] | None:
    if p.ragged is not None:
        result: list[Piece] = []
        for sequence, own_p in p.sequences():
            own = pieces_of_problem(own_p)
            if own is None:
                return None
            for x in own:
                # Keys are not rounded up: the result has the same bits, whatever sequences it is packed with.
                keys = _within(x.keys, sequence.keys)
                result.append(Piece(ALL, _within(x.rows, sequence.rows), keys, keys, x.causal))
        return result
    if p.empty:
        return []
    _, _, m, n = p.shape
    if p.span.lo is None and p.span.hi is None:
        return _pieces_of_run(p.span, n, ALL, (0, m), (0, n))
    return _pieces_of_runs(p.span, p.shape, _runs(p))


def pieces_of_lengths(span: Span, shape: Shape, lengths: list[int]) -> list[Piece] | None:
    """Pieces for `Mask.lengths` and the scalar bounds of the span."""
    own = zip(_batches(len(lengths)), lengths, strict=True)
    return _pieces_of_runs(span, shape, [(batch, (0, shape[2]), (0, n)) for batch, n in own])


def _pieces_of_runs(span: Span, shape: Shape, runs: list[Run]) -> list[Piece] | None:
    result: list[Piece] = []
    scores, last = 0, dict[int | None, int]()
    for batch, rows, keys in runs:
        own = _pieces_of_run(span, shape[3], batch, rows, keys)
        if own is None or (own and own[0].keys.start < last.get(batch.start, 0)):
            return None
        for piece in own:
            last[batch.start] = piece.keys.stop
            scores += (piece.rows.stop - piece.rows.start) * (piece.keys.stop - piece.keys.start)
        result += own
    return result if len(result) <= FEW or scores * shape[1] >= SMALL * len(result) else None


def _within(part: slice, whole: slice) -> slice:
    return slice(whole.start + part.start, whole.start + part.stop)


def _runs(p: Problem) -> list[Run]:
    """The runs of a span with lo or hi."""
    span, (_, _, m, n) = p.span, p.shape
    batch = max(len(x) for x in (span.lo, span.hi) if x is not None)
    batches = _batches(batch)
    ends = [_ends(x, default, batch) for x, default in ((span.lo, 0), (span.hi, n))]
    if all(x[0] == x[-1] for bound in ends for x in bound):  # bounds never decrease: all rows have the same
        return [(own, (0, m), (max(lo[0], 0), min(hi[0], n))) for own, lo, hi in zip(batches, *ends, strict=True)]
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
        (batches[number], (begin, stop or m), (max(first, 0), min(last, n)))
        for (number, begin), stop, (first, last) in zip(begins, stops, bounds, strict=True)
    ]


def _ends(bound: Tensor | None, default: int, batch: int) -> list[list[int]]:
    """The bounds of the first and the last row of each sequence."""
    if bound is None:
        return [[default, default]] * batch
    result = bound[:, :: max(1, bound.shape[1] - 1)].tolist()
    return result * batch if len(result) == 1 else result


def run(span: Span, rows: tuple[int, int], keys: tuple[int, int]) -> tuple[int, bool] | None:
    """The shape of the visible scores of rows x keys under the scalar bounds of the span: (first row that sees a key,
    causal), where causal is False for a full rectangle. None if it is neither a rectangle nor a top-left triangle."""
    (top, bottom), (first, last) = rows, keys
    if span.right is not None and span.right + top < first:
        top = min(bottom, first - span.right)
    if span.left is not None and (span.sinks or bottom - 1 + span.left > first):
        return None
    if span.right is None:
        return top, False
    ahead = top + span.right - first  # keys visible to the first row, minus one
    if ahead >= last - first - 1:
        return top, False
    return (top, True) if ahead == 0 else None


def _pieces_of_run(
    span: Span, total: int, batch: slice, rows: tuple[int, int], keys: tuple[int, int]
) -> list[Piece] | None:
    """The piece of one run, or [] if its rows are fully masked. total: N."""
    (top, bottom), (first, last) = rows, keys
    if bottom <= top or last <= first:
        return []
    visible = run(span, rows, keys)
    if visible is None:
        return None
    top, causal = visible
    last = min(last, first + bottom - top) if causal else last  # no row sees keys after the last row's diagonal
    return [_piece(batch, slice(top, bottom), slice(first, last), causal, total)] if top < bottom else []


def _piece(batch: slice, rows: slice, keys: slice, causal: bool, total: int) -> Piece:
    read = keys
    if keys.stop != total:
        end = keys.stop + (keys.start - keys.stop) % VECTOR
        read = slice(keys.start, end) if end <= total else keys
    return Piece(batch, rows, keys, read, causal)


def may_be_padding(p: Problem) -> bool:
    """True if the mask may be padding (keys at either end that no row of a sequence sees) and p is large enough."""
    mask, (b, heads, m, n) = p.mask, p.shape
    if mask is None or mask.shape[1] > 1 or mask.shape[3] != n or p.ragged is not None:
        return False
    return p.span.lo is None and p.span.hi is None and b * heads * m * n >= PADDED and readable(mask)


def looks_padded(mask: Tensor) -> bool:
    """True if the first and last rows of a mask with one head are equal and hide enough keys to skip them."""
    first = mask[:, :, 0]
    if mask.shape[2] > 1 and not torch.equal(first, mask[:, :, -1]):
        return False
    return first.sum().item() <= FULL * first.numel()


def padding_of(mask: Tensor) -> Tensor | None:
    """bool (B or 1, N): the keys visible to every row, for a mask with one head and equal rows that hides enough keys;
    otherwise None."""
    if looks_padded(mask) and (mask.shape[2] == 1 or torch.equal(mask[:, :, :1].expand_as(mask), mask)):
        return mask[:, 0, 0]
    return None


def pieces_of_padding(span: Span, shape: Shape, visible: Tensor) -> list[Piece] | None:
    """Pieces for visible keys (`padding_of`), which must be one interval per sequence, and the span's scalar bounds."""
    (_, _, m, n), bits = shape, visible.byte()
    count = bits.sum(1).tolist()
    first, last = bits.argmax(1).tolist(), [n - x for x in bits.flip(1).argmax(1).tolist()]
    if any(c and c != z - a for c, a, z in zip(count, first, last, strict=True)):
        return None
    result: list[Piece] = []
    for batch, begin, keys in zip(_batches(len(count)), first, count, strict=True):
        own = _pieces_of_run(span, n, batch, (0, m), (begin, begin + keys))
        if own is None:
            return None
        result += own
    return result


def _batches(count: int) -> list[slice]:
    """A slice per sequence; a single one stands for the whole batch."""
    return [ALL] if count == 1 else [slice(x, x + 1) for x in range(count)]
