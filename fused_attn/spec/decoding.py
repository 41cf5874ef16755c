"""Decoding: a cache of keys and values, dense or paged, and the attention of new queries to it.

Shapes follow the memory layout of caches: q (B, M, Hq, D), k and v (C, N, Hkv, D), or pages (P, page, Hkv, D) indexed
by a table (B, pages). Sequence b has keys first <= j < length; its queries are its last M positions, so row i is at
position length - M + i. `problems` defines the meaning: one dense Problem per sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import storage
from .checks import readable
from .problem import Problem, Span, empty_ordered


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotary embedding of the first 2 * cos.shape[1] dims by cos, sin (S, R / 2), one row per position.

    Dims d and d + R / 2 are a pair; interleaved, 2 d and 2 d + 1. Su et al., "RoFormer", 2021.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    def rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B, T, H, D) rotated for positions (B, T), computed in float32, or float64 for float64."""
        half = self.cos.shape[1]
        dtype = torch.promote_types(x.dtype, torch.float32)
        cos, sin = (y[positions].to(dtype)[:, :, None] for y in (self.cos, self.sin))
        pairs = x[..., : 2 * half].to(dtype).unflatten(-1, (half, 2) if self.interleaved else (2, half))
        first, second = pairs.unbind(-1 if self.interleaved else -2)
        pairs_rotated = (first * cos - second * sin, second * cos + first * sin)
        rotated = torch.stack(pairs_rotated, -1 if self.interleaved else -2).flatten(-2).to(x.dtype)
        return torch.cat((rotated, x[..., 2 * half :]), -1)

    def check(self, cache: Cache, count: int) -> None:
        """Check that cos and sin cover `count` positions after every sequence; see Cache.check."""
        if readable(cache.k) and cache.lengths is not None and len(cache.lengths):
            end = int(cache.lengths.max()) + count
            if end > len(self.cos):
                raise ValueError(f"rotary: expected cos and sin of at least {end} positions, got {len(self.cos)}")


