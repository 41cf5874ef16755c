"""An attention problem as a few dense ones: which rows see one interval of keys, so that nothing else is computed.

Only for the CPU, where lengths, sequence starts and masks can be read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import readable
from .spec import Problem

FEW, SMALL = 16, 4096  # more pieces than FEW, of less than SMALL scores each, cost more than tiles
VECTOR = 16  # keys in a vector register of float32
PADDED = 2**20  # scores of a problem from which its mask is searched for padding
FULL = 0.9  # share of keys in sight above which leaving out the others gains less than it costs


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


ALL = slice(None)


def pieces(p: Problem) -> list[Piece] | None:
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
            own = pieces(alone)
            if own is None:
                return None
            for x in own:
                # Exactly its keys: then its bits are those of a call of its own, whatever it is packed with.
                own_keys = _within(x.keys, one.keys)
                found.append(Piece(ALL, _within(x.rows, one.rows), own_keys, own_keys, x.causal))
        return found
    if p.empty:
        return []
    _, heads, m, n = p.shape
    span = p.span
    if span.lo is None and span.hi is None:
        return _pieces_of_run(p, ALL, (0, m), (0, n))
    found = []
    scores, last = 0, dict[int | None, int]()
    for batch, rows, keys in _runs(p):
        own = _pieces_of_run(p, batch, rows, keys)
        if own is None or (own and own[0].keys.start < last.get(batch.start, 0)):
            return None
        for piece in own:
            last[batch.start] = piece.keys.stop
            scores += (piece.rows.stop - piece.rows.start) * (piece.keys.stop - piece.keys.start)
        found += own
    return found if len(found) <= FEW or scores * heads >= SMALL * len(found) else None


def _within(part: slice, whole: slice) -> slice:
    return slice(whole.start + part.start, whole.start + part.stop)


def _runs(p: Problem) -> list[tuple[slice, tuple[int, int], tuple[int, int]]]:
    """Rows one after another that have the same lo and hi: (batch, rows, keys) each."""
    span, (_, _, m, n) = p.span, p.shape
    given = [x for x in (span.lo, span.hi) if x is not None]
    batch = max(map(len, given))
    lo, hi = (
        p.q.new_full((batch, m), value, dtype=torch.int32) if x is None else x.expand(batch, m)
        for x, value in ((span.lo, 0), (span.hi, n))
    )
    whole = [ALL] if batch == 1 else [slice(x, x + 1) for x in range(batch)]
    ends = torch.stack((lo[:, 0], hi[:, 0], lo[:, -1], hi[:, -1]), 1).tolist()
    if all(x[:2] == x[2:] for x in ends):  # bounds never decrease, so all rows have the same
        return [
            (own, (0, m), (max(first, 0), min(last, n))) for own, (first, last, *_) in zip(whole, ends, strict=True)
        ]
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


def run(p: Problem, rows: tuple[int, int], keys: tuple[int, int]) -> tuple[int, bool] | None:
    """Of rows that see these keys as far as the numbers of the span allow: the first one that sees any, and whether
    they see a triangle and not all. None: it is neither."""
    (top, bottom), (first, last), span = rows, keys, p.span
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


def _pieces_of_run(p: Problem, batch: slice, rows: tuple[int, int], keys: tuple[int, int]) -> list[Piece] | None:
    """The piece of such rows, or none where they see nothing; None: it is not one."""
    (top, bottom), (first, last) = rows, keys
    if bottom <= top or last <= first:
        return []
    shape = run(p, rows, keys)
    if shape is None:
        return None
    top, causal = shape
    last = min(last, first + bottom - top) if causal else last  # no row sees what lies behind the last diagonal
    return [_piece(batch, slice(top, bottom), slice(first, last), causal, p.shape[3])] if top < bottom else []


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


def unpadded(p: Problem) -> list[Piece] | None:
    """The pieces of a problem whose mask is padding, which are then computed without it; None: compute all of it.

    Reads the mask, which has no heads here: that costs little beside the scores.
    """
    mask, n = p.mask, p.shape[3]
    if mask is None or not searched(p) or not looks_padded(mask):
        return None
    if not torch.equal(mask[:, :, :1].expand_as(mask), mask):
        return None
    seen = mask[:, 0, 0].byte()
    count = seen.sum(1).tolist()
    first, last = seen.argmax(1).tolist(), [n - x for x in seen.flip(1).argmax(1).tolist()]
    if any(c and c != z - a for c, a, z in zip(count, first, last, strict=True)):
        return None
    whole = [ALL] if len(count) == 1 else [slice(x, x + 1) for x in range(len(count))]
    found: list[Piece] = []
    for batch, begin, keys in zip(whole, first, count, strict=True):
        own = _pieces_of_run(p, batch, (0, p.shape[2]), (begin, begin + keys))
        if own is None:
            return None
        found += own
    return found
