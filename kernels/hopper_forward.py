"""Forward for sm_90 in Gluon: the kernel of forward.py, warp-specialised so that matrix products overlap with the
softmax.

A persistent program has one producer warp and two or three consumers, warpgroups with ROWS rows each. The producer
copies q, k and v to shared memory with TMA; keys and values use a ring of STAGES buffers. A consumer issues the scores
of the next tile, then p v of this one, and computes the softmax while both are in flight. With PING, consumers
alternate in issuing products, so that the softmax of one overlaps with the products of the others.

Layouts: S of the scores [ROWS, BLOCK_N] and ACC of the output [ROWS, D] are those of the accumulators of their matrix
products, a warpgroup to 64 rows; ROW is that of one number a row of ACC.

Shah et al., "FlashAttention-3: fast and accurate attention with asynchrony and low-precision", 2024.
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

from .hopper_common import barriers, fetch, pin, tile_start, visit
from .memory import decode_int, pointers, row_base, schedule, work_tile
from .modifiers import Plane, capped, distance_at, parameters, saturation
from .numerics import LOG2E
from .softmax import LOWEST, finish, store_normaliser, update
from .types import Span


class Plan(NamedTuple):
    """c: what every partition reads. From GROUP on all are constants.

    GROUP: query heads per key-value head. ROWS: rows per consumer. PING: consumers alternate in issuing products.
    OWN_OUT, UNPACKED: see the kernel.
    """

    span: Span
    M: Any
    N: Any
    HEADS: Any
    BATCHED_HEADS: Any
    WAVE: Any
    GROUP: Any
    CONSUMERS: Any
    ROWS: Any
    BLOCK_N: Any
    D: Any
    STAGES: Any
    PING: Any
    OWN_OUT: Any
    UNPACKED: Any


class Shared(NamedTuple):
    """Shared memory: q and out per consumer, k and v per stage, and mbarriers for full and empty buffers. pingpong:
    an mbarrier per consumer, completed when it may issue products."""

    q: Any  # [CONSUMERS, 1, 1, ROWS, D]
    k: Any  # [STAGES, 1, 1, BLOCK_N, D]
    v: Any  # [STAGES, 1, 1, BLOCK_N, D]
    out: Any  # [CONSUMERS, 1, 1, ROWS, D]
    q_full: Any
    q_empty: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any
    pingpong: Any


class Task(NamedTuple):
    """t: a consumer's tile in the program's `turn`, rows from m on, and the parameters of their scores."""

    m: Any
    turn: Any
    plane: Plane
    factor: Any
    consumer: Any


@gluon.jit
def assignment(c, turn):
    """(m, b, h, visited tiles) of a program's `turn`. Every second round of tiles is reversed, so that a program that
    got a long tile gets a short one next."""
    ROWS: gl.constexpr = c.ROWS * c.CONSUMERS
    programs = gl.num_programs(0)
    program = gl.program_id(0)
    if turn % 2 == 1:
        program = programs - 1 - program
    tiles = gl.cdiv(c.M, ROWS)
    tile, head = schedule(turn * programs + program, tiles, c.BATCHED_HEADS, c.WAVE)
    m = (tiles - 1 - tile) * ROWS  # last rows first: under a causal mask they take longest
    last = gl.minimum(m + ROWS, c.M) - 1
    return m, head // c.HEADS, head % c.HEADS, visit(c.span, m, last, c.N, c.BLOCK_N)


@gluon.jit
def turns(c):
    """The number of tiles of this program."""
    ROWS: gl.constexpr = c.ROWS * c.CONSUMERS
    total = gl.cdiv(c.M, ROWS) * c.BATCHED_HEADS
    programs = gl.num_programs(0)
    rounds = total // programs
    program = gl.program_id(0)
    if rounds % 2 == 1:
        program = programs - 1 - program
    if rounds * programs + program < total:
        rounds += 1
    return rounds


@gluon.jit
def produce(c, q, k, v, shared):
    """The producer: copy q, k and v as soon as their buffers are free. The first scores need q and the first keys."""
    count = 0
    for turn in range(turns(c)):
        m, b, h, visited = assignment(c, turn)
        for i in range(visited.total):
            n = tile_start(visited, i, c.BLOCK_N)
            stage = count % c.STAGES
            phase = count // c.STAGES & 1
            if i == 0:
                mbarrier.wait(shared.q_empty.index(0), (turn & 1) ^ 1)
                fetch(q, [b, h, m, 0], shared.q_full.index(0), shared.q.index(0))
            mbarrier.wait(shared.k_empty.index(stage), phase ^ 1)
            fetch(k, [b, h // c.GROUP, n, 0], shared.k_full.index(stage), shared.k.index(stage))
            if i == 0:
                for g in gl.static_range(1, c.CONSUMERS):
                    mbarrier.wait(shared.q_empty.index(g), (turn & 1) ^ 1)
                    fetch(q, [b, h, m + g * c.ROWS, 0], shared.q_full.index(g), shared.q.index(g))
            mbarrier.wait(shared.v_empty.index(stage), phase ^ 1)
            fetch(v, [b, h // c.GROUP, n, 0], shared.v_full.index(stage), shared.v.index(stage))
            count += 1


@gluon.jit
def scores(c, shared, consumer, count, S: gl.constexpr):
    """Issue q k^T [ROWS, BLOCK_N] with the count-th keys, after waiting for them."""
    stage = count % c.STAGES
    mbarrier.wait(shared.k_full.index(stage), count // c.STAGES & 1)
    q = shared.q.index(consumer).reshape([c.ROWS, c.D])  # [ROWS, D]
    k = shared.k.index(stage).reshape([c.BLOCK_N, c.D]).permute([1, 0])  # [D, BLOCK_N]
    zeros = gl.zeros((c.ROWS, c.BLOCK_N), gl.float32, S)  # [ROWS, BLOCK_N]
    return warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)


@gluon.jit
def operand(p, ACC: gl.constexpr, DTYPE: gl.constexpr):
    """Weights p [ROWS, BLOCK_N] as the first operand of a product, in registers."""
    return gl.convert_layout(p, gl.DotOperandLayout(0, ACC, 2)).to(DTYPE)


@gluon.jit
def converted(c, p, ACC: gl.constexpr, DTYPE: gl.constexpr, NOW: gl.constexpr):
    """The operand, if it is converted NOW: when the weights are computed or, if UNPACKED, by the step that multiplies
    them; else p."""
    if NOW == c.UNPACKED:
        return p
    else:
        return operand(p, ACC, DTYPE)


@gluon.jit
def weighted_values(c, shared, weights, acc, count):
    """Issue acc + weights v [ROWS, D] with the count-th values, after waiting for them."""
    stage = count % c.STAGES
    mbarrier.wait(shared.v_full.index(stage), count // c.STAGES & 1)
    return warpgroup_mma(weights, shared.v.index(stage).reshape([c.BLOCK_N, c.D]), acc, is_async=True)


@gluon.jit
def bias_tile(c, t, n, S: gl.constexpr):
    """The bias of the scores at keys n, loaded before the wait for the scores; 0 without a bias."""
    if t.plane.score.bias is None:
        return 0
    else:
        # Beyond the edge repeat the last row and key, so that a load needs no mask; those scores are never used.
        i = gl.minimum(gl.arange(0, c.ROWS, gl.SliceLayout(1, S)), c.M - 1 - t.m)[:, None]  # [ROWS, 1]
        j = gl.minimum(gl.arange(0, c.BLOCK_N, gl.SliceLayout(0, S)), c.N - 1 - n)[None, :]  # [1, BLOCK_N]
        return gl.load(pointers(t.plane.score.bias, t.plane.own.bias, t.m, n, i, j))


@gluon.jit
def weigh(c, t, s, bias, m_i, l_i, n, MASKED: gl.constexpr):
    """(weights, alpha, m_i, l_i) of scores s at keys n; see softmax.update."""
    S: gl.constexpr = s.type.layout
    i = gl.arange(0, c.ROWS, gl.SliceLayout(1, S))[:, None]  # [ROWS, 1]
    j = gl.arange(0, c.BLOCK_N, gl.SliceLayout(0, S))[None, :]  # [1, BLOCK_N]
    x = s  # [ROWS, BLOCK_N]
    if not t.plane.score.folds:
        x = capped(t.plane, s, saturation(t.plane, s))  # [ROWS, BLOCK_N]
        if t.plane.score.bias is not None:
            x += bias.to(gl.float32)
        if t.plane.score.slopes is not None:
            x -= t.plane.own.slope * distance_at(t.plane, t.m, n, i, j)
    allowed = None
    if MASKED:
        i += t.m
        j += n
        # [ROWS, BLOCK_N]
        allowed = j < c.N
        if c.span.left is not None:
            allowed = allowed & (j >= i + decode_int(c.span.left))
        if c.span.right is not None:
            allowed = allowed & (j <= i + decode_int(c.span.right))
    return update(m_i, l_i, x, allowed, t.factor)


@gluon.jit
def step(c, shared, t, count, n, state, MASKED: gl.constexpr):
    """One iteration: the scores of the count-th keys, at n, while p v of the values before them is in flight."""
    m_i, l_i, acc, p = state  # [ROWS], [ROWS], [ROWS, D], [ROWS, BLOCK_N]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, c.BLOCK_N, 16])
    ACC: gl.constexpr = acc.type.layout
    weights = converted(c, p, ACC, shared.v.dtype, False)  # [ROWS, BLOCK_N]
    if c.PING:
        # The phase counts this consumer's steps: all but the first of each tile, which does not wait.
        mbarrier.wait(shared.pingpong.index(t.consumer), (count - 1 - t.turn) & 1)
    bias = bias_tile(c, t, n, S)  # [ROWS, BLOCK_N]
    s = scores(c, shared, t.consumer, count, S)  # [ROWS, BLOCK_N]
    o = weighted_values(c, shared, weights, acc, count - 1)  # [ROWS, D]
    if c.PING:
        mbarrier.arrive(shared.pingpong.index((t.consumer + 1) % c.CONSUMERS), count=1)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(shared.k_empty.index(count % c.STAGES), count=1)
    p, alpha, m_i, l_i = weigh(c, t, s, bias, m_i, l_i, n, MASKED)  # [ROWS, BLOCK_N], then [ROWS] each
    l_i = pin(l_i)
    acc = warpgroup_mma_wait(0, deps=(o,))
    mbarrier.arrive(shared.v_empty.index((count - 1) % c.STAGES), count=1)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, ACC))[:, None]
    return m_i, l_i, acc, converted(c, p, ACC, shared.v.dtype, True)


@gluon.jit
def attend(c, shared, t, visited, count):
    """(m_i, l_i, acc) of a tile's rows over all keys that it visits. count: keys and values used by earlier tiles."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, c.BLOCK_N, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, c.D, 16])
    mbarrier.wait(shared.q_full.index(t.consumer), t.turn & 1)
    begin = tile_start(visited, 0, c.BLOCK_N)
    bias = bias_tile(c, t, begin, S)
    s = warpgroup_mma_wait(0, deps=(scores(c, shared, t.consumer, count, S),))  # [ROWS, BLOCK_N]
    mbarrier.arrive(shared.k_empty.index(count % c.STAGES), count=1)
    m_i = gl.full((c.ROWS,), LOWEST, gl.float32, gl.SliceLayout(1, S))
    l_i = gl.zeros((c.ROWS,), gl.float32, gl.SliceLayout(1, S))
    p, _, m_i, l_i = weigh(c, t, s, bias, m_i, l_i, begin, True)  # [ROWS, BLOCK_N], then [ROWS] each
    acc = gl.zeros((c.ROWS, c.D), gl.float32, ACC)  # [ROWS, D]
    state = m_i, l_i, acc, converted(c, p, ACC, shared.v.dtype, True)
    partial = gl.maximum(visited.total - visited.full, 1)
    for i in range(1, partial):
        state = step(c, shared, t, count + i, tile_start(visited, i, c.BLOCK_N), state, True)
    for i in range(partial, visited.total):
        state = step(c, shared, t, count + i, tile_start(visited, i, c.BLOCK_N), state, False)
    m_i, l_i, acc, p = state
    last = count + visited.total - 1
    if c.OWN_OUT:
        mbarrier.arrive(shared.q_empty.index(t.consumer), count=1)
    acc = warpgroup_mma_wait(
        0, deps=(weighted_values(c, shared, converted(c, p, ACC, shared.v.dtype, False), acc, last),)
    )
    mbarrier.arrive(shared.v_empty.index(last % c.STAGES), count=1)
    return m_i, l_i, acc


