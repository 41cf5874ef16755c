"""How alike q and k are: the dot product, or w . tanh(q + k). Modifiers (modifiers.py) make its value a score.

An additive product goes feature by feature over a tile, two at a time. Directly, tanh(q + k); or, where every |q| and
|k| of the tile is at most SAFE, by the identity tanh(q + k) = (a - 2) / a with a = 1 + exp(2 q) exp(2 k), in which two
features share one reciprocal, of a b: half the special-function work. Beyond SAFE a b could overflow, and a clamp would
be wrong (q = 15 with k = -14.5 is no saturation), so such tiles take tanh.
"""

import triton
import triton.language as tl

from .memory import number
from .numerics import dot, reciprocal, tanh

PEAKS: tl.constexpr = tl.constexpr(16)  # rows to a peak, and to a block of a pitch
GAP: tl.constexpr = tl.constexpr(256)  # rows of zeros behind a sequence; no tile is longer
SAFE: tl.constexpr = tl.constexpr(11.0)  # exp(4 * 2 * 11) < 2**127


@triton.jit
def products(q, k, PRECISION: tl.constexpr):
    """q [BLOCK_M, BLOCK_D], k [BLOCK_N, BLOCK_D] -> [BLOCK_M, BLOCK_N]; swap them for the transpose."""
    return dot(q, tl.trans(k), None, PRECISION)


@triton.jit
def pitch(blocks):
    """Elements from one feature to the next, of a code of blocks of PEAKS."""
    return number(blocks) * PEAKS


@triton.jit
def room(at, start):
    """Where the features of a sequence begin, that begins at start in q or k: in memory of its own, zeros behind its
    end, so that a tile that runs over it meets nothing of the next one. 0 in a batch, where start and b - batch are."""
    return (tl.cdiv(start, PEAKS) + (at.b - at.batch) * (GAP // PEAKS + 1)) * PEAKS


@triton.jit
def query_features(plane, base, m):
    """To feature 0 of row m, in memory laid out as q's features are."""
    head = plane.at.home.to(tl.int64) * plane.score.additive.features
    return base + (head * pitch(plane.score.additive.q_pitch) + room(plane.at, plane.at.row)) + m


@triton.jit
def key_features(plane, base, n):
    """To feature 0 of key n, in memory laid out as k's features are."""
    head = (plane.at.home // plane.score.additive.group).to(tl.int64) * plane.score.additive.features
    return base + (head * pitch(plane.score.additive.k_pitch) + room(plane.at, plane.at.key)) + n


@triton.jit
def peak(base, blocks, head, start, BLOCK: tl.constexpr):
    """The largest |feature| of a tile. NaN may be skipped: it makes NaN of either way."""
    at = start // PEAKS + tl.arange(0, BLOCK // PEAKS)
    found = tl.load(base + head.to(tl.int64) * number(blocks) + at, mask=at < number(blocks), other=0.0)
    return tl.max(found, 0)


@triton.jit
def paired(plane, m, n):
    """Whether the tile at (m, n) may take the identity."""
    q = peak(
        plane.score.additive.q_peaks,
        plane.score.additive.q_pitch,
        plane.at.home,
        room(plane.at, plane.at.row) + m,
        plane.BLOCK_M,
    )
    k = peak(
        plane.score.additive.k_peaks,
        plane.score.additive.k_pitch,
        plane.at.home // plane.score.additive.group,
        room(plane.at, plane.at.key) + n,
        plane.BLOCK_N,
    )
    return (q <= SAFE) & (k <= SAFE)


@triton.jit
def feature_pair(plane, q, k, TRANSPOSED: tl.constexpr):
    """A feature of the tile's queries and of its keys, from pointers to the first ones, shaped to broadcast."""
    q = tl.load(q + tl.arange(0, plane.BLOCK_M))
    k = tl.load(k + tl.arange(0, plane.BLOCK_N))
    if TRANSPOSED:
        return q[None, :], k[:, None]
    else:
        return q[:, None], k[None, :]


@triton.jit
def halves(plane, q, k, TRANSPOSED: tl.constexpr):
    """(a, b) = 1 + exp(2 q) exp(2 k) of two features, from pointers to the exponentials."""
    q0, k0 = feature_pair(plane, q, k, TRANSPOSED)
    q1, k1 = feature_pair(plane, *following(plane, q, k, 1), TRANSPOSED)
    return q0 * k0 + 1.0, q1 * k1 + 1.0


@triton.jit
def tanhs(plane, q, k, TRANSPOSED: tl.constexpr):
    """tanh(q + k) of two features."""
    q0, k0 = feature_pair(plane, q, k, TRANSPOSED)
    q1, k1 = feature_pair(plane, *following(plane, q, k, 1), TRANSPOSED)
    return tanh(q0 + k0), tanh(q1 + k1)


@triton.jit
def following(plane, q, k, FEATURES: tl.constexpr):
    """The pointers so many features further on."""
    return (
        q + FEATURES * pitch(plane.score.additive.q_pitch),
        k + FEATURES * pitch(plane.score.additive.k_pitch),
    )


@triton.jit
def first_features(plane, m, n, PAIRED: tl.constexpr):
    """Pointers to feature 0 of the queries and of the keys of the tile at (m, n), exponentials if PAIRED."""
    if PAIRED:
        return (
            query_features(plane, plane.score.additive.q_exp, m),
            key_features(plane, plane.score.additive.k_exp, n),
        )
    else:
        return query_features(plane, plane.score.additive.q, m), key_features(plane, plane.score.additive.k, n)


@triton.jit
def feature_sum(plane, m, n, PAIRED: tl.constexpr, TRANSPOSED: tl.constexpr):
    """w . tanh(q + k) of the tile at (m, n)."""
    q, k = first_features(plane, m, n, PAIRED)
    w = plane.own.weights
    if TRANSPOSED:
        s = tl.zeros([plane.BLOCK_N, plane.BLOCK_M], tl.float32)
    else:
        s = tl.zeros([plane.BLOCK_M, plane.BLOCK_N], tl.float32)
    for _ in tl.range(0, plane.score.additive.features, 2):
        w0, w1 = tl.load(w), tl.load(w + 1)
        if PAIRED:
            # w0 (a - 2) / a + w1 (b - 2) / b, in seven operations and one reciprocal for the two.
            a, b = halves(plane, q, k, TRANSPOSED)
            ab = a * b
            s += ((w0 + w1) * ab + (b * (-2.0 * w0) + a * (-2.0 * w1))) * reciprocal(ab, plane.score.additive.fast)
        else:
            x, y = tanhs(plane, q, k, TRANSPOSED)
            s += w0 * x + w1 * y
        q, k = following(plane, q, k, 2)
        w += 2
    return s


@triton.jit
def additive(plane, m, n, TRANSPOSED: tl.constexpr):
    """The products of the tile at (m, n). Features of what lies past the ends, or is never seen, are zeros."""
    if plane.score.additive.pairs:
        if paired(plane, m, n):
            s = feature_sum(plane, m, n, True, TRANSPOSED)
        else:
            s = feature_sum(plane, m, n, False, TRANSPOSED)
    else:
        s = feature_sum(plane, m, n, False, TRANSPOSED)
    return s
