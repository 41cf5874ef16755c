"""Backward for sm_90 in Gluon: dq, dk and dv in one pass over the keys, with five matrix products per tile.

A program works on two tiles of keys and sweeps over the rows that see them, for each query head of its group. One
producer warp copies rows to shared memory; two consumers, warpgroups with one tile of keys each, compute

    s = k q^T    dp = v dout^T - delta    p = exp2((s - peak) * factor - log2_sum)    ds = p * dp
    dv += p dout    dk += ds q

These are transposed, [KEYS, BLOCK_M], so that p and ds enter the next products from registers. dq needs the ds of both
consumers: they leave it in shared memory, and each computes half of ds k. A fourth partition adds the halves to a
float32 accumulator in global memory with TMA: in any order or, if ORDERED, in the order of tickets, which makes the
result deterministic. The exponentials overlap with the product dp.

Layouts: S of the scores [KEYS, BLOCK_M] and A of dk and dv [KEYS, D] are those of the accumulators of their matrix
products.

Shah et al., "FlashAttention-3: fast and accurate attention with asynchrony and low-precision", 2024.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_common import barriers, bulk_wait, fetch, pin_all, reduce_add, store_release, wait_for
from .memory import decode_int, head_pointer, load_rows, schedule, store_rows
from .numerics import LOG2E
from .types import Span


@triton.jit(do_not_specialize=["M", "FIRST", "LAST", "LEAD", "ROWS", "HEADS", "BATCHED_HEADS"])
def hopper_prepare_kernel(
    out, dout, peak, log_sum, dlse, known, total, M, FIRST, LAST, LEAD, ROWS, HEADS, BATCHED_HEADS,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """known: SplitRowNumbers of (B * Hq, ROWS), with row 0 at LEAD, written. total: View, the accumulator of dq,
    zeroed.

    peak, log_sum, dlse: pointers to (B, Hq, M); the first two from the forward, the last may be None. Entries outside
    of rows FIRST to LAST get a log2_sum of +inf and a delta of 0, hence weights and gradients of 0, so that the sweeps
    need no mask for the ends of their tiles.
    """
    tile, head = schedule(tl.program_id(0), tl.cdiv(ROWS, BLOCK_M), BATCHED_HEADS, BATCHED_HEADS)
    b = head // HEADS
    h = head % HEADS
    start = tile * BLOCK_M - LEAD
    rows = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    seeing = (rows >= FIRST) & (rows < LAST)
    o = load_rows(out, head_pointer(out, b, h), start, seeing, BLOCK_M, D, BLOCK_D).to(tl.float32)  # [BLOCK_M, BLOCK_D]
    # [BLOCK_M, BLOCK_D]
    do = load_rows(dout, head_pointer(dout, b, h), start, seeing, BLOCK_M, D, BLOCK_D).to(tl.float32)
    row_delta = tl.sum(o * do, 1)  # [BLOCK_M]
    offs = head.to(tl.int64) * M + rows
    if dlse is not None:
        row_delta -= tl.load(dlse + offs, mask=seeing, other=0.0).to(tl.float32)
    log = tl.load(log_sum + offs, mask=seeing, other=float("-inf"))
    log2_sum = tl.where(log == float("-inf"), float("inf"), log * LOG2E)  # [BLOCK_M]
    to = head.to(tl.int64) * ROWS + LEAD + rows
    inside = rows < ROWS - LEAD
    tl.store(known.peak + to, tl.load(peak + offs, mask=seeing, other=0.0), mask=inside)
    tl.store(known.log2_sum + to, log2_sum, mask=inside)
    tl.store(known.delta + to, row_delta, mask=inside)
    zeros = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    store_rows(total, head_pointer(total, b, h), start, (rows >= 0) & (rows < M), zeros, BLOCK_M, D, BLOCK_D)


@triton.jit(do_not_specialize=["scale", "M", "HEADS", "BATCHED_HEADS"])
def hopper_finish_kernel(
    total, dq, scale, M, HEADS, BATCHED_HEADS, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr
):
    """dq, from the float32 sums of ds k."""
    tile, head = schedule(tl.program_id(0), tl.cdiv(M, BLOCK_M), BATCHED_HEADS, BATCHED_HEADS)
    b = head // HEADS
    h = head % HEADS
    m = tile * BLOCK_M
    live = m + tl.arange(0, BLOCK_M) < M  # [BLOCK_M]
    x = load_rows(total, head_pointer(total, b, h), m, live, BLOCK_M, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    store_rows(dq, head_pointer(dq, b, h), m, live, x * scale, BLOCK_M, D, BLOCK_D)


class Plan(NamedTuple):
    """c: what every partition reads. From GROUP on all are constants.

    span: transposed, of keys over rows. HEADS, BATCHED_HEADS: of keys. ROWS, LEAD: layout of the row numbers. ticket:
    the program's. KEYS: keys per tile; TILES: tiles of keys per program.
    """

    span: Span
    M: Any
    N: Any
    HEADS: Any
    BATCHED_HEADS: Any
    WAVE: Any
    ROWS: Any
    LEAD: Any
    ticket: Any
    factor: Any
    GROUP: Any
    BLOCK_M: Any
    KEYS: Any
    TILES: Any
    D: Any
    STAGES: Any
    ORDERED: Any
    OVERLAP: Any


class Task(NamedTuple):
    """t: a program's work, keys from n on of head (b, h), `head` = b * HEADS + h, and the rows first to last that see
    them, in whole tiles. Rows full_first to full_last need no mask."""

    n: Any
    b: Any
    h: Any
    head: Any
    first: Any
    last: Any
    full_first: Any
    full_last: Any


class Shared(NamedTuple):
    """Shared memory: k, v and the sums of dq per consumer; q, dout and row numbers per stage; ds twice per consumer;
    order, the row indices 0, 1, ... of a tile; and mbarriers for full and empty buffers."""

    k: Any  # [2, 1, 1, KEYS, D]
    v: Any  # [2, 1, 1, KEYS, D]
    dq: Any  # [2, 1, rows, columns] of half a tile
    q: Any  # [STAGES, 1, 1, BLOCK_M, D]
    peak: Any  # [STAGES, BLOCK_M]
    log2_sum: Any  # [STAGES, BLOCK_M]
    do: Any  # [STAGES, 1, 1, BLOCK_M, D]
    delta: Any  # [STAGES, BLOCK_M]
    ds: Any  # [4, KEYS, BLOCK_M]
    order: Any  # [BLOCK_M]
    k_full: Any
    v_full: Any
    full: Any
    empty: Any
    ds_full: Any
    dq_full: Any
    dq_empty: Any


@gluon.jit
def assignment(c):
    """The Task of this program. Every key is seen by some row."""
    KEYS: gl.constexpr = c.TILES * c.KEYS
    tiles = gl.cdiv(c.N, KEYS)
    tile, head = schedule(c.ticket, tiles, c.BATCHED_HEADS, c.WAVE)
    if c.ORDERED:
        tile = tiles - 1 - tile  # under a causal mask the shortest sweeps first, for short waits
    n = tile * KEYS
    last_key = gl.minimum(n + KEYS, c.N) - 1
    first = 0
    last = c.M
    full_first = 0
    full_last = gl.cdiv(c.M, c.BLOCK_M) * c.BLOCK_M
    if c.span.left is not None:
        first = gl.maximum(first, n + decode_int(c.span.left))
        full_first = gl.maximum(full_first, last_key + decode_int(c.span.left))
    if c.span.right is not None:
        last = gl.minimum(last, last_key + decode_int(c.span.right) + 1)
        full_last = gl.minimum(full_last, n + decode_int(c.span.right) + 1)
    if n + KEYS > c.N:
        full_last = 0  # keys past the end must not reach dq
    return Task(
        n,
        head // c.HEADS,
        head % c.HEADS,
        head,
        first // c.BLOCK_M * c.BLOCK_M,
        gl.cdiv(last, c.BLOCK_M) * c.BLOCK_M,
        gl.cdiv(full_first, c.BLOCK_M) * c.BLOCK_M,
        full_last // c.BLOCK_M * c.BLOCK_M,
    )


@gluon.jit
def produce(c, shared, q, k, v, dout, peak, log2_sum, delta):
    """The producer: copy q, dout and row numbers as soon as their buffers are free."""
    t = assignment(c)
    for g in gl.static_range(c.TILES):
        fetch(k, [t.b, t.h, t.n + g * c.KEYS, 0], shared.k_full.index(0), shared.k.index(g))
    count = 0
    for member in range(c.GROUP):
        h = t.h * c.GROUP + member
        for m in range(t.first, t.last, c.BLOCK_M):
            row = (t.head * c.GROUP + member) * c.ROWS + c.LEAD + m
            stage = count % c.STAGES
            mbarrier.wait(shared.empty.index(stage), (count // c.STAGES & 1) ^ 1)
            fetch(q, [t.b, h, m, 0], shared.full.index(stage), shared.q.index(stage))
            if count == 0:
                for g in gl.static_range(c.TILES):
                    fetch(v, [t.b, t.h, t.n + g * c.KEYS, 0], shared.v_full.index(g), shared.v.index(g))
            fetch(dout, [t.b, h, m, 0], shared.full.index(stage), shared.do.index(stage))
            fetch(peak, [row], shared.full.index(stage), shared.peak.index(stage))
            fetch(log2_sum, [row], shared.full.index(stage), shared.log2_sum.index(stage))
            fetch(delta, [row], shared.full.index(stage), shared.delta.index(stage))
            count += 1


@gluon.jit
def visible(c, order, n, m):
    """The mask predicate [KEYS, BLOCK_M] of keys from n and rows from m. order: 0, 1, 2 ... as [1, BLOCK_M]."""
    j = n + gl.arange(0, c.KEYS, gl.SliceLayout(1, order.type.layout))  # [KEYS]
    stop = gl.where(j < c.N, c.BLOCK_M, 0)  # [KEYS]
    if c.span.right is not None:
        stop = gl.minimum(stop, j + (decode_int(c.span.right) + 1 - m))
    see = order < stop[:, None]  # [KEYS, BLOCK_M]
    if c.span.left is not None:
        see = see & (order >= (j + (decode_int(c.span.left) - m))[:, None])
    return see


@gluon.jit
def prepare(c, shared, count):
    """-delta [KEYS, BLOCK_M] of the count-th rows, after waiting for them: the initial accumulator of dp.

    This saves a subtraction per element between dp and the next product. Call it before any product is in flight;
    otherwise it waits for the product.
    """
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, c.BLOCK_M, 16])
    stage = count % c.STAGES
    mbarrier.wait(shared.full.index(stage), count // c.STAGES & 1)
    zeros = gl.zeros((c.KEYS, c.BLOCK_M), gl.float32, S)  # [KEYS, BLOCK_M]
    return pin_all(zeros - shared.delta.index(stage).load(gl.SliceLayout(0, S))[None, :])


@gluon.jit
def scores(c, shared, g: gl.constexpr, count):
    """Issue k q^T [KEYS, BLOCK_M] with the count-th rows."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, c.BLOCK_M, 16])
    q = shared.q.index(count % c.STAGES).reshape([c.BLOCK_M, c.D])  # [BLOCK_M, D]
    # count >> 30 is 0, but not at compile time: else addresses of k, v and dq stay in registers across tiles.
    k = shared.k.index(g + (count >> 30)).reshape([c.KEYS, c.D])  # [KEYS, D]
    zeros = gl.zeros((c.KEYS, c.BLOCK_M), gl.float32, S)  # [KEYS, BLOCK_M]
    return warpgroup_mma(k, q.permute([1, 0]), zeros, use_acc=False, is_async=True)


