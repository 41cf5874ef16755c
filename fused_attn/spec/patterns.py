"""Visibility that is no interval of keys: equal ids in any order, and blocks of scores; by element and by tile."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

NARROW = {torch.uint8, torch.uint16, torch.int8, torch.int16, torch.int32}  # int32 holds every id of these
BUCKETS = 64  # hash buckets of ids, per tile


@dataclass(frozen=True, eq=False)
class Pattern:
    """Visibility that is no interval of keys: row i may attend to key j where

        q_ids[b, i] == kv_ids[b, j]   and   blocks[b, h, i // height, j // width].

    None allows everything. q_ids and kv_ids are int32 (B or 1, M) and (B or 1, N), in any order; blocks is bool,
    broadcastable to (B, Hq, ceil(M / height), ceil(N / width)).
    """

    q_ids: Tensor | None = None
    kv_ids: Tensor | None = None
    blocks: Tensor | None = None
    height: int = 1
    width: int = 1

    def meet(self, other: Pattern, m: int, n: int) -> Pattern:
        """The intersection: ids of both become ids of pairs, and blocks are cut to a size that divides both."""
        met = self
        if other.q_ids is not None and other.kv_ids is not None:
            q, k = other.q_ids, other.kv_ids
            if self.q_ids is not None and self.kv_ids is not None:
                q, k = _ranked((self.q_ids.long() << 32) + q, (self.kv_ids.long() << 32) + k)
            met = replace(met, q_ids=q, kv_ids=k)
        if other.blocks is not None:
            if self.blocks is None:
                return replace(met, blocks=other.blocks, height=other.height, width=other.width)
            a, b, height = _cut(self.blocks, self.height, other.blocks, other.height, 2, m)
            a, b, width = _cut(a, self.width, b, other.width, 3, n)
            met = replace(met, blocks=a & b, height=height, width=width)
        return met

    @property
    def conditions(self) -> list[Pattern]:
        """The ids and the blocks as separate patterns."""
        ids = [] if self.q_ids is None else [replace(self, blocks=None)]
        return ids if self.blocks is None else [*ids, replace(self, q_ids=None, kv_ids=None)]

    def part(self, batch: slice, heads: slice) -> Pattern:
        """The pattern of a slice of batches and heads."""
        ids = [x if x is None or len(x) == 1 else x[batch] for x in (self.q_ids, self.kv_ids)]
        blocks = self.blocks
        if blocks is not None:
            blocks = blocks if blocks.shape[0] == 1 else blocks[batch]
            blocks = blocks if blocks.shape[1] == 1 else blocks[:, heads]
        return replace(self, q_ids=ids[0], kv_ids=ids[1], blocks=blocks)

    def begin(self, m: int, n: int) -> Pattern:
        """The pattern of the first m rows and n keys."""
        q, k = (None if x is None else x[:, :size] for x, size in ((self.q_ids, m), (self.kv_ids, n)))
        return replace(self, q_ids=q, kv_ids=k)

    def materialize(self, rows: Tensor, cols: Tensor) -> Tensor:
        """bool (B or 1, Hq or 1, rows, cols), True where the row may attend to the column."""
        grids = []
        if self.q_ids is not None and self.kv_ids is not None:
            grids.append((self.q_ids[:, rows, None] == self.kv_ids[:, None, cols])[:, None])
        if self.blocks is not None:
            grids.append(self.blocks[:, :, (rows // self.height)[:, None], cols // self.width])
        return grids[0] if len(grids) == 1 else grids[0] & grids[1]

    def tiles(self, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """(some, whole), bool (B or 1, Hq or 1, T, K): True if some pair of a tile is visible, and if all pairs are.

        rows (T, size) and keys (K, size) are the indices of each tile, ascending; a shorter tile repeats its last
        index. whole is exact. some is exact for blocks and may be a false positive for ids, which are compared by
        bucket and by range.
        """
        results = []
        if self.q_ids is not None and self.kv_ids is not None:
            q, k = self.q_ids[:, rows], self.kv_ids[:, keys]
            (q_low, q_high), (k_low, k_high) = (x.aminmax(dim=-1) for x in (q, k))
            q_low, q_high, k_low, k_high = q_low[..., None], q_high[..., None], k_low[:, None], k_high[:, None]
            some = (q_low <= k_high) & (k_low <= q_high) & (_buckets(q) @ _buckets(k).mT > 0)
            whole = (q_low == k_high) & (q_high == k_low)
            results.append((some[:, None], whole[:, None]))
        if self.blocks is not None:
            top, bottom = rows[:, :1] // self.height, rows[:, -1:] // self.height + 1
            left, right = keys[:, 0] // self.width, keys[:, -1] // self.width + 1
            sums = _sums_before(_sums_before(self.blocks, 2), 3)
            count = (
                sums[:, :, bottom, right] - sums[:, :, top, right] - sums[:, :, bottom, left] + sums[:, :, top, left]
            )
            results.append((count > 0, count == (bottom - top) * (right - left)))
        (some, whole), *rest = results
        for other in rest:
            some, whole = some & other[0], whole & other[1]
        return some, whole

    def visible_keys(self, start: Tensor, stop: Tensor) -> Tensor:
        """bool (B or 1, N): the keys visible to some row in [start, stop) by ids, and to some such row by blocks in any
        head. start and stop are (B or 1, N)."""
        reached, device = start < stop, start.device
        if self.q_ids is not None and self.kv_ids is not None:
            # Sorted by (id, row), the rows of one id in [start, stop) are adjacent.
            m = self.q_ids.shape[1]
            order = (self.q_ids.long() * m + torch.arange(m, device=device)).sort().values
            first, last = (self.kv_ids.long() * m + x for x in (start, stop))
            batch = max(map(len, (order, first, last)))
            order, first, last = (x.expand(batch, -1).contiguous() for x in (order, first, last))
            reached = reached & (torch.searchsorted(order, first) < torch.searchsorted(order, last))
        if self.blocks is not None:
            above = _sums_before(self.blocks.any(1), 1)
            each = torch.arange(len(above), device=device)[:, None]
            cols = torch.arange(start.shape[1], device=device) // self.width
            bottom = (stop - 1).clamp_min(0) // self.height + 1
            top = torch.minimum(start // self.height, bottom)
            reached = reached & (above[each, bottom, cols] > above[each, top, cols])
        return reached


def as_ids(q_ids: Tensor, kv_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Integers of any width, (B or 1, M) and (B or 1, N), as int32, equal where those are."""
    if {q_ids.dtype, kv_ids.dtype} <= NARROW:
        return q_ids.int(), kv_ids.int()
    return _ranked(q_ids.long(), kv_ids.long())


def _ranked(q_ids: Tensor, kv_ids: Tensor) -> tuple[Tensor, Tensor]:
    """int64 -> int32 ranks: how many of all ids are smaller."""
    batch = max(len(q_ids), len(kv_ids))
    q_ids, kv_ids = (x.expand(batch, -1).contiguous() for x in (q_ids, kv_ids))
    order = torch.cat((q_ids, kv_ids), 1).sort().values
    return torch.searchsorted(order, q_ids, out_int32=True), torch.searchsorted(order, kv_ids, out_int32=True)


def _cut(a: Tensor, size: int, b: Tensor, other: int, dim: int, length: int) -> tuple[Tensor, Tensor, int]:
    """a and b, with blocks of size and other along dim, cut to one common size; a single block stays one."""
    if a.shape[dim] == 1 or b.shape[dim] == 1:
        return a, b, other if a.shape[dim] == 1 else size
    common = math.gcd(size, other)
    count = -(-length // common)
    a, b = (x.repeat_interleave(s // common, dim).narrow(dim, 0, count) for x, s in ((a, size), (b, other)))
    return a, b, common


def _buckets(ids: Tensor) -> Tensor:
    """(B, tiles, size) -> float32 (B, tiles, BUCKETS): 1 where a tile has an id of that bucket.

    Multiplicative hashing (Knuth, "The art of computer programming", 6.4); neighbours never collide.
    """
    bucket = (ids.long() * 0x9E3779B1 >> 26) & (BUCKETS - 1)
    buckets = torch.zeros((*ids.shape[:2], BUCKETS), device=ids.device)
    return buckets.scatter_(2, bucket, 1.0)


def _sums_before(x: Tensor, dim: int) -> Tensor:
    """Exclusive prefix sums along dim, int32, with the total as an additional last element."""
    sums = x.cumsum(dim, dtype=torch.int32)
    return torch.cat((sums.new_zeros(*sums.shape[:dim], 1, *sums.shape[dim + 1 :]), sums), dim)
