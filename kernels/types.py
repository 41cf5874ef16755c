"""The tuples that the host passes to the kernels.

An absent option is None and vanishes at compile time. Integers travel encoded, as 4 * x + 3, and `memory.decode_int`
decodes them. The reason: Triton specialises the integers of a tuple on being 1 and on divisibility by 16, whatever the
kernel's do_not_specialize says, so a stride that depends on a length would compile anew for each length. 4 * x + 3 is
never 1 and never divisible.

Two faults of triton 3.6 shape these tuples:
- `x is None` is wrong for a tuple with a None inside, so View, Scalar, Vector and Dropout hold none.
- The constants of a nested tuple are lost unless a constant follows in the outer one, so tuples that hold Views end in
  a constant.
"""

from typing import Any, NamedTuple


class View(NamedTuple):
    """A tensor (batch, head, row, column).

    strides: one per dimension, encoded, in units of `unit` elements. unit: the elements in 16 bytes if the pointer and
    every stride allow it, else 1; the kernel multiplies by it, which tells the compiler that rows are aligned.
    rows: 0 if the stride of rows is 0, else 1. columns: 0 if their stride is 0, 1 if they are contiguous, 2 if they are
    strided. wide: offsets inside a tile need int64.
    """

    ptr: Any
    strides: tuple
    unit: Any
    rows: Any
    columns: Any
    wide: Any


class Scalar(NamedTuple):
    """A number, or, if `pointer`, a pointer to one number per (batch, head). strides: of batch and head, encoded."""

    value: Any
    strides: tuple
    pointer: Any


class Vector(NamedTuple):
    """int32 (batch, index). stride: of the batch, encoded."""

    ptr: Any
    stride: Any


class Blocks(NamedTuple):
    """bool (batch, head, block of x, block of y). strides, sizes (of a block, in x and in y): encoded."""

    ptr: Any
    strides: tuple
    sizes: tuple


class Tree(NamedTuple):
    """bool (batch, row, key). strides: encoded."""

    ptr: Any
    strides: tuple


class BlockMask(NamedTuple):
    """A block mask: int32 (batch, head, tile of x, 2 + tiles of y). strides: the first three, encoded.

    For each tile of x: the number of partial tiles of y, the number of full ones, then their indices, the partial ones
    first. A kernel that goes through all tiles in order gets one flag per tile instead of indices: 0 means skip.
    """

    ptr: Any
    strides: tuple


class Ragged(NamedTuple):
    """A packed (varlen) batch: all sequences in one batch entry, one after another.

    q, k: pointers to int32 (B + 1), cumulative lengths of queries and keys. schedule: pointer to int64 entries, one
    per slot and shared by all heads; see tile_scheduler.py. aligned: 1 if the diagonal of each sequence ends at its
    last row and key (bottom right), else 0; encoded.
    """

    q: Any
    k: Any
    schedule: Any
    aligned: Any


class Span(NamedTuple):
    """Index x may attend to y if x + left <= y <= x + right and lo[x] <= y < hi[x]; see `fused_attn.Mask`.

    x is a query and y a key. For key-major kernels the host passes the transpose: x is a key and y a query.

    left, right, sinks: encoded integers; y < sinks is visible whatever left says. lo, hi: Vectors. ids, others: Vectors
    of the ids of x and of y, which must be equal. blocks: Blocks, which must be true. block_mask: a BlockMask, the
    tiles to visit. tree: a Tree, which of the last M keys a row sees; decoding only.
    """

    left: Any = None
    right: Any = None
    lo: Any = None
    hi: Any = None
    sinks: Any = None
    ids: Any = None
    others: Any = None
    blocks: Any = None
    block_mask: Any = None
    tree: Any = None


class Additive(NamedTuple):
    """The operands of an additive score. Features are float32 (heads, features, index), so each one is contiguous.

    weights: pointer to (Hq or 1, features); stride: of its heads, encoded.
    q, k: pointers to the features of queries and keys; q_exp, k_exp: to exp(2 q) and exp(2 k) in the same layout.
    q_peaks, k_peaks: pointers to the largest |feature| of each block of 16 indices. q_pitch, k_pitch: from one feature
    to the next, in blocks of 16, encoded. features: their count, made even by a feature of zeros. pairs: the
    exponentials are there. group: query heads per key-value head. fast: use the hardware's approximate reciprocal.
    """

    weights: Any
    stride: Any
    q: Any
    k: Any
    q_exp: Any
    k_exp: Any
    q_peaks: Any
    k_peaks: Any
    q_pitch: Any
    k_pitch: Any
    features: Any
    pairs: Any
    group: Any
    fast: Any


class Score(NamedTuple):
    """How a product becomes a score: scale, softcap, bias (a View), ALiBi slopes and the offset of their diagonal.

    offset: encoded, or None if rows carry their own positions. rows, keys: pointers to float32 (B, Hq, M) and
    (B, Hq, N), added to product * scale. additive: an Additive, or None for dot products. sigmoid: a weight is
    sigmoid(score) instead of a softmax. folds: the scale is positive and finite and no modifier follows it, so the
    largest product is the largest score, and the kernels multiply by the scale inside the exponential.
    """

    scale: Scalar
    softcap: Any
    bias: Any
    slopes: Any
    offset: Any
    rows: Any
    keys: Any
    additive: Any
    sigmoid: Any
    folds: Any


