"""The nouns that cross the border between host and device.

What is absent is None, and vanishes at compile time. Two faults of triton 3.6 shape these tuples. It cannot tell if a
tuple `is None` when there is a None inside, so View, Scalar, Vector and Dropout hold none. And it forgets the constants
of a tuple inside a tuple, unless a constant follows in the outer one, so what holds Views ends in a constant.

Triton specialises the integers of a tuple on being 1 and on divisibility by 16, whatever the kernel's own marks say,
so a length that shows in a stride would compile anew. Integers here therefore travel as codes, 4 * x + 3: never 1,
never divisible, for every x. `memory.number` reads them.
"""

from typing import Any, NamedTuple


class View(NamedTuple):
    """A tensor (batch, head, row, column). strides: one code a dim, in `unit` elements.

    unit: elements in 16 bytes where the pointer and every stride allow it, else 1; the kernel multiplies, which is how
    the compiler learns that rows are aligned. rows: 0 where all are the same one, else 1. columns: 0 likewise, 1 where
    they are adjacent, 2 where they are apart. wide: offsets inside a tile need int64.
    """

    ptr: Any
    strides: tuple
    unit: Any
    rows: Any
    columns: Any
    wide: Any


class Scalar(NamedTuple):
    """A number; or, when pointer, a pointer to numbers, with the codes of its batch and head strides."""

    value: Any
    strides: tuple
    pointer: Any


class Vector(NamedTuple):
    """int32 (batch, index), with the code of its batch stride."""

    ptr: Any
    stride: Any


class Blocks(NamedTuple):
    """bool (batch, head, block of x, block of y), with the codes of its strides and of the two sizes of a block."""

    ptr: Any
    strides: tuple
    sizes: tuple


class Tree(NamedTuple):
    """bool (batch, row, key), with the codes of its strides."""

    ptr: Any
    strides: tuple


class Table(NamedTuple):
    """int32 (batch, head, tile of x, 2 + tiles of y), with the codes of three strides: how many tiles of y are partial,
    how many are full, and which: the partial ones first. Where a kernel visits all tiles in order, what each is
    instead: 0 where it is not visited."""

    ptr: Any
    strides: tuple


class Ragged(NamedTuple):
    """Sequences behind one another. q, k: pointers to int32 (B + 1), where each begins and the last one ends. turns: to
    int64 keys of whose tile comes when, which every head takes; see turns.py. aligned: the code of 1 where each one's
    diagonal ends at its last row and key, else of 0."""

    q: Any
    k: Any
    turns: Any
    aligned: Any


class Span(NamedTuple):
    """Index x may see y where x + left <= y <= x + right and lo[x] <= y < hi[x]; see `fused_attn.Mask`.

    sinks: y below it may be seen whatever left says. ids, others: Vectors of x's and of y's ids, which must be equal;
    blocks: Blocks that must be allowed; table: which tiles to visit; tree: a Tree, which of the last M keys a row sees,
    where decoding asks. x is a row and y a key; for the key-major kernel
    the host passes the transpose, with x a key and y a row.
    """

    left: Any = None
    right: Any = None
    lo: Any = None
    hi: Any = None
    sinks: Any = None
    ids: Any = None
    others: Any = None
    blocks: Any = None
    table: Any = None
    tree: Any = None


class Additive(NamedTuple):
    """What additive scores are made of. Features are float32 (heads, features, index): a row of memory for each.

    weights: pointer to (Hq or 1, features); stride: the code of that of its heads. q, k: pointers to the features of
    queries and keys, rows `pitch` blocks of 16 apart, a code; q_exp, k_exp: to exp(2 q) and exp(2 k) likewise; q_peaks,
    k_peaks: to the largest |feature| of each block of 16. features: their count, made even by one of zeros. pairs: the
    exponentials are there. group: query heads for a key-value head. fast: reciprocals are the hardware's.
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
    """What turns a product into a score: scale, softcap, bias (a View), ALiBi slopes and the diagonal they see; and
    rows and keys, pointers to float32 (B, Hq, M) and (B, Hq, N), added to the product times the scale. additive: what
    the product is made of where it is no dot product. offset is also None where rows know where they stand.

    sigmoid: what turns a score into a weight is a sigmoid, not a softmax. folds: the scale is known to be positive and
    finite, and nothing follows it, so the largest product is the largest score, and the kernels multiply inside the
    exponential.
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
    """Where keys lie: int32 (batch, entry), with the code of its batch stride, names a page of `size` keys for each."""

    ptr: Any
    stride: Any
    size: Any