@gluon.jit
def weigh(c, t, shared, g: gl.constexpr, count, m, s, less):
    """(p, dp) [KEYS, BLOCK_M] of the count-th rows, at m; the exponentials overlap with the product."""
    COLUMN: gl.constexpr = gl.SliceLayout(0, less.type.layout)
    stage = count % c.STAGES
    n = t.n + g * c.KEYS
    partial = (m < t.full_first) | (m >= t.full_last)
    do = shared.do.index(stage).reshape([c.BLOCK_M, c.D])  # [BLOCK_M, D]
    v = shared.v.index(g + (count >> 30)).reshape([c.KEYS, c.D])  # [KEYS, D]
    dp = warpgroup_mma(v, do.permute([1, 0]), less, is_async=True)  # [KEYS, BLOCK_M]
    s = warpgroup_mma_wait(1, deps=(s,))
    # The cheaper place for the mask, in registers, depends on BLOCK_M.
    if c.BLOCK_M > c.KEYS:  # noqa: SIM102
        if partial:
            s = gl.where(visible(c, shared.order.load(COLUMN).to(gl.int32)[None, :], n, m), s, float("-inf"))
    # [KEYS, BLOCK_M]; peak first, as in backward.py.
    w = s - shared.peak.index(stage).load(COLUMN)[None, :]
    w = gl.exp2(w * c.factor - shared.log2_sum.index(stage).load(COLUMN)[None, :])
    if c.BLOCK_M <= c.KEYS:  # noqa: SIM102
        if partial:
            w = gl.where(visible(c, shared.order.load(COLUMN).to(gl.int32)[None, :], n, m), w, 0.0)
    w = pin_all(w)
    return w, warpgroup_mma_wait(0, deps=(dp,))


