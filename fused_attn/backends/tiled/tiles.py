"""How a problem is cut into tiles on the host: which rows, which of their keys, how many heads at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...spec.problem import Problem
from ...spec.reach import masked_by_tensors

ROWS, KEYS = (128, 512), 512  # at least and at most as many rows, of every head of a group together
STRETCH = 128  # keys of which a pattern says at once whether a tile of rows sees them
NONE, SOME, ALL = range(3)
EVERYTHING = slice(None)


class Tile(NamedTuple):
    """Rows [start, stop) see keys inside [first, last), and every one of them sees all of [full_from, full_to).

    sinks: they also see some of the keys before it. pattern: what it leaves them, NONE, SOME or ALL, of each stretch of
    keys; empty where there is no pattern, or none that was asked.
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
            for begin, end in self._left_by_pattern(first, last):
                for start in range(begin, end, KEYS):
                    yield slice(start, min(start + KEYS, end))

    def _left_by_pattern(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Runs of keys of which the pattern says the same, without those that it hides."""
        if not self.pattern:
            yield first, last
            return
        stretches = range(first // STRETCH, -(-last // STRETCH))
        for what, run in itertools.groupby(stretches, self.pattern.__getitem__):
            begin, *rest = run
            end = (rest[-1] if rest else begin) + 1
            if what != NONE:
                yield max(first, begin * STRETCH), min(last, end * STRETCH)

    def clear(self, keys: slice) -> bool:
        """Whether a pattern is known to hide nothing of one of `key_tiles`."""
        return bool(self.pattern) and self.pattern[keys.start // STRETCH] == ALL

    def partial(self, keys: slice) -> list[slice]:
        """The stretches of these keys that not every row sees."""
        if self.full_from >= self.full_to:
            return [keys]
        before = slice(keys.start, min(keys.stop, self.full_from))
        after = slice(max(keys.start, self.full_to), keys.stop)
        return [x for x in (before, after) if x.start < x.stop]


class Share(NamedTuple):
    """The part of the batch and of the heads that one round of tiles works on."""

    batch: slice
    kv_heads: slice
    heads: slice
    tiles: list[Tile]


def part(x: Tensor, *slices: slice) -> Tensor:
    """The part of a tensor that broadcasts: an axis of length 1 is kept as it is."""
    return x[tuple(slice(None) if size == 1 else cut for cut, size in zip(slices, x.shape, strict=True))]


def row_tiles(p: Problem) -> list[Tile]:
    """Tiles of the rows that may see a key, as far as numbers tell; a group of heads shares a tile's rows."""
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
    """As far as numbers tell."""
    left, right, n = p.span.left, p.span.right, p.shape[3]
    first, full_from = (0, 0) if left is None else (max(0, start + left), max(0, stop - 1 + left))
    last, full_to = (n, n) if right is None else (min(n, stop + right), min(n, start + right + 1))
    return _beside_sinks(Tile(start, stop, first, last, full_from, full_to), p)


def _beside_sinks(tile: Tile, p: Problem) -> Tile:
    """A tile that knows of the sinks: they stand before its window, join it, or are all that it has."""
    sinks = min(p.span.sinks, p.shape[3])
    if tile.first >= tile.last:
        return tile._replace(first=0, last=sinks, full_from=sinks)
    return tile._replace(first=0) if tile.first <= sinks else tile._replace(sinks=sinks)


def one_tile(p: Problem, start: int, stop: int) -> Tile:
    """Of any rows; tensors are not read, so that with lo and hi no key counts as seen by every row."""
    tile = _tile(p, start, stop)
    return tile._replace(full_from=0, full_to=0) if masked_by_tensors(p) else tile


class Window(NamedTuple):
    """Rows [start, stop), and which of them were chosen: row start + inside[i] is the choice slots[i]."""

    start: int
    stop: int
    inside: list[int]
    slots: list[int]


def windows(rows: list[int], most: int, apart: int) -> list[Window]:
    """Chosen rows, in any order, in as few windows as hold at most `most` rows, no two choices further `apart`."""
    found: list[Window] = []
    for slot, row in sorted(enumerate(rows), key=lambda x: x[1]):
        if not found or row - found[-1].start >= most or row - found[-1].stop >= apart:
            found.append(Window(row, row, [], []))
        last = found[-1]
        last.inside.append(row - last.start)
        last.slots.append(slot)
        found[-1] = last._replace(stop=row + 1)
    return found


def _rows(p: Problem) -> int:
    """More rows fill the products better, and waste more where a row's keys begin or end: a quarter of what it sees."""
    span, (m, n) = p.span, p.shape[2:]
    seen = n if span.left is None or span.right is None else min(n, span.right - span.left + 1)
    least, most = ROWS
    rows = least if p.pattern is not None else max(least, min(most, seen // 4))
    return max(1, min(m, max(16, rows // p.group)))


def _tiles_by_round(p: Problem, batches: int) -> list[list[Tile]]:
    """For each round of so many batches, or one list for all of them: the tiles of rows, with lo and hi read."""
    tiles, (m, n) = row_tiles(p), p.shape[2:]
    if not tiles or (p.span.lo is None and p.span.hi is None):
        return [tiles]
    lo, hi = torch.broadcast_tensors(*replace(p.span, sinks=0).bounds(torch.arange(m, device=p.q.device), n))
    blind = lo >= hi
    edges = (
        (lo.masked_fill(blind, n), torch.amin),
        (hi.masked_fill(blind, 0), torch.amax),
        (lo, torch.amax),
        (hi, torch.amin),
    )
    limits = torch.stack([torch.stack([pick(x[:, t.rows], 1) for x, pick in edges], 1) for t in tiles], 1).tolist()
    rounds = (limits[i : i + batches] for i in range(0, len(limits), batches))
    joined = ([_beside_sinks(_joined(tile, of), p) for tile, *of in zip(tiles, *x, strict=True)] for x in rounds)
    return [[tile for tile in round if tile.first < tile.last] for round in joined]


def _joined(tile: Tile, limits: list[list[float]]) -> Tile:
    """The rows of a tile in several batches: together they see what one of them does, in full what all of them do."""
    first, last, full_from, full_to = zip(*limits, strict=True)
    return Tile(tile.start, tile.stop, int(min(first)), int(max(last)), int(max(full_from)), int(min(full_to)))


def _elements(device: torch.device) -> int:
    """How many scores to hold at once: a few MiB of cache for each thread, or enough to fill an accelerator."""
    return 2**19 * torch.get_num_threads() if device.type == "cpu" else 2**24


def shares(p: Problem) -> Iterator[Share]:
    """Enough heads at once to keep a device busy, few enough for their tiles to stay in a cache."""
    b, _, m, n = p.shape
    kv_heads = p.k.shape[1]
    if p.empty:
        return
    head = p.group * _rows(p) * min(n, KEYS)
    heads = max(1, _elements(p.q.device) // head)
    per_head, per_batch = min(kv_heads, heads), max(1, min(b, heads // kv_heads))
    pattern = p.pattern
    bounds = (p.span.lo, p.span.hi, *((pattern.q_ids, pattern.kv_ids, pattern.blocks) if pattern is not None else ()))
    # Batches or heads whose tiles differ each skip their own, one at a time, unless a step costs more than that.
    alone = max(1, _elements(p.q.device) // 8 // (p.group * m * n))
    if pattern is not None and pattern.blocks is not None and pattern.blocks.shape[1] > 1:
        per_head = min(per_head, alone)
    if any(x is not None and x.shape[0] > 1 for x in bounds):
        per_batch = max(1, min(per_batch, alone // kv_heads))
    tiles, left_of = _tiles_by_round(p, per_batch), _patterns(p)
    for i in range(0, b, per_batch):
        for h in range(0, kv_heads, per_head):
            stop = min(h + per_head, kv_heads)
            batch, members = slice(i, min(i + per_batch, b)), slice(h * p.group, stop * p.group)
            of_round = tiles[i // per_batch if len(tiles) > 1 else 0]
            yield Share(batch, slice(h, stop), members, left_of(of_round, batch, members))


def _patterns(p: Problem) -> Callable[[list[Tile], slice, slice], list[Tile]]:
    """What adds to tiles what the pattern leaves of them, in some batches and heads."""
    if p.pattern is None:
        return lambda tiles, batch, heads: tiles
    device, (m, n) = p.q.device, p.shape[2:]
    starts = [tile.start for tile in row_tiles(p)]
    rows = (torch.tensor(starts, device=device)[:, None] + torch.arange(_rows(p), device=device)).clamp_max(m - 1)
    keys = torch.arange(-(-n // STRETCH) * STRETCH, device=device).clamp_max(n - 1).view(-1, STRETCH)
    some, whole = p.pattern.tiles(rows, keys)

    def left_of(tiles: list[Tile], batch: slice, heads: slice) -> list[Tile]:
        here = [part(x, batch, heads, EVERYTHING, EVERYTHING) for x in (some, whole)]
        left = here[0].any(1).any(0).int() + here[1].all(1).all(0)
        found = dict(zip(starts, map(tuple, left.tolist()), strict=True))
        return [tile._replace(pattern=found[tile.start]) for tile in tiles]

    return left_of