@gluon.jit
def consume(consumer: gl.constexpr, c, shared, out, normaliser, score, sink):
    """A consumer: rows m + consumer * ROWS of every tile of this program."""
    ROW: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, c.D, 16]))
    count = 0
    for turn in range(turns(c)):
        m, b, h, visited = assignment(c, turn)
        m += consumer * c.ROWS
        tile = work_tile(None, b, h, m * 0, c.M, c.N, c.HEADS)
        own = parameters(score, None, b, h)
        scale = 1.0
        if score.folds:
            scale = own.scale
        # The context is built inside the call: an assignment would turn the constants in it into run-time values.
        # [ROWS], [ROWS], [ROWS, D]
        m_i, l_i, acc = attend(
            c, shared,
            Task(m, turn, Plane(score, own, None, None, tile, c.ROWS, c.BLOCK_N), scale * LOG2E, consumer),
            visited, count,
        )  # fmt: skip
        count += visited.total

        rows = m + gl.arange(0, c.ROWS, ROW)  # [ROWS]
        some = rows < c.M
        if c.span.left is not None:
            some = some & (rows + decode_int(c.span.left) < c.N)
        if c.span.right is not None:
            some = some & (rows + decode_int(c.span.right) >= 0)
        logit = None
        if sink is not None:
            logit = gl.load(sink + h).to(gl.float32)
        # [ROWS, D], then [ROWS] each
        out_tile, lse, peak, log_sum = finish(
            gl.convert_layout(m_i, ROW), gl.convert_layout(l_i, ROW), acc, scale, logit, some
        )
        store_normaliser(normaliser, row_base(tile) + rows, lse, peak, log_sum, rows < c.M)
        if c.OWN_OUT:
            tma.store_wait(0)  # the previous tile's store
        buffer = shared.out.index(consumer)
        buffer.reshape([c.ROWS, c.D]).store(out_tile.to(shared.out.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out, [b, h, m, 0], buffer)
        if not c.OWN_OUT:
            tma.store_wait(0)
            mbarrier.arrive(shared.q_empty.index(consumer), count=1)
    tma.store_wait(0)


@gluon.jit
def specialize(c, q, k, v, out, normaliser, score, sink):
    """Allocate shared memory and start the partitions."""
    q_tiles = gl.allocate_shared_memory(q.dtype, [c.CONSUMERS, 1, 1, c.ROWS, c.D], q.layout)
    out_tiles = q_tiles
    if c.OWN_OUT:
        out_tiles = gl.allocate_shared_memory(q.dtype, [c.CONSUMERS, 1, 1, c.ROWS, c.D], q.layout)
    shared = Shared(
        q_tiles,
        gl.allocate_shared_memory(k.dtype, [c.STAGES, 1, 1, c.BLOCK_N, c.D], k.layout),
        gl.allocate_shared_memory(v.dtype, [c.STAGES, 1, 1, c.BLOCK_N, c.D], v.layout),
        out_tiles,
        barriers(c.CONSUMERS, 1), barriers(c.CONSUMERS, 1), barriers(c.STAGES, 1), barriers(c.STAGES, c.CONSUMERS),
        barriers(c.STAGES, 1), barriers(c.STAGES, c.CONSUMERS), barriers(c.CONSUMERS, 1),
    )  # fmt: skip
    fence_async_shared()
    if c.PING:
        mbarrier.arrive(shared.pingpong.index(0), count=1)  # the first consumer may start
    if c.CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (0, c, shared, out, normaliser, score, sink)),
                (consume, (1, c, shared, out, normaliser, score, sink)),
                (produce, (c, q, k, v, shared)),
            ],
            [4, 1], [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (0, c, shared, out, normaliser, score, sink)),
                (consume, (1, c, shared, out, normaliser, score, sink)),
                (consume, (2, c, shared, out, normaliser, score, sink)),
                (produce, (c, q, k, v, shared)),
            ],
            [4, 4, 1], [160, 160, 32],
        )  # fmt: skip


@gluon.jit(do_not_specialize=["M", "N", "HEADS", "BATCHED_HEADS", "WAVE"])
def hopper_forward_kernel(
    q, k, v, out, normaliser, score, span, sink, M, N, HEADS, BATCHED_HEADS, WAVE,
    GROUP: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PING: gl.constexpr, OWN_OUT: gl.constexpr,
    UNPACKED: gl.constexpr,
):  # fmt: skip
    """q, k, v, out: TMA descriptors of (B, H, S, D), with boxes of one consumer's rows (q, out) or of BLOCK_N keys (k,
    v). normaliser: a Normaliser. sink: pointer (Hq,).

    OWN_OUT: out has its own shared memory, else it reuses that of q. UNPACKED: weights stay in float32 from one step to
    the next, which costs registers; in half precision they cost two instructions each, because the assembler unpacks
    and repacks the pairs.
    """
    specialize(
        Plan(
            span, M, N, HEADS, BATCHED_HEADS, WAVE, GROUP, CONSUMERS, q.block_type.shape[2],
            k.block_type.shape[2], q.block_type.shape[3], STAGES, PING, OWN_OUT, UNPACKED,
        ),
        q, k, v, out, normaliser, score, sink,
    )  # fmt: skip
