"""From a product to a score: scale, softcap, bias, ALiBi, in this order; then, on the weights, dropout.

    u = product * scale      y = cap * tanh(u / cap)      x = y + bias - slope * |i + offset - j|

or, where rows and keys have terms of their own and there is no softcap, y = u + row term + key term.

Each modifier stands here with its value, its derivative and the gradient of its parameter. A tile is at row m and key
n of a Plane, and TRANSPOSED makes it [BLOCK_N, BLOCK_M]; the same lines serve both.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .memory import Place, head_pointer, key_base, number, pair_pointers, read_scalar, row_base
from .numerics import tanh
from .types import Score


class Parameters(NamedTuple):
    """One head's parameters, in registers; bias and mask point to the head's plane. Of rows in which heads are packed
    scale and slope are [BLOCK_M, 1], and so is position, where each row stands."""

    scale: Any
    cap: Any
    slope: Any
    bias: Any
    mask: Any
    weights: Any
    position: Any


class Plane(NamedTuple):
    """The scores of one head, and what makes them."""

    score: Score
    own: Parameters
    mask: Any
    dropout: Any
    at: Place
    BLOCK_M: Any
    BLOCK_N: Any


@triton.jit
def parameters(score, mask, b, h):
    """What the head (b, h) needs of a Score and a bool mask; zeros, not None, for what is absent.

    A function must not return None beside values, nor spell `return None`: triton 3.6 refuses both.
    """
    cap = 0.0
    slope = 0.0
    bias = 0
    plane = 0
    weights = 0
    if score.additive is not None:
        weights = score.additive.weights + h * number(score.additive.stride)
    if score.softcap is not None:
        cap = read_scalar(score.softcap, b, h)
    if score.slopes is not None:
        slope = read_scalar(score.slopes, b, h)
    if score.bias is not None:
        bias = head_pointer(score.bias, b, h)
    if mask is not None:
        plane = head_pointer(mask, b, h)
    return Parameters(read_scalar(score.scale, b, h), cap, slope, bias, plane, weights, 0)


@triton.jit
def positions(plane, m, n, TRANSPOSED: tl.constexpr):
    """Row and key indices of the tile, shaped to broadcast."""
    if TRANSPOSED:
        return (m + tl.arange(0, plane.BLOCK_M))[None, :], (n + tl.arange(0, plane.BLOCK_N))[:, None]
    else:
        return (m + tl.arange(0, plane.BLOCK_M))[:, None], (n + tl.arange(0, plane.BLOCK_N))[None, :]


@triton.jit
def tile_pointers(view, start, plane, m, n, TRANSPOSED: tl.constexpr):
    """To the tile of something (M, N)."""
    return pair_pointers(view, start, m, n, plane.at.M, plane.at.N, plane.BLOCK_M, plane.BLOCK_N, TRANSPOSED)


@triton.jit
def distance(plane, m, n, TRANSPOSED: tl.constexpr):
    """|i + offset - j| in float32; without an offset, rows say where they stand."""
    i, j = positions(plane, 0, 0, TRANSPOSED)
    if plane.score.offset is None:
        return tl.abs((plane.own.position - n - j).to(tl.float32))
    else:
        return apart(plane, m, n, i, j)


@triton.jit
def apart(plane, m, n, i, j):
    """|row + offset - key| in float32, of rows m + i and keys n + j: i and j are tensors that broadcast.

    The tile's distance is one number and becomes a float once; what is left are small whole numbers, exact in float32.
    """
    far = 1.0 * (m - n + number(plane.score.offset) + plane.at.shift)
    return tl.abs((far + i.to(tl.float32)) - j.to(tl.float32))


@triton.jit
def saturation(plane, s):
    """tanh(u / cap) of products s, or s where there is no softcap."""
    if plane.score.softcap is None:
        return s
    else:
        return tanh(s * (plane.own.scale / plane.own.cap))


@triton.jit
def value(plane, s, t, m, n, TRANSPOSED: tl.constexpr):
    """x of products s, with t = saturation(s)."""
    x = capped(plane, s, t)
    if plane.score.rows is not None:
        i, j = positions(plane, m, n, TRANSPOSED)
        row, key = tl.minimum(i, plane.at.M - 1), tl.minimum(j, plane.at.N - 1)  # beyond the edge nothing is used
        x += tl.load(plane.score.rows + row_base(plane.at) + row)
        x += tl.load(plane.score.keys + key_base(plane.at) + key)
    if plane.score.bias is not None:
        x += tl.load(tile_pointers(plane.score.bias, plane.own.bias, plane, m, n, TRANSPOSED)).to(tl.float32)
    if plane.score.slopes is not None:
        x -= plane.own.slope * distance(plane, m, n, TRANSPOSED)
    return x


@triton.jit
def capped(plane, s, t):
    """y of products s, with t = saturation(s)."""
    if plane.score.softcap is None:
        return s * plane.own.scale
    else:
        return t * plane.own.cap


@triton.jit
def backward(plane, dx, t):
    """du, given dx."""
    if plane.score.softcap is None:
        return dx
    else:
        return dx * (1.0 - t * t)


@triton.jit
def softcap_gradient(plane, dx, s, t):
    """d cap, a summand for each element."""
    return dx * (t - s * (plane.own.scale / plane.own.cap) * (1.0 - t * t))


@triton.jit
def slope_gradient(plane, dx, m, n, TRANSPOSED: tl.constexpr):
    """d slope, a summand for each element."""
    return -dx * distance(plane, m, n, TRANSPOSED)


@triton.jit
def allowed(plane, m, n, TRANSPOSED: tl.constexpr):
    """The bool mask's tile."""
    return tl.load(tile_pointers(plane.mask, plane.own.mask, plane, m, n, TRANSPOSED)) != 0


