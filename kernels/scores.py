"""How similar are q and k: the dot product, or w . tanh(q + k). Modifiers (modifiers.py) turn this product into a
score.

An additive product is summed feature by feature over a tile, two features at a time. There are two ways:

- tanh(q + k) directly.
- tanh(q + k) = (a - 2) / a with a = 1 + exp(2 q) exp(2 k). Two features a, b share one reciprocal, that of a b, which
  halves the special-function instructions. This needs |q|, |k| <= SAFE in the tile: beyond it a b may overflow, and
  clamping would be wrong (q = 15 with k = -14.5 does not saturate).
"""

import triton
import triton.language as tl

from .memory import decode_int
from .numerics import dot, reciprocal, tanh

PEAKS: tl.constexpr = tl.constexpr(16)  # indices per peak, and per block of a pitch
GAP: tl.constexpr = tl.constexpr(256)  # zeros after each sequence; no tile is longer
SAFE: tl.constexpr = tl.constexpr(11.0)  # exp(4 * 2 * 11) < 2**127


@triton.jit
def products(q, k, PRECISION: tl.constexpr):
    """q [BLOCK_M, BLOCK_D], k [BLOCK_N, BLOCK_D] -> [BLOCK_M, BLOCK_N]; swapped arguments give the transpose."""
    return dot(q, tl.trans(k), None, PRECISION)


@triton.jit
def pitch(blocks):
    """Elements between two features, decoded from a number of blocks of PEAKS."""
    return decode_int(blocks) * PEAKS