class Pages(NamedTuple):
    """The page table of a paged cache: int32 (batch, entry), each entry a page of `size` keys. stride: of the batch,
    encoded."""

    ptr: Any
    stride: Any
    size: Any


class Sequences(NamedTuple):
    """The sequences of a cache, pointers to int32 (batch,) or None.

    lengths: keys in the cache, without the `added` new ones (encoded). index: the row of the cache. leftpad: the first
    key that is no padding.
    """

    lengths: Any
    index: Any
    leftpad: Any
    added: Any


class Parts(NamedTuple):
    """Partial states of split-KV decoding, pointers to float32.

    acc (batch * Hkv, part, row, column): the sum of exp(score - peak) v. peak, sum (batch * Hkv, part, row): the part's
    largest score, a natural logit, and the sum of exp(score - peak).
    """

    acc: Any
    peak: Any
    sum: Any


class Rotary(NamedTuple):
    """cos, sin: Views (1, 1, position, half), of `positions` (encoded) positions, for the first 2 * half dims.

    interleaved: dims 2 d and 2 d + 1 are a pair; else d and d + half are.
    """

    cos: Any
    sin: Any
    positions: Any
    half: Any
    interleaved: Any


class Dropout(NamedTuple):
    """rng: pointer to int64 seed and offset. threshold: a weight is kept if its 32-bit word, less 2**31, is at least
    this. rescale: the factor of kept weights."""

    rng: Any
    threshold: Any
    rescale: Any


class Normaliser(NamedTuple):
    """What the forward writes about each row's denominator, pointers to float32 (B, Hq, M).

    lse: its natural log, the sink included. peak, log_sum: kept apart for the backward, because one float32 loses the
    log of the sum beside a large maximum. peak is the largest score or, if the scale folds (see Score), the largest
    unscaled product; log_sum is the natural log of the sum of exp(score - largest score), the sink included. So lse is
    peak + log_sum, or peak * scale + log_sum if the scale folds. A fully masked row has peak 0.
    """

    lse: Any
    peak: Any
    log_sum: Any


class RowNumbers(NamedTuple):
    """What the backward reads of each row, pointers to (B, Hq, M).

    peak_log2_sum: int64, two float32 (see `numerics.pair`): peak, as the forward wrote it, and log_sum in base 2, +inf
    for a fully masked row. delta: float32, subtracted from the gradient of a weight.
    """

    peak_log2_sum: Any
    delta: Any


class SplitRowNumbers(NamedTuple):
    """RowNumbers with peak and log2_sum in tensors of their own, for TMA: pointers to float32."""

    peak: Any
    log2_sum: Any
    delta: Any


class KeyGradients(NamedTuple):
    """Outputs asked of dkdv_kernel. dk, dv: Views. sums: pointer to column sums of dx, float32 (B, Hq, N)."""

    dk: Any = None
    dv: Any = None
    sums: Any = None
    end: None = None


class AdditiveGradients(NamedTuple):
    """Outputs asked of the backward of additive scores, and its scratch memory.

    dv, bias: Views, the second dense. columns, scale, softcap, slopes: pointers to (B, Hq, N), column sums of dx and of
    the gradients of these parameters. rows: pointer to row sums of dx (B, Hq, M). dq, dk: pointers to features in the
    layout of those of q and k. dw: pointer to (B * Hq, tiles of keys, features). rows, dq, dk and dw start as zeros.

    ticket: pointer to the next program's ticket. semaphores: pointer to one counter per head and tile of rows, the tile
    of keys that may add to it next. Both start as zeros. stage: pointer to (programs, features, BLOCK_M), the part of
    dq that comes from one tile.
    """

    ticket: Any
    semaphores: Any
    dv: Any = None
    bias: Any = None
    columns: Any = None
    scale: Any = None
    softcap: Any = None
    slopes: Any = None
    rows: Any = None
    dq: Any = None
    dk: Any = None
    dw: Any = None
    stage: Any = None
    end: None = None


class RowGradients(NamedTuple):
    """Outputs asked of dq_kernel. dq, bias: Views, the second dense. The others: pointers to row sums (B, Hq, M);
    `sums` is that of dx itself."""

    dq: Any = None
    bias: Any = None
    scale: Any = None
    softcap: Any = None
    slopes: Any = None
    sums: Any = None
    end: None = None


class RowStatistics(NamedTuple):
    """Outputs asked of row_statistics_kernel: pointers to float32 (B, Hq, M) unless noted.

    max_logit, entropy. shift, part: what key_mass_kernel needs to compute weights. indices (int64), weights:
    (B, Hq, M, k), the largest weights and their keys. bound: int64; only scores below it are ranked. next: int64, the
    bound for the next round. weighs: some output needs a softmax's denominator.
    """

    max_logit: Any = None
    entropy: Any = None
    shift: Any = None
    part: Any = None
    indices: Any = None
    weights: Any = None
    bound: Any = None
    next: Any = None
    weighs: Any = None
