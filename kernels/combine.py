"""Merge the parts of a split-KV decode.

    out = sum_r exp(peak_r - m) acc_r / sum_r exp(peak_r - m) sum_r    over parts r, with m = max_r peak_r

Grid: (B * Hkv x packed rows), flat. Parts are read PARTS_AT_ONCE at a time, in order, so that the bits of a row depend
on its own parts only. The sink joins once, at the end. Parts that were not written are not read.
"""

import triton
import triton.language as tl

from .decode import cut, first_key, length_of
from .memory import packed_rows
from .numerics import LOG2E
from .softmax import finish, init, update

PARTS_AT_ONCE: tl.constexpr = tl.constexpr(16)


@triton.jit(do_not_specialize=["M", "N", "KV_HEADS", "PARTS", "LEAST"])
def combine_kernel(
    parts, out, lse, span, sink, sequences, M, N, KV_HEADS, PARTS, LEAST,
    GROUP: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The arguments are those of decode_kernel, from which both compute the number of parts."""
    row = tl.program_id(0) % (M * GROUP)
    head = tl.program_id(0) // (M * GROUP)
    b = head // KV_HEADS
    h = head % KV_HEADS
    length = length_of(sequences, b, N)
    _, _, count = cut(first_key(sequences, span, b, length, M), length, PARTS, LEAST, BLOCK_N)

    columns = tl.arange(0, BLOCK_DV)  # [BLOCK_DV]
    base = head.to(tl.int64) * PARTS * (M * GROUP) + row
    m_i, l_i, acc = init(1, BLOCK_DV)  # [1], [1], [1, BLOCK_DV]
    for part in tl.range(0, count, PARTS_AT_ONCE):
        index = part + tl.arange(0, PARTS_AT_ONCE)  # [PARTS_AT_ONCE]
        written = index < count
        own = base + index.to(tl.int64) * (M * GROUP)
        x = tl.load(parts.peak + own, mask=written, other=float("-inf"))  # [PARTS_AT_ONCE]
        sums = tl.load(parts.sum + own, mask=written, other=0.0)  # [PARTS_AT_ONCE]
        mask = written[:, None] & (columns < DV)[None, :]
        # [PARTS_AT_ONCE, BLOCK_DV]
        values = tl.load(parts.acc + own[:, None] * DV + columns[None, :], mask=mask, other=0.0)
        p, alpha, m_i, _parts = update(m_i, l_i, x[None, :], None, LOG2E)  # p: [1, PARTS_AT_ONCE]
        l_i = l_i * alpha + tl.sum(p * sums[None, :], 1)
        acc = acc * alpha[:, None] + tl.sum(tl.trans(p) * values, 0)[None, :]

    rows = row + tl.arange(0, 1)  # [1]
    heads = h * GROUP + rows % GROUP
    logit = None
    if sink is not None:
        logit = tl.load(sink + heads).to(tl.float32)
    out_tile, lse_tile, _, _ = finish(m_i, l_i, acc, 1.0, logit, rows >= 0)  # [1, BLOCK_DV], [1]
    tl.store(lse + (b.to(tl.int64) * (KV_HEADS * GROUP) + heads) * M + rows // GROUP, lse_tile)
    ptrs = packed_rows(out, b, h * GROUP, rows, GROUP, BLOCK_DV)
    tl.store(ptrs, out_tile.to(out.ptr.dtype.element_ty), mask=(columns < DV)[None, :])