@triton.jit
def feature_start(tile, start):
    """Index where the features of a sequence begin, given that it begins at start in q or k. Each sequence has zeros
    after its end, so that a tile that extends past the end reads nothing of the next one. 0 in a dense batch, where
    start and b - batch are 0."""
    return (tl.cdiv(start, PEAKS) + (tile.b - tile.batch) * (GAP // PEAKS + 1)) * PEAKS


@triton.jit
def query_features(plane, base, m):
    """Pointer to feature 0 of row m, in the layout of q's features."""
    head = plane.tile.memory_head.to(tl.int64) * plane.score.additive.features
    return base + (head * pitch(plane.score.additive.q_pitch) + feature_start(plane.tile, plane.tile.row)) + m


@triton.jit
def key_features(plane, base, n):
    """Pointer to feature 0 of key n, in the layout of k's features."""
    head = (plane.tile.memory_head // plane.score.additive.group).to(tl.int64) * plane.score.additive.features
    return base + (head * pitch(plane.score.additive.k_pitch) + feature_start(plane.tile, plane.tile.key)) + n


@triton.jit
def peak(base, blocks, head, start, BLOCK: tl.constexpr):
    """The largest |feature| of a tile. It may skip NaN: both ways give NaN then."""
    offs = start // PEAKS + tl.arange(0, BLOCK // PEAKS)  # [BLOCK / PEAKS]
    # [BLOCK / PEAKS]
    peaks = tl.load(base + head.to(tl.int64) * decode_int(blocks) + offs, mask=offs < decode_int(blocks), other=0.0)
    return tl.max(peaks, 0)


@triton.jit
def paired(plane, m, n):
    """True if the tile at (m, n) may use exponentials."""
    q = peak(
        plane.score.additive.q_peaks,
        plane.score.additive.q_pitch,
        plane.tile.memory_head,
        feature_start(plane.tile, plane.tile.row) + m,
        plane.BLOCK_M,
    )
    k = peak(
        plane.score.additive.k_peaks,
        plane.score.additive.k_pitch,
        plane.tile.memory_head // plane.score.additive.group,
        feature_start(plane.tile, plane.tile.key) + n,
        plane.BLOCK_N,
    )
    return (q <= SAFE) & (k <= SAFE)


@triton.jit
def feature_pair(plane, q, k, TRANSPOSED: tl.constexpr):
    """One feature of the tile's queries and keys, from pointers to their first ones, shaped to broadcast."""
    q = tl.load(q + tl.arange(0, plane.BLOCK_M))  # [BLOCK_M]
    k = tl.load(k + tl.arange(0, plane.BLOCK_N))  # [BLOCK_N]
    if TRANSPOSED:
        return q[None, :], k[:, None]
    else:
        return q[:, None], k[None, :]


@triton.jit
def halves(plane, q, k, TRANSPOSED: tl.constexpr):
    """(a, b) = 1 + exp(2 q) exp(2 k) of two features, from pointers to the exponentials."""
    q0, k0 = feature_pair(plane, q, k, TRANSPOSED)  # [BLOCK_M, 1], [1, BLOCK_N]
    q1, k1 = feature_pair(plane, *following(plane, q, k, 1), TRANSPOSED)
    return q0 * k0 + 1.0, q1 * k1 + 1.0  # [BLOCK_M, BLOCK_N] each


@triton.jit
def tanhs(plane, q, k, TRANSPOSED: tl.constexpr):
    """tanh(q + k) of two features."""
    q0, k0 = feature_pair(plane, q, k, TRANSPOSED)  # [BLOCK_M, 1], [1, BLOCK_N]
    q1, k1 = feature_pair(plane, *following(plane, q, k, 1), TRANSPOSED)
    return tanh(q0 + k0), tanh(q1 + k1)  # [BLOCK_M, BLOCK_N] each


@triton.jit
def following(plane, q, k, FEATURES: tl.constexpr):
    """The pointers, FEATURES features further on."""
    return (
        q + FEATURES * pitch(plane.score.additive.q_pitch),
        k + FEATURES * pitch(plane.score.additive.k_pitch),
    )


@triton.jit
def first_features(plane, m, n, PAIRED: tl.constexpr):
    """Pointers to feature 0 of the queries and keys of the tile at (m, n); to exponentials if PAIRED."""
    if PAIRED:
        return (
            query_features(plane, plane.score.additive.q_exp, m),
            key_features(plane, plane.score.additive.k_exp, n),
        )
    else:
        return query_features(plane, plane.score.additive.q, m), key_features(plane, plane.score.additive.k, n)


@triton.jit
def feature_sum(plane, m, n, PAIRED: tl.constexpr, TRANSPOSED: tl.constexpr):
    """w . tanh(q + k) of the tile at (m, n), [BLOCK_M, BLOCK_N] or its transpose."""
    q, k = first_features(plane, m, n, PAIRED)
    w = plane.own.weights
    if TRANSPOSED:
        s = tl.zeros([plane.BLOCK_N, plane.BLOCK_M], tl.float32)
    else:
        s = tl.zeros([plane.BLOCK_M, plane.BLOCK_N], tl.float32)
    for _ in tl.range(0, plane.score.additive.features, 2):
        w0, w1 = tl.load(w), tl.load(w + 1)
        if PAIRED:
            # w0 (a - 2) / a + w1 (b - 2) / b with one reciprocal.
            a, b = halves(plane, q, k, TRANSPOSED)  # [BLOCK_M, BLOCK_N]
            ab = a * b
            s += ((w0 + w1) * ab + (b * (-2.0 * w0) + a * (-2.0 * w1))) * reciprocal(ab, plane.score.additive.fast)
        else:
            x, y = tanhs(plane, q, k, TRANSPOSED)  # [BLOCK_M, BLOCK_N]
            s += w0 * x + w1 * y
        q, k = following(plane, q, k, 2)
        w += 2
    return s


@triton.jit
def additive(plane, m, n, TRANSPOSED: tl.constexpr):
    """The products of the tile at (m, n). Features past the ends, and those that no row sees, are zeros."""
    if plane.score.additive.pairs:
        if paired(plane, m, n):
            s = feature_sum(plane, m, n, True, TRANSPOSED)
        else:
            s = feature_sum(plane, m, n, False, TRANSPOSED)
    else:
        s = feature_sum(plane, m, n, False, TRANSPOSED)
    return s
