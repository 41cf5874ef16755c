"""From a product to a score: scale, softcap, bias, ALiBi, in this order; then dropout, which applies to weights.

    u = product * scale      y = cap * tanh(u / cap)      x = y + bias - slope * |i + offset - j|

With terms of rows and keys (and no softcap), y = u + row term + key term.

Each modifier has its value, its derivative and the gradient of its parameter here. A tile is at row m and key n of a
Plane: [BLOCK_M, BLOCK_N], or [BLOCK_N, BLOCK_M] if TRANSPOSED.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .memory import WorkTile, decode_int, head_pointer, key_base, pair_pointers, read_scalar, row_base
from .numerics import tanh
from .types import Score


class Parameters(NamedTuple):
    """One head's parameters. scale, cap, slope: numbers, or scale and slope [BLOCK_M, 1] if heads are packed into rows;
    position: then the position of each row, [BLOCK_M, 1]. bias, mask, weights: pointers to the head's data."""

    scale: Any
    cap: Any
    slope: Any
    bias: Any
    mask: Any
    weights: Any
    position: Any


class Plane(NamedTuple):
    """The score matrix of one head: everything that `value` and its derivatives read."""

    score: Score
    own: Parameters
    mask: Any
    dropout: Any
    tile: WorkTile
    BLOCK_M: Any
    BLOCK_N: Any


@triton.jit
def parameters(score, mask, b, h):
    """The Parameters of head (b, h), from a Score and a bool mask; zeros, not None, for those that are absent.

    triton 3.6 accepts neither a tuple of values and None, nor the statement `return None`.
    """
    cap = 0.0
    slope = 0.0
    bias = 0
    plane = 0
    weights = 0
    if score.additive is not None:
        weights = score.additive.weights + h * decode_int(score.additive.stride)
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
    """Row and key indices of the tile, shaped to broadcast: [BLOCK_M, 1] and [1, BLOCK_N], or [1, BLOCK_M] and
    [BLOCK_N, 1]."""
    if TRANSPOSED:
        return (m + tl.arange(0, plane.BLOCK_M))[None, :], (n + tl.arange(0, plane.BLOCK_N))[:, None]
    else:
        return (m + tl.arange(0, plane.BLOCK_M))[:, None], (n + tl.arange(0, plane.BLOCK_N))[None, :]


@triton.jit
def tile_pointers(view, start, plane, m, n, TRANSPOSED: tl.constexpr):
    """Pointers to the tile at (m, n) of a View of (M, N)."""
    return pair_pointers(view, start, m, n, plane.tile.M, plane.tile.N, plane.BLOCK_M, plane.BLOCK_N, TRANSPOSED)


@triton.jit
def distance(plane, m, n, TRANSPOSED: tl.constexpr):
    """|i + offset - j| of the tile, in float32. Without an offset, rows carry their own positions."""
    i, j = positions(plane, 0, 0, TRANSPOSED)  # [BLOCK_M, 1], [1, BLOCK_N]
    if plane.score.offset is None:
        return tl.abs((plane.own.position - n - j).to(tl.float32))
    else:
        return distance_at(plane, m, n, i, j)


@triton.jit
def distance_at(plane, m, n, i, j):
    """|row + offset - key| in float32, for rows m + i and keys n + j; i and j are tensors that broadcast.

    The distance between the tile's corners is converted to float once; i and j are small integers, exact in float32.
    """
    far = 1.0 * (m - n + decode_int(plane.score.offset) + plane.tile.shift)
    return tl.abs((far + i.to(tl.float32)) - j.to(tl.float32))


@triton.jit
def saturation(plane, s):
    """t = tanh(u / cap) of products s; s itself without a softcap."""
    if plane.score.softcap is None:
        return s
    else:
        return tanh(s * (plane.own.scale / plane.own.cap))  # [BLOCK_M, BLOCK_N]


