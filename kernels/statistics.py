"""Statistics of the weights, in memory linear in length, and the weights of chosen rows. See `attention_stats`.

- row_statistics_kernel, grid (tiles of BLOCK_M rows x B * Hq): sweeps over the keys with a running maximum m, the sum l
  of weights exp(x - m), the sum t of weights times (m - x), and the largest scores.
- key_mass_kernel, grid (tiles of BLOCK_N keys x B * Hq): adds exp(x - shift) / d over the rows.
- map_kernel, grid (tiles with chosen rows x B * chosen heads): sweeps once for shift and d, and once to store weights.

    entropy = (t + l (shift - m + log d)) / d       d = l + exp(sink - shift), relative to shift = max(m, sink)

Scores here are natural logits. Row numbers are float32 (B, Hq, M).

A score and its key are packed into one int64, ordered by score, and among equal scores from the last key to the first.
No two are equal, so the largest can be removed one at a time.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .forward import issue
from .memory import key_base, load_rows, row_base, scheduled_tile, start_pointer, work_tile
from .modifiers import Plane, parameters, saturation, value
from .numerics import LN2, LOG2E, sigmoid
from .scores import additive, products
from .softmax import init, update
from .spans import Reach, interval, listed, live, pattern, sweep, visible, visit
from .types import RowStatistics, View

NAN: tl.constexpr = tl.constexpr(0x7FC00000)  # as int32; above every number
LAST: tl.constexpr = tl.constexpr(2**31 - 1)  # no key is larger
NOTHING: tl.constexpr = tl.constexpr(-(2**63))  # less than any packed score
NO_SCORE: tl.constexpr = tl.constexpr(-(2**31))  # in place of a score; less than -inf
FAR: tl.constexpr = tl.constexpr(1000.0)  # exp(-FAR) is 0, and FAR times 0 is 0


class Rows(NamedTuple):
    """Context c of row_statistics_kernel's sweep: a tile of query rows at m, and all that a step over keys of head h
    reads."""

    q: Any  # [BLOCK_M, BLOCK_D]
    m: Any
    k: View
    k_head: Any
    k_desc: Any
    pages: Any
    h: Any
    plane: Plane
    reach: Reach
    outputs: RowStatistics
    bound: Any  # [BLOCK_M]
    D: Any
    BLOCK_D: Any
    PRECISION: Any


@triton.jit
def logits(plane, s, see, m, n, TRANSPOSED: tl.constexpr):
    """The scores of products s; -inf where a row may not see a key."""
    x = value(plane, s, saturation(plane, s), m, n, TRANSPOSED)  # [BLOCK_M, BLOCK_N]
    if see is not None:
        x = tl.where(see, x, float("-inf"))
    return x


@triton.jit
def weights(plane, x, shift, part):
    """Weights of scores x, given shift and 1 / d of their rows. 0 where x is -inf, even in a row of NaN."""
    if plane.score.sigmoid:
        p = sigmoid(x)  # [BLOCK_M, BLOCK_N]
    else:
        p = tl.exp2((x - shift) * LOG2E) * part  # [BLOCK_M, BLOCK_N]
    return tl.where(x == float("-inf"), 0.0, p)


# The largest scores


@triton.jit
def packed(x, n):
    """Scores [BLOCK_M, BLOCK_N] with their keys, from n on, as int64; NOTHING for -inf."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0
    order = tl.where(x != x, NAN, bits ^ ((bits >> 31) & LAST))  # [BLOCK_M, BLOCK_N]
    keys = LAST - n - tl.arange(0, x.shape[1])  # [BLOCK_N]
    return tl.where(x == float("-inf"), NOTHING, (order.to(tl.int64) << 32) + keys[None, :].to(tl.int64))


@triton.jit
def unpacked(best):
    """(score, key); -inf and -1 for NOTHING."""
    order = (best >> 32).to(tl.int32)  # [BLOCK_M, BLOCK_K]
    bits = order ^ ((order >> 31) & LAST)
    missing = order == NO_SCORE
    x = tl.where(missing, float("-inf"), bits.to(tl.float32, bitcast=True))  # [BLOCK_M, BLOCK_K]
    return x, tl.where(missing, -1, LAST - (best & LAST).to(tl.int32))