@dataclass(frozen=True, eq=False)
class Cache:
    """The keys and values of B sequences. lengths, table, index: int32 on k's device.

    Sequence b has lengths[b] + added keys, or `capacity` without lengths. They are stored in row index[b] (b without
    index) of k and v, or, with a table, in the pages table[b].
    """

    k: Tensor
    v: Tensor
    lengths: Tensor | None = None
    table: Tensor | None = None
    index: Tensor | None = None
    added: int = 0

    @property
    def page(self) -> int:
        """Keys per page."""
        return self.k.shape[1]

    @property
    def capacity(self) -> int:
        """The maximum number of keys of a sequence."""
        return self.page * (1 if self.table is None else self.table.shape[1])

    def room(self) -> str:
        """The capacity, for an error message."""
        where = "" if self.table is None else f" in the {self.table.shape[1]} pages of a row of page_table"
        return f"with {self.added} new keys and room for {self.capacity}{where}"

    def ends(self, batch: int) -> list[int]:
        """The number of keys of each sequence; read on the host."""
        if self.lengths is None:
            return [self.capacity] * batch
        return [int(x) + self.added for x in self.lengths.tolist()]

    def rows(self, x: Tensor, b: int, first: int, end: int) -> Tensor:
        """Keys or values first <= j < end of sequence b, from x = k or v: (1, Hkv, end - first, D)."""
        if self.table is None:
            rows = x[b if self.index is None else int(self.index[b]), first:end]
        else:
            begin = first // self.page
            pages = self.table[b, begin : -(-end // self.page)].long()
            rows = x.index_select(0, pages).flatten(0, 1)[first - begin * self.page : end - begin * self.page]
        return rows.transpose(0, 1)[None]

    def positions(self, count: int, advance: bool = True) -> Tensor:
        """(B, count) int64: the positions of `count` new tokens; without advance, all equal the first one's."""
        if self.lengths is None:
            raise ValueError("cache_seqlens: new keys need the lengths before them, got None")
        steps = torch.arange(count, device=self.k.device) * int(advance)
        return self.lengths.long()[:, None] + steps

    def append(self, k: Tensor, v: Tensor) -> None:
        """Append k, v (B, T, Hkv, D) to each sequence, in place."""
        keys = self.positions(k.shape[1])
        if self.table is not None:
            rows, slots = self.table.long().gather(1, keys // self.page), keys % self.page
        else:
            own = torch.arange(len(keys), device=keys.device) if self.index is None else self.index.long()
            rows, slots = own[:, None].expand_as(keys), keys
        self.k.index_put_((rows, slots), k)
        self.v.index_put_((rows, slots), v)

    def check(self, leftpad: Tensor | None = None) -> None:
        """Check the values of index tensors, if `readable`: on the CPU and under `debug`."""
        if not readable(self.k):
            return
        if self.lengths is not None:
            _check_within("cache_seqlens", self.lengths, 0, self.capacity - self.added, self.room())
        if self.index is not None:
            _check_within("cache_batch_idx", self.index, 0, len(self.k) - 1, f"in a cache of {len(self.k)} rows")
        ends = self.capacity if self.lengths is None else self.lengths[:, None].long() + self.added
        if leftpad is not None:
            most = torch.as_tensor(ends).flatten()
            wrong = (leftpad < 0) | (leftpad > most)
            if wrong.any():
                b = int(wrong.nonzero()[0])
                raise ValueError(
                    f"cache_leftpad: expected 0 <= cache_leftpad <= {int(most[b if len(most) > 1 else 0])}, the keys of"
                    f" sequence {b}, got {int(leftpad[b])}"
                )
        if self.table is not None:
            wrong = self._used(self.table, leftpad) & ((self.table < 0) | (self.table >= len(self.k)))
            if wrong.any():
                b, i = wrong.nonzero()[0].tolist()
                raise ValueError(
                    f"page_table: expected pages 0 <= id < {len(self.k)} for the keys of each sequence,"
                    f" got {int(self.table[b, i])} at ({b}, {i})"
                )

    def check_writes(self, leftpad: Tensor | None = None) -> None:
        """Check, after `check`, that appending to a sequence overwrites nothing of another one.

        Addresses are always compared; index tensors are read as in `check`.
        """
        if not self.added:
            return
        for name, x in (("k_cache", self.k), ("v_cache", self.v)):
            if storage.overlaps_itself(x):
                raise ValueError(
                    f"{name}: expected elements that share no memory, because new keys are written, got shape"
                    f" {tuple(x.shape)} with strides {x.stride()}; clone() an expanded tensor"
                )
        if storage.overlap(self.k, self.v):
            raise ValueError("v_cache: expected memory that does not overlap k_cache, because both are written")
        if not readable(self.k):
            return
        if self.index is not None and len(self.index.unique()) < len(self.index):
            rows, counts = self.index.unique(return_counts=True)
            row = int(rows[counts > 1][0])
            which = (self.index == row).nonzero().flatten().tolist()
            raise ValueError(
                f"cache_batch_idx: sequences {', '.join(map(str, which))} append to row {row}; expected one row each"
            )
        if self.table is not None and self.lengths is not None:
            self._check_written_pages(self.table, self.lengths.long()[:, None], leftpad)

    def _used(self, table: Tensor, leftpad: Tensor | None) -> Tensor:
        """bool (B, pages): the entries of the table whose pages hold keys of their sequence."""
        ends = self.capacity if self.lengths is None else self.lengths.long()[:, None] + self.added
        start = self._page_starts(table)
        return (start < ends) & (start + self.page > (0 if leftpad is None else leftpad[:, None]))

    def _page_starts(self, table: Tensor) -> Tensor:
        """(pages,): the first key of each page."""
        return torch.arange(table.shape[1], device=table.device) * self.page

    def _check_written_pages(self, table: Tensor, lengths: Tensor, leftpad: Tensor | None) -> None:
        """Check that no slot where a new key is written belongs to two entries of the table. lengths: (B, 1)."""
        used = self._used(table, leftpad)
        start = self._page_starts(table)
        held = (lengths + self.added - start).clamp(0, self.page)[used]  # the number of slots in use
        written = (lengths - start).clamp(0, self.page)[used]  # the first slot written, or page
        pages = table[used].long()
        first = pages.new_full((len(self.k),), self.page).scatter_reduce_(0, pages, written, "amin")
        hit = held > first[pages]
        hits, counts = pages[hit].unique(return_counts=True)
        if (counts > 1).any():
            page = int(hits[counts > 1][0])
            owners = used.nonzero()[:, 0][hit & (pages == page)].tolist()
            raise ValueError(
                f"page_table: page {page} holds keys of sequences {', '.join(map(str, owners))} where one of them"
                " appends; expected separate pages for each, as from PagedKVCache.extend"
            )


def _check_within(name: str, x: Tensor, least: int, most: int, why: str) -> None:
    wrong = (x < least) | (x > most)
    if wrong.any():
        b = int(wrong.nonzero()[0])
        raise ValueError(f"{name}: expected {least} <= {name} <= {most} {why}, got {int(x[b])} at ({b},)")


@dataclass(frozen=True, eq=False)
class Decode:
    """A validated decoding call: queries q (B, M, Hq, D) over a cache.

    scale, softcap, slopes, sink: as in Problem; softmax1 is a sink of zeros here. A row attends to `left` keys before
    its own position and `right` keys after it (None: all), from leftpad (int32 (B,)) on; causal is right = 0. tree:
    bool (B or 1, M, M), the visible ones of the last M keys. splits: the number of parts that a sequence's keys are
    split into, None for a choice by the device; batch_invariant: split at positions that depend only on the sequence's
    length.
    """

    q: Tensor
    cache: Cache
    scale: float | Tensor
    softcap: float | Tensor | None = None
    slopes: Tensor | None = None
    sink: Tensor | None = None
    left: int | None = None
    right: int | None = None
    leftpad: Tensor | None = None
    tree: Tensor | None = None
    splits: int | None = None
    batch_invariant: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, Hq, M, N), N being the cache's capacity."""
        b, m, heads, _ = self.q.shape
        return b, heads, m, self.cache.capacity

    @property
    def empty(self) -> bool:
        """True if there is nothing to compute."""
        return 0 in self.q.shape

    def empty_out(self) -> Tensor:
        """An uninitialised (B, M, Hq, Dv) whose memory order follows q's."""
        return empty_ordered(self.q, self.cache.v.shape[3])

    def empty_lse(self) -> Tensor:
        """An uninitialised (B, Hq, M)."""
        dtype = torch.promote_types(self.q.dtype, torch.float32)
        return self.q.new_empty(self.shape[:3], dtype=dtype)

    def problems(self) -> Iterator[Problem]:
        """The dense problem of each sequence, B = 1; lengths are read on the host."""
        ends = self.cache.ends(len(self.q))
        firsts = [0] * len(ends) if self.leftpad is None else self.leftpad.tolist()
        for b, (first, end) in enumerate(zip(firsts, ends, strict=True)):
            yield self.problem(b, first, end)

    def problem(self, b: int, first: int, end: int) -> Problem:
        """The problem of sequence b and its keys first <= j < end, counted from first."""
        m = self.q.shape[1]
        keys = max(end - first, 0)
        diagonal = keys - m
        return Problem(
            self.q[b : b + 1].transpose(1, 2),
            self.cache.rows(self.cache.k, b, first, first + keys),
            self.cache.rows(self.cache.v, b, first, first + keys),
            self.scale,
            self.softcap,
            slopes=self.slopes if self.slopes is None or self.slopes.ndim == 1 else self.slopes[b : b + 1],
            sink=self.sink,
            mask=None if self.tree is None else self._tree_mask(self.tree, b, keys),
            span=Span(
                None if self.left is None else diagonal - self.left,
                None if self.right is None else diagonal + self.right,
            ),
            offset=diagonal,
            return_lse=True,
        )

    def _tree_mask(self, tree: Tensor, b: int, keys: int) -> Tensor:
        """bool (1, 1, M, keys): the tree mask over the last min(M, keys) keys; earlier keys are visible."""
        m = self.q.shape[1]
        last = min(m, keys)
        mask = tree.new_ones(1, 1, m, keys)
        mask[0, 0, :, keys - last :] = tree[b if len(tree) > 1 else 0][:, m - last :]
        return mask

    def check(self) -> None:
        """See Cache.check."""
        self.cache.check(self.leftpad)