@triton.jit
def value(plane, s, t, m, n, TRANSPOSED: tl.constexpr):
    """The scores x of products s, given t = saturation(s)."""
    x = capped(plane, s, t)  # [BLOCK_M, BLOCK_N]
    if plane.score.rows is not None:
        i, j = positions(plane, m, n, TRANSPOSED)  # [BLOCK_M, 1], [1, BLOCK_N]
        # scores beyond the edge are not used
        row, key = tl.minimum(i, plane.tile.M - 1), tl.minimum(j, plane.tile.N - 1)
        x += tl.load(plane.score.rows + row_base(plane.tile) + row)
        x += tl.load(plane.score.keys + key_base(plane.tile) + key)
    if plane.score.bias is not None:
        x += tl.load(tile_pointers(plane.score.bias, plane.own.bias, plane, m, n, TRANSPOSED)).to(tl.float32)
    if plane.score.slopes is not None:
        x -= plane.own.slope * distance(plane, m, n, TRANSPOSED)
    return x


@triton.jit
def capped(plane, s, t):
    """y of products s, given t = saturation(s)."""
    if plane.score.softcap is None:
        return s * plane.own.scale
    else:
        return t * plane.own.cap


@triton.jit
def backward(plane, dx, t):
    """du, given dx and t."""
    if plane.score.softcap is None:
        return dx
    else:
        return dx * (1.0 - t * t)


@triton.jit
def softcap_gradient(plane, dx, s, t):
    """The gradient of cap, one term per element."""
    return dx * (t - s * (plane.own.scale / plane.own.cap) * (1.0 - t * t))


@triton.jit
def slope_gradient(plane, dx, m, n, TRANSPOSED: tl.constexpr):
    """The gradient of slope, one term per element."""
    return -dx * distance(plane, m, n, TRANSPOSED)


@triton.jit
def allowed(plane, m, n, TRANSPOSED: tl.constexpr):
    """The tile of the bool mask."""
    return tl.load(tile_pointers(plane.mask, plane.own.mask, plane, m, n, TRANSPOSED)) != 0


@triton.jit
def keep(plane, m, n, TRANSPOSED: tl.constexpr):
    """The tile of dropout's mask: which weights are kept; see `Dropout` of the package for the definition.

    One call of Philox gives the words of rows i and i + 8 and keys j and j + 8, which one thread of an accumulator
    holds.
    """
    # [BLOCK_M / 2], [BLOCK_N / 2]
    i, j = (m + every_other_eight(plane.BLOCK_M)), (n + every_other_eight(plane.BLOCK_N))
    if TRANSPOSED:
        rows, cols = i[None, :], j[:, None]
    else:
        rows, cols = i[:, None], j[None, :]
    zero = (rows * 0 + cols * 0).to(tl.uint32)  # [BLOCK_M / 2, BLOCK_N / 2], as w0 to w3 are
    w0, w1, w2, w3 = tl.philox(
        tl.load(plane.dropout.rng),
        zero + cols.to(tl.uint32),
        zero + rows.to(tl.uint32),
        zero + plane.tile.head.to(tl.uint32),
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
    """[BLOCK / 2]: 0..7, 16..23, 32..39, ..."""
    r = tl.arange(0, BLOCK // 2)
    return r // 8 * 16 + r % 8


@triton.jit
def alive(word, threshold):
    return (word ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold


@triton.jit
def interleave(x, right, below, both):
    """Four tiles [R, C] -> [2 R, 2 C] in runs of eight: `right` fills every second run of columns, `below` of rows."""
    R: tl.constexpr = x.shape[0] // 8
    C: tl.constexpr = x.shape[1] // 8
    tile = tl.join(tl.join(x, right), tl.join(below, both))  # [R * 8, C * 8, 2 (columns), 2 (rows)]
    tile = tl.permute(tl.reshape(tile, (R, 8, C, 8, 2, 2)), (0, 5, 1, 2, 4, 3))
    return tl.reshape(tile, (R * 16, C * 16))