@gluon.jit
def accumulate(c, shared, g: gl.constexpr, count, w, dp, dk, dv):
    """Use p and dp of the count-th rows: returns (dk, dv), with dk still in flight, and hands this consumer's half of
    the rows' dq, summed over both tiles of keys, to the partition that adds it."""
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, c.D, 16])
    ROWS: gl.constexpr = shared.dq.shape[2]
    WIDTH: gl.constexpr = shared.dq.shape[3]
    T: gl.constexpr = shared.q.dtype
    stage = count % c.STAGES
    half = count & 1
    ds = (w * dp).to(T)  # [KEYS, BLOCK_M]
    shared.ds.index(half * 2 + g).store(ds)
    fence_async_shared()
    mbarrier.arrive(shared.ds_full.index(half), count=1)
    do = shared.do.index(stage).reshape([c.BLOCK_M, c.D])  # [BLOCK_M, D]
    dv = warpgroup_mma(gl.convert_layout(w.to(T), gl.DotOperandLayout(0, A, 2)), do, dv, is_async=True)  # [KEYS, D]
    mbarrier.wait(shared.ds_full.index(half), count // 2 & 1)
    # [ROWS, WIDTH]
    dq = gl.zeros((ROWS, WIDTH), gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16]))
    for x in gl.static_range(2):
        a = shared.ds.index(half * 2 + x)  # [KEYS, BLOCK_M]
        b = shared.k.index(x + (count >> 30)).reshape([c.KEYS, c.D])  # [KEYS, D]
        if ROWS == c.BLOCK_M:  # each consumer takes all rows of the tile and half of the columns
            b = b.slice(g * WIDTH, WIDTH, 1)
        else:
            a = a.slice(g * ROWS, ROWS, 1)
        dq = warpgroup_mma(a.permute([1, 0]), b, dq, use_acc=x > 0, is_async=True)
    q = shared.q.index(stage).reshape([c.BLOCK_M, c.D])  # [BLOCK_M, D]
    dk = warpgroup_mma(gl.convert_layout(ds, gl.DotOperandLayout(0, A, 2)), q, dk, is_async=True)  # [KEYS, D]
    dq, dv = warpgroup_mma_wait(1, deps=(dq, dv))
    mbarrier.wait(shared.dq_empty.index(g), (count & 1) ^ 1)
    shared.dq.index(g + (count >> 30)).reshape([ROWS, WIDTH]).store(dq)
    fence_async_shared()
    mbarrier.arrive(shared.dq_full.index(g), count=1)
    return dk, dv