@triton.jit
def keep(plane, m, n, TRANSPOSED: tl.constexpr):
    """Which weights of the tile live; see `fused_attn.spec.Dropout`.

    One call of Philox serves rows i and i + 8 and keys j and j + 8, which lie in one thread of an accumulator.
    """
    i, j = (m + every_other_eight(plane.BLOCK_M)), (n + every_other_eight(plane.BLOCK_N))
    if TRANSPOSED:
        rows, cols = i[None, :], j[:, None]
    else:
        rows, cols = i[:, None], j[None, :]
    zero = (rows * 0 + cols * 0).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        tl.load(plane.dropout.rng),
        zero + cols.to(tl.uint32),
        zero + rows.to(tl.uint32),
        zero + plane.at.head.to(tl.uint32),
        zero + tl.load(plane.dropout.rng + 1).to(tl.uint32),
        7,
    )
    if TRANSPOSED:
        w1, w2 = w2, w1
    return interleave(
        alive(w0, plane.dropout.threshold),
        alive(w1, plane.dropout.threshold),
        alive(w2, plane.dropout.threshold),
        alive(w3, plane.dropout.threshold),
    )


@triton.jit
def every_other_eight(BLOCK: tl.constexpr):
    """0..7, 16..23, 32..39, ...: [BLOCK / 2]."""
    r = tl.arange(0, BLOCK // 2)
    return r // 8 * 16 + r % 8


@triton.jit
def alive(word, threshold):
    return (word ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold


@triton.jit
def interleave(x, right, below, both):
    """Four [R, C] -> [2 R, 2 C], by eights: right takes the odd eights of columns, below those of rows."""
    R: tl.constexpr = x.shape[0] // 8
    C: tl.constexpr = x.shape[1] // 8
    tile = tl.join(tl.join(x, right), tl.join(below, both))  # [R * 8, C * 8, 2 of columns, 2 of rows]
    tile = tl.permute(tl.reshape(tile, (R, 8, C, 8, 2, 2)), (0, 5, 1, 2, 4, 3))
    return tl.reshape(tile, (R * 16, C * 16))
