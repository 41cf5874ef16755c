"""Backward: dq, dk, dv and every parameter's gradient, from out and what is known of each row's denominator, with the
weights computed again.

    p = exp(x - peak - log_sum)    dp = keep * (dout v^T)    dx = p * (dp - delta)    delta = sum(dout * out) - dlse
    p = sigmoid(x)                                           dx = p * (1 - p) * dp    where the normalizer is a sigmoid

Four kernels, none with an atomic: delta; dk, dv (a program owns keys, and adds up its group's query heads in order);
dq with what sums over a row; and dbias, for a bias that is broadcast over batch or heads (a program owns a tile of it).
Grids are flat: tiles x heads. What is known of rows (types.RowNumbers) and the row sums are (B, Hq, M) float32. peak
and log_sum stay apart, because their sum, lse, is rounded to a multiple of what peak's last bit stands for.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .memory import (
    head_pointer,
    key_base,
    load_rows,
    member,
    owner,
    pair_pointers,
    place,
    row_base,
    schedule,
    start_pointer,
    store_rows,
)
from .modifiers import (
    Plane,
    backward,
    keep,
    parameters,
    positions,
    saturation,
    slope_gradient,
    softcap_gradient,
    tile_pointers,
    value,
)
from .numerics import LOG2E, dot, pair, sigmoid, unpair
from .scores import additive, products
from .spans import Reach, interval, listed, live, pattern, sweep, visible, visit
from .types import KeyGradients, RowGradients, View

BLIND: tl.constexpr = tl.constexpr(0x7F800000)  # pair(0.0, +inf)


@triton.jit
def row_numbers(known, at, rows, seeing):
    """(peak, log2_sum, delta) of rows; those that are not `seeing` get weights of 0 from them. seeing None: every row
    sees. Zeros for a sigmoid, which asks for none of them: known is None."""
    if known is None:
        return rows * 0.0, rows * 0.0, rows * 0.0
    else:
        own = row_base(at) + rows
        if seeing is None:
            peak, log2_sum = unpair(tl.load(known.normaliser + own))
            return peak, log2_sum, tl.load(known.delta + own)
        else:
            peak, log2_sum = unpair(tl.load(known.normaliser + own, mask=seeing, other=BLIND))
            return peak, log2_sum, tl.load(known.delta + own, mask=seeing, other=0.0)


@triton.jit
def weights(plane, s, t, peak, log2_sum, see, m, n, TRANSPOSED: tl.constexpr):
    """p of products s; peak and log2_sum are shaped to broadcast."""
    # peak first, which at the maximum leaves an exact zero: a rounded sum of the two would lose log2_sum where peak is
    # large, and a factor that came first would multiply its rounding by the whole score.
    if plane.score.sigmoid:
        p = sigmoid(value(plane, s, t, m, n, TRANSPOSED))
    elif plane.score.folds:
        p = tl.exp2((s - peak) * (plane.own.scale * LOG2E) - log2_sum)
    else:
        p = tl.exp2((value(plane, s, t, m, n, TRANSPOSED) - peak) * LOG2E - log2_sum)
    if see is not None:
        p = tl.where(see, p, 0.0)
    return p


@triton.jit
def score_gradient(plane, p, dp, delta, kept):
    """dx; kept is dropout's tile, or None."""
    if kept is not None:
        dp = tl.where(kept, dp * plane.dropout.rescale, 0.0)
    if plane.score.sigmoid:
        return p * (1.0 - p) * dp
    else:
        return p * (dp - delta)


@triton.jit
def dropped(plane, m, n, TRANSPOSED: tl.constexpr):
    """Dropout's tile, or None."""
    if plane.dropout is None:
        return
    else:
        return keep(plane, m, n, TRANSPOSED)