@gluon.jit
def advance(c, t, m):
    """The next tile of rows after m, or the first one of the next head."""
    m += c.BLOCK_M
    if m == t.last:
        m = t.first
    return m


@gluon.jit
def consume(c, shared, dk_out, dv_out, scale, g: gl.constexpr):
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, c.D, 16])
    t = assignment(c)
    mbarrier.wait(shared.k_full.index(0), 0)
    mbarrier.wait(shared.v_full.index(g), 0)
    dk = gl.zeros((c.KEYS, c.D), gl.float32, A)  # [KEYS, D]
    dv = gl.zeros((c.KEYS, c.D), gl.float32, A)  # [KEYS, D]
    m = t.first
    tiles = (t.last - t.first) // c.BLOCK_M * c.GROUP
    if c.OVERLAP:
        # The scores of the next tile are issued after dk of this one; nothing is in flight at the end of the loop.
        less = prepare(c, shared, 0)  # [KEYS, BLOCK_M]
        w, dp = weigh(c, t, shared, g, 0, m, scores(c, shared, g, 0), less)  # [KEYS, BLOCK_M]
        for count in range(tiles - 1):
            m = advance(c, t, m)
            dk, dv = accumulate(c, shared, g, count, w, dp, dk, dv)
            less = prepare(c, shared, count + 1)  # [KEYS, BLOCK_M]
            s = scores(c, shared, g, count + 1)  # [KEYS, BLOCK_M]
            dk = warpgroup_mma_wait(1, deps=(dk,))
            mbarrier.arrive(shared.empty.index(count % c.STAGES), count=1)
            w, dp = weigh(c, t, shared, g, count + 1, m, s, less)  # [KEYS, BLOCK_M]
        dk, dv = accumulate(c, shared, g, tiles - 1, w, dp, dk, dv)
        dk = warpgroup_mma_wait(0, deps=(dk,))
    else:
        for count in range(tiles):
            less = prepare(c, shared, count)  # [KEYS, BLOCK_M]
            w, dp = weigh(c, t, shared, g, count, m, scores(c, shared, g, count), less)  # [KEYS, BLOCK_M]
            dk, dv = accumulate(c, shared, g, count, w, dp, dk, dv)
            dk = warpgroup_mma_wait(0, deps=(dk,))
            mbarrier.arrive(shared.empty.index(count % c.STAGES), count=1)
            m = advance(c, t, m)
    # This consumer alone reads this tile of v, and has finished: reuse its memory.
    tile = shared.v.index(g)
    tile.reshape([c.KEYS, c.D]).store(dv.to(shared.v.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(dv_out, [t.b, t.h, t.n + g * c.KEYS, 0], tile)
    tma.store_wait(0)
    tile.reshape([c.KEYS, c.D]).store((dk * scale).to(shared.v.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(dk_out, [t.b, t.h, t.n + g * c.KEYS, 0], tile)
    tma.store_wait(0)


@gluon.jit
def add(c, shared, sums, semaphores):
    """The partition that adds each tile of dq to the accumulator: in any order or, if ORDERED, after the
    programs of lower rank."""
    t = assignment(c)
    ROWS: gl.constexpr = sums.block_type.shape[1]
    WIDTH: gl.constexpr = sums.block_type.shape[2]
    ACROSS: gl.constexpr = c.D // WIDTH
    BUFFERS: gl.constexpr = shared.dq.shape[0]
    ROUNDS: gl.constexpr = c.BLOCK_M // ROWS * ACROSS // BUFFERS
    count = 0
    for member in range(c.GROUP):
        head = t.head * c.GROUP + member
        for m in range(t.first, t.last, c.BLOCK_M):
            index = 1 + head * (c.ROWS // c.BLOCK_M) + m // c.BLOCK_M
            rank = rank_of(c, t, m)
            for r in gl.static_range(ROUNDS):
                for g in gl.static_range(BUFFERS):
                    mbarrier.wait(shared.dq_full.index(g), (count * ROUNDS + r) & 1)
                    if c.ORDERED and r + g == 0:
                        wait_for(semaphores + index, rank)
                    row = m + (r * BUFFERS + g) // ACROSS * ROWS
                    reduce_add(sums, [head, row, (r * BUFFERS + g) % ACROSS * WIDTH], shared.dq.index(g))
                tma.store_wait(0)
                for g in gl.static_range(BUFFERS):
                    mbarrier.arrive(shared.dq_empty.index(g), count=1)
            if c.ORDERED:
                bulk_wait()
                store_release(semaphores + index, rank + 1)
            count += 1


@gluon.jit
def rank_of(c, t, m):
    """The number of programs that add to the tile of dq at m before this one: those with later keys."""
    last = c.N - 1
    if c.span.left is not None:
        last = gl.minimum(last, m + c.BLOCK_M - 1 - decode_int(c.span.left))
    return (last - t.n) // (c.TILES * c.KEYS)


@gluon.jit
def start_partitions(c, shared, q, k, v, dout, peak, log2_sum, delta, sums, dk, dv, semaphores, scale):
    """Start the partitions. A function of its own, because constants inside of tuples survive only as arguments."""
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (c, shared, dk, dv, scale, 0)),
            (consume, (c, shared, dk, dv, scale, 1)),
            (produce, (c, shared, q, k, v, dout, peak, log2_sum, delta)),
            (add, (c, shared, sums, semaphores)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )


@gluon.jit(do_not_specialize=["scale", "factor", "M", "N", "HEADS", "BATCHED_HEADS", "WAVE", "ROWS", "LEAD"])
def hopper_backward_kernel(
    q, k, v, dout, peak, log2_sum, delta, sums, dk, dv, semaphores, span, scale, factor,
    M, N, HEADS, BATCHED_HEADS, WAVE, ROWS, LEAD,
    GROUP: gl.constexpr, STAGES: gl.constexpr, ORDERED: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """TMA descriptors: q, dout (B, Hq, M, D), boxes of BLOCK_M rows; k, v, dk, dv (B, Hkv, N, D), boxes of one
    consumer's keys; peak, log2_sum, delta (B * Hq * ROWS), boxes of BLOCK_M, with a head's row 0 at LEAD; sums (B * Hq,
    M, D), boxes of one consumer's half of a tile.

    semaphores: pointer to int32 zeros, the ticket and one counter per tile of rows, or None. HEADS, BATCHED_HEADS: of
    keys.
    """
    BLOCK_M: gl.constexpr = q.block_type.shape[2]
    D: gl.constexpr = q.block_type.shape[3]
    KEYS: gl.constexpr = k.block_type.shape[2]
    ADDED: gl.constexpr = sums.block_type.shape[1]
    WIDTH: gl.constexpr = sums.block_type.shape[2]
    T: gl.constexpr = q.dtype
    gl.static_assert(STAGES > 1 or not OVERLAP)
    ticket = gl.program_id(0)
    if ORDERED:
        ticket = gl.atomic_add(semaphores, 1)
    order = gl.allocate_shared_memory(gl.int16, [BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    order.store(gl.arange(0, BLOCK_M, gl.BlockedLayout([1], [32], [4], [0])).to(gl.int16))
    start_partitions(
        Plan(
            span, M, N, HEADS, BATCHED_HEADS, WAVE, ROWS, LEAD, ticket, factor,
            GROUP, BLOCK_M, KEYS, 2, D, STAGES, ORDERED, OVERLAP,
        ),
        Shared(
            gl.allocate_shared_memory(T, [2, 1, 1, KEYS, D], k.layout),
            gl.allocate_shared_memory(T, [2, 1, 1, KEYS, D], v.layout),
            gl.allocate_shared_memory(gl.float32, [2, 1, ADDED, WIDTH], sums.layout),
            gl.allocate_shared_memory(T, [STAGES, 1, 1, BLOCK_M, D], q.layout),
            gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], peak.layout),
            gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], log2_sum.layout),
            gl.allocate_shared_memory(T, [STAGES, 1, 1, BLOCK_M, D], dout.layout),
            gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], delta.layout),
            gl.allocate_shared_memory(T, [4, KEYS, BLOCK_M], gl.NVMMASharedLayout(128, 16, rank=2)),
            order,
            barriers(1, 2), barriers(2, 1),
            barriers(STAGES, 5), barriers(STAGES, 2),
            barriers(2, 2), barriers(2, 1), barriers(2, 1),
        ),
        q, k, v, dout, peak, log2_sum, delta, sums, dk, dv, semaphores, scale,
    )  # fmt: skip
