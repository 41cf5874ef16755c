"""Write new keys and values into a cache, in place, with rotary embedding; and apply it to the queries.

    x'_d = x_d cos - x_e sin,   x'_e = x_e cos + x_d sin,   where e = d + R / 2, or dims 2 d and 2 d + 1 are a pair

Grid: (HEADS x tiles of BLOCK_T tokens x B), flat; HEADS counts those of k, of v and, with rotary embedding, of q.
"""

import triton
import triton.language as tl

from .decode import keys_of
from .memory import decode_int, head_pointer, load_rows, pointers, row_offsets, store_rows, whole_rows


@triton.jit
def rotated(view, head, start, live, positions, rotary, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of x from `start` on, rotated by their positions [ROWS], in float32; x itself without rotary embedding.

    A position beyond the tables of cos and sin gives NaN.
    """
    x = load_rows(view, head, start, live, ROWS, D, BLOCK_D)  # [ROWS, BLOCK_D]
    if rotary is None:
        return x
    else:
        d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
        if rotary.interleaved:
            first, other, column = d % 2 == 0, d ^ 1, d // 2  # [BLOCK_D]
        else:
            first = d < rotary.half  # [BLOCK_D]
            other = tl.where(first, d + rotary.half, d - rotary.half)
            column = tl.where(first, d, d - rotary.half)
        rotates = d < 2 * rotary.half
        other = tl.where(rotates, other, 0)
        # [ROWS, BLOCK_D], the other dim of each pair
        ptrs = pointers(view, head, start, start * 0, tl.arange(0, ROWS)[:, None], other[None, :])
        x = x.to(tl.float32)
        y = tl.load(ptrs, mask=live[:, None] & rotates[None, :], other=0.0).to(tl.float32)
        known = (live & (positions < decode_int(rotary.positions)))[:, None] & rotates[None, :]  # [ROWS, BLOCK_D]
        # [ROWS, 1], [1, BLOCK_D]
        row, column = tl.where(live, positions, 0)[:, None], tl.where(rotates, column, 0)[None, :]
        zero = start * 0
        # [ROWS, BLOCK_D]
        cos = tl.load(pointers(rotary.cos, rotary.cos.ptr, zero, zero, row, column), mask=known, other=0.0)
        # [ROWS, BLOCK_D]
        sin = tl.load(pointers(rotary.sin, rotary.sin.ptr, zero, zero, row, column), mask=known, other=0.0)
        cos = tl.where(known, cos.to(tl.float32), float("nan"))
        sin = tl.where(known, sin.to(tl.float32), float("nan"))
        return tl.where(rotates[None, :], tl.where(first[None, :], x * cos - y * sin, x * cos + y * sin), x)


@triton.jit
def write(view, pages, sequences, b, h, keys, live, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store x [len(keys), BLOCK_D] as keys or values of sequence b in a cache."""
    cache_row, entry = keys_of(sequences, pages, b)
    offsets = row_offsets(view, pages, entry, keys, live)  # [len(keys)]
    ptrs = whole_rows(view, head_pointer(view, cache_row, h), offsets, BLOCK_D)  # [len(keys), BLOCK_D]
    mask = live[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    tl.store(ptrs, x.to(view.ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "M", "N", "KV_HEADS", "HEADS"])
def append_kernel(
    k_new, v_new, k, v, q, q_rotated, sequences, pages, rotary, T, M, N, KV_HEADS, HEADS,
    ADVANCE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """k_new, v_new: Views (B, Hkv, T, ..). k, v: Views of the cache. q, q_rotated: Views (B, Hq, M, D), None without
    rotary embedding. ADVANCE: consecutive queries have consecutive positions, as keys do; else all have the first
    one's."""
    head = tl.program_id(0) % HEADS
    pid = tl.program_id(0) // HEADS
    tiles = tl.cdiv(tl.maximum(T, M), BLOCK_T)
    start = pid % tiles * BLOCK_T
    b = pid // tiles
    length = tl.load(sequences.lengths + b)
    steps = start + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    keys = length + steps  # [BLOCK_T]
    live = (steps < T) & (keys >= 0) & (keys < N)
    if head < KV_HEADS:
        # [BLOCK_T, BLOCK_D]
        k_tile = rotated(k_new, head_pointer(k_new, b, head), start, live, keys, rotary, BLOCK_T, D, BLOCK_D)
        write(k, pages, sequences, b, head, keys, live, k_tile, D, BLOCK_D)
    elif head < 2 * KV_HEADS:
        # [BLOCK_T, BLOCK_DV]
        v_tile = load_rows(v_new, head_pointer(v_new, b, head - KV_HEADS), start, live, BLOCK_T, DV, BLOCK_DV)
        write(v, pages, sequences, b, head - KV_HEADS, keys, live, v_tile, DV, BLOCK_DV)
    elif q is not None:
        h = head - 2 * KV_HEADS
        positions = keys
        if not ADVANCE:
            positions = keys - steps
        # [BLOCK_T, BLOCK_D]
        q_tile = rotated(q, head_pointer(q, b, h), start, steps < M, positions, rotary, BLOCK_T, D, BLOCK_D)
        store_rows(q_rotated, head_pointer(q_rotated, b, h), start, steps < M, q_tile, BLOCK_T, D, BLOCK_D)
