"""Forward for sm_90 in Gluon: the kernel of forward.py, cut so that the tensor cores never wait for the softmax.

A persistent program of one producer warp and two or three consumers, groups of four warps with ROWS rows each. The
producer copies q, k and v into shared memory; keys and values stand in a ring of STAGES. A consumer issues the scores
of the next tile, then the weighted sum of this one, and computes the softmax while both are in flight; consumers take
turns in issuing, so that one's softmax runs beside the others' products.

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

from .hopper import barriers, fetch, pin, tile_start, visit
from .memory import number, place, pointers, row_base, schedule
from .modifiers import Plane, apart, capped, parameters, saturation
from .numerics import LOG2E
from .softmax import LOWEST, finish, store_normaliser, update
from .types import Span


class Plan(NamedTuple):
    """What every partition knows. From GROUP on all are constants: query heads per key-value head; the rows of one
    consumer; PING: consumers take turns; OWN_OUT, UNPACKED: see the kernel."""

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
    """Shared memory: q and out by consumer, k and v by stage, and the barriers that say when each is full or empty;
    turn: whose turn it is to issue products."""

    q: Any
    k: Any
    v: Any
    out: Any
    q_full: Any
    q_empty: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any
    turn: Any


class Tile(NamedTuple):
    """A consumer's tile of the program's `turn`: rows from m on, and what scores them."""

    m: Any
    turn: Any
    plane: Plane
    factor: Any
    group: Any


@gluon.jit
def assignment(p, turn):
    """(m, b, h, visited tiles) of a program's turn. Every other round runs backwards, so that who begins with a long
    tile goes on with a short one."""
    ROWS: gl.constexpr = p.ROWS * p.CONSUMERS
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    if turn % 2 == 1:
        place = programs - 1 - place
    tiles = gl.cdiv(p.M, ROWS)
    tile, head = schedule(turn * programs + place, tiles, p.BATCHED_HEADS, p.WAVE)
    m = (tiles - 1 - tile) * ROWS  # under a causal mask the last rows take longest
    last = gl.minimum(m + ROWS, p.M) - 1
    return m, head // p.HEADS, head % p.HEADS, visit(p.span, m, last, p.N, p.BLOCK_N)


@gluon.jit
def turns(p):
    """How many tiles this program computes."""
    ROWS: gl.constexpr = p.ROWS * p.CONSUMERS
    total = gl.cdiv(p.M, ROWS) * p.BATCHED_HEADS
    programs = gl.num_programs(0)
    rounds = total // programs
    place = gl.program_id(0)
    if rounds % 2 == 1:
        place = programs - 1 - place
    if rounds * programs + place < total:
        rounds += 1
    return rounds


@gluon.jit
def produce(p, q, k, v, shared):
    """Copy what the consumers will ask for, as soon as there is room: the first scores need q and the first keys."""
    count = 0
    for turn in range(turns(p)):
        m, b, h, seen = assignment(p, turn)
        for i in range(seen.total):
            n = tile_start(seen, i, p.BLOCK_N)
            stage = count % p.STAGES
            phase = count // p.STAGES & 1
            if i == 0:
                mbarrier.wait(shared.q_empty.index(0), (turn & 1) ^ 1)
                fetch(q, [b, h, m, 0], shared.q_full.index(0), shared.q.index(0))
            mbarrier.wait(shared.k_empty.index(stage), phase ^ 1)
            fetch(k, [b, h // p.GROUP, n, 0], shared.k_full.index(stage), shared.k.index(stage))
            if i == 0:
                for g in gl.static_range(1, p.CONSUMERS):
                    mbarrier.wait(shared.q_empty.index(g), (turn & 1) ^ 1)
                    fetch(q, [b, h, m + g * p.ROWS, 0], shared.q_full.index(g), shared.q.index(g))
            mbarrier.wait(shared.v_empty.index(stage), phase ^ 1)
            fetch(v, [b, h // p.GROUP, n, 0], shared.v_full.index(stage), shared.v.index(stage))
            count += 1


@gluon.jit
def scores(p, shared, group, count, S: gl.constexpr):
    """Issue q k^T [ROWS, BLOCK_N] of the count-th keys, once they are there."""
    stage = count % p.STAGES
    mbarrier.wait(shared.k_full.index(stage), count // p.STAGES & 1)
    q = shared.q.index(group).reshape([p.ROWS, p.D])
    k = shared.k.index(stage).reshape([p.BLOCK_N, p.D]).permute([1, 0])
    zeros = gl.zeros((p.ROWS, p.BLOCK_N), gl.float32, S)
    return warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)


@gluon.jit
def operand(e, ACC: gl.constexpr, DTYPE: gl.constexpr):
    """Weights e as the first operand of a product, in registers."""
    return gl.convert_layout(e, gl.DotOperandLayout(0, ACC, 2)).to(DTYPE)


@gluon.jit
def packed(p, e, ACC: gl.constexpr, DTYPE: gl.constexpr, NOW: gl.constexpr):
    """The operand, made as soon as the weights are or, if UNPACKED, by the step that multiplies them."""
    if NOW == p.UNPACKED:
        return e
    else:
        return operand(e, ACC, DTYPE)


@gluon.jit
def averages(p, shared, weights, acc, count):
    """Issue acc + weights v [ROWS, D] of the count-th values, once they are there."""
    stage = count % p.STAGES
    mbarrier.wait(shared.v_full.index(stage), count // p.STAGES & 1)
    return warpgroup_mma(weights, shared.v.index(stage).reshape([p.BLOCK_N, p.D]), acc, is_async=True)


@gluon.jit
def bias_tile(p, tile, n, S: gl.constexpr):
    """The bias of scores at keys from n on, to be asked for before the scores are waited for; 0 where there is none."""
    if tile.plane.score.bias is None:
        return 0
    else:
        # Beyond the edge the last row and key again, so that a load needs no mask; those scores are never used.
        i = gl.minimum(gl.arange(0, p.ROWS, gl.SliceLayout(1, S)), p.M - 1 - tile.m)[:, None]
        j = gl.minimum(gl.arange(0, p.BLOCK_N, gl.SliceLayout(0, S)), p.N - 1 - n)[None, :]
        return gl.load(pointers(tile.plane.score.bias, tile.plane.own.bias, tile.m, n, i, j))


@gluon.jit
def weigh(p, tile, s, bias, m_i, l_i, n, MASKED: gl.constexpr):
    """(weights, alpha, m_i, l_i) of scores s at keys from n on; see softmax.update."""
    S: gl.constexpr = s.type.layout
    i = gl.arange(0, p.ROWS, gl.SliceLayout(1, S))[:, None]
    j = gl.arange(0, p.BLOCK_N, gl.SliceLayout(0, S))[None, :]
    x = s
    if not tile.plane.score.folds:
        x = capped(tile.plane, s, saturation(tile.plane, s))
        if tile.plane.score.bias is not None:
            x += bias.to(gl.float32)
        if tile.plane.score.slopes is not None:
            x -= tile.plane.own.slope * apart(tile.plane, tile.m, n, i, j)
    allowed = None
    if MASKED:
        i += tile.m
        j += n
        allowed = j < p.N
        if p.span.left is not None:
            allowed = allowed & (j >= i + number(p.span.left))
        if p.span.right is not None:
            allowed = allowed & (j <= i + number(p.span.right))
    return update(m_i, l_i, x, allowed, tile.factor)


@gluon.jit
def step(p, shared, tile, count, n, state, MASKED: gl.constexpr):
    """The scores of the count-th keys, at n, beside the weighted sum of the values before them."""
    m_i, l_i, acc, e = state
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, p.BLOCK_N, 16])
    ACC: gl.constexpr = acc.type.layout
    weights = packed(p, e, ACC, shared.v.dtype, False)
    if p.PING:
        mbarrier.wait(shared.turn.index(tile.group), (count - 1 - tile.turn) & 1)  # of the program's steps before this
    bias = bias_tile(p, tile, n, S)
    s = scores(p, shared, tile.group, count, S)
    o = averages(p, shared, weights, acc, count - 1)
    if p.PING:
        mbarrier.arrive(shared.turn.index((tile.group + 1) % p.CONSUMERS), count=1)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(shared.k_empty.index(count % p.STAGES), count=1)
    e, alpha, m_i, l_i = weigh(p, tile, s, bias, m_i, l_i, n, MASKED)
    l_i = pin(l_i)
    acc = warpgroup_mma_wait(0, deps=(o,))
    mbarrier.arrive(shared.v_empty.index((count - 1) % p.STAGES), count=1)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, ACC))[:, None]
    return m_i, l_i, acc, packed(p, e, ACC, shared.v.dtype, True)


@gluon.jit
def attend(p, shared, tile, seen, count):
    """(m_i, l_i, acc) of a tile's rows over all keys that it visits; count of keys and values have gone before."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, p.BLOCK_N, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, p.D, 16])
    mbarrier.wait(shared.q_full.index(tile.group), tile.turn & 1)
    begin = tile_start(seen, 0, p.BLOCK_N)
    bias = bias_tile(p, tile, begin, S)
    s = warpgroup_mma_wait(0, deps=(scores(p, shared, tile.group, count, S),))
    mbarrier.arrive(shared.k_empty.index(count % p.STAGES), count=1)
    m_i = gl.full((p.ROWS,), LOWEST, gl.float32, gl.SliceLayout(1, S))
    l_i = gl.zeros((p.ROWS,), gl.float32, gl.SliceLayout(1, S))
    e, _, m_i, l_i = weigh(p, tile, s, bias, m_i, l_i, begin, True)
    acc = gl.zeros((p.ROWS, p.D), gl.float32, ACC)
    state = m_i, l_i, acc, packed(p, e, ACC, shared.v.dtype, True)
    partial = gl.maximum(seen.total - seen.full, 1)
    for i in range(1, partial):
        state = step(p, shared, tile, count + i, tile_start(seen, i, p.BLOCK_N), state, True)
    for i in range(partial, seen.total):
        state = step(p, shared, tile, count + i, tile_start(seen, i, p.BLOCK_N), state, False)
    m_i, l_i, acc, e = state
    last = count + seen.total - 1
    if p.OWN_OUT:
        mbarrier.arrive(shared.q_empty.index(tile.group), count=1)
    acc = warpgroup_mma_wait(0, deps=(averages(p, shared, packed(p, e, ACC, shared.v.dtype, False), acc, last),))
    mbarrier.arrive(shared.v_empty.index(last % p.STAGES), count=1)
    return m_i, l_i, acc


