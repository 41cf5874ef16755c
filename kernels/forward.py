"""Forward: out = softmax(scores) v and lse, in one pass over the keys, or out = sigmoid(scores) v.

    s = q k^T or w . tanh(q + k)    x = modifiers(s)    p = exp(x - m), m the running maximum    out = (p v) / sum(p)

Grid: (tiles of BLOCK_M rows x B * Hq), flat. Scores and their maximum m stay natural logits or, where no modifier
follows a positive scale (`folds` in types.Score), unscaled products. Only the argument of an exponential is in base 2:
p = exp2((x - m) * factor), with factor = log2(e), times the scale if that folds. lse is a natural logarithm.

Saved for the backward: the maximum of each row and the log of its sum of weights, as two numbers (types.Normaliser).

Reading order. Each file answers one question:

- types: which tuples does the host pass?
- memory: where does row n live, and which tile does a program compute?
- spans: which keys may a row see, and which tiles does a program visit? `sweep` is the one loop.
- scores, then modifiers: how similar are q and k?
- softmax: what is accumulated?
- forward: the kernel, and the two steps of its sweep, `issue` and `absorb`. backward, decode, statistics and additive
  have the same form.

hopper_*.py are the same kernels for sm_90 in Gluon.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .memory import load_rows, load_tile, row_base, scheduled_tile, start_pointer, store_rows
from .modifiers import Plane, keep, parameters, saturation, value
from .numerics import LOG2E, dot, sigmoid
from .scores import additive, products
from .softmax import finish, init, store_normaliser, update
from .spans import Reach, interval, listed, live, pattern, sweep, visible, visit
from .types import View


class Rows(NamedTuple):
    """Context c of the forward's sweep: a tile of query rows at m, and all that a step over keys of head h reads."""

    q: Any  # [BLOCK_M, BLOCK_D]
    m: Any
    k: View
    k_head: Any
    k_desc: Any
    v: View
    v_head: Any
    v_desc: Any
    pages: Any
    h: Any
    plane: Plane
    reach: Reach
    factor: Any  # of the exponent: p = exp2((x - m) * factor)
    D: Any
    DV: Any
    BLOCK_D: Any
    BLOCK_DV: Any
    PRECISION: Any


@triton.jit
def issue(c, n, MASKED: tl.constexpr):
    """The products [BLOCK_M, BLOCK_N] of the rows with the keys from n on."""
    if c.plane.score.additive is not None:
        return additive(c.plane, c.m, n, False)
    else:
        keys = live(c.reach, n, c.plane.BLOCK_N, MASKED)  # [BLOCK_N]
        # [BLOCK_N, BLOCK_D]
        k = load_tile(c.k, c.k_head, c.k_desc, c.pages, c.plane.tile, c.h, n, keys, c.plane.BLOCK_N, c.D, c.BLOCK_D)
        return products(c.q, k, c.PRECISION)


@triton.jit
def absorb(c, state, s, n, MASKED: tl.constexpr):
    """Add the tile of keys at n to the state: turn products s into weights, and accumulate the values."""
    m_i, l_i, acc = state  # [BLOCK_M], [BLOCK_M], [BLOCK_M, BLOCK_DV]
    if c.plane.score.folds:
        x = s  # [BLOCK_M, BLOCK_N]
    else:
        x = value(c.plane, s, saturation(c.plane, s), c.m, n, False)  # [BLOCK_M, BLOCK_N]
    see = visible(c.reach, c.plane, c.m, n, MASKED, False)  # [BLOCK_M, BLOCK_N]
    if c.plane.score.sigmoid:
        p = sigmoid(x)  # [BLOCK_M, BLOCK_N]
        if see is not None:
            p = tl.where(see, p, 0.0)
    else:
        p, alpha, m_i, l_i = update(m_i, l_i, x, see, c.factor)  # [BLOCK_M, BLOCK_N], [BLOCK_M], ...
        acc *= alpha[:, None]
    if c.plane.dropout is not None:
        p = tl.where(keep(c.plane, c.m, n, False), p, 0.0)
    keys = live(c.reach, n, c.plane.BLOCK_N, MASKED)  # [BLOCK_N]
    # [BLOCK_N, BLOCK_DV]
    v = load_tile(c.v, c.v_head, c.v_desc, c.pages, c.plane.tile, c.h, n, keys, c.plane.BLOCK_N, c.DV, c.BLOCK_DV)
    acc = dot(p.to(v.dtype), v, acc, c.PRECISION)  # [BLOCK_M, BLOCK_DV]
    return m_i, l_i, acc


@triton.jit(do_not_specialize=["M", "N", "HEADS", "BATCHED_HEADS", "WAVE"])
def forward_kernel(
    q, k, v, out, normaliser, score, span, mask, sink, dropout, ragged, k_desc, v_desc,
    M, N, HEADS, BATCHED_HEADS, WAVE,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q, k, v, out, mask: Views; normaliser: a Normaliser, None for a sigmoid; sink: pointer (Hq,); k_desc, v_desc:
    TMA descriptors, or None. The last rows come first: under a causal mask they take longest."""
    tile = scheduled_tile(ragged, tl.program_id(0), tl.cdiv(M, BLOCK_M), M, N, HEADS, BATCHED_HEADS, WAVE, True)
    m = tile.index * BLOCK_M
    rows = m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    lo, hi = interval(span, tile.b, rows, tile.M, tile.N, tile.shift)  # [BLOCK_M]
    visited = listed(span, visit(lo, hi, tile.N, BLOCK_N), tile)

    own = parameters(score, mask, tile.b, tile.h)
    # [BLOCK_M, BLOCK_D]
    q_tile = load_rows(q, start_pointer(q, tile, tile.h, tile.row), m, rows < tile.M, BLOCK_M, D, BLOCK_D)
    scale = tl.full([], 1.0, tl.float32)
    if score.folds:
        scale *= own.scale
    # The context is built inside the call: an assignment would turn the constants in it into run-time values.
    # [BLOCK_M], [BLOCK_M], [BLOCK_M, BLOCK_DV]
    m_i, l_i, acc = sweep(
        issue, absorb,
        Rows(
            q_tile, m, k, start_pointer(k, tile, tile.h // GROUP, tile.key), k_desc,
            v, start_pointer(v, tile, tile.h // GROUP, tile.key), v_desc, None, tile.h // GROUP,
            Plane(score, own, mask, dropout, tile, BLOCK_M, BLOCK_N),
            Reach(span, lo, hi, visited, pattern(span, tile.b, tile.h, rows, tile.M, tile.shift)),
            scale * LOG2E, D, DV, BLOCK_D, BLOCK_DV, PRECISION,
        ),
        init(BLOCK_M, BLOCK_DV), visited, BLOCK_N, OVERLAP,
    )  # fmt: skip

    logit = None
    if sink is not None:
        logit = tl.load(sink + tile.h).to(tl.float32)
    if score.sigmoid:
        out_tile = acc  # [BLOCK_M, BLOCK_DV]
    else:
        # [BLOCK_M, BLOCK_DV], then [BLOCK_M] each
        out_tile, lse, peak, log_sum = finish(m_i, l_i, acc, scale, logit, lo < hi)
        store_normaliser(normaliser, row_base(tile) + rows, lse, peak, log_sum, rows < tile.M)
    if dropout is not None:
        out_tile *= dropout.rescale
    store_rows(out, start_pointer(out, tile, tile.h, tile.row), m, rows < tile.M, out_tile, BLOCK_M, DV, BLOCK_DV)
