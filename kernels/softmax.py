"""What is remembered of the keys seen so far: the row maximum, the sum of weights, and their average in the making.

A score in base 2 is x * factor, with factor > 0.
Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
"""

import triton
import triton.language as tl

from .numerics import LN2, LOG2E

LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)  # of float32


@triton.jit
def init(BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    """(m_i, l_i, acc) of a row that has seen nothing."""
    # Finite, so that a row of -inf has weights of exp2(-inf) = 0 and not NaN; no score but -inf is lower.
    m_i = tl.full([BLOCK_M], LOWEST, tl.float32)
    return m_i, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)


@triton.jit
def update(m_i, l_i, x, allowed, factor):
    """(p [BLOCK_M, BLOCK_N], alpha, m_i, l_i): a tile's weights, what to multiply earlier sums by, and the new sums.

    The maximum skips NaN and the weights do not, so a NaN score reaches l_i and the accumulator. It is subtracted
    before the factor: one multiply-add would be cheaper, but leaves the rounding of peak * factor, which is larger than
    exp2's range from 2**30 on, and the test for that lengthens the way from the maximum to the exponentials, which
    then no longer fit beside a product.
    """
    if allowed is not None:
        x = tl.where(allowed, x, float("-inf"))
    peak = tl.maximum(m_i, tl.max(x, 1))
    p = tl.exp2((x - peak[:, None]) * factor)
    alpha = tl.exp2((m_i - peak) * factor)
    return p, alpha, peak, l_i * alpha + tl.sum(p, 1)


@triton.jit
def partial(m_i, l_i, acc, scale, some):
    """(acc, peak, sum) of some of the keys, to be joined with those of others: peak is a natural logit.

    some: rows that may see anything; the others end as if they had seen nothing.
    """
    l_i = tl.where(some, l_i, 0.0)
    return tl.where((l_i == 0.0)[:, None], 0.0, acc), tl.where(l_i == 0.0, float("-inf"), m_i * scale), l_i


@triton.jit
def finish(m_i, l_i, acc, scale, sink, some):
    """(out, lse, peak, log_sum): the average, and what `types.Normaliser` keeps of a row.

    scale makes a natural logit of m_i; in base 2 the maximum would carry the rounding of log2(e) into lse.
    some: rows that may see anything; the others end as if they had seen nothing. sink: a float32 logit, or None.
    """
    l_i = tl.where(some, l_i, 0.0)
    blind = l_i == 0.0
    peak = tl.where(blind, 0.0, m_i)
    c = tl.where(blind, float("-inf"), m_i * scale)
    rise = 0.0  # of the larger of peak and sink above peak
    if sink is not None:
        # The state (0, sink): it joins the denominator and brings no value.
        top = tl.maximum(c, sink)
        safe = tl.where(top > float("-inf"), top, 0.0)
        share = tl.exp2((c - safe) * LOG2E)
        l_i = l_i * share + tl.exp2((sink - safe) * LOG2E)
        acc = acc * share[:, None]
        rise = safe - tl.where(blind, 0.0, c)
        c = safe
    log = tl.log2(l_i) * LN2
    out = tl.where((l_i == 0.0)[:, None] | (some == 0)[:, None], 0.0, acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None])
    return out, c + log, peak, rise + log


@triton.jit
def store_normaliser(normaliser, at, lse, peak, log_sum, mask):
    """What `finish` found of rows, at offsets `at`."""
    tl.store(normaliser.lse + at, lse, mask=mask)
    tl.store(normaliser.peak + at, peak, mask=mask)
    tl.store(normaliser.log_sum + at, log_sum, mask=mask)