@triton.jit(do_not_specialize=["M", "HEADS", "BATCHED_HEADS"])
def delta_kernel(
    out, dout, peak, log_sum, dlse, known, M, HEADS, BATCHED_HEADS,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """known: RowNumbers, to be written; peak, log_sum, dlse: pointers to (B, Hq, M), the last may be None.

    A row that sees nothing gets a log2_sum of +inf, and with it weights of 0, without a mask.
    """
    tile, head = schedule(tl.program_id(0), tl.cdiv(M, BLOCK_M), BATCHED_HEADS, BATCHED_HEADS)
    b = head // HEADS
    h = head % HEADS
    m = tile * BLOCK_M
    rows = m + tl.arange(0, BLOCK_M)
    o = load_rows(out, head_pointer(out, b, h), m, rows < M, BLOCK_M, DV, BLOCK_DV).to(tl.float32)
    do = load_rows(dout, head_pointer(dout, b, h), m, rows < M, BLOCK_M, DV, BLOCK_DV).to(tl.float32)
    total = tl.sum(o * do, 1)
    at = head.to(tl.int64) * M + rows
    if dlse is not None:
        total -= tl.load(dlse + at, mask=rows < M, other=0.0).to(tl.float32)
    tl.store(known.delta + at, total, mask=rows < M)
    log = tl.load(log_sum + at, mask=rows < M, other=0.0)
    log2_sum = tl.where(log == float("-inf"), float("inf"), log * LOG2E)
    both = pair(tl.load(peak + at, mask=rows < M, other=0.0), log2_sum)
    tl.store(known.normaliser + at, both, mask=rows < M)


class Keys(NamedTuple):
    """A tile of keys at n, and what a step of its sweep over one head's rows asks for."""

    k: Any
    v: Any
    n: Any
    q: View
    q_head: Any
    dout: View
    do_head: Any
    known: Any
    plane: Plane
    reach: Reach
    gradients: KeyGradients
    D: Any
    DV: Any
    BLOCK_D: Any
    BLOCK_DV: Any
    PRECISION: Any


@triton.jit
def issue_rows(c, m, MASKED: tl.constexpr):
    """k q^T and v dout^T, [BLOCK_N, BLOCK_M], the tiles they came from, and the rows' numbers."""
    rows = live(c.reach, m, c.plane.BLOCK_M, MASKED)
    q = load_rows(c.q, c.q_head, m, rows, c.plane.BLOCK_M, c.D, c.BLOCK_D)
    do = load_rows(c.dout, c.do_head, m, rows, c.plane.BLOCK_M, c.DV, c.BLOCK_DV)
    # Read before the products: what is read after a wait for one waits with it, and the exponentials need these.
    at = m + tl.arange(0, c.plane.BLOCK_M)
    if MASKED:
        peak, log2_sum, delta = row_numbers(c.known, c.plane.at, at, at < c.plane.at.M)
    else:
        peak, log2_sum, delta = row_numbers(c.known, c.plane.at, at, None)
    return products(c.k, q, c.PRECISION), products(c.v, do, c.PRECISION), q, do, peak, log2_sum, delta


@triton.jit
def absorb_rows(c, state, issued, m, MASKED: tl.constexpr):
    """Add what the rows of the tile at m send to the keys."""
    dk, dv, columns = state
    s, dp, q, do, peak, log2_sum, delta = issued
    t = saturation(c.plane, s)
    see = visible(c.reach, c.plane, m, c.n, MASKED, True)
    p = weights(c.plane, s, t, peak[None, :], log2_sum[None, :], see, m, c.n, True)
    kept = dropped(c.plane, m, c.n, True)
    if c.gradients.dv is not None:
        if kept is None:
            sent = p
        else:
            sent = tl.where(kept, p, 0.0)
        dv = dot(sent.to(do.dtype), do, dv, c.PRECISION)
    if (c.gradients.dk is not None) or (c.gradients.sums is not None):
        dx = score_gradient(c.plane, p, dp, delta[None, :], kept)
        if c.gradients.sums is not None:
            columns += tl.sum(dx, 1)
        if c.gradients.dk is not None:
            du = backward(c.plane, dx, t)
            if c.plane.score.scale.pointer:
                du *= c.plane.own.scale  # it may differ between the heads of a group
            dk = dot(du.to(q.dtype), q, dk, c.PRECISION)
    return dk, dv, columns


@triton.jit(do_not_specialize=["M", "N", "HEADS", "BATCHED_HEADS", "WAVE"])
def dkdv_kernel(
    q, k, v, dout, known, score, span, mask, dropout, ragged, gradients, M, N, HEADS, BATCHED_HEADS, WAVE,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """known: RowNumbers, None for a sigmoid; span: of keys over rows. HEADS and BATCHED_HEADS count key-value heads.
    Keys nobody sees get zeros.

    Under a causal mask the first keys take longest.
    """
    at = owner(ragged, tl.program_id(0), tl.cdiv(N, BLOCK_N), M, N, HEADS, BATCHED_HEADS, WAVE, False)
    n = at.tile * BLOCK_N
    keys = n + tl.arange(0, BLOCK_N)
    lo, hi = interval(span, at.b, keys, at.N, at.M, 0 - at.shift)
    seen = lo < hi
    reach = visit(lo, hi, at.M, BLOCK_M)
    k_tile = load_rows(k, start_pointer(k, at, at.h, at.key), n, seen, BLOCK_N, D, BLOCK_D)
    v_tile = load_rows(v, start_pointer(v, at, at.h, at.key), n, seen, BLOCK_N, DV, BLOCK_DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for index in range(GROUP):
        of_rows = member(at, index, GROUP)
        own = parameters(score, mask, at.b, of_rows.h)
        tiles = listed(span, reach, of_rows)
        dk, dv, columns = sweep(
            issue_rows, absorb_rows,
            Keys(
                k_tile, v_tile, n, q, start_pointer(q, at, of_rows.h, at.row),
                dout, start_pointer(dout, at, of_rows.h, at.row), known,
                Plane(score, own, mask, dropout, of_rows, BLOCK_M, BLOCK_N),
                Reach(span, lo, hi, tiles, pattern(span, at.b, of_rows.h, keys, at.N, 0 - at.shift)),
                gradients, D, DV, BLOCK_D, BLOCK_DV, PRECISION,
            ),
            (dk, dv, tl.zeros([BLOCK_N], tl.float32)), tiles, BLOCK_M, False,
        )  # fmt: skip
        if gradients.sums is not None:
            tl.store(gradients.sums + key_base(of_rows) + keys, tl.where(seen, columns, 0.0), mask=keys < at.N)
    if gradients.dk is not None:
        if not score.scale.pointer:
            dk *= score.scale.value
        dk = tl.where(seen[:, None], dk, 0.0)
        start = start_pointer(gradients.dk, at, at.h, at.key)
        store_rows(gradients.dk, start, n, keys < at.N, dk, BLOCK_N, D, BLOCK_D)
    if gradients.dv is not None:
        if dropout is not None:
            dv *= dropout.rescale
        dv = tl.where(seen[:, None], dv, 0.0)
        start = start_pointer(gradients.dv, at, at.h, at.key)
        store_rows(gradients.dv, start, n, keys < at.N, dv, BLOCK_N, DV, BLOCK_DV)


class Rows(NamedTuple):
    """A tile of query rows at m, and what a step of its sweep over the keys asks for."""

    q: Any
    do: Any
    m: Any
    peak: Any
    log2_sum: Any
    delta: Any
    k: View
    k_head: Any
    v: View
    v_head: Any
    plane: Plane
    reach: Reach
    gradients: RowGradients
    bias_head: Any
    D: Any
    DV: Any
    BLOCK_D: Any
    BLOCK_DV: Any
    PRECISION: Any


@triton.jit
def issue_keys(c, n, MASKED: tl.constexpr):
    """q k^T and dout v^T, [BLOCK_M, BLOCK_N], and the keys."""
    keys = live(c.reach, n, c.plane.BLOCK_N, MASKED)
    k = load_rows(c.k, c.k_head, n, keys, c.plane.BLOCK_N, c.D, c.BLOCK_D)
    v = load_rows(c.v, c.v_head, n, keys, c.plane.BLOCK_N, c.DV, c.BLOCK_DV)
    return products(c.q, k, c.PRECISION), products(c.do, v, c.PRECISION), k


@triton.jit
def absorb_keys(c, state, issued, n, MASKED: tl.constexpr):
    """Add what the keys of the tile at n send to the rows."""
    dq, caps, slopes, sums = state
    s, dp, k = issued
    t = saturation(c.plane, s)
    see = visible(c.reach, c.plane, c.m, n, MASKED, False)
    p = weights(c.plane, s, t, c.peak[:, None], c.log2_sum[:, None], see, c.m, n, False)
    dx = score_gradient(c.plane, p, dp, c.delta[:, None], dropped(c.plane, c.m, n, False))
    if c.gradients.bias is not None:
        i, j = positions(c.plane, c.m, n, False)
        ptrs = tile_pointers(c.gradients.bias, c.bias_head, c.plane, c.m, n, False)
        tl.store(ptrs, dx.to(ptrs.dtype.element_ty), mask=(i < c.plane.at.M) & (j < c.plane.at.N))
    if c.gradients.sums is not None:
        sums += tl.sum(dx, 1)
    if c.gradients.slopes is not None:
        slopes += tl.sum(slope_gradient(c.plane, dx, c.m, n, False), 1)
    if c.gradients.softcap is not None:
        caps += tl.sum(softcap_gradient(c.plane, dx, s, t), 1)
    if (c.gradients.dq is not None) or (c.gradients.scale is not None):
        dq = dot(backward(c.plane, dx, t).to(k.dtype), k, dq, c.PRECISION)
    return dq, caps, slopes, sums


@triton.jit(do_not_specialize=["M", "N", "HEADS", "BATCHED_HEADS", "WAVE"])
def dq_kernel(
    q, k, v, dout, known, score, span, mask, dropout, ragged, gradients, M, N, HEADS, BATCHED_HEADS, WAVE,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What sums over the keys: dq, each row's share of the scalar gradients, and dx itself for a dense bias."""
    at = owner(ragged, tl.program_id(0), tl.cdiv(M, BLOCK_M), M, N, HEADS, BATCHED_HEADS, WAVE, True)
    m = at.tile * BLOCK_M
    rows = m + tl.arange(0, BLOCK_M)
    lo, hi = interval(span, at.b, rows, at.M, at.N, at.shift)
    reach = listed(span, visit(lo, hi, at.N, BLOCK_N), at)
    own = parameters(score, mask, at.b, at.h)
    q_tile = load_rows(q, start_pointer(q, at, at.h, at.row), m, rows < at.M, BLOCK_M, D, BLOCK_D)
    do_tile = load_rows(dout, start_pointer(dout, at, at.h, at.row), m, rows < at.M, BLOCK_M, DV, BLOCK_DV)
    peak, log2_sum, delta = row_numbers(known, at, rows, lo < hi)
    bias_head = None
    if gradients.bias is not None:
        bias_head = head_pointer(gradients.bias, at.b, at.h)
    zeros = tl.zeros([BLOCK_M], tl.float32)
    dq, caps, slopes, sums = sweep(
        issue_keys, absorb_keys,
        Rows(
            q_tile, do_tile, m, peak, log2_sum, delta,
            k, start_pointer(k, at, at.h // GROUP, at.key), v, start_pointer(v, at, at.h // GROUP, at.key),
            Plane(score, own, mask, dropout, at, BLOCK_M, BLOCK_N),
            Reach(span, lo, hi, reach, pattern(span, at.b, at.h, rows, at.M, at.shift)),
            gradients, bias_head, D, DV, BLOCK_D, BLOCK_DV, PRECISION,
        ),
        (tl.zeros([BLOCK_M, BLOCK_D], tl.float32), zeros, zeros, zeros), reach, BLOCK_N, False,
    )  # fmt: skip
    own_rows = row_base(at) + rows
    if gradients.scale is not None:
        tl.store(gradients.scale + own_rows, tl.sum(q_tile.to(tl.float32) * dq, 1), mask=rows < at.M)
    if gradients.softcap is not None:
        tl.store(gradients.softcap + own_rows, caps, mask=rows < at.M)
    if gradients.slopes is not None:
        tl.store(gradients.slopes + own_rows, slopes, mask=rows < at.M)
    if gradients.sums is not None:
        tl.store(gradients.sums + own_rows, sums, mask=rows < at.M)
    if gradients.dq is not None:
        start = start_pointer(gradients.dq, at, at.h, at.row)
        store_rows(gradients.dq, start, m, rows < at.M, dq * own.scale, BLOCK_M, D, BLOCK_D)


@triton.jit(do_not_specialize=["M", "N", "ROWS", "KEYS", "BATCH", "HEADS", "BIAS_BATCH", "BIAS_HEADS"])
def dbias_kernel(
    q, k, v, dout, known, score, span, mask, dropout, ragged, dbias, M, N, ROWS, KEYS, BATCH, HEADS,
    BIAS_BATCH, BIAS_HEADS,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dbias: View (1 or B, 1 or Hq, M, N). Adds dx over the batches and heads that share a tile, in order.

    ROWS, KEYS: those that q and k have in memory: M and N, or of all sequences together.
    """
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    tile, own = schedule(tl.program_id(0), tiles, BIAS_BATCH * BIAS_HEADS, BIAS_BATCH * BIAS_HEADS)
    m = tile // tl.cdiv(N, BLOCK_N) * BLOCK_M
    n = tile % tl.cdiv(N, BLOCK_N) * BLOCK_N
    rows = m + tl.arange(0, BLOCK_M)
    keys = n + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    shared_heads = HEADS // BIAS_HEADS
    for sharer in tl.range(0, BATCH // BIAS_BATCH * shared_heads):
        b = own // BIAS_HEADS + sharer // shared_heads
        at = place(ragged, b, own % BIAS_HEADS + sharer % shared_heads, tile, ROWS, KEYS, HEADS)
        lo, hi = interval(span, b, rows, at.M, at.N, at.shift)
        reach = visit(lo, hi, at.N, BLOCK_N)
        visits = 1
        if ragged is not None:
            visits = tl.minimum(reach.total, 1)  # far behind a sequence's end there is no memory to read
        for _ in tl.range(0, visits):
            total += tile_gradient(
                q, k, v, dout, row_numbers(known, at, rows, lo < hi),
                Plane(score, parameters(score, mask, b, at.h), mask, dropout, at, BLOCK_M, BLOCK_N),
                Reach(span, lo, hi, reach, pattern(span, b, at.h, rows, at.M, at.shift)), m, n,
                GROUP, D, DV, BLOCK_D, BLOCK_DV, PRECISION,
            )  # fmt: skip
    ptrs = pair_pointers(
        dbias, head_pointer(dbias, own // BIAS_HEADS, own % BIAS_HEADS), m, n, M, N, BLOCK_M, BLOCK_N, False
    )
    tl.store(ptrs, total.to(ptrs.dtype.element_ty), mask=(rows < M)[:, None] & (keys < N)[None, :])


@triton.jit
def tile_gradient(
    q, k, v, dout, known, plane, reach, m, n,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dx of one tile of one head, [BLOCK_M, BLOCK_N]; known: its rows' numbers."""
    rows = m + tl.arange(0, plane.BLOCK_M) < plane.at.M
    h = plane.at.h
    keys = live(reach, n, plane.BLOCK_N, True)
    q_tile = load_rows(q, start_pointer(q, plane.at, h, plane.at.row), m, rows, plane.BLOCK_M, D, BLOCK_D)
    k_tile = load_rows(k, start_pointer(k, plane.at, h // GROUP, plane.at.key), n, keys, plane.BLOCK_N, D, BLOCK_D)
    v_tile = load_rows(v, start_pointer(v, plane.at, h // GROUP, plane.at.key), n, keys, plane.BLOCK_N, DV, BLOCK_DV)
    do_tile = load_rows(dout, start_pointer(dout, plane.at, h, plane.at.row), m, rows, plane.BLOCK_M, DV, BLOCK_DV)
    if plane.score.additive is not None:
        s = additive(plane, m, n, False)
    else:
        s = products(q_tile, k_tile, PRECISION)
    dp = products(do_tile, v_tile, PRECISION)
    see = visible(reach, plane, m, n, True, False)
    peak, log2_sum, delta = known
    p = weights(plane, s, saturation(plane, s), peak[:, None], log2_sum[:, None], see, m, n, False)
    return score_gradient(plane, p, dp, delta[:, None], dropped(plane, m, n, False))
