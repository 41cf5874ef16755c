"""Which keys may a row see: intervals, the tiles that a program visits, and the one loop over them.

A program works on a tile of indices x and sweeps over tiles of the other side, y: rows over keys, or, transposed, keys
over rows. A tile is full if every x that sees anything sees all of it; it then needs no mask. The others are partial.
In an interval, partial tiles lie at both ends. Where visibility is no interval, a block mask from the host
(types.BlockMask) lists the tiles.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .memory import decode_int
from .modifiers import allowed
from .types import Span


class Visit(NamedTuple):
    """The tiles that a program visits, as ordinals 0 to total.

    Without a block mask: from index `origin` on, `leading` partial tiles, `full` full ones, and the other partial ones.
    With one: block_mask points to the indices of `leading` partial and `full` full tiles. first, last: no x of the
    program sees y outside of [first, last).
    """

    origin: Any
    leading: Any
    full: Any
    total: Any
    first: Any
    last: Any
    block_mask: Any


class Pattern(NamedTuple):
    """Visibility beside the intervals; zeros for parts that are absent.

    near: where the window of each x begins, beside sinks. ids: of each x; others: pointer to the ids of y. blocks:
    pointers to each x's row of blocks. tree: pointers to each x's row of a tree, whose first column is y = trunk.
    """

    near: Any  # [BLOCK]
    ids: Any  # [BLOCK]
    others: Any  # pointer
    blocks: Any  # [BLOCK] pointers
    tree: Any  # [BLOCK] pointers
    trunk: Any


class Reach(NamedTuple):
    """What the indices x of a program see: intervals lo <= y < hi, a pattern, and the tiles to visit."""

    span: Span
    lo: Any  # [BLOCK]
    hi: Any  # [BLOCK]
    visit: Visit
    pattern: Pattern


@triton.jit
def interval(span, b, index, length, limit, shift):
    """lo, hi [BLOCK]: index x sees lo <= y < hi. If x sees nothing or lies past length, lo >= hi.

    limit: the length of the other side. shift: added to the span's offsets.
    """
    lo = index * 0
    hi = tl.where(index < length, limit, 0)
    if (span.left is not None) and (span.sinks is None):
        lo = tl.maximum(lo, index + (shift + decode_int(span.left)))
    if span.right is not None:
        hi = tl.minimum(hi, index + (shift + decode_int(span.right) + 1))
    if span.lo is not None:
        ptrs = span.lo.ptr + b.to(tl.int64) * decode_int(span.lo.stride) + index  # [BLOCK]
        lo = tl.maximum(lo, tl.load(ptrs, mask=index < length, other=0))
    if span.hi is not None:
        ptrs = span.hi.ptr + b.to(tl.int64) * decode_int(span.hi.stride) + index  # [BLOCK]
        hi = tl.minimum(hi, tl.load(ptrs, mask=index < length, other=0))
    if span.sinks is not None:
        lo = tl.where(lo < decode_int(span.sinks), lo, tl.maximum(lo, index + (shift + decode_int(span.left))))
    return lo, hi


@triton.jit
def visit(lo, hi, limit, BLOCK: tl.constexpr):
    """The tiles of BLOCK that intervals [BLOCK] reach. Indices that see nothing do not count."""
    some = lo < hi  # [BLOCK]
    first = tl.min(tl.where(some, lo, limit))
    last = tl.max(tl.where(some, hi, 0))
    origin = first // BLOCK * BLOCK
    total = tl.maximum(tl.cdiv(last - origin, BLOCK), 0)
    full_first = tl.cdiv(tl.max(tl.where(some, lo, 0)), BLOCK) * BLOCK
    full_last = tl.min(tl.where(some, hi, limit)) // BLOCK * BLOCK
    full = tl.where(total > 0, tl.maximum(full_last - full_first, 0) // BLOCK, 0)
    leading = tl.where(full > 0, (full_first - origin) // BLOCK, total)
    return Visit(origin, leading, full, total, first, last, 0)


@triton.jit
def listed(span, visited, tile):
    """The visit of the program at a tile: that of the block mask, if there is one."""
    if span.block_mask is None:
        return visited
    else:
        head = tile.b.to(tl.int64) * decode_int(span.block_mask.strides[0]) + tile.h.to(tl.int64) * decode_int(
            span.block_mask.strides[1]
        )
        own = span.block_mask.ptr + head + tile.index * decode_int(span.block_mask.strides[2])
        some = (tile.M > 0) & (tile.N > 0)
        partial = tl.where(some, tl.load(own), 0)
        full = tl.where(some, tl.load(own + 1), 0)
        return Visit(visited.origin, partial, full, partial + full, visited.first, visited.last, own + 2)


@triton.jit
def pattern(span, b, h, index, length, shift):
    """The Pattern of indices x [BLOCK]: zeros, not None, for parts that are absent."""
    near = 0
    ids = 0
    others = 0
    blocks = 0
    if span.sinks is not None:
        near = index + (shift + decode_int(span.left))  # [BLOCK]
    if span.ids is not None:
        ptrs = span.ids.ptr + b.to(tl.int64) * decode_int(span.ids.stride) + index
        ids = tl.load(ptrs, mask=index < length, other=0)  # [BLOCK]
        others = span.others.ptr + b.to(tl.int64) * decode_int(span.others.stride)
    if span.blocks is not None:
        own = tl.minimum(index, length - 1) // decode_int(span.blocks.sizes[0])  # [BLOCK]
        head = b.to(tl.int64) * decode_int(span.blocks.strides[0]) + h.to(tl.int64) * decode_int(span.blocks.strides[1])
        blocks = span.blocks.ptr + head + own.to(tl.int64) * decode_int(span.blocks.strides[2])  # [BLOCK]
    return Pattern(near, ids, others, blocks, 0, 0)


@triton.jit
def sees(reach, y):
    """The mask predicate [BLOCK, len(y)]."""
    if (reach.span.left is None) and (reach.span.lo is None):
        see = y[None, :] < reach.hi[:, None]  # [BLOCK, len(y)]
    else:
        see = (y[None, :] >= reach.lo[:, None]) & (y[None, :] < reach.hi[:, None])  # [BLOCK, len(y)]
    inside = y < reach.visit.last  # [len(y)]
    if reach.span.sinks is not None:
        see &= (y < decode_int(reach.span.sinks))[None, :] | (y[None, :] >= reach.pattern.near[:, None])
    if reach.span.ids is not None:
        see &= reach.pattern.ids[:, None] == tl.load(reach.pattern.others + y, mask=inside, other=0)[None, :]
    if reach.span.blocks is not None:
        block = (tl.where(inside, y, 0) // decode_int(reach.span.blocks.sizes[1])).to(tl.int64)  # [len(y)]
        # [BLOCK, len(y)]
        ptrs = reach.pattern.blocks[:, None] + (block * decode_int(reach.span.blocks.strides[3]))[None, :]
        see &= tl.load(ptrs) != 0
    if reach.span.tree is not None:
        leaf = y - reach.pattern.trunk  # [len(y)]
        ptrs = reach.pattern.tree[:, None] + (leaf * decode_int(reach.span.tree.strides[2]))[None, :]  # [BLOCK, len(y)]
        see &= tl.load(ptrs, mask=(inside & (leaf >= 0))[None, :], other=1) != 0
    return see


@triton.jit
def contiguous(span):
    """True if the visible range is contiguous and bounded by scalars only, so that [first, last) is exact."""
    return (
        (span.lo is None)
        and (span.hi is None)
        and (span.sinks is None)
        and (span.ids is None)
        and (span.blocks is None)
    )


@triton.jit
def live(reach, start, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """[BLOCK]: the y of the tile that some x of the program sees; None in a full tile.

    The others must not reach a matrix product: their memory may hold NaN, and 0 * NaN is NaN.
    """
    if not MASKED:
        return
    else:
        y = start + tl.arange(0, BLOCK)  # [BLOCK]
        if contiguous(reach.span):
            return (y >= reach.visit.first) & (y < reach.visit.last)
        else:
            return tl.max(sees(reach, y).to(tl.int32), 0) > 0


@triton.jit
def visible(reach, plane, m, n, MASKED: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The predicate of the tile at (m, n), the bool mask included: [BLOCK_M, BLOCK_N], or its transpose. None if every
    row sees every key."""
    if TRANSPOSED:
        y = m + tl.arange(0, plane.BLOCK_M)  # [BLOCK_M]
    else:
        y = n + tl.arange(0, plane.BLOCK_N)  # [BLOCK_N]
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
def partial_tile(span, visit, ordinal, BLOCK: tl.constexpr):
    """The first index of a partial tile."""
    if span.block_mask is None:
        return visit.origin + (ordinal + tl.where(ordinal < visit.leading, 0, visit.full)) * BLOCK
    else:
        return tl.load(visit.block_mask + ordinal) * BLOCK


