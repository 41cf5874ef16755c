"""Backward: dq, dk, dv and every parameter's gradient, from q, k, v, out, dout and the saved numbers of each row.

    p = exp2((x - peak) * factor - log2_sum)    dx = p * (dp - delta)    delta = sum(dout * out) - dlse
    p = sigmoid(x)                              dx = p * (1 - p) * dp    for sigmoid attention
    dp = keep * (dout v^T)
    du = dx * f'(u)    dq = scale * du k    dk = scale * du^T q    dv = (keep * p)^T dout

Weights p are recomputed; x and factor are those of forward.py. peak and log_sum stay apart, because their sum, lse, is
rounded to the precision of peak, and log_sum is lost where peak is large.

Four kernels without atomics:

- delta_kernel: delta, and the row numbers in the form that the others read (types.RowNumbers).
- dkdv_kernel: a program works on keys and adds the query heads of its group in order.
- dq_kernel: dq, and all gradients that are sums over a row.
- dbias_kernel: a bias broadcast over batch or heads; a program works on a tile of the bias.

Grids are flat: tiles x heads. Row sums are float32 (B, Hq, M).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .memory import (
    head_pointer,
    key_base,
    load_rows,
    member,
    pair_pointers,
    row_base,
    schedule,
    scheduled_tile,
    start_pointer,
    store_rows,
    work_tile,
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

FULLY_MASKED: tl.constexpr = tl.constexpr(0x7F800000)  # pair(0.0, +inf)


@triton.jit
def row_numbers(known, tile, rows, seeing):
    """(peak, log2_sum, delta) [BLOCK_M] of rows. seeing [BLOCK_M]: rows where it is false get numbers that make their
    weights 0; None: true for all. Zeros for a sigmoid, whose `known` is None."""
    if known is None:
        return rows * 0.0, rows * 0.0, rows * 0.0
    else:
        own = row_base(tile) + rows
        if seeing is None:
            peak, log2_sum = unpair(tl.load(known.peak_log2_sum + own))
            return peak, log2_sum, tl.load(known.delta + own)
        else:
            peak, log2_sum = unpair(tl.load(known.peak_log2_sum + own, mask=seeing, other=FULLY_MASKED))
            return peak, log2_sum, tl.load(known.delta + own, mask=seeing, other=0.0)


@triton.jit
def weights(plane, s, t, peak, log2_sum, see, m, n, TRANSPOSED: tl.constexpr):
    """The weights p of products s. peak, log2_sum: shaped to broadcast."""
    # Subtract peak first: exact at the maximum. A rounded peak + log2_sum would lose log2_sum where peak is large, and
    # scaling before the subtraction would scale rounding errors by the whole score.
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
    """dx. kept: the tile of dropout's mask, or None."""
    if kept is not None:
        dp = tl.where(kept, dp * plane.dropout.rescale, 0.0)
    if plane.score.sigmoid:
        return p * (1.0 - p) * dp
    else:
        return p * (dp - delta)


@triton.jit
def dropped(plane, m, n, TRANSPOSED: tl.constexpr):
    """The tile of dropout's mask, or None."""
    if plane.dropout is None:
        return
    else:
        return keep(plane, m, n, TRANSPOSED)