class Sequences(NamedTuple):
    """What each sequence of a batch has in a cache, pointers to int32 (batch,) or None: lengths, its keys, to which
    `added`, a code, come; index, which row of the cache it has; leftpad, its first key."""

    lengths: Any
    index: Any
    leftpad: Any
    added: Any


class Parts(NamedTuple):
    """Pointers to the states of parts of the keys, float32: acc (batch * Hkv, part, row, column), values summed with
    weights exp(score - peak); and, (.., row), peak, the part's largest score, a natural logit, and the weights' sum."""

    acc: Any
    peak: Any
    sum: Any


class Rotary(NamedTuple):
    """cos and sin, Views (1, 1, position, half) of so many positions, a code, for the first 2 * half dims."""

    cos: Any
    sin: Any
    positions: Any
    half: Any
    interleaved: Any


class Dropout(NamedTuple):
    """rng: pointer to int64 seed and offset. threshold: of the 32-bit word, less 2**31. rescale: of a survivor."""

    rng: Any
    threshold: Any
    rescale: Any


class Normaliser(NamedTuple):
    """Where the forward leaves what it knows of each row's denominator, pointers to (B, Hq, M) float32: lse, its
    natural log; and what lse is the sum of, apart, for the backward: peak, the largest score, in the units in which the
    loop compares scores (products where the scale is folded into the exponential), and log_sum, the natural log of the
    sum of exp(score - peak), the sink included. A row that sees nothing has peak 0."""

    lse: Any
    peak: Any
    log_sum: Any


class RowNumbers(NamedTuple):
    """What the backward knows of each row, pointers to (B, Hq, M). normaliser: two float32 in an int64, see
    `numerics.pair`: peak, as the forward left it, and log_sum in base 2, +inf for a row that sees nothing; delta:
    float32, what is subtracted from the gradient of a weight."""

    normaliser: Any
    delta: Any


class RowBoxes(NamedTuple):
    """The same for sm_90, which copies each in boxes: pointers to float32."""

    peak: Any
    log2_sum: Any
    delta: Any


class KeyGradients(NamedTuple):
    """What the key-major kernel is asked for. dk, dv: View. sums: pointer to column sums of dx (B, Hq, N) float32."""

    dk: Any = None
    dv: Any = None
    sums: Any = None
    end: None = None


class AdditiveGradients(NamedTuple):
    """What the backward of additive scores is asked for.

    dv, bias: View, the second dense. columns, scale, softcap, slopes: pointers to column sums (B, Hq, N), of dx and of
    what it gives those parameters. rows: pointer to row sums of dx (B, Hq, M), zeros before. dq, dk: pointers to
    features like those of q and k, zeros before; dw: to (B * Hq, tiles of keys, features), zeros before; stage: to
    (programs, features, BLOCK_M), for one tile's part of dq. ticket: the next program's number; turns:
    for each head and tile of rows, the tile of keys that may add to it. Both are zeros before.
    """

    ticket: Any
    turns: Any
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
    """What the row-major kernel is asked for. dq, bias: View, the second dense. The others: pointers to row sums,
    `sums` to those of dx itself."""

    dq: Any = None
    bias: Any = None
    scale: Any = None
    softcap: Any = None
    slopes: Any = None
    sums: Any = None
    end: None = None


class Found(NamedTuple):
    """What the row-major statistics kernel is asked for: pointers to (B, Hq, M), float32. shift and part are what the
    key-major kernel weighs with; indices (int64) and weights are (B, Hq, M, k). bound, int64: only what is less is
    ranked; next: the bound of who ranks on. weighs: whether anything asks for weights, which a sigmoid has without."""

    max_logit: Any = None
    entropy: Any = None
    shift: Any = None
    part: Any = None
    indices: Any = None
    weights: Any = None
    bound: Any = None
    next: Any = None
    weighs: Any = None