@triton.jit
def full_tile(span, visit, begin, ordinal, BLOCK: tl.constexpr):
    """The first index of a full tile. Without a block mask full tiles are contiguous, from begin on."""
    if span.block_mask is None:
        return begin + ordinal * BLOCK
    else:
        return tl.load(visit.block_mask + visit.leading + ordinal) * BLOCK


@triton.jit
def following_tile(span, visit, start, ordinal, BLOCK: tl.constexpr):
    """The first index of the full tile after the one with that ordinal, which is at start."""
    if span.block_mask is None:
        return start + BLOCK
    else:
        return tl.load(visit.block_mask + visit.leading + ordinal + 1) * BLOCK


@triton.jit
def sweep(issue: tl.constexpr, absorb: tl.constexpr, context, state, visit, BLOCK: tl.constexpr, AHEAD: tl.constexpr):
    """Visit the partial tiles, then the full ones.

    - issue(context, start, MASKED) -> products: load a tile and start its matrix products.
    - absorb(context, state, products, start, MASKED) -> state: the rest of the tile's work.

    AHEAD: issue the products of the next full tile before this one is absorbed, so that exponentials overlap with
    matrix products.
    """
    for ordinal in tl.range(0, visit.total - visit.full):
        start = partial_tile(context.reach.span, visit, ordinal, BLOCK)
        state = absorb(context, state, issue(context, start, True), start, True)
    begin = visit.origin + visit.leading * BLOCK
    if AHEAD:
        if visit.full > 0:
            start = full_tile(context.reach.span, visit, begin, 0, BLOCK)
            ahead = issue(context, start, False)
            for ordinal in tl.range(0, visit.full - 1):
                after = following_tile(context.reach.span, visit, start, ordinal, BLOCK)
                following = issue(context, after, False)
                state = absorb(context, state, ahead, start, False)
                ahead = following
                start = after
            state = absorb(context, state, ahead, start, False)
    else:
        for ordinal in tl.range(0, visit.full):
            start = full_tile(context.reach.span, visit, begin, ordinal, BLOCK)
            state = absorb(context, state, issue(context, start, False), start, False)
    return state