@triton.jit(do_not_specialize=["M", "HEADS", "BATCHED_HEADS"])
def delta_kernel(
    out, dout, peak, log_sum, dlse, known, M, HEADS, BATCHED_HEADS,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """known: RowNumbers, written. peak, log_sum, dlse: pointers to (B, Hq, M), the last may be None.

    A fully masked row gets a log2_sum of +inf, so that its weights are 0 without a mask.
    """
    tile, head = schedule(tl.program_id(0), tl.cdiv(M, BLOCK_M), BATCHED_HEADS, BATCHED_HEADS)
    b = head // HEADS
    h = head % HEADS
    m = tile * BLOCK_M
    rows = m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    # [BLOCK_M, BLOCK_DV]
    o = load_rows(out, head_pointer(out, b, h), m, rows < M, BLOCK_M, DV, BLOCK_DV).to(tl.float32)
    # [BLOCK_M, BLOCK_DV]
    do = load_rows(dout, head_pointer(dout, b, h), m, rows < M, BLOCK_M, DV, BLOCK_DV).to(tl.float32)
    total = tl.sum(o * do, 1)  # [BLOCK_M]
    offs = head.to(tl.int64) * M + rows
    if dlse is not None:
        total -= tl.load(dlse + offs, mask=rows < M, other=0.0).to(tl.float32)
    tl.store(known.delta + offs, total, mask=rows < M)
    log = tl.load(log_sum + offs, mask=rows < M, other=0.0)
    log2_sum = tl.where(log == float("-inf"), float("inf"), log * LOG2E)  # [BLOCK_M]
    both = pair(tl.load(peak + offs, mask=rows < M, other=0.0), log2_sum)  # [BLOCK_M]
    tl.store(known.peak_log2_sum + offs, both, mask=rows < M)


class Keys(NamedTuple):
    """Context c of dkdv_kernel's sweep: a tile of keys at n, and all that a step over one head's rows reads."""

    k: Any  # [BLOCK_N, BLOCK_D]
    v: Any  # [BLOCK_N, BLOCK_DV]
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
    """k q^T and v dout^T [BLOCK_N, BLOCK_M], the tiles q and dout, and the numbers of the rows."""
    live_rows = live(c.reach, m, c.plane.BLOCK_M, MASKED)  # [BLOCK_M]
    q = load_rows(c.q, c.q_head, m, live_rows, c.plane.BLOCK_M, c.D, c.BLOCK_D)  # [BLOCK_M, BLOCK_D]
    do = load_rows(c.dout, c.do_head, m, live_rows, c.plane.BLOCK_M, c.DV, c.BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    # Loaded before the products: a load after the wait for a product would delay the exponentials that need it.
    rows = m + tl.arange(0, c.plane.BLOCK_M)
    if MASKED:
        peak, log2_sum, delta = row_numbers(c.known, c.plane.tile, rows, rows < c.plane.tile.M)
    else:
        peak, log2_sum, delta = row_numbers(c.known, c.plane.tile, rows, None)
    return products(c.k, q, c.PRECISION), products(c.v, do, c.PRECISION), q, do, peak, log2_sum, delta


@triton.jit
def absorb_rows(c, state, issued, m, MASKED: tl.constexpr):
    """Add the contributions of the tile of rows at m to dk, dv and the column sums of dx."""
    dk, dv, columns = state  # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV], [BLOCK_N]
    s, dp, q, do, peak, log2_sum, delta = issued
    t = saturation(c.plane, s)  # [BLOCK_N, BLOCK_M]
    see = visible(c.reach, c.plane, m, c.n, MASKED, True)  # [BLOCK_N, BLOCK_M]
    p = weights(c.plane, s, t, peak[None, :], log2_sum[None, :], see, m, c.n, True)  # [BLOCK_N, BLOCK_M]
    kept = dropped(c.plane, m, c.n, True)  # [BLOCK_N, BLOCK_M]
    if c.gradients.dv is not None:
        if kept is None:
            sent = p
        else:
            sent = tl.where(kept, p, 0.0)
        dv = dot(sent.to(do.dtype), do, dv, c.PRECISION)  # [BLOCK_N, BLOCK_DV]
    if (c.gradients.dk is not None) or (c.gradients.sums is not None):
        dx = score_gradient(c.plane, p, dp, delta[None, :], kept)  # [BLOCK_N, BLOCK_M]
        if c.gradients.sums is not None:
            columns += tl.sum(dx, 1)
        if c.gradients.dk is not None:
            du = backward(c.plane, dx, t)  # [BLOCK_N, BLOCK_M]
            if c.plane.score.scale.pointer:
                du *= c.plane.own.scale  # may differ between the heads of a group
            dk = dot(du.to(q.dtype), q, dk, c.PRECISION)  # [BLOCK_N, BLOCK_D]
    return dk, dv, columns


@triton.jit(do_not_specialize=["M", "N", "HEADS", "BATCHED_HEADS", "WAVE"])
def dkdv_kernel(
    q, k, v, dout, known, score, span, mask, dropout, ragged, gradients, M, N, HEADS, BATCHED_HEADS, WAVE,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """known: RowNumbers, None for a sigmoid. span: transposed, of keys over rows. HEADS, BATCHED_HEADS: of keys and
    values. Keys that no row sees get zeros.

    The first keys come first: under a causal mask they take longest.
    """
    tile = scheduled_tile(ragged, tl.program_id(0), tl.cdiv(N, BLOCK_N), M, N, HEADS, BATCHED_HEADS, WAVE, False)
    n = tile.index * BLOCK_N
    keys = n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    lo, hi = interval(span, tile.b, keys, tile.N, tile.M, 0 - tile.shift)  # [BLOCK_N]
    seen = lo < hi
    visited = visit(lo, hi, tile.M, BLOCK_M)
    k_tile = load_rows(k, start_pointer(k, tile, tile.h, tile.key), n, seen, BLOCK_N, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    # [BLOCK_N, BLOCK_DV]
    v_tile = load_rows(v, start_pointer(v, tile, tile.h, tile.key), n, seen, BLOCK_N, DV, BLOCK_DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for index in range(GROUP):
        query_tile = member(tile, index, GROUP)
        own = parameters(score, mask, tile.b, query_tile.h)
        tiles = listed(span, visited, query_tile)
        dk, dv, columns = sweep(
            issue_rows, absorb_rows,
            Keys(
                k_tile, v_tile, n, q, start_pointer(q, tile, query_tile.h, tile.row),
                dout, start_pointer(dout, tile, query_tile.h, tile.row), known,
                Plane(score, own, mask, dropout, query_tile, BLOCK_M, BLOCK_N),
                Reach(span, lo, hi, tiles, pattern(span, tile.b, query_tile.h, keys, tile.N, 0 - tile.shift)),
                gradients, D, DV, BLOCK_D, BLOCK_DV, PRECISION,
            ),
            (dk, dv, tl.zeros([BLOCK_N], tl.float32)), tiles, BLOCK_M, False,
        )  # fmt: skip
        if gradients.sums is not None:
            tl.store(gradients.sums + key_base(query_tile) + keys, tl.where(seen, columns, 0.0), mask=keys < tile.N)
    if gradients.dk is not None:
        if not score.scale.pointer:
            dk *= score.scale.value
        dk = tl.where(seen[:, None], dk, 0.0)
        start = start_pointer(gradients.dk, tile, tile.h, tile.key)
        store_rows(gradients.dk, start, n, keys < tile.N, dk, BLOCK_N, D, BLOCK_D)
    if gradients.dv is not None:
        if dropout is not None:
            dv *= dropout.rescale
        dv = tl.where(seen[:, None], dv, 0.0)
        start = start_pointer(gradients.dv, tile, tile.h, tile.key)
        store_rows(gradients.dv, start, n, keys < tile.N, dv, BLOCK_N, DV, BLOCK_DV)


class Rows(NamedTuple):
    """Context c of dq_kernel's sweep: a tile of query rows at m, and all that a step over the keys reads."""

    q: Any  # [BLOCK_M, BLOCK_D]
    do: Any  # [BLOCK_M, BLOCK_DV]
    m: Any
    peak: Any  # [BLOCK_M]
    log2_sum: Any  # [BLOCK_M]
    delta: Any  # [BLOCK_M]
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
    """q k^T and dout v^T [BLOCK_M, BLOCK_N], and the tile of keys."""
    keys = live(c.reach, n, c.plane.BLOCK_N, MASKED)  # [BLOCK_N]
    k = load_rows(c.k, c.k_head, n, keys, c.plane.BLOCK_N, c.D, c.BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v = load_rows(c.v, c.v_head, n, keys, c.plane.BLOCK_N, c.DV, c.BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
    return products(c.q, k, c.PRECISION), products(c.do, v, c.PRECISION), k


@triton.jit
def absorb_keys(c, state, issued, n, MASKED: tl.constexpr):
    """Add the contributions of the tile of keys at n to dq and the row sums; store dx as the gradient of a dense
    bias."""
    dq, caps, slopes, sums = state  # [BLOCK_M, BLOCK_D], then [BLOCK_M] each
    s, dp, k = issued
    t = saturation(c.plane, s)  # [BLOCK_M, BLOCK_N]
    see = visible(c.reach, c.plane, c.m, n, MASKED, False)  # [BLOCK_M, BLOCK_N]
    p = weights(c.plane, s, t, c.peak[:, None], c.log2_sum[:, None], see, c.m, n, False)  # [BLOCK_M, BLOCK_N]
    dx = score_gradient(c.plane, p, dp, c.delta[:, None], dropped(c.plane, c.m, n, False))  # [BLOCK_M, BLOCK_N]
    if c.gradients.bias is not None:
        i, j = positions(c.plane, c.m, n, False)  # [BLOCK_M, 1], [1, BLOCK_N]
        ptrs = tile_pointers(c.gradients.bias, c.bias_head, c.plane, c.m, n, False)  # [BLOCK_M, BLOCK_N]
        tl.store(ptrs, dx.to(ptrs.dtype.element_ty), mask=(i < c.plane.tile.M) & (j < c.plane.tile.N))
    if c.gradients.sums is not None:
        sums += tl.sum(dx, 1)
    if c.gradients.slopes is not None:
        slopes += tl.sum(slope_gradient(c.plane, dx, c.m, n, False), 1)
    if c.gradients.softcap is not None:
        caps += tl.sum(softcap_gradient(c.plane, dx, s, t), 1)
    if (c.gradients.dq is not None) or (c.gradients.scale is not None):
        dq = dot(backward(c.plane, dx, t).to(k.dtype), k, dq, c.PRECISION)  # [BLOCK_M, BLOCK_D]
    return dq, caps, slopes, sums


@triton.jit(do_not_specialize=["M", "N", "HEADS", "BATCHED_HEADS", "WAVE"])
def dq_kernel(
    q, k, v, dout, known, score, span, mask, dropout, ragged, gradients, M, N, HEADS, BATCHED_HEADS, WAVE,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Everything that is a sum over keys: dq and each row's part of the gradients of scale, softcap and slopes. Also
    stores dx as the gradient of a dense bias."""
    tile = scheduled_tile(ragged, tl.program_id(0), tl.cdiv(M, BLOCK_M), M, N, HEADS, BATCHED_HEADS, WAVE, True)
    m = tile.index * BLOCK_M
    rows = m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    lo, hi = interval(span, tile.b, rows, tile.M, tile.N, tile.shift)  # [BLOCK_M]
    visited = listed(span, visit(lo, hi, tile.N, BLOCK_N), tile)
    own = parameters(score, mask, tile.b, tile.h)
    # [BLOCK_M, BLOCK_D]
    q_tile = load_rows(q, start_pointer(q, tile, tile.h, tile.row), m, rows < tile.M, BLOCK_M, D, BLOCK_D)
    # [BLOCK_M, BLOCK_DV]
    do_tile = load_rows(dout, start_pointer(dout, tile, tile.h, tile.row), m, rows < tile.M, BLOCK_M, DV, BLOCK_DV)
    peak, log2_sum, delta = row_numbers(known, tile, rows, lo < hi)  # [BLOCK_M]
    bias_head = None
    if gradients.bias is not None:
        bias_head = head_pointer(gradients.bias, tile.b, tile.h)
    zeros = tl.zeros([BLOCK_M], tl.float32)
    # [BLOCK_M, BLOCK_D], then [BLOCK_M] each
    dq, caps, slopes, sums = sweep(
        issue_keys, absorb_keys,
        Rows(
            q_tile, do_tile, m, peak, log2_sum, delta,
            k, start_pointer(k, tile, tile.h // GROUP, tile.key), v, start_pointer(v, tile, tile.h // GROUP, tile.key),
            Plane(score, own, mask, dropout, tile, BLOCK_M, BLOCK_N),
            Reach(span, lo, hi, visited, pattern(span, tile.b, tile.h, rows, tile.M, tile.shift)),
            gradients, bias_head, D, DV, BLOCK_D, BLOCK_DV, PRECISION,
        ),
        (tl.zeros([BLOCK_M, BLOCK_D], tl.float32), zeros, zeros, zeros), visited, BLOCK_N, False,
    )  # fmt: skip
    own_rows = row_base(tile) + rows
    if gradients.scale is not None:
        tl.store(gradients.scale + own_rows, tl.sum(q_tile.to(tl.float32) * dq, 1), mask=rows < tile.M)
    if gradients.softcap is not None:
        tl.store(gradients.softcap + own_rows, caps, mask=rows < tile.M)
    if gradients.slopes is not None:
        tl.store(gradients.slopes + own_rows, slopes, mask=rows < tile.M)
    if gradients.sums is not None:
        tl.store(gradients.sums + own_rows, sums, mask=rows < tile.M)
    if gradients.dq is not None:
        start = start_pointer(gradients.dq, tile, tile.h, tile.row)
        store_rows(gradients.dq, start, m, rows < tile.M, dq * own.scale, BLOCK_M, D, BLOCK_D)


@triton.jit(do_not_specialize=["M", "N", "ROWS", "KEYS", "BATCH", "HEADS", "BIAS_BATCH", "BIAS_HEADS"])
def dbias_kernel(
    q, k, v, dout, known, score, span, mask, dropout, ragged, dbias, M, N, ROWS, KEYS, BATCH, HEADS,
    BIAS_BATCH, BIAS_HEADS,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dbias: View (1 or B, 1 or Hq, M, N). Adds dx over the batch entries and heads that share a tile, in order.

    ROWS, KEYS: extents of q and k in memory: M and N, or the totals of a packed batch.
    """
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    index, own = schedule(tl.program_id(0), tiles, BIAS_BATCH * BIAS_HEADS, BIAS_BATCH * BIAS_HEADS)
    m = index // tl.cdiv(N, BLOCK_N) * BLOCK_M
    n = index % tl.cdiv(N, BLOCK_N) * BLOCK_N
    rows = m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    keys = n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    shared_heads = HEADS // BIAS_HEADS
    for sharer in tl.range(0, BATCH // BIAS_BATCH * shared_heads):
        b = own // BIAS_HEADS + sharer // shared_heads
        tile = work_tile(ragged, b, own % BIAS_HEADS + sharer % shared_heads, index, ROWS, KEYS, HEADS)
        lo, hi = interval(span, b, rows, tile.M, tile.N, tile.shift)  # [BLOCK_M]
        visited = visit(lo, hi, tile.N, BLOCK_N)
        visits = 1
        if ragged is not None:
            visits = tl.minimum(visited.total, 1)  # there may be no memory that far past a sequence's end
        for _ in tl.range(0, visits):
            total += tile_gradient(
                q, k, v, dout, row_numbers(known, tile, rows, lo < hi),
                Plane(score, parameters(score, mask, b, tile.h), mask, dropout, tile, BLOCK_M, BLOCK_N),
                Reach(span, lo, hi, visited, pattern(span, b, tile.h, rows, tile.M, tile.shift)), m, n,
                GROUP, D, DV, BLOCK_D, BLOCK_DV, PRECISION,
            )  # fmt: skip
    # [BLOCK_M, BLOCK_N]
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
    """dx [BLOCK_M, BLOCK_N] of one tile of one head. known: the numbers of its rows, as from row_numbers."""
    rows = m + tl.arange(0, plane.BLOCK_M) < plane.tile.M  # [BLOCK_M]
    h = plane.tile.h
    keys = live(reach, n, plane.BLOCK_N, True)  # [BLOCK_N]
    # [BLOCK_M, BLOCK_D]
    q_tile = load_rows(q, start_pointer(q, plane.tile, h, plane.tile.row), m, rows, plane.BLOCK_M, D, BLOCK_D)
    # [BLOCK_N, BLOCK_D]
    k_tile = load_rows(k, start_pointer(k, plane.tile, h // GROUP, plane.tile.key), n, keys, plane.BLOCK_N, D, BLOCK_D)
    # [BLOCK_N, BLOCK_DV]
    v_tile = load_rows(
        v, start_pointer(v, plane.tile, h // GROUP, plane.tile.key), n, keys, plane.BLOCK_N, DV, BLOCK_DV
    )
    # [BLOCK_M, BLOCK_DV]
    do_tile = load_rows(dout, start_pointer(dout, plane.tile, h, plane.tile.row), m, rows, plane.BLOCK_M, DV, BLOCK_DV)
    if plane.score.additive is not None:
        s = additive(plane, m, n, False)  # [BLOCK_M, BLOCK_N]
    else:
        s = products(q_tile, k_tile, PRECISION)  # [BLOCK_M, BLOCK_N]
    dp = products(do_tile, v_tile, PRECISION)  # [BLOCK_M, BLOCK_N]
    see = visible(reach, plane, m, n, True, False)  # [BLOCK_M, BLOCK_N]
    peak, log2_sum, delta = known  # [BLOCK_M] each
    # [BLOCK_M, BLOCK_N]
    p = weights(plane, s, saturation(plane, s), peak[:, None], log2_sum[:, None], see, m, n, False)
    return score_gradient(plane, p, dp, delta[:, None], dropped(plane, m, n, False))
