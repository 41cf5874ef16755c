"""Additive scores: the features that the kernels read, and the whole backward in one pass over the keys.

    s = w . tanh(q + k); with t = tanh(q + k), per feature:
    dq_i = scale w sum_j du_ij (1 - t_ij^2)    dk_j = scale w sum_i du_ij (1 - t_ij^2)    dw = scale sum_ij du_ij t_ij

A program works on a tile of keys and sweeps over the rows of its group's query heads. For each tile of rows it loops
over the features once for the scores and once more for the gradients: two tanh per feature, where separate kernels for
rows and for keys would take four.

Tiles of keys add to the same rows, in their order: a counter per tile of rows (types.AdditiveGradients.semaphores) says
which tile of keys is next, and a program waits until it is its own. It waits for smaller tickets only, so there is no
deadlock whatever order the hardware starts programs in, and the result is deterministic.

Grid: as many programs as run at once; each takes tickets until there are no tiles left. Features are float32 and
feature-major; see types.Additive. Scores are natural logits until their exponential.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .backward import dropped, row_numbers, score_gradient, weights
from .memory import (
    decode_int,
    head_pointer,
    key_base,
    load_rows,
    member,
    row_base,
    scheduled_tile,
    start_pointer,
    store_rows,
)
from .modifiers import Plane, backward, parameters, saturation, slope_gradient, softcap_gradient, tile_pointers
from .numerics import LOG2E, dot, reciprocal
from .scores import (
    PEAKS,
    additive,
    feature_start,
    first_features,
    following,
    halves,
    key_features,
    paired,
    pitch,
    products,
    query_features,
    tanhs,
)
from .spans import Reach, interval, listed, live, pattern, visible, visit
from .types import AdditiveGradients, View

SLICE: tl.constexpr = tl.constexpr(16)  # features added at a time


@triton.jit(do_not_specialize=["LENGTH", "HEADS", "BATCHED_HEADS"])
def additive_prepare_kernel(
    x, features, exponentials, peaks, blocks, ragged, LENGTH, HEADS, BATCHED_HEADS,
    FEATURES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Write features, and if PAIRS their exponentials and peaks, of x: View (B, H, LENGTH, D). Zeros past the end.

    Grid: (blocks of PEAKS rows x heads), flat. ragged: lengths of x only; memory between sequences must hold zeros
    already.
    """
    tile = scheduled_tile(
        ragged, tl.program_id(0), decode_int(blocks), LENGTH, LENGTH, HEADS, BATCHED_HEADS, BATCHED_HEADS, False
    )
    start = tile.index * PEAKS
    rows = start + tl.arange(0, PEAKS) < tile.M  # [PEAKS]
    # [PEAKS, BLOCK_D]
    x_tile = load_rows(x, start_pointer(x, tile, tile.h, tile.row), start, rows, PEAKS, D, BLOCK_D).to(tl.float32)
    d = tl.arange(0, BLOCK_D)[None, :]  # [1, BLOCK_D]
    first = feature_start(tile, tile.row) + start
    own = tile.memory_head.to(tl.int64) * FEATURES * pitch(blocks) + first
    offsets = d.to(tl.int64) * pitch(blocks) + tl.arange(0, PEAKS)[:, None]  # [PEAKS, BLOCK_D]
    width = FEATURES
    if ragged is not None:
        width = tl.where(start < tile.M, FEATURES, 0)  # a tile past the end of its sequence writes nothing
    tl.store(features + own + offsets, x_tile, mask=d < width)
    if PAIRS:
        tl.store(exponentials + own + offsets, tl.exp2(x_tile * (2.0 * LOG2E)), mask=d < width)
        block = tile.memory_head.to(tl.int64) * decode_int(blocks) + first // PEAKS
        tl.store(peaks + block, tl.max(tl.max(tl.abs(x_tile), 1), 0), mask=width > 0)


class Keys(NamedTuple):
    """Context c of the sweep: a tile of keys at n, and all that a step over one head's rows reads. row_slots,
    key_slots: tiles per head for which a packed batch has memory; None for a dense one."""

    v: Any  # [BLOCK_N, BLOCK_DV]
    n: Any
    program: Any
    row_slots: Any
    key_slots: Any
    dout: View
    do_head: Any
    bias_head: Any
    known: Any
    plane: Plane
    reach: Reach
    gradients: AdditiveGradients
    DV: Any
    BLOCK_DV: Any
    PRECISION: Any


