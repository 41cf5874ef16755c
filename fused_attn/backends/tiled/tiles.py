"""Tile geometry: the rows of each tile, the keys that it visits, and the batches and heads computed together."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...spec.problem import Problem
from ...spec.visibility import has_tensor_bounds

ROWS, KEYS = (128, 512), 512  # (fewest, most) rows of a tile, over all heads of a group, and its keys
PATTERN_BLOCK = 128  # keys per entry of Tile.pattern
NONE, SOME, ALL = range(3)
EVERYTHING = slice(None)


class Tile(NamedTuple):
    """Rows [start, stop): their visible keys lie in [first, last), and [full_from, full_to) is visible to all of them.

    sinks: keys [0, sinks) are visible to some rows too. pattern: NONE, SOME or ALL for each PATTERN_BLOCK keys; empty
    if the problem has no pattern or it was not evaluated.
    """

    start: int
    stop: int
    first: int
    last: int
    full_from: int
    full_to: int
    sinks: int = 0
    pattern: tuple[int, ...] = ()

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def keys(self) -> slice:
        return slice(0 if self.sinks else self.first, self.last)

    def key_tiles(self) -> Iterator[slice]:
        for first, last in ((0, self.sinks), (self.first, self.last)):
            for begin, end in self._visited(first, last):
                for start in range(begin, end, KEYS):
                    yield slice(start, min(start + KEYS, end))

    def _visited(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Runs of keys with one pattern value, without those that are NONE."""
        if not self.pattern:
            yield first, last
            return
        blocks = range(first // PATTERN_BLOCK, -(-last // PATTERN_BLOCK))
        for value, run in itertools.groupby(blocks, self.pattern.__getitem__):
            begin, *rest = run
            end = (rest[-1] if rest else begin) + 1
            if value != NONE:
                yield max(first, begin * PATTERN_BLOCK), min(last, end * PATTERN_BLOCK)

    def clear(self, keys: slice) -> bool:
        """True if the pattern is known to hide no score of one of `key_tiles`."""
        return bool(self.pattern) and self.pattern[keys.start // PATTERN_BLOCK] == ALL

    def partial(self, keys: slice) -> list[slice]:
        """The parts of these keys that some rows do not see, to be masked by the span."""
        if self.full_from >= self.full_to:
            return [keys]
        before = slice(keys.start, min(keys.stop, self.full_from))
        after = slice(max(keys.start, self.full_to), keys.stop)
        return [x for x in (before, after) if x.start < x.stop]


class Chunk(NamedTuple):
    """Batches and heads that are computed together, and the tiles of rows to visit for them."""

    batch: slice
    kv_heads: slice
    heads: slice
    tiles: list[Tile]


def part(x: Tensor, *slices: slice) -> Tensor:
    """Slice a tensor that broadcasts: dims of size 1 are kept whole."""
    return x[tuple(slice(None) if size == 1 else s for s, size in zip(slices, x.shape, strict=True))]


def row_tiles(p: Problem) -> list[Tile]:
    """Tiles of the rows that see a key by the scalar bounds of the span; lo, hi and the pattern are not read."""
    left, right, (m, n) = p.span.left, p.span.right, p.shape[2:]
    if left is not None and right is not None and left > right and not p.span.sinks:
        return []
    begin = 0 if right is None else max(0, -right)
    end = m if left is None or p.span.sinks else min(m, n - left)
    tiles, size = [], _rows(p)
    for start in range(begin, end, size):
        tiles.append(_tile(p, start, min(start + size, end)))
    return [tile for tile in tiles if tile.first < tile.last]


def _tile(p: Problem, start: int, stop: int) -> Tile:
    left, right, n = p.span.left, p.span.right, p.shape[3]
    first, full_from = (0, 0) if left is None else (max(0, start + left), max(0, stop - 1 + left))
    last, full_to = (n, n) if right is None else (min(n, stop + right), min(n, start + right + 1))
    return _with_sinks(Tile(start, stop, first, last, full_from, full_to), p)


def _with_sinks(tile: Tile, p: Problem) -> Tile:
    """The tile with the span's sink keys: separate if they end before its window, otherwise joined to it."""
    sinks = min(p.span.sinks, p.shape[3])
    if tile.first >= tile.last:
        return tile._replace(first=0, last=sinks, full_from=sinks)
    return tile._replace(first=0) if tile.first <= sinks else tile._replace(sinks=sinks)


def one_tile(p: Problem, start: int, stop: int) -> Tile:
    """The tile of any rows. lo, hi and the pattern are not read; if there are any, no key counts as fully visible."""
    tile = _tile(p, start, stop)
    return tile._replace(full_from=0, full_to=0) if has_tensor_bounds(p) else tile


class Window(NamedTuple):
    """Rows [start, stop) that cover some of the requested rows: row start + inside[i] is request slots[i]."""

    start: int
    stop: int
    inside: list[int]
    slots: list[int]


def windows(rows: list[int], most: int, apart: int) -> list[Window]:
    """Cover rows, in any order, by windows of at most `most` rows with gaps of at most `apart` between requests."""
    result: list[Window] = []
    for slot, row in sorted(enumerate(rows), key=lambda x: x[1]):
        if not result or row - result[-1].start >= most or row - result[-1].stop >= apart:
            result.append(Window(row, row, [], []))
        last = result[-1]
        last.inside.append(row - last.start)
        last.slots.append(slot)
        result[-1] = last._replace(stop=row + 1)
    return result


def _rows(p: Problem) -> int:
    """Rows of a tile. More rows make larger products, but waste more at the edges of a window: a quarter of it."""
    span, (m, n) = p.span, p.shape[2:]
    width = n if span.left is None or span.right is None else min(n, span.right - span.left + 1)
    least, most = ROWS
    rows = least if p.pattern is not None else max(least, min(most, width // 4))
    return max(1, min(m, max(16, rows // p.group)))


def _tiles_by_chunk(p: Problem, batches: int) -> list[list[Tile]]:
    """The tiles of rows, bounded by lo and hi: one list per `batches` batches, or one list for all of them."""
    tiles, (m, n) = row_tiles(p), p.shape[2:]
    if not tiles or (p.span.lo is None and p.span.hi is None):
        return [tiles]
    lo, hi = torch.broadcast_tensors(*replace(p.span, sinks=0).bounds(torch.arange(m, device=p.q.device), n))
    fully_masked = lo >= hi
    edges = (
        (lo.masked_fill(fully_masked, n), torch.amin),
        (hi.masked_fill(fully_masked, 0), torch.amax),
        (lo, torch.amax),
        (hi, torch.amin),
    )
    limits = torch.stack([torch.stack([pick(x[:, t.rows], 1) for x, pick in edges], 1) for t in tiles], 1).tolist()
    parts = (limits[i : i + batches] for i in range(0, len(limits), batches))
    joined = ([_with_sinks(_joined(tile, own), p) for tile, *own in zip(tiles, *x, strict=True)] for x in parts)
    return [[tile for tile in x if tile.first < tile.last] for x in joined]


def _joined(tile: Tile, limits: list[list[float]]) -> Tile:
    """One tile for several batches: the union of their visible keys, the intersection of their fully visible keys."""
    first, last, full_from, full_to = zip(*limits, strict=True)
    return Tile(tile.start, tile.stop, int(min(first)), int(max(last)), int(max(full_from)), int(min(full_to)))


def _elements(device: torch.device) -> int:
    """Scores held at once: a few MiB of cache per thread, or enough to fill an accelerator."""
    return 2**19 * torch.get_num_threads() if device.type == "cpu" else 2**24


def chunks(p: Problem) -> Iterator[Chunk]:
    """Cut the batch and the heads: enough at once to keep the device busy, few enough for a tile to stay in cache."""
    b, _, m, n = p.shape
    kv_heads = p.k.shape[1]
    if p.empty:
        return
    head = p.group * _rows(p) * min(n, KEYS)
    together = max(1, _elements(p.q.device) // head)
    per_head, per_batch = min(kv_heads, together), max(1, min(b, together // kv_heads))
    pattern = p.pattern
    bounds = (p.span.lo, p.span.hi, *((pattern.q_ids, pattern.kv_ids, pattern.blocks) if pattern is not None else ()))
    # Batches or heads with different tiles skip more when separate; small ones stay together, as a step costs more.
    small = max(1, _elements(p.q.device) // 8 // (p.group * m * n))
    if pattern is not None and pattern.blocks is not None and pattern.blocks.shape[1] > 1:
        per_head = min(per_head, small)
    if any(x is not None and x.shape[0] > 1 for x in bounds):
        per_batch = max(1, min(per_batch, small // kv_heads))
    tiles, with_pattern = _tiles_by_chunk(p, per_batch), _pattern_reader(p)
    for i in range(0, b, per_batch):
        for h in range(0, kv_heads, per_head):
            stop = min(h + per_head, kv_heads)
            batch, heads = slice(i, min(i + per_batch, b)), slice(h * p.group, stop * p.group)
            own = tiles[i // per_batch if len(tiles) > 1 else 0]
            yield Chunk(batch, slice(h, stop), heads, with_pattern(own, batch, heads))


def _pattern_reader(p: Problem) -> Callable[[list[Tile], slice, slice], list[Tile]]:
    """A function (tiles, batch, heads) that sets `Tile.pattern` for these batches and heads."""
    if p.pattern is None:
        return lambda tiles, batch, heads: tiles
    device, (m, n) = p.q.device, p.shape[2:]
    starts = [tile.start for tile in row_tiles(p)]
    rows = (torch.tensor(starts, device=device)[:, None] + torch.arange(_rows(p), device=device)).clamp_max(m - 1)
    keys = torch.arange(-(-n // PATTERN_BLOCK) * PATTERN_BLOCK, device=device).clamp_max(n - 1).view(-1, PATTERN_BLOCK)
    some, whole = p.pattern.tiles(rows, keys)

    def with_pattern(tiles: list[Tile], batch: slice, heads: slice) -> list[Tile]:
        some_here, whole_here = (part(x, batch, heads, EVERYTHING, EVERYTHING) for x in (some, whole))
        values = some_here.any(1).any(0).int() + whole_here.all(1).all(0)  # NONE, SOME or ALL
        by_start = dict(zip(starts, map(tuple, values.tolist()), strict=True))
        return [tile._replace(pattern=by_start[tile.start]) for tile in tiles]

    return with_pattern
