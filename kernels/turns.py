"""Whose tile comes when, of sequences behind one another: a key for each turn, which `memory.owner` takes apart.

A key holds how much a tile sees, the sequence and the tile, so that keys sorted downwards are turns with the longest
first, and the kernels that take them need nothing else. Turns for which there is no tile have tile NONE of sequence 0.
"""

import triton
import triton.language as tl

from .memory import BITS, NONE, number

GRAIN: tl.constexpr = tl.constexpr(64)  # keys that make a difference; 18 bits of them are 2**24 keys
MOST: tl.constexpr = tl.constexpr(2**18 - 1)


@triton.jit(do_not_specialize=["TURNS", "BATCH", "BLOCK"])
def turns_kernel(
    own, other, left, right, aligned, keys, TURNS, BATCH, BLOCK, CHUNK: tl.constexpr, SEQUENCES: tl.constexpr
):
    """own, other: pointers to int32 (BATCH + 1), where the sequences begin whose tiles of BLOCK these are, and those
    that they look at; left, right, aligned: as in Span and Ragged. keys: int64 (TURNS,). Grid: chunks of turns."""
    turn = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    b = tl.zeros([CHUNK], tl.int32)
    first = tl.zeros([CHUNK], tl.int32)
    total = BATCH * 0
    for start in tl.range(0, BATCH, SEQUENCES):
        index = start + tl.arange(0, SEQUENCES)
        begin = tl.load(own + index, mask=index < BATCH, other=0)
        count = tl.cdiv(tl.load(own + index + 1, mask=index < BATCH, other=0) - begin, BLOCK)
        ends = total + tl.cumsum(count, 0)
        ended = (ends[None, :] <= turn[:, None]) & (index < BATCH)[None, :]
        b += tl.sum(ended.to(tl.int32), 1)
        first = tl.maximum(first, tl.max(tl.where(ended, ends[None, :], 0), 1))
        total += tl.sum(count, 0)
    b = tl.minimum(b, BATCH - 1)
    tile = turn - first
    length = tl.load(own + b + 1) - tl.load(own + b)
    limit = tl.load(other + b + 1) - tl.load(other + b)
    shift = (limit - length) * number(aligned)
    lo = tile * 0
    hi = limit
    if left is not None:
        lo = tl.maximum(tile * BLOCK + (shift + number(left)), 0)
    if right is not None:
        hi = tl.minimum(hi, tl.minimum(tile * BLOCK + BLOCK, length) + (shift + number(right)))
    seen = tl.minimum(tl.cdiv(tl.maximum(hi - lo, 0), GRAIN), MOST)
    key = (((seen.to(tl.int64) << BITS) + b) << BITS) + tile
    tl.store(keys + turn, tl.where(turn < total, key, NONE), mask=turn < TURNS)