@triton.jit
def row_slot(tile, index, slots, BLOCK: tl.constexpr):
    """Index of a tile of rows in memory with one entry per tile."""
    if slots is None:
        return tile.head * tl.cdiv(tile.M, BLOCK) + index
    else:
        return tile.memory_head * slots + tile.row // BLOCK + tile.b + index


@triton.jit
def key_slot(tile, slots, BLOCK: tl.constexpr):
    """Index of the program's tile of keys in memory with one entry per tile."""
    if slots is None:
        return tile.head * tl.cdiv(tile.N, BLOCK) + tile.index
    else:
        return tile.memory_head * slots + tile.key // BLOCK + tile.b + tile.index


@triton.jit
def add_features(c, du, m, PAIRED: tl.constexpr):
    """Add the contributions of du [BLOCK_N, BLOCK_M] to dk and dw; write the tile's part of dq to the stage."""
    q, k = first_features(c.plane, m, c.n, PAIRED)
    w = c.plane.own.weights
    dk = key_features(c.plane, c.gradients.dk, c.n)
    stage = c.gradients.stage + c.program.to(tl.int64) * c.plane.score.additive.features * c.plane.BLOCK_M
    slot = key_slot(c.plane.tile, c.key_slots, c.plane.BLOCK_N)
    dw = c.gradients.dw + slot.to(tl.int64) * c.plane.score.additive.features
    step = pitch(c.plane.score.additive.k_pitch)
    for _ in tl.range(0, c.plane.score.additive.features, 2):
        if PAIRED:
            a, b = halves(c.plane, q, k, True)
            r = reciprocal(a * b, c.plane.score.additive.fast)  # [BLOCK_N, BLOCK_M]
            x, y = 1.0 - 2.0 * (b * r), 1.0 - 2.0 * (a * r)  # [BLOCK_N, BLOCK_M]
        else:
            x, y = tanhs(c.plane, q, k, True)  # [BLOCK_N, BLOCK_M]
        add_feature(c, du, x, tl.load(w), dk, stage, dw)
        add_feature(c, du, y, tl.load(w + 1), dk + step, stage + c.plane.BLOCK_M, dw + 1)
        q, k = following(c.plane, q, k, 2)
        w += 2
        dk += 2 * step
        stage += 2 * c.plane.BLOCK_M
        dw += 2


@triton.jit
def add_feature(c, du, t, w, dk, stage, dw):
    sent = du * t  # [BLOCK_N, BLOCK_M]
    slope = du - sent * t  # [BLOCK_N, BLOCK_M]
    tl.store(stage + tl.arange(0, c.plane.BLOCK_M), tl.sum(slope, 0) * w)
    ptrs = dk + tl.arange(0, c.plane.BLOCK_N)  # [BLOCK_N]
    tl.store(ptrs, tl.load(ptrs) + tl.sum(slope, 1) * (w * c.plane.own.scale))
    tl.store(dw, tl.load(dw) + tl.sum(sent))


