"""From a product to a score: scale, softcap, bias, ALiBi, in this order; then, on the weights, dropout.

    u = product * scale      y = cap * tanh(u / cap)      x = y + bias - slope * |i + offset - j|

Each modifier stands here with its value, its derivative and the gradient of its parameter. Positions i and j are
shaped to broadcast, so the same lines serve a tile and its transpose. A score in base 2 is x * factor.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .memory import head_pointer, number, pair_pointers, read_scalar
from .numerics import tanh


class Parameters(NamedTuple):
    """One head's parameters, in registers. bias and mask point to the head's plane."""

    scale: Any
    cap: Any
    slope: Any
    bias: Any
    mask: Any


@triton.jit
def parameters(score, mask, b, h):
    """What the head (b, h) needs of a Score and a bool mask."""
    scale = read_scalar(score.scale, b, h)
    cap = None
    slope = None
    bias = None
    allowed = None
    if score.softcap is not None:
        cap = read_scalar(score.softcap, b, h)
    if score.slopes is not None:
        slope = read_scalar(score.slopes, b, h)
    if score.bias is not None:
        bias = head_pointer(score.bias, b, h)
    if mask is not None:
        allowed = head_pointer(mask, b, h)
    return Parameters(scale, cap, slope, bias, allowed)


@triton.jit
def is_linear(score):
    """A score that is product * scale and nothing more: the scale then folds into the exponential."""
    return (score.softcap is None) and (score.bias is None) and (score.slopes is None)


@triton.jit
def distance(score, i, j):
    """|i + offset - j| in float32."""
    return tl.abs(i + number(score.offset) - j).to(tl.float32)


@triton.jit
def capped(s, own):
    """tanh(u / cap), for products s."""
    return tanh(s * (own.scale / own.cap))


@triton.jit
def value(s, t, score, own, m, n, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """x for products s of the tile at (m, n), given t = capped(s, own) where there is a softcap."""
    if score.softcap is None:
        x = s * own.scale
    else:
        x = t * own.cap
    if score.bias is not None:
        ptrs = pair_pointers(score.bias, own.bias, m, n, M, N, BLOCK_M, BLOCK_N, TRANSPOSED)
        x += tl.load(ptrs).to(tl.float32)
    if score.slopes is not None:
        i, j = positions(m, n, BLOCK_M, BLOCK_N, TRANSPOSED)
        x -= own.slope * distance(score, i, j)
    return x


@triton.jit
def positions(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Row and key indices of the tile at (m, n), shaped to broadcast."""
    if TRANSPOSED:
        return (m + tl.arange(0, BLOCK_M))[None, :], (n + tl.arange(0, BLOCK_N))[:, None]
    else:
        return (m + tl.arange(0, BLOCK_M))[:, None], (n + tl.arange(0, BLOCK_N))[None, :]


@triton.jit
def allowed(mask, own, m, n, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The bool mask's tile at (m, n)."""
    return tl.load(pair_pointers(mask, own.mask, m, n, M, N, BLOCK_M, BLOCK_N, TRANSPOSED)) != 0


@triton.jit
def keep(dropout, head, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Which weights of the tile at (m, n) live; head is b * Hq + h. See `fused_attn.spec.Dropout`."""
    i, j = positions(m, n, BLOCK_M, BLOCK_N, TRANSPOSED)
    seed = tl.load(dropout.rng)
    offset = tl.load(dropout.rng + 1).to(tl.uint32)
    zero = (i * 0 + j * 0).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed, zero + (j & ~8).to(tl.uint32), zero + (i & ~8).to(tl.uint32), zero + head.to(tl.uint32), zero + offset, 7
    )
    odd_i, odd_j = (i & 8) != 0, (j & 8) != 0
    word = tl.where(odd_i, tl.where(odd_j, w3, w2), tl.where(odd_j, w1, w0))
    return (word ^ 0x80000000).to(tl.int32, bitcast=True) >= dropout.threshold
