"""Decoding: softmax(scores) v over a cache of keys and values, for a few queries per sequence (split-KV).

The sweep is the forward's. The query heads of a key-value head are packed into rows, so that a tile of keys is read
once for all of them: row r is query r // GROUP of head r % GROUP of the group. The keys of a sequence are cut into
parts, which run in parallel. Each part writes the state of its own keys (types.Parts), without the sink, and combine.py
merges them. A short sequence has fewer parts; `cut` tells both kernels how many.

Grid: (B * Hkv x parts x tiles of BLOCK_M packed rows), flat. Scores and lse are in the units of forward.py.
"""

import triton
import triton.language as tl

from .forward import Rows, absorb, issue
from .memory import WorkTile, decode_int, head_pointer, load_whole, packed_rows, read_scalar
from .modifiers import Parameters, Plane
from .numerics import LOG2E
from .softmax import finish, init, partial
from .spans import Pattern, Reach, Visit, interval, sweep, visit


@triton.jit
def length_of(sequences, b, N):
    """The number of keys of sequence b, new ones included. N: the cache's capacity."""
    if sequences.lengths is None:
        return N
    else:
        return tl.minimum(tl.maximum(tl.load(sequences.lengths + b), 0) + decode_int(sequences.added), N)


@triton.jit
def keys_of(sequences, pages, b):
    """(cache_row, entry) of sequence b: its row in the cache; and in a paged cache, the offset of its row in the page
    table."""
    cache_row = b
    if sequences.index is not None:
        cache_row = tl.load(sequences.index + b)
    entry = b * 0
    if pages is not None:
        cache_row = b * 0
        entry = b.to(tl.int64) * decode_int(pages.stride)
    return cache_row, entry


@triton.jit
def first_key(sequences, span, b, length, M):
    """The first key that any row of sequence b sees."""
    first = length * 0
    if sequences.leftpad is not None:
        first = tl.maximum(first, tl.load(sequences.leftpad + b))
    if span.left is not None:
        first = tl.maximum(first, length - M + decode_int(span.left))
    return first


@triton.jit
def cut(first, length, PARTS, LEAST, BLOCK: tl.constexpr):
    """(begin, size, count): the keys from `begin` on, a multiple of BLOCK, in `count` parts of `size` keys. The parts
    are as even as whole tiles and at least LEAST keys per part allow. count <= PARTS, and 0 without keys."""
    begin = first // BLOCK * BLOCK
    keys = tl.maximum(length - begin, 0)
    size = tl.maximum(tl.cdiv(tl.cdiv(keys, PARTS), BLOCK) * BLOCK, LEAST)
    return begin, size, tl.cdiv(keys, size)


@triton.jit
def per_row(x, b, heads):
    """A Scalar as [BLOCK_M, 1], one number per packed row; or a number, if all heads share it."""
    if x.pointer:
        return tl.load(x.value + b * decode_int(x.strides[0]) + heads * decode_int(x.strides[1])).to(tl.float32)[
            :, None
        ]
    else:
        return x.value


