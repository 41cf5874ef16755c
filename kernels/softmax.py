"""What is accumulated over the keys: the row maximum m_i, the sum of weights l_i, and the weighted sum of values acc.

    m' = max(m, max_j x_j)    p_j = exp2((x_j - m') factor)    alpha = exp2((m - m') factor)
    l' = l alpha + sum_j p_j    acc' = acc alpha + sum_j p_j v_j

factor > 0 is log2(e), times the scale if x are unscaled products (`folds` in types.Score).

Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
"""

import triton
import triton.language as tl

from .numerics import LN2, LOG2E

LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)  # of float32


@triton.jit
def init(BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    """(m_i [BLOCK_M], l_i [BLOCK_M], acc [BLOCK_M, BLOCK_DV]) before the first key."""
    # Finite, so that weights in a row of -inf are exp2(-inf) = 0 and not NaN; only -inf is lower.
    m_i = tl.full([BLOCK_M], LOWEST, tl.float32)
    return m_i, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)


@triton.jit
def update(m_i, l_i, x, allowed, factor):
    """(p [BLOCK_M, BLOCK_N], alpha [BLOCK_M], m_i, l_i) after the tile of scores x: its weights, the factor that
    rescales earlier sums, and the new maximum and sum. allowed: the mask predicate, or None.

    The maximum skips NaN and the weights do not, so a NaN score reaches l_i and acc. The maximum is subtracted before
    the multiplication by factor. A fused multiply-add of x * factor - peak * factor would be cheaper, but the rounding
    error of peak * factor exceeds the range of exp2 for peaks above 2**30; and a branch for that case lengthens the
    path from the maximum to the exponentials, which then no longer overlap with a matrix product.
    """
    if allowed is not None:
        x = tl.where(allowed, x, float("-inf"))
    # [BLOCK_M]
    peak = tl.maximum(m_i, tl.max(x, 1))
    p = tl.exp2((x - peak[:, None]) * factor)  # [BLOCK_M, BLOCK_N]
    alpha = tl.exp2((m_i - peak) * factor)  # [BLOCK_M]
    return p, alpha, peak, l_i * alpha + tl.sum(p, 1)


@triton.jit
def partial(m_i, l_i, acc, scale, some):
    """(acc, peak, sum) over part of the keys, to be merged with other parts; peak is a natural logit.

    some [BLOCK_M]: rows that see a key; the others end as if they had accumulated nothing.
    """
    l_i = tl.where(some, l_i, 0.0)
    return tl.where((l_i == 0.0)[:, None], 0.0, acc), tl.where(l_i == 0.0, float("-inf"), m_i * scale), l_i


@triton.jit
def finish(m_i, l_i, acc, scale, sink, some):
    """(out, lse, peak, log_sum) of rows: the output, and the numbers of types.Normaliser.

    scale: of m_i to a natural logit: 1, or the scale that folds. some
    [BLOCK_M]: rows that see a key; the others end as if they had accumulated nothing. sink: a float32 logit, or None.
    """
    l_i = tl.where(some, l_i, 0.0)
    fully_masked = l_i == 0.0  # [BLOCK_M]
    peak = tl.where(fully_masked, 0.0, m_i)
    logit = tl.where(fully_masked, float("-inf"), m_i * scale)  # [BLOCK_M]
    rise = 0.0  # max(logit, sink) - logit
    if sink is not None:
        # Merge with the state of the sink: it adds to the denominator and has no value.
        top = tl.maximum(logit, sink)
        top = tl.where(top > float("-inf"), top, 0.0)
        share = tl.exp2((logit - top) * LOG2E)  # [BLOCK_M]
        l_i = l_i * share + tl.exp2((sink - top) * LOG2E)
        acc = acc * share[:, None]
        rise = top - tl.where(fully_masked, 0.0, logit)
        logit = top
    log = tl.log2(l_i) * LN2
    # [BLOCK_M, BLOCK_DV]
    out = tl.where((l_i == 0.0)[:, None] | (some == 0)[:, None], 0.0, acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None])
    return out, logit + log, peak, rise + log


@triton.jit
def store_normaliser(normaliser, offs, lse, peak, log_sum, mask):
    """Store the numbers of rows at offsets `offs`."""
    tl.store(normaliser.lse + offs, lse, mask=mask)
    tl.store(normaliser.peak + offs, peak, mask=mask)
    tl.store(normaliser.log_sum + offs, log_sum, mask=mask)