@triton.jit
def absorb(c, state, m):
    """Add the contributions of the tile of rows at m to the state. Returns the state, and the row sums of dx."""
    dv, columns, scale, caps, slopes = state  # [BLOCK_N, BLOCK_DV], then [BLOCK_N] each
    rows = m + tl.arange(0, c.plane.BLOCK_M)  # [BLOCK_M]
    live_rows = live(c.reach, m, c.plane.BLOCK_M, True)  # [BLOCK_M]
    do = load_rows(c.dout, c.do_head, m, live_rows, c.plane.BLOCK_M, c.DV, c.BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    peak, log2_sum, delta = row_numbers(c.known, c.plane.tile, rows, rows < c.plane.tile.M)  # [BLOCK_M]
    s = additive(c.plane, m, c.n, True)  # [BLOCK_N, BLOCK_M]
    dp = products(c.v, do, c.PRECISION)  # [BLOCK_N, BLOCK_M]
    t = saturation(c.plane, s)  # [BLOCK_N, BLOCK_M]
    see = visible(c.reach, c.plane, m, c.n, True, True)  # [BLOCK_N, BLOCK_M]
    p = weights(c.plane, s, t, peak[None, :], log2_sum[None, :], see, m, c.n, True)  # [BLOCK_N, BLOCK_M]
    kept = dropped(c.plane, m, c.n, True)  # [BLOCK_N, BLOCK_M]
    if c.gradients.dv is not None:
        if kept is None:
            sent = p
        else:
            sent = tl.where(kept, p, 0.0)
        dv = dot(sent.to(do.dtype), do, dv, c.PRECISION)  # [BLOCK_N, BLOCK_DV]
    dx = score_gradient(c.plane, p, dp, delta[None, :], kept)  # [BLOCK_N, BLOCK_M]
    if c.gradients.bias is not None:
        ptrs = tile_pointers(c.gradients.bias, c.bias_head, c.plane, m, c.n, True)  # [BLOCK_N, BLOCK_M]
        inside = (rows < c.plane.tile.M)[None, :] & (c.n + tl.arange(0, c.plane.BLOCK_N) < c.plane.tile.N)[:, None]
        tl.store(ptrs, dx.to(ptrs.dtype.element_ty), mask=inside)
    if c.gradients.columns is not None:
        columns += tl.sum(dx, 1)
    if c.gradients.slopes is not None:
        slopes += tl.sum(slope_gradient(c.plane, dx, m, c.n, True), 1)
    if c.gradients.softcap is not None:
        caps += tl.sum(softcap_gradient(c.plane, dx, s, t), 1)
    du = backward(c.plane, dx, t)  # [BLOCK_N, BLOCK_M]
    if c.gradients.scale is not None:
        scale += tl.sum(du * s, 1)
    if c.gradients.dq is not None:
        if c.plane.score.additive.pairs:
            if paired(c.plane, m, c.n):
                add_features(c, du, m, True)
            else:
                add_features(c, du, m, False)
        else:
            add_features(c, du, m, False)
    sums = tl.zeros([c.plane.BLOCK_M], tl.float32)  # [BLOCK_M]
    if c.gradients.rows is not None:
        sums += tl.sum(dx, 0)
    return dv, columns, scale, caps, slopes, sums


@triton.jit
def add_rows(c, m, sums):
    """Add the staged part of dq and the row sums of dx to the rows at m, when the semaphore says so."""
    rows = m + tl.arange(0, c.plane.BLOCK_M)  # [BLOCK_M]
    if c.gradients.rows is not None:
        ptrs = c.gradients.rows + (row_base(c.plane.tile) + rows)  # [BLOCK_M]
        tl.store(ptrs, tl.load(ptrs, mask=rows < c.plane.tile.M, other=0.0) + sums, mask=rows < c.plane.tile.M)
    if c.gradients.dq is not None:
        base = query_features(c.plane, c.gradients.dq, m * 0)
        stage = c.gradients.stage + c.program.to(tl.int64) * c.plane.score.additive.features * c.plane.BLOCK_M
        for first in tl.range(0, c.plane.score.additive.features, SLICE):
            d = first + tl.arange(0, SLICE)[:, None]  # [SLICE, 1]
            inside = (d < c.plane.score.additive.features) & (rows < c.plane.tile.M)[None, :]
            ptrs = base + d.to(tl.int64) * pitch(c.plane.score.additive.q_pitch) + rows[None, :]  # [SLICE, BLOCK_M]
            # [SLICE, BLOCK_M]
            staged = tl.load(
                stage + d * c.plane.BLOCK_M + tl.arange(0, c.plane.BLOCK_M)[None, :], mask=inside, other=0.0
            )
            tl.store(ptrs, tl.load(ptrs, mask=inside, other=0.0) + staged, mask=inside)


@triton.jit
def sweep_rows(c, state):
    """Go through every tile of one query head's rows: absorb those that see the keys; advance the semaphores of all."""
    tiles = tl.cdiv(c.plane.tile.M, c.plane.BLOCK_M)
    visit = c.reach.visit
    for index in tl.range(0, tiles):
        m = index * c.plane.BLOCK_M
        if c.reach.span.block_mask is None:
            visited = (m >= visit.origin) & (m < visit.origin + visit.total * c.plane.BLOCK_M)
        else:
            visited = tl.load(visit.block_mask + index) != 0
        sums = tl.zeros([c.plane.BLOCK_M], tl.float32)  # [BLOCK_M]
        if visited:
            dv, columns, scale, caps, slopes, sums = absorb(c, state, m)
            state = dv, columns, scale, caps, slopes
        semaphore = c.gradients.semaphores + row_slot(c.plane.tile, index, c.row_slots, c.plane.BLOCK_M)
        # The first barrier makes the stage visible to all threads; after the second, earlier tiles' sums are visible.
        tl.debug_barrier()
        while tl.atomic_add(semaphore, 0, sem="acquire") != c.plane.tile.index:
            pass
        tl.debug_barrier()
        if visited:
            add_rows(c, m, sums)
        tl.debug_barrier()
        tl.atomic_xchg(semaphore, c.plane.tile.index + 1, sem="release")
    return state


@triton.jit
def keep_columns(pointer, tile, keys, seen, sums):
    if pointer is not None:
        tl.store(pointer + key_base(tile) + keys, tl.where(seen, sums, 0.0), mask=keys < tile.N)


@triton.jit(do_not_specialize=["M", "N", "HEADS", "BATCHED_HEADS", "WAVE"])
def additive_backward_kernel(
    v, dout, known, score, span, mask, dropout, ragged, gradients, M, N, HEADS, BATCHED_HEADS, WAVE,
    GROUP: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """known: RowNumbers, None for a sigmoid. span: transposed, of keys over rows. HEADS, BATCHED_HEADS: of keys and
    values. Keys that no row sees get zeros.

    A program keeps taking tickets, so that the stage needs memory per program, not per tile.
    """
    tiles = tl.cdiv(N, BLOCK_N)
    tickets = tiles * BATCHED_HEADS
    row_slots = None
    key_slots = None
    if ragged is not None:
        row_slots = M // BLOCK_M + BATCHED_HEADS // HEADS
        key_slots = N // BLOCK_N + BATCHED_HEADS // HEADS
        tickets = key_slots * HEADS
    ticket = tl.atomic_add(gradients.ticket, 1)
    while ticket < tickets:
        tile = scheduled_tile(ragged, ticket, tiles, M, N, HEADS, BATCHED_HEADS, WAVE, False)
        n = tile.index * BLOCK_N
        keys = n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        lo, hi = interval(span, tile.b, keys, tile.N, tile.M, 0 - tile.shift)  # [BLOCK_N]
        seen = lo < hi
        visited = visit(lo, hi, tile.M, BLOCK_M)
        # [BLOCK_N, BLOCK_DV]
        v_tile = load_rows(v, start_pointer(v, tile, tile.h, tile.key), n, seen, BLOCK_N, DV, BLOCK_DV)
        dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
        zeros = tl.zeros([BLOCK_N], tl.float32)
        for index in range(GROUP):
            query_tile = member(tile, index, GROUP)
            bias_head = None
            if gradients.bias is not None:
                bias_head = head_pointer(gradients.bias, tile.b, query_tile.h)
            dv, columns, scale, caps, slopes = sweep_rows(
                Keys(
                    v_tile, n, tl.program_id(0), row_slots, key_slots,
                    dout, start_pointer(dout, tile, query_tile.h, tile.row), bias_head, known,
                    Plane(
                        score, parameters(score, mask, tile.b, query_tile.h), mask, dropout, query_tile,
                        BLOCK_M, BLOCK_N,
                    ),
                    Reach(
                        span, lo, hi, listed(span, visited, query_tile),
                        pattern(span, tile.b, query_tile.h, keys, tile.N, 0 - tile.shift),
                    ),
                    gradients, DV, BLOCK_DV, PRECISION,
                ),
                (dv, zeros, zeros, zeros, zeros),
            )  # fmt: skip
            keep_columns(gradients.columns, query_tile, keys, seen, columns)
            keep_columns(gradients.scale, query_tile, keys, seen, scale)
            keep_columns(gradients.softcap, query_tile, keys, seen, caps)
            keep_columns(gradients.slopes, query_tile, keys, seen, slopes)
        if gradients.dv is not None:
            if dropout is not None:
                dv *= dropout.rescale
            dv = tl.where(seen[:, None], dv, 0.0)
            start = start_pointer(gradients.dv, tile, tile.h, tile.key)
            store_rows(gradients.dv, start, n, keys < tile.N, dv, BLOCK_N, DV, BLOCK_DV)
        ticket = tl.atomic_add(gradients.ticket, 1)