@triton.jit
def no_entries(BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_M, BLOCK_K] of distinct empty entries."""
    return tl.zeros([BLOCK_M, BLOCK_K], tl.int64) + (NOTHING + 1) + tl.arange(0, BLOCK_K)[None, :].to(tl.int64)


@triton.jit
def insert(best, keys):
    """Merge keys [BLOCK_M, BLOCK_N] into best [BLOCK_M, BLOCK_K]: while a row has an entry above the least of its best,
    that entry replaces it."""
    least, most = tl.min(best, 1), tl.max(keys, 1)  # [BLOCK_M]
    while tl.max((most > least).to(tl.int32), 0) > 0:
        best = tl.where((best == least[:, None]) & (most > least)[:, None], most[:, None], best)
        keys = tl.where(keys == most[:, None], NOTHING, keys)
        least, most = tl.min(best, 1), tl.max(keys, 1)  # [BLOCK_M]
    return best


@triton.jit
def descending(best, BLOCK_K: tl.constexpr):
    """Sort each row in descending order."""
    result = best
    slots = tl.arange(0, BLOCK_K)[None, :]  # [1, BLOCK_K]
    for slot in tl.range(0, BLOCK_K):
        most = tl.max(best, 1)[:, None]  # [BLOCK_M, 1]
        result = tl.where(slots == slot, most, result)
        best = tl.where(best == most, NOTHING, best)
    return result


# Rows


@triton.jit
def observe(c, state, s, n, MASKED: tl.constexpr):
    """Add the tile of keys at n to the state."""
    m_i, l_i, t_i, top, nan, best = state  # [BLOCK_M] each, but best [BLOCK_M, BLOCK_K]
    x = logits(c.plane, s, visible(c.reach, c.plane, c.m, n, MASKED, False), c.m, n, False)  # [BLOCK_M, BLOCK_N]
    if c.outputs.max_logit is not None:
        top = tl.maximum(top, tl.max(x, 1))
        nan = tl.maximum(nan, tl.max((x != x).to(tl.int32), 1))
    if c.outputs.indices is not None:
        keys = packed(x, n)  # [BLOCK_M, BLOCK_N]
        if c.bound is not None:
            keys = tl.where(keys < c.bound[:, None], keys, NOTHING)
        best = insert(best, keys)
    if c.outputs.weighs:
        p, alpha, peak, total = update(m_i, l_i, x, None, LOG2E)  # [BLOCK_M, BLOCK_N], then [BLOCK_M] each
        if c.outputs.entropy is not None:
            rise = tl.where(l_i == 0.0, 0.0, (peak - m_i) * l_i)  # [BLOCK_M]
            t_i = alpha * (t_i + rise) + tl.sum(p * tl.minimum(peak[:, None] - x, FAR), 1)
        m_i, l_i = peak, total
    return m_i, l_i, t_i, top, nan, best


@triton.jit
def denominator(m_i, l_i, sink, h):
    """(c, shift, d) [BLOCK_M]: the row maximum, -inf if the row has seen nothing; the reference of exponentials, the
    larger of c and the sink; and the sum of all weights exp(x - shift), the sink's included."""
    c = tl.where(l_i == 0.0, float("-inf"), m_i)
    top = c
    if sink is not None:
        logit = tl.load(sink + h).to(tl.float32)
        top = tl.maximum(c, logit)
    shift = tl.where(top > float("-inf"), top, 0.0)
    d = l_i * tl.exp2((c - shift) * LOG2E)
    if sink is not None:
        d += tl.exp2((logit - shift) * LOG2E)
    return c, shift, d


