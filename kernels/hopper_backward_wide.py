"""Backward for sm_90 in Gluon for head dims at which one consumer's registers hold either dk or dv, not both.

As hopper_backward.py, but a program works on one tile of keys, and its consumers divide the work by output: one
computes dv and dq, the other ds and dk. Both compute the scores, so each has three products. The exponentials of the
first overlap with the product for dv of the previous tile, those of the second with the product dp.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_backward import Plan, add, advance, assignment, produce, visible
from .hopper_common import barriers, pin_all


class Shared(NamedTuple):
    """Shared memory: k and v; one box of dq; q, dout and row numbers per stage; ds twice; order, the row indices 0, 1,
    ... of a tile; and mbarriers for full and empty buffers."""

    k: Any  # [1, 1, 1, KEYS, D]
    v: Any  # [1, 1, 1, KEYS, D]
    dq: Any  # [1, 1, BLOCK_M, WIDTH]
    q: Any  # [STAGES, 1, 1, BLOCK_M, D]
    peak: Any  # [STAGES, BLOCK_M]
    log2_sum: Any  # [STAGES, BLOCK_M]
    do: Any  # [STAGES, 1, 1, BLOCK_M, D]
    delta: Any  # [STAGES, BLOCK_M]
    ds: Any  # [2, KEYS, BLOCK_M]
    order: Any  # [BLOCK_M]
    k_full: Any
    v_full: Any
    full: Any
    empty: Any
    ds_full: Any
    ds_empty: Any
    dq_full: Any
    dq_empty: Any


@gluon.jit
def scores(c, shared, count):
    """Issue k q^T [KEYS, BLOCK_M] with the count-th rows, which have arrived."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, c.BLOCK_M, 16])
    q = shared.q.index(count % c.STAGES).reshape([c.BLOCK_M, c.D])  # [BLOCK_M, D]
    k = shared.k.index(count >> 30).reshape([c.KEYS, c.D])  # 0, but not at compile time
    zeros = gl.zeros((c.KEYS, c.BLOCK_M), gl.float32, S)
    return warpgroup_mma(k, q.permute([1, 0]), zeros, use_acc=False, is_async=True)


@gluon.jit
def weigh(c, t, shared, s, count, m, partial):
    """The weights [KEYS, BLOCK_M] of scores s with the count-th rows, at m."""
    COLUMN: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    w = s - shared.peak.index(count % c.STAGES).load(COLUMN)[None, :]  # [KEYS, BLOCK_M]
    w = gl.exp2(w * c.factor - shared.log2_sum.index(count % c.STAGES).load(COLUMN)[None, :])
    if partial:
        w = gl.where(visible(c, shared.order.load(COLUMN).to(gl.int32)[None, :], t.n, m), w, 0.0)
    return w


@gluon.jit
def send_dq(c, shared, dq, count):
    """Hand a box of dq to the partition that adds it. count: boxes so far."""
    mbarrier.wait(shared.dq_empty.index(0), (count & 1) ^ 1)
    shared.dq.index(count >> 30).reshape([c.BLOCK_M, shared.dq.shape[3]]).store(dq)
    fence_async_shared()
    mbarrier.arrive(shared.dq_full.index(0), count=1)


@gluon.jit
def compute_dq(c, shared, count):
    """dq of the count-th rows, box by box."""
    WIDTH: gl.constexpr = shared.dq.shape[3]
    BOXES: gl.constexpr = c.D // WIDTH
    half = count & 1
    mbarrier.wait(shared.ds_full.index(half), count // 2 & 1)
    ds = shared.ds.index(half).permute([1, 0])  # [BLOCK_M, KEYS]
    k = shared.k.index(count >> 30).reshape([c.KEYS, c.D])  # [KEYS, D]
    # [BLOCK_M, WIDTH]
    zeros = gl.zeros((c.BLOCK_M, WIDTH), gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16]))
    for x in gl.static_range(BOXES):
        dq = warpgroup_mma(ds, k.slice(x * WIDTH, WIDTH, 1), zeros, use_acc=False, is_async=True)
        dq = warpgroup_mma_wait(0, deps=(dq,))
        if x == BOXES - 1:
            mbarrier.arrive(shared.ds_empty.index(half), count=1)
        send_dq(c, shared, dq, count * BOXES + x)


