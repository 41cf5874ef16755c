"""Decoding: softmax(scores) v over a cache of keys and values, for a few queries of each sequence.

The sweep is the forward's. The query heads of a key-value head are packed into rows, so a tile of keys is read once for
all of them: row r is query r // GROUP of head r % GROUP of the group. The keys of a sequence are cut into parts that
run side by side; each leaves the state of its own keys (see types.Parts), without the sink, for combine.py. Parts of
which a sequence is too short are not run and not read: `cut` tells both kernels which these are.

Grid (B * Hkv x parts x tiles of BLOCK_M packed rows). lse is a natural logarithm.
"""

import triton
import triton.language as tl

from .forward import Rows, absorb, issue
from .memory import Place, head_pointer, load_whole, number, packed_rows, read_scalar
from .modifiers import Parameters, Plane
from .numerics import LOG2E
from .softmax import finish, init, partial
from .spans import Pattern, Reach, Visit, interval, sweep, visit


@triton.jit
def length_of(sequences, b, N):
    """How many keys sequence b has; N is what there is room for."""
    if sequences.lengths is None:
        return N
    else:
        return tl.minimum(tl.maximum(tl.load(sequences.lengths + b), 0) + number(sequences.added), N)


@triton.jit
def keys_of(sequences, pages, b):
    """(home, entry): the row of the cache where sequence b lies; or, of pages, where its row of their table begins."""
    home = b
    if sequences.index is not None:
        home = tl.load(sequences.index + b)
    entry = b * 0
    if pages is not None:
        home = b * 0
        entry = b.to(tl.int64) * number(pages.stride)
    return home, entry


@triton.jit
def first_key(sequences, span, b, length, M):
    """The first key that any row of sequence b sees."""
    first = length * 0
    if sequences.leftpad is not None:
        first = tl.maximum(first, tl.load(sequences.leftpad + b))
    if span.left is not None:
        first = tl.maximum(first, length - M + number(span.left))
    return first


@triton.jit
def cut(first, length, PARTS, LEAST, BLOCK: tl.constexpr):
    """(begin, size, count): the keys from a multiple of BLOCK on, in `count` parts of `size` keys, as even as whole
    tiles and LEAST keys a part allow. No more than PARTS; none where there is no key."""
    begin = first // BLOCK * BLOCK
    keys = tl.maximum(length - begin, 0)
    size = tl.maximum(tl.cdiv(tl.cdiv(keys, PARTS), BLOCK) * BLOCK, LEAST)
    return begin, size, tl.cdiv(keys, size)


@triton.jit
def of_rows(x, b, heads):
    """A Scalar for each row of packed heads, [BLOCK_M, 1], or one number for all."""
    if x.pointer:
        return tl.load(x.value + b * number(x.strides[0]) + heads * number(x.strides[1])).to(tl.float32)[:, None]
    else:
        return x.value