@triton.jit(do_not_specialize=["M", "N", "HEADS", "BATCHED_HEADS", "WAVE", "FIRST", "TOP"])
def row_statistics_kernel(
    q, k, score, span, mask, sink, ragged, outputs, M, N, HEADS, BATCHED_HEADS, WAVE, FIRST, TOP,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q, k, mask: Views; sink: pointer (Hq,); outputs: RowStatistics. Writes ranks FIRST to FIRST + BLOCK_K of TOP."""
    tile = scheduled_tile(ragged, tl.program_id(0), tl.cdiv(M, BLOCK_M), M, N, HEADS, BATCHED_HEADS, WAVE, True)
    m = tile.index * BLOCK_M
    rows = m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    lo, hi = interval(span, tile.b, rows, tile.M, tile.N, tile.shift)  # [BLOCK_M]
    visited = listed(span, visit(lo, hi, tile.N, BLOCK_N), tile)
    mine = row_base(tile) + rows
    inside = rows < tile.M
    bound = None
    if outputs.bound is not None:
        bound = tl.load(outputs.bound + mine, mask=inside, other=0)

    own = parameters(score, mask, tile.b, tile.h)
    # [BLOCK_M, BLOCK_D]
    q_tile = load_rows(q, start_pointer(q, tile, tile.h, tile.row), m, inside, BLOCK_M, D, BLOCK_D)
    m_i, l_i, _ = init(BLOCK_M, 1)
    zero = tl.zeros([BLOCK_M], tl.float32)
    # [BLOCK_M] each, but best [BLOCK_M, BLOCK_K]
    m_i, l_i, t_i, top, nan, best = sweep(
        issue, observe,
        Rows(
            q_tile, m, k, start_pointer(k, tile, tile.h // GROUP, tile.key), None, None, tile.h // GROUP,
            Plane(score, own, mask, None, tile, BLOCK_M, BLOCK_N),
            Reach(span, lo, hi, visited, pattern(span, tile.b, tile.h, rows, tile.M, tile.shift)),
            outputs, bound, D, BLOCK_D, PRECISION,
        ),
        (m_i, l_i, zero, zero + float("-inf"), tl.zeros([BLOCK_M], tl.int32), no_entries(BLOCK_M, BLOCK_K)),
        visited, BLOCK_N, False,
    )  # fmt: skip

    # Full tiles have no mask, so rows that see nothing have accumulated too.
    some = lo < hi
    if outputs.max_logit is not None:
        top = tl.where(nan > 0, float("nan"), top)
        tl.store(outputs.max_logit + mine, tl.where(some, top, float("-inf")), mask=inside)
    shift = zero
    part = zero
    if outputs.weighs:
        c, shift, d = denominator(m_i, tl.where(some, l_i, 0.0), sink, tile.h)
        fully_masked = c == float("-inf")
        part = tl.where(fully_masked, 0.0, tl.exp2((c - shift) * LOG2E) / d)
        if outputs.entropy is not None:
            depth = shift - c + tl.log2(d) * LN2
            tl.store(outputs.entropy + mine, tl.where(fully_masked, 0.0, part * (t_i + depth * l_i)), mask=inside)
        part = tl.where(fully_masked, 0.0, 1.0 / d)
        if outputs.shift is not None:
            tl.store(outputs.shift + mine, tl.where(fully_masked, float("inf"), shift), mask=inside)
            tl.store(outputs.part + mine, part, mask=inside)
    if outputs.indices is not None:
        best = descending(best, BLOCK_K)
        x, key = unpacked(best)  # [BLOCK_M, BLOCK_K]
        x = tl.where(some[:, None], x, float("-inf"))
        slots = FIRST + tl.arange(0, BLOCK_K)[None, :]  # [1, BLOCK_K]
        places = mine[:, None] * TOP + slots  # [BLOCK_M, BLOCK_K]
        wanted = inside[:, None] & (slots < TOP)  # [BLOCK_M, BLOCK_K]
        tl.store(outputs.indices + places, tl.where(some[:, None], key, -1).to(tl.int64), mask=wanted)
        # [BLOCK_M, BLOCK_K]
        p = weights(Plane(score, own, mask, None, tile, BLOCK_M, BLOCK_N), x, shift[:, None], part[:, None])
        tl.store(outputs.weights + places, p, mask=wanted)
        if outputs.next is not None:
            tl.store(outputs.next + mine, tl.min(best, 1), mask=inside)


# Keys


class Keys(NamedTuple):
    """Context c of key_mass_kernel's sweep: a tile of keys at n, and all that a step over one head's rows reads."""

    k: Any  # [BLOCK_N, BLOCK_D]
    n: Any
    q: View
    q_head: Any
    shift: Any
    part: Any
    plane: Plane
    reach: Reach
    D: Any
    BLOCK_D: Any
    PRECISION: Any


@triton.jit
def issue_rows(c, m, MASKED: tl.constexpr):
    """The products [BLOCK_N, BLOCK_M] of the keys with the rows at m."""
    if c.plane.score.additive is not None:
        return additive(c.plane, m, c.n, True)
    else:
        rows = live(c.reach, m, c.plane.BLOCK_M, MASKED)
        return products(c.k, load_rows(c.q, c.q_head, m, rows, c.plane.BLOCK_M, c.D, c.BLOCK_D), c.PRECISION)


@triton.jit
def collect(c, mass, s, m, MASKED: tl.constexpr):
    """Add the weights of the tile of rows at m to the keys' sums."""
    x = logits(c.plane, s, visible(c.reach, c.plane, m, c.n, MASKED, True), m, c.n, True)  # [BLOCK_N, BLOCK_M]
    shift = tl.zeros([c.plane.BLOCK_M], tl.float32)
    part = shift
    if c.shift is not None:
        rows = m + tl.arange(0, c.plane.BLOCK_M)  # [BLOCK_M]
        offs = row_base(c.plane.tile) + rows
        shift = tl.load(c.shift + offs, mask=rows < c.plane.tile.M, other=0.0)
        part = tl.load(c.part + offs, mask=rows < c.plane.tile.M, other=0.0)
    return mass + tl.sum(weights(c.plane, x, shift[None, :], part[None, :]), 1)


@triton.jit(do_not_specialize=["M", "N", "HEADS", "BATCHED_HEADS", "WAVE"])
def key_mass_kernel(
    q, k, score, span, mask, shift, part, ragged, key_mass, M, N, HEADS, BATCHED_HEADS, WAVE,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """span: transposed, of keys over rows. shift, part: pointers (B, Hq, M), None for a sigmoid. key_mass: pointer (B,
    Hq, N)."""
    tile = scheduled_tile(ragged, tl.program_id(0), tl.cdiv(N, BLOCK_N), M, N, HEADS, BATCHED_HEADS, WAVE, False)
    n = tile.index * BLOCK_N  # under a causal mask the first keys take longest
    keys = n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    lo, hi = interval(span, tile.b, keys, tile.N, tile.M, 0 - tile.shift)  # [BLOCK_N]
    seen = lo < hi
    visited = listed(span, visit(lo, hi, tile.M, BLOCK_M), tile)
    # [BLOCK_N, BLOCK_D]
    k_tile = load_rows(k, start_pointer(k, tile, tile.h // GROUP, tile.key), n, seen, BLOCK_N, D, BLOCK_D)
    # [BLOCK_N]
    mass = sweep(
        issue_rows, collect,
        Keys(
            k_tile, n, q, start_pointer(q, tile, tile.h, tile.row), shift, part,
            Plane(score, parameters(score, mask, tile.b, tile.h), mask, None, tile, BLOCK_M, BLOCK_N),
            Reach(span, lo, hi, visited, pattern(span, tile.b, tile.h, keys, tile.N, 0 - tile.shift)),
            D, BLOCK_D, PRECISION,
        ),
        tl.zeros([BLOCK_N], tl.float32), visited, BLOCK_M, False,
    )  # fmt: skip
    tl.store(key_mass + key_base(tile) + keys, tl.where(seen, mass, 0.0), mask=keys < tile.N)


# Chosen rows


class Shown(NamedTuple):
    """Context c of map_kernel's sweeps: a tile of rows at m, their shift and 1 / d, the pointers to their weights,
    and all that a step over the keys reads."""

    q: Any  # [BLOCK_M, BLOCK_D]
    m: Any
    k: View
    k_head: Any
    k_desc: Any
    pages: Any
    h: Any
    plane: Plane
    reach: Reach
    shift: Any  # [BLOCK_M]
    part: Any  # [BLOCK_M]
    ptrs: Any  # [BLOCK_M]
    chosen: Any  # [BLOCK_M]
    D: Any
    BLOCK_D: Any
    PRECISION: Any


@triton.jit
def show(c, state, s, n, MASKED: tl.constexpr):
    """Store the weights of the tile of keys at n."""
    x = logits(c.plane, s, visible(c.reach, c.plane, c.m, n, MASKED, False), c.m, n, False)  # [BLOCK_M, BLOCK_N]
    p = weights(c.plane, x, c.shift[:, None], c.part[:, None])  # [BLOCK_M, BLOCK_N]
    cols = tl.arange(0, c.plane.BLOCK_N)[None, :]  # [1, BLOCK_N]
    tl.store(c.ptrs[:, None] + (n + cols), p, mask=c.chosen[:, None] & (cols < c.plane.tile.N - n))
    return state


@triton.jit(do_not_specialize=["M", "N", "HEADS", "SHOWN_ROWS", "SHOWN_HEADS", "TILES"])
def map_kernel(
    q, k, score, span, mask, sink, tiles, slots, heads, out, M, N, HEADS, SHOWN_ROWS, SHOWN_HEADS, TILES,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out: pointer (B, SHOWN_HEADS, SHOWN_ROWS, N). tiles: int32 pointer (TILES,), the tiles that hold chosen rows.
    slots: (TILES, BLOCK_M), which row of out each row of a tile is, -1 for none. heads: (SHOWN_HEADS,), the chosen
    heads."""
    entry = tl.program_id(0) % TILES
    shown = tl.program_id(0) // TILES  # in B x SHOWN_HEADS
    h = tl.load(heads + shown % SHOWN_HEADS)
    tile = work_tile(None, shown // SHOWN_HEADS, h, tl.load(tiles + entry), M, N, HEADS)
    m = tile.index * BLOCK_M
    slot = tl.load(slots + entry * BLOCK_M + tl.arange(0, BLOCK_M))  # [BLOCK_M]
    rows = m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    lo, hi = interval(span, tile.b, rows, M, N, tile.shift)  # [BLOCK_M]
    visited = listed(span, visit(lo, hi, N, BLOCK_N), tile)
    own = parameters(score, mask, tile.b, h)
    q_tile = load_rows(q, start_pointer(q, tile, h, tile.row), m, rows < M, BLOCK_M, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    k_head = start_pointer(k, tile, h // GROUP, tile.key)
    shift = tl.zeros([BLOCK_M], tl.float32)
    part = shift
    if not score.sigmoid:
        m_i, l_i, _ = init(BLOCK_M, 1)
        # [BLOCK_M]
        m_i, l_i = sweep(
            issue, weigh,
            Shown(
                q_tile, m, k, k_head, None, None, h // GROUP,
                Plane(score, own, mask, None, tile, BLOCK_M, BLOCK_N),
                Reach(span, lo, hi, visited, pattern(span, tile.b, h, rows, M, tile.shift)),
                shift, part, None, slot >= 0, D, BLOCK_D, PRECISION,
            ),
            (m_i, l_i), visited, BLOCK_N, False,
        )  # fmt: skip
        c, shift, d = denominator(m_i, l_i, sink, h)  # [BLOCK_M]
        part = tl.where(c == float("-inf"), 0.0, 1.0 / d)
    ptrs = out + (shown.to(tl.int64) * SHOWN_ROWS + slot) * N  # [BLOCK_M]
    sweep(
        issue, show,
        Shown(
            q_tile, m, k, k_head, None, None, h // GROUP,
            Plane(score, own, mask, None, tile, BLOCK_M, BLOCK_N),
            Reach(span, lo, hi, visited, pattern(span, tile.b, h, rows, M, tile.shift)),
            shift, part, ptrs, (slot >= 0) & (lo < hi), D, BLOCK_D, PRECISION,
        ),
        shift, visited, BLOCK_N, False,
    )  # fmt: skip


@triton.jit
def weigh(c, state, s, n, MASKED: tl.constexpr):
    """Add the tile of keys at n to the maximum and the sum of weights."""
    m_i, l_i = state
    x = logits(c.plane, s, visible(c.reach, c.plane, c.m, n, MASKED, False), c.m, n, False)  # [BLOCK_M, BLOCK_N]
    _, _, m_i, l_i = update(m_i, l_i, x, None, LOG2E)
    return m_i, l_i
