"""Forward: out = softmax(scores) v and lse, one pass over the keys with the scores in registers.

Grid (tiles of BLOCK_M rows x B * Hq). What is saved for the backward is lse, (B, Hq, M) float32, the natural log of
the whole denominator; inside, scores are in base 2, so that exp2 is all that an exponential costs.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .memory import head_pointer, load_rows, schedule, store_rows
from .modifiers import Parameters, allowed, capped, is_linear, keep, parameters, value
from .numerics import LOG2E, dot
from .scores import products
from .softmax import finish, init, update
from .spans import interval, seen, sees, sweep, visit
from .types import Score, Span, View, Visit


class Rows(NamedTuple):
    """A tile of query rows, and everything that a step of its sweep over the keys asks for."""

    q: Any
    k: View
    v: View
    k_head: Any
    v_head: Any
    score: Score
    own: Parameters
    factor: Any
    mask: Any
    dropout: Any
    head: Any
    span: Span
    visit: Visit
    lo: Any
    hi: Any
    m: Any
    M: Any
    N: Any
    D: Any
    DV: Any
    BLOCK_M: Any
    BLOCK_N: Any
    BLOCK_D: Any
    BLOCK_DV: Any
    PRECISION: Any


@triton.jit
def live_keys(c, n, MASKED: tl.constexpr):
    """Keys of the tile at n that may be read, [BLOCK_N]; None in a full tile."""
    if MASKED:
        return seen(c.span, c.lo, c.hi, c.visit, n + tl.arange(0, c.BLOCK_N))
    else:
        return None


@triton.jit
def issue(c, n, MASKED: tl.constexpr):
    """q k^T, [BLOCK_M, BLOCK_N]."""
    k = load_rows(c.k, c.k_head, n, live_keys(c, n, MASKED), c.BLOCK_N, c.D, c.BLOCK_D)
    return products(c.q, k, c.PRECISION)


@triton.jit
def visible(c, n, MASKED: tl.constexpr):
    """The predicate of the tile at n, [BLOCK_M, BLOCK_N], or None where every row sees every key."""
    see = None
    if MASKED:
        see = sees(c.lo, c.hi, n + tl.arange(0, c.BLOCK_N))
    if c.mask is not None:
        by_tensor = allowed(c.mask, c.own, c.m, n, c.M, c.N, c.BLOCK_M, c.BLOCK_N, False)
        if MASKED:
            see = see & by_tensor
        else:
            see = by_tensor
    return see


@triton.jit
def absorb(c, state, s, n, MASKED: tl.constexpr):
    """Weigh the values of the tile at n."""
    m_i, l_i, acc = state
    x = s
    if not is_linear(c.score):
        t = None
        if c.score.softcap is not None:
            t = capped(s, c.own)
        x = value(s, t, c.score, c.own, c.m, n, c.M, c.N, c.BLOCK_M, c.BLOCK_N, False)
    p, alpha, m_i, l_i = update(m_i, l_i, x, visible(c, n, MASKED), c.factor)
    if c.dropout is not None:
        p = tl.where(keep(c.dropout, c.head, c.m, n, c.BLOCK_M, c.BLOCK_N, False), p, 0.0)
    v = load_rows(c.v, c.v_head, n, live_keys(c, n, MASKED), c.BLOCK_N, c.DV, c.BLOCK_DV)
    acc = dot(p.to(v.dtype), v, acc * alpha[:, None], c.PRECISION)
    return m_i, l_i, acc


@triton.jit(do_not_specialize=["M", "N", "HEADS", "BATCHED_HEADS", "WAVE"])
def forward_kernel(
    q, k, v, out, lse, score, span, mask, sink, dropout, M, N, HEADS, BATCHED_HEADS, WAVE,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q, k, v, out: View; lse: pointer (B, Hq, M); score: Score; span: Span; mask: View; sink: Scalar; Dropout."""
    tiles = tl.cdiv(M, BLOCK_M)
    tile, head = schedule(tiles, BATCHED_HEADS, WAVE)
    m = (tiles - 1 - tile) * BLOCK_M  # under a causal mask the last rows take longest
    b = head // HEADS
    h = head % HEADS
    rows = m + tl.arange(0, BLOCK_M)
    lo, hi = interval(span, b, rows, M, N)
    reach = visit(lo, hi, N, BLOCK_N)

    own = parameters(score, mask, b, h)
    q_tile = load_rows(q, head_pointer(q, b, h), m, rows < M, BLOCK_M, D, BLOCK_D)
    factor = tl.full([], LOG2E, tl.float32)
    if is_linear(score):
        # The sign of the scale goes to q, so that the largest product is the largest score.
        q_tile = tl.where(own.scale < 0, -q_tile, q_tile)
        factor = tl.abs(own.scale) * LOG2E
    c = Rows(
        q_tile, k, v, head_pointer(k, b, h // GROUP), head_pointer(v, b, h // GROUP), score, own, factor, mask, dropout,
        head, span, reach, lo, hi, m, M, N, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
    )  # fmt: skip
    m_i, l_i, acc = sweep(issue, absorb, c, init(BLOCK_M, BLOCK_DV), reach, BLOCK_N, OVERLAP)

    logit = None
    if sink is not None:
        logit = tl.load(sink + h).to(tl.float32)
    out_tile, lse_tile = finish(m_i, l_i, acc, factor, logit, lo < hi)
    if dropout is not None:
        out_tile *= dropout.rescale
    store_rows(out, head_pointer(out, b, h), m, rows < M, out_tile, BLOCK_M, DV, BLOCK_DV)
    tl.store(lse + head.to(tl.int64) * M + rows, lse_tile, mask=rows < M)