@gluon.jit
def sum_values(c, t, shared, dv_out):
    """The consumer that computes dv and dq."""
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, c.D, 16])
    T: gl.constexpr = shared.v.dtype
    dv = gl.zeros((c.KEYS, c.D), gl.float32, A)  # [KEYS, D]
    mbarrier.wait(shared.k_full.index(0), 0)
    mbarrier.wait(shared.full.index(0), 0)
    m = t.first
    s = scores(c, shared, 0)  # [KEYS, BLOCK_M]
    s = warpgroup_mma_wait(0, deps=(s,))
    w = weigh(c, t, shared, s, 0, m, (m < t.full_first) | (m >= t.full_last))  # [KEYS, BLOCK_M]
    weights = gl.convert_layout(w.to(T), gl.DotOperandLayout(0, A, 2))
    tiles = (t.last - t.first) // c.BLOCK_M * c.GROUP
    for count in range(1, tiles):
        m = advance(c, t, m)
        mbarrier.wait(shared.full.index(count % c.STAGES), count // c.STAGES & 1)
        s = scores(c, shared, count)  # [KEYS, BLOCK_M]
        do = shared.do.index((count - 1) % c.STAGES).reshape([c.BLOCK_M, c.D])  # [BLOCK_M, D]
        sent = warpgroup_mma(weights, do, dv, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        w = weigh(c, t, shared, s, count, m, (m < t.full_first) | (m >= t.full_last))  # [KEYS, BLOCK_M]
        packed = pin_all(w.to(T))
        dv = warpgroup_mma_wait(0, deps=(sent,))
        mbarrier.arrive(shared.empty.index((count - 1) % c.STAGES), count=1)
        weights = gl.convert_layout(packed, gl.DotOperandLayout(0, A, 2))
        compute_dq(c, shared, count - 1)
    dv = warpgroup_mma(weights, shared.do.index((tiles - 1) % c.STAGES).reshape([c.BLOCK_M, c.D]), dv)
    compute_dq(c, shared, tiles - 1)
    # The last ds is complete, so v is no longer read: reuse its memory.
    tile = shared.v.index(0)
    tile.reshape([c.KEYS, c.D]).store(dv.to(T))
    fence_async_shared()
    tma.async_copy_shared_to_global(dv_out, [t.b, t.h, t.n, 0], tile)
    tma.store_wait(0)


@gluon.jit
def sum_keys(c, t, shared, dk_out, scale):
    """The consumer that computes ds and dk."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, c.BLOCK_M, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, c.D, 16])
    T: gl.constexpr = shared.k.dtype
    dk = gl.zeros((c.KEYS, c.D), gl.float32, A)  # [KEYS, D]
    zeros = gl.zeros((c.KEYS, c.BLOCK_M), gl.float32, S)  # [KEYS, BLOCK_M]
    mbarrier.wait(shared.k_full.index(0), 0)
    mbarrier.wait(shared.v_full.index(0), 0)
    m = t.first
    tiles = (t.last - t.first) // c.BLOCK_M * c.GROUP
    for count in range(tiles):
        stage = count % c.STAGES
        half = count & 1
        mbarrier.wait(shared.full.index(stage), count // c.STAGES & 1)
        less = pin_all(zeros - shared.delta.index(stage).load(gl.SliceLayout(0, S))[None, :])  # [KEYS, BLOCK_M]
        s = scores(c, shared, count)  # [KEYS, BLOCK_M]
        v = shared.v.index(count >> 30).reshape([c.KEYS, c.D])  # [KEYS, D]
        do = shared.do.index(stage).reshape([c.BLOCK_M, c.D])  # [BLOCK_M, D]
        dp = warpgroup_mma(v, do.permute([1, 0]), less, is_async=True)  # [KEYS, BLOCK_M]
        s = warpgroup_mma_wait(1, deps=(s,))
        w = weigh(c, t, shared, s, count, m, (m < t.full_first) | (m >= t.full_last))  # [KEYS, BLOCK_M]
        w = pin_all(w)
        dp = warpgroup_mma_wait(0, deps=(dp,))
        ds = (w * dp).to(T)  # [KEYS, BLOCK_M]
        mbarrier.wait(shared.ds_empty.index(half), (count // 2 & 1) ^ 1)
        shared.ds.index(half).store(ds)
        fence_async_shared()
        mbarrier.arrive(shared.ds_full.index(half), count=1)
        q = shared.q.index(stage).reshape([c.BLOCK_M, c.D])  # [BLOCK_M, D]
        dk = warpgroup_mma(gl.convert_layout(ds, gl.DotOperandLayout(0, A, 2)), q, dk, is_async=True)
        dk = warpgroup_mma_wait(0, deps=(dk,))
        mbarrier.arrive(shared.empty.index(stage), count=1)
        m = advance(c, t, m)
    # The last dq is complete, so k is no longer read: reuse its memory.
    mbarrier.wait(shared.ds_empty.index((tiles - 1) & 1), (tiles - 1) // 2 & 1)
    tile = shared.k.index(0)
    tile.reshape([c.KEYS, c.D]).store((dk * scale).to(T))
    fence_async_shared()
    tma.async_copy_shared_to_global(dk_out, [t.b, t.h, t.n, 0], tile)
    tma.store_wait(0)


@gluon.jit
def begin_values(c, shared, dv):
    sum_values(c, assignment(c), shared, dv)


@gluon.jit
def begin_keys(c, shared, dk, scale):
    sum_keys(c, assignment(c), shared, dk, scale)


@gluon.jit
def start_partitions(c, shared, q, k, v, dout, peak, log2_sum, delta, sums, dk, dv, semaphores, scale):
    """Start the partitions."""
    fence_async_shared()
    gl.warp_specialize(
        [
            (begin_values, (c, shared, dv)),
            (begin_keys, (c, shared, dk, scale)),
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
    """See the kernel of this name in hopper_backward.py. sums: boxes of all rows of a tile and some columns. OVERLAP
    has no effect: there is one order of issue."""
    BLOCK_M: gl.constexpr = q.block_type.shape[2]
    D: gl.constexpr = q.block_type.shape[3]
    KEYS: gl.constexpr = k.block_type.shape[2]
    WIDTH: gl.constexpr = sums.block_type.shape[2]
    T: gl.constexpr = q.dtype
    gl.static_assert(STAGES > 1)  # scores of a tile are issued before dv of the previous one is complete
    ticket = gl.program_id(0)
    if ORDERED:
        ticket = gl.atomic_add(semaphores, 1)
    order = gl.allocate_shared_memory(gl.int16, [BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    order.store(gl.arange(0, BLOCK_M, gl.BlockedLayout([1], [32], [4], [0])).to(gl.int16))
    start_partitions(
        Plan(
            span, M, N, HEADS, BATCHED_HEADS, WAVE, ROWS, LEAD, ticket, factor,
            GROUP, BLOCK_M, KEYS, 1, D, STAGES, ORDERED, OVERLAP,
        ),
        Shared(
            gl.allocate_shared_memory(T, [1, 1, 1, KEYS, D], k.layout),
            gl.allocate_shared_memory(T, [1, 1, 1, KEYS, D], v.layout),
            gl.allocate_shared_memory(gl.float32, [1, 1, BLOCK_M, WIDTH], sums.layout),
            gl.allocate_shared_memory(T, [STAGES, 1, 1, BLOCK_M, D], q.layout),
            gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], peak.layout),
            gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], log2_sum.layout),
            gl.allocate_shared_memory(T, [STAGES, 1, 1, BLOCK_M, D], dout.layout),
            gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], delta.layout),
            gl.allocate_shared_memory(T, [2, KEYS, BLOCK_M], gl.NVMMASharedLayout(128, 16, rank=2)),
            order,
            barriers(1, 1), barriers(1, 1),
            barriers(STAGES, 5), barriers(STAGES, 2),
            barriers(2, 1), barriers(2, 1), barriers(1, 1), barriers(1, 1),
        ),
        q, k, v, dout, peak, log2_sum, delta, sums, dk, dv, semaphores, scale,
    )  # fmt: skip