@triton.jit
def before_tree(span, tiles, trunk, BLOCK: tl.constexpr):
    """The visit in which the tiles that reach into the tree are partial."""
    if span.tree is None:
        return tiles
    else:
        begin = tiles.origin + tiles.leading * BLOCK
        full = tl.minimum(tiles.full, tl.maximum(trunk - begin, 0) // BLOCK)
        return Visit(tiles.origin, tiles.leading, full, tiles.total, tiles.first, tiles.last, tiles.block_mask)


@triton.jit
def tree_rows(span, b, query, M):
    """Pointers [BLOCK_M] to each row's part of the tree; 0 without one."""
    if span.tree is None:
        return 0
    else:
        rows = tl.minimum(query, M - 1).to(tl.int64) * decode_int(span.tree.strides[1])
        return span.tree.ptr + b.to(tl.int64) * decode_int(span.tree.strides[0]) + rows


@triton.jit(do_not_specialize=["M", "N", "KV_HEADS", "PARTS", "LEAST"])
def decode_kernel(
    q, k, v, out, lse, score, span, sink, sequences, pages, parts, M, N, KV_HEADS, PARTS, LEAST,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q, out: Views (B, Hq, M, ..). k, v: Views (C, Hkv, N, ..), or of pages. lse: pointer (B, Hq, M); sink: pointer
    (Hq,). If there are parts, combine.py writes out and lse and reads sink."""
    tiles = tl.cdiv(M * GROUP, BLOCK_M)
    pid = tl.program_id(0)
    index = pid % tiles
    part = pid // tiles % PARTS
    head = pid // tiles // PARTS
    b = head // KV_HEADS
    h = head % KV_HEADS
    length = length_of(sequences, b, N)
    first = first_key(sequences, span, b, length, M)
    begin, size, count = cut(first, length, PARTS, LEAST, BLOCK_N)
    if parts is not None:  # noqa: SIM102 - only the outer one is known at compile time
        if part >= count:
            return

    rows = index * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    live = rows < M * GROUP  # [BLOCK_M]
    query = rows // GROUP  # [BLOCK_M]
    heads = h * GROUP + rows % GROUP  # [BLOCK_M]
    shift = length - M
    lo, hi = interval(span, b, query, M, length, shift)  # [BLOCK_M]
    lo = tl.maximum(lo, tl.maximum(first, begin + part * size))
    hi = tl.minimum(hi, begin + (part + 1) * size)
    visited = before_tree(span, visit(lo, hi, length, BLOCK_N), shift, BLOCK_N)

    cache_row, entry = keys_of(sequences, pages, b)
    zero = head * 0
    slope = 0.0
    if score.slopes is not None:
        slope = per_row(score.slopes, b, heads)
    cap = 0.0
    if score.softcap is not None:
        cap = read_scalar(score.softcap, b, h)
    factor = per_row(score.scale, b, heads)
    scale = tl.full([], 1.0, tl.float32)
    if score.folds:
        scale *= factor

    q_tile = load_whole(packed_rows(q, b, h * GROUP, rows, GROUP, BLOCK_D), live, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    # The context is built inside the call: an assignment would turn the constants in it into run-time values.
    # [BLOCK_M], [BLOCK_M], [BLOCK_M, BLOCK_DV]
    m_i, l_i, acc = sweep(
        issue, absorb,
        Rows(
            q_tile, index * BLOCK_M, k, head_pointer(k, cache_row, h), None,
            v, head_pointer(v, cache_row, h), None, pages, h,
            Plane(
                score, Parameters(factor, cap, slope, 0, 0, 0, (query + shift)[:, None]), None, None,
                WorkTile(b, h, head, index, M, length, shift, cache_row, head, zero, entry, zero, zero),
                BLOCK_M, BLOCK_N,
            ),
            Reach(span, lo, hi, visited, Pattern(0, 0, 0, 0, tree_rows(span, b, query, M), shift)),
            scale * LOG2E, D, DV, BLOCK_D, BLOCK_DV, PRECISION,
        ),
        init(BLOCK_M, BLOCK_DV), visited, BLOCK_N, OVERLAP,
    )  # fmt: skip

    columns = (tl.arange(0, BLOCK_DV) < DV)[None, :]  # [1, BLOCK_DV]
    if parts is None:
        logit = None
        if sink is not None:
            logit = tl.load(sink + heads).to(tl.float32)
        out_tile, lse_tile, _, _ = finish(m_i, l_i, acc, scale, logit, lo < hi)  # [BLOCK_M, BLOCK_DV], [BLOCK_M]
        own = (b.to(tl.int64) * (KV_HEADS * GROUP) + heads) * M + query  # [BLOCK_M]
        ptrs = packed_rows(out, b, h * GROUP, rows, GROUP, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
        tl.store(lse + own, lse_tile, mask=live)
        tl.store(ptrs, out_tile.to(out.ptr.dtype.element_ty), mask=live[:, None] & columns)
    else:
        acc, peak, total = partial(m_i, l_i, acc, scale, lo < hi)  # [BLOCK_M, BLOCK_DV], [BLOCK_M], [BLOCK_M]
        own = (head.to(tl.int64) * PARTS + part) * (M * GROUP) + rows  # [BLOCK_M]
        tl.store(parts.peak + own, peak, mask=live)
        tl.store(parts.sum + own, total, mask=live)
        tl.store(parts.acc + own[:, None] * DV + tl.arange(0, BLOCK_DV)[None, :], acc, mask=live[:, None] & columns)