@gluon.jit
def consume(group: gl.constexpr, p, shared, out, normaliser, score, sink):
    """Rows m + group * ROWS of every tile of this program."""
    ROW: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, p.D, 16]))
    count = 0
    for turn in range(turns(p)):
        m, b, h, seen = assignment(p, turn)
        m += group * p.ROWS
        at = place(None, b, h, m * 0, p.M, p.N, p.HEADS)
        own = parameters(score, None, b, h)
        scale = 1.0
        if score.folds:
            scale = own.scale
        # The context is built inside the call: an assignment would turn the constants in it into run-time values.
        m_i, l_i, acc = attend(
            p, shared,
            Tile(
                m, turn, Plane(score, own, None, None, at, p.ROWS, p.BLOCK_N), scale * LOG2E,
                group,
            ),
            seen, count,
        )  # fmt: skip
        count += seen.total

        rows = m + gl.arange(0, p.ROWS, ROW)
        some = rows < p.M
        if p.span.left is not None:
            some = some & (rows + number(p.span.left) < p.N)
        if p.span.right is not None:
            some = some & (rows + number(p.span.right) >= 0)
        logit = None
        if sink is not None:
            logit = gl.load(sink + h).to(gl.float32)
        found, lse, peak, log_sum = finish(
            gl.convert_layout(m_i, ROW), gl.convert_layout(l_i, ROW), acc, scale, logit, some
        )
        store_normaliser(normaliser, row_base(at) + rows, lse, peak, log_sum, rows < p.M)
        if p.OWN_OUT:
            tma.store_wait(0)  # of the tile before
        slot = shared.out.index(group)
        slot.reshape([p.ROWS, p.D]).store(found.to(shared.out.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out, [b, h, m, 0], slot)
        if not p.OWN_OUT:
            tma.store_wait(0)
            mbarrier.arrive(shared.q_empty.index(group), count=1)
    tma.store_wait(0)


@gluon.jit
def specialize(p, q, k, v, out, normaliser, score, sink):
    """Allocate, and start the partitions."""
    q_tiles = gl.allocate_shared_memory(q.dtype, [p.CONSUMERS, 1, 1, p.ROWS, p.D], q.layout)
    out_tiles = q_tiles
    if p.OWN_OUT:
        out_tiles = gl.allocate_shared_memory(q.dtype, [p.CONSUMERS, 1, 1, p.ROWS, p.D], q.layout)
    shared = Shared(
        q_tiles,
        gl.allocate_shared_memory(k.dtype, [p.STAGES, 1, 1, p.BLOCK_N, p.D], k.layout),
        gl.allocate_shared_memory(v.dtype, [p.STAGES, 1, 1, p.BLOCK_N, p.D], v.layout),
        out_tiles,
        barriers(p.CONSUMERS, 1), barriers(p.CONSUMERS, 1), barriers(p.STAGES, 1), barriers(p.STAGES, p.CONSUMERS),
        barriers(p.STAGES, 1), barriers(p.STAGES, p.CONSUMERS), barriers(p.CONSUMERS, 1),
    )  # fmt: skip
    fence_async_shared()
    if p.PING:
        mbarrier.arrive(shared.turn.index(0), count=1)  # the first consumer begins
    if p.CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (0, p, shared, out, normaliser, score, sink)),
                (consume, (1, p, shared, out, normaliser, score, sink)),
                (produce, (p, q, k, v, shared)),
            ],
            [4, 1], [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (0, p, shared, out, normaliser, score, sink)),
                (consume, (1, p, shared, out, normaliser, score, sink)),
                (consume, (2, p, shared, out, normaliser, score, sink)),
                (produce, (p, q, k, v, shared)),
            ],
            [4, 4, 1], [160, 160, 32],
        )  # fmt: skip


@gluon.jit(do_not_specialize=["M", "N", "HEADS", "BATCHED_HEADS", "WAVE"])
def hopper_forward_kernel(
    q, k, v, out, normaliser, score, span, sink, M, N, HEADS, BATCHED_HEADS, WAVE,
    GROUP: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PING: gl.constexpr, OWN_OUT: gl.constexpr,
    UNPACKED: gl.constexpr,
):  # fmt: skip
    """q, k, v, out: descriptors of (B, H, S, D), with boxes of one consumer's rows, or of BLOCK_N keys. normaliser: a
    Normaliser; sink: pointer (Hq,). OWN_OUT: out has shared memory of its own; else it takes the place of q. UNPACKED:
    weights live from one step to the next in float32. In half precision they cost two instructions each, which the
    assembler spends on taking pairs apart and putting them together; float32 costs registers."""
    specialize(
        Plan(
            span, M, N, HEADS, BATCHED_HEADS, WAVE, GROUP, CONSUMERS, q.block_type.shape[2],
            k.block_type.shape[2], q.block_type.shape[3], STAGES, PING, OWN_OUT, UNPACKED,
        ),
        q, k, v, out, normaliser, score, sink,
    )  # fmt: skip