@triton.jit
def before_tree(span, found, trunk, BLOCK: tl.constexpr):
    """The visit in which the tiles that a tree reaches into are partial."""
    if span.tree is None:
        return found
    else:
        begin = found.origin + found.head * BLOCK
        full = tl.minimum(found.full, tl.maximum(trunk - begin, 0) // BLOCK)
        return Visit(found.origin, found.head, full, found.total, found.first, found.last, found.table)


@triton.jit
def tree_rows(span, b, query, M):
    """Pointers to each row's part of the tree; 0 where there is none."""
    if span.tree is None:
        return 0
    else:
        rows = tl.minimum(query, M - 1).to(tl.int64) * number(span.tree.strides[1])
        return span.tree.ptr + b.to(tl.int64) * number(span.tree.strides[0]) + rows


@triton.jit(do_not_specialize=["M", "N", "KV_HEADS", "PARTS", "LEAST"])
def decode_kernel(
    q, k, v, out, lse, score, span, sink, sequences, pages, parts, M, N, KV_HEADS, PARTS, LEAST,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q, out: View (B, Hq, M, ..); k, v: View (C, Hkv, N, ..), or of pages; lse, sink: pointers (B, Hq, M) and (Hq,).
    With parts, out, lse and sink are left to combine.py."""
    tiles = tl.cdiv(M * GROUP, BLOCK_M)
    turn = tl.program_id(0)
    tile = turn % tiles
    part = turn // tiles % PARTS
    head = turn // tiles // PARTS
    b = head // KV_HEADS
    h = head % KV_HEADS
    length = length_of(sequences, b, N)
    first = first_key(sequences, span, b, length, M)
    begin, size, count = cut(first, length, PARTS, LEAST, BLOCK_N)
    if parts is not None:  # noqa: SIM102 - the one is known to the compiler, the other is not
        if part >= count:
            return

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < M * GROUP
    query = rows // GROUP
    heads = h * GROUP + rows % GROUP
    shift = length - M
    lo, hi = interval(span, b, query, M, length, shift)
    lo = tl.maximum(lo, tl.maximum(first, begin + part * size))
    hi = tl.minimum(hi, begin + (part + 1) * size)
    reach = before_tree(span, visit(lo, hi, length, BLOCK_N), shift, BLOCK_N)

    home, entry = keys_of(sequences, pages, b)
    zero = head * 0
    slope = 0.0
    if score.slopes is not None:
        slope = of_rows(score.slopes, b, heads)
    cap = 0.0
    if score.softcap is not None:
        cap = read_scalar(score.softcap, b, h)
    factor = of_rows(score.scale, b, heads)
    scale = tl.full([], 1.0, tl.float32)
    if score.folds:
        scale *= factor

    q_tile = load_whole(packed_rows(q, b, h * GROUP, rows, GROUP, BLOCK_D), live, D, BLOCK_D)
    # The context is built inside the call: an assignment would turn the constants in it into run-time values.
    m_i, l_i, acc = sweep(
        issue, absorb,
        Rows(
            q_tile, tile * BLOCK_M, k, head_pointer(k, home, h), None, v, head_pointer(v, home, h), None, pages, h,
            Plane(
                score, Parameters(factor, cap, slope, 0, 0, 0, (query + shift)[:, None]), None, None,
                Place(b, h, head, tile, M, length, shift, home, head, zero, entry, zero, zero), BLOCK_M, BLOCK_N,
            ),
            Reach(span, lo, hi, reach, Pattern(0, 0, 0, 0, tree_rows(span, b, query, M), shift)),
            scale * LOG2E, D, DV, BLOCK_D, BLOCK_DV, PRECISION,
        ),
        init(BLOCK_M, BLOCK_DV), reach, BLOCK_N, OVERLAP,
    )  # fmt: skip

    columns = (tl.arange(0, BLOCK_DV) < DV)[None, :]
    if parts is None:
        logit = None
        if sink is not None:
            logit = tl.load(sink + heads).to(tl.float32)
        out_tile, lse_tile, _, _ = finish(m_i, l_i, acc, scale, logit, lo < hi)
        own = (b.to(tl.int64) * (KV_HEADS * GROUP) + heads) * M + query
        ptrs = packed_rows(out, b, h * GROUP, rows, GROUP, BLOCK_DV)
        tl.store(lse + own, lse_tile, mask=live)
        tl.store(ptrs, out_tile.to(out.ptr.dtype.element_ty), mask=live[:, None] & columns)
    else:
        acc, peak, total = partial(m_i, l_i, acc, scale, lo < hi)
        own = (head.to(tl.int64) * PARTS + part) * (M * GROUP) + rows
        tl.store(parts.peak + own, peak, mask=live)
        tl.store(parts.sum + own, total, mask=live)
        tl.store(parts.acc + own[:, None] * DV + tl.arange(0, BLOCK_DV)[None, :], acc, mask=live[:, None] & columns)
