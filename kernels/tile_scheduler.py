"""Longest-first tile schedule for packed (varlen) batches: one entry per slot, decoded by `memory.scheduled_tile`.

From the highest bits down, an entry holds how many keys the tile sees, the sequence and the tile. Sorted in descending
order, the longest tiles come first. Entries without a tile hold sequence 0 and tile NONE.
"""

import triton
import triton.language as tl

from .memory import BITS, NONE, decode_int

GRAIN: tl.constexpr = tl.constexpr(64)  # unit of the number of visible keys; 18 bits of it hold 2**24 keys
MOST: tl.constexpr = tl.constexpr(2**18 - 1)


@triton.jit(do_not_specialize=["SLOTS", "BATCH", "BLOCK"])
def schedule_kernel(
    own, other, left, right, aligned, entries, SLOTS, BATCH, BLOCK, CHUNK: tl.constexpr, SEQUENCES: tl.constexpr
):
    """own: pointer to int32 (BATCH + 1), cumulative lengths of the sequences whose tiles of BLOCK are scheduled; other:
    of those that they attend to. left, right, aligned: as in Span and Ragged. entries: pointer to int64 (SLOTS),
    written.

    Grid: (chunks of CHUNK entries).
    """
    slot = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)  # [CHUNK]
    b = tl.zeros([CHUNK], tl.int32)  # [CHUNK], the sequence
    first = tl.zeros([CHUNK], tl.int32)  # [CHUNK], tiles of the sequences before it
    total = BATCH * 0
    for start in tl.range(0, BATCH, SEQUENCES):
        index = start + tl.arange(0, SEQUENCES)  # [SEQUENCES]
        begin = tl.load(own + index, mask=index < BATCH, other=0)  # [SEQUENCES]
        count = tl.cdiv(tl.load(own + index + 1, mask=index < BATCH, other=0) - begin, BLOCK)  # [SEQUENCES], tiles
        ends = total + tl.cumsum(count, 0)  # [SEQUENCES]
        ended = (ends[None, :] <= slot[:, None]) & (index < BATCH)[None, :]  # [CHUNK, SEQUENCES]
        b += tl.sum(ended.to(tl.int32), 1)
        first = tl.maximum(first, tl.max(tl.where(ended, ends[None, :], 0), 1))
        total += tl.sum(count, 0)
    b = tl.minimum(b, BATCH - 1)
    tile = slot - first  # [CHUNK]
    length = tl.load(own + b + 1) - tl.load(own + b)
    limit = tl.load(other + b + 1) - tl.load(other + b)
    shift = (limit - length) * decode_int(aligned)
    lo = tile * 0
    hi = limit
    if left is not None:
        lo = tl.maximum(tile * BLOCK + (shift + decode_int(left)), 0)
    if right is not None:
        hi = tl.minimum(hi, tl.minimum(tile * BLOCK + BLOCK, length) + (shift + decode_int(right)))
    visible = tl.minimum(tl.cdiv(tl.maximum(hi - lo, 0), GRAIN), MOST)  # [CHUNK]
    entry = (((visible.to(tl.int64) << BITS) + b) << BITS) + tile  # [CHUNK]
    tl.store(entries + slot, tl.where(slot < total, entry, NONE), mask=slot < SLOTS)
