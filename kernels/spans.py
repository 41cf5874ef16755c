"""How far an index may look: its interval, the tiles that are visited, and the one loop over them.

A program owns a tile of indices and sweeps over tiles of the other side: rows over keys, or, transposed, keys over
rows. Tiles that every live index sees whole need no mask; those at both ends of the interval do.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .memory import number
from .modifiers import allowed
from .types import Span


class Visit(NamedTuple):
    """The tiles that a program visits, from index `origin` on: `head` partial ones, `full` full ones, and partial ones
    again, `total` in all. first and last bound what any index of the program sees."""

    origin: Any
    head: Any
    full: Any
    total: Any
    first: Any
    last: Any


class Reach(NamedTuple):
    """How far the indices of a program look: their intervals [BLOCK], and the tiles these make it visit."""

    span: Span
    lo: Any
    hi: Any
    visit: Visit


@triton.jit
def interval(span, b, index, length, limit):
    """lo, hi [BLOCK]: index sees lo <= y < hi. An index that sees nothing, or lies past length, has lo >= hi."""
    lo = index * 0
    hi = tl.where(index < length, limit, 0)
    if span.left is not None:
        lo = tl.maximum(lo, index + number(span.left))
    if span.right is not None:
        hi = tl.minimum(hi, index + number(span.right) + 1)
    if span.lo is not None:
        ptrs = span.lo.ptr + b.to(tl.int64) * number(span.lo.stride) + index
        lo = tl.maximum(lo, tl.load(ptrs, mask=index < length, other=0))
    if span.hi is not None:
        ptrs = span.hi.ptr + b.to(tl.int64) * number(span.hi.stride) + index
        hi = tl.minimum(hi, tl.load(ptrs, mask=index < length, other=0))
    return lo, hi


@triton.jit
def visit(lo, hi, limit, BLOCK: tl.constexpr):
    """The tiles of size BLOCK that the intervals reach. Indices that see nothing have no say."""
    some = lo < hi
    first = tl.min(tl.where(some, lo, limit))
    last = tl.max(tl.where(some, hi, 0))
    origin = first // BLOCK * BLOCK
    total = tl.maximum(tl.cdiv(last - origin, BLOCK), 0)
    full_first = tl.cdiv(tl.max(tl.where(some, lo, 0)), BLOCK) * BLOCK
    full_last = tl.min(tl.where(some, hi, limit)) // BLOCK * BLOCK
    full = tl.where(total > 0, tl.maximum(full_last - full_first, 0) // BLOCK, 0)
    head = tl.where(full > 0, (full_first - origin) // BLOCK, total)
    return Visit(origin, head, full, total, first, last)


@triton.jit
def sees(reach, y):
    """The mask predicate, [BLOCK, len(y)]."""
    if (reach.span.left is None) and (reach.span.lo is None):
        return y[None, :] < reach.hi[:, None]
    else:
        return (y[None, :] >= reach.lo[:, None]) & (y[None, :] < reach.hi[:, None])


@triton.jit
def live(reach, start, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Which y of the tile some index of the program sees; nothing else may reach a product, for it may be NaN.

    None in a full tile.
    """
    if not MASKED:
        return
    else:
        y = start + tl.arange(0, BLOCK)
        if (reach.span.lo is None) and (reach.span.hi is None):
            return (y >= reach.visit.first) & (y < reach.visit.last)
        else:
            return tl.max(sees(reach, y).to(tl.int32), 0) > 0


@triton.jit
def visible(reach, plane, m, n, MASKED: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The predicate of the tile at (m, n), the bool mask included; None where every row sees every key."""
    if TRANSPOSED:
        y = m + tl.arange(0, plane.BLOCK_M)
    else:
        y = n + tl.arange(0, plane.BLOCK_N)
    if plane.mask is None:
        if MASKED:
            return sees(reach, y)
        else:
            return
    else:
        if MASKED:
            return sees(reach, y) & allowed(plane, m, n, TRANSPOSED)
        else:
            return allowed(plane, m, n, TRANSPOSED)


@triton.jit
def sweep(issue: tl.constexpr, absorb: tl.constexpr, context, state, visit, BLOCK: tl.constexpr, AHEAD: tl.constexpr):
    """Visit the partial tiles of both ends, then the full ones.

    issue(context, start, MASKED) -> products loads a tile and starts its matrix products;
    absorb(context, state, products, start, MASKED) -> state does the rest. AHEAD issues the products of the next full
    tile before this one is absorbed, so that exponentials run while a product is in flight.
    """
    for ordinal in tl.range(0, visit.total - visit.full):
        start = visit.origin + (ordinal + tl.where(ordinal < visit.head, 0, visit.full)) * BLOCK
        state = absorb(context, state, issue(context, start, True), start, True)
    begin = visit.origin + visit.head * BLOCK
    if AHEAD:
        if visit.full > 0:
            start = begin
            ahead = issue(context, start, False)
            for _ in tl.range(0, visit.full - 1):
                following = issue(context, start + BLOCK, False)
                state = absorb(context, state, ahead, start, False)
                ahead = following
                start += BLOCK
            state = absorb(context, state, ahead, start, False)
    else:
        for ordinal in tl.range(0, visit.full):
            start = begin + ordinal * BLOCK
            state = absorb(context, state, issue(context, start, False), start, False)
    return state
