"""How a problem is cut into tiles on the host: which rows, which of their keys, how many heads at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .spec import Problem, Span

ROWS, KEYS = (128, 512), 512  # at least and at most as many rows, of every head of a group together


class Tile(NamedTuple):
    """Rows [start, stop) see keys inside [first, last), and every one of them sees all of [full_from, full_to)."""

    start: int
    stop: int
    first: int
    last: int
    full_from: int
    full_to: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def keys(self) -> slice:
        return slice(self.first, self.last)

    def key_tiles(self) -> Iterator[slice]:
        for start in range(self.first, self.last, KEYS):
            yield slice(start, min(start + KEYS, self.last))

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


def bounded_per_row(span: Span) -> bool:
    return span.lo is not None or span.hi is not None


def _bounds(p: Problem) -> tuple[Tensor, Tensor]:
    """lo, hi (B or 1, M): row i sees lo <= j < hi."""
    bounds = p.span.bounds(torch.arange(p.shape[2], device=p.q.device), p.shape[3])
    lo, hi = torch.broadcast_tensors(*bounds)
    return lo.contiguous(), hi.contiguous()


def row_tiles(span: Span, m: int, n: int, group: int) -> list[Tile]:
    """Tiles of the rows that may see a key, as far as left and right tell; a group of heads shares a tile's rows."""
    left, right = span.left, span.right
    if left is not None and right is not None and left > right:
        return []
    begin = 0 if right is None else max(0, -right)
    end = m if left is None else min(m, n - left)
    tiles, size = [], _rows(span, m, n, group)
    for start in range(begin, end, size):
        tile = _tile(span, start, min(start + size, end), n)
        if tile.first < tile.last:
            tiles.append(tile)
    return tiles


def _tile(span: Span, start: int, stop: int, n: int) -> Tile:
    """As far as left and right tell."""
    left, right = span.left, span.right
    first, full_from = (0, 0) if left is None else (max(0, start + left), max(0, stop - 1 + left))
    last, full_to = (n, n) if right is None else (min(n, stop + right), min(n, start + right + 1))
    return Tile(start, stop, first, last, full_from, full_to)


def one_tile(span: Span, start: int, stop: int, n: int) -> Tile:
    """Of any rows; lo and hi are not read, so that with them no key counts as seen by every row."""
    tile = _tile(span, start, stop, n)
    return tile._replace(full_from=0, full_to=0) if bounded_per_row(span) else tile


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


def _rows(span: Span, m: int, n: int, group: int) -> int:
    """More rows fill the products better, and waste more where a row's keys begin or end: a quarter of what it sees."""
    seen = n if span.left is None or span.right is None else min(n, span.right - span.left + 1)
    least, most = ROWS
    return max(1, min(m, max(16, max(least, min(most, seen // 4)) // group)))


def _tiles_by_round(p: Problem, batches: int) -> list[list[Tile]]:
    """For each round of so many batches, or one list for all of them: the tiles of rows, with lo and hi read."""
    m, n = p.shape[2:]
    tiles = row_tiles(p.span, m, n, p.group)
    if not tiles or not bounded_per_row(p.span):
        return [tiles]
    lo, hi = _bounds(p)
    blind = lo >= hi
    edges = (
        (lo.masked_fill(blind, n), torch.amin),
        (hi.masked_fill(blind, 0), torch.amax),
        (lo, torch.amax),
        (hi, torch.amin),
    )
    limits = torch.stack([torch.stack([pick(x[:, t.rows], 1) for x, pick in edges], 1) for t in tiles], 1).tolist()
    rounds = (limits[i : i + batches] for i in range(0, len(limits), batches))
    joined = ([_joined(tile, of) for tile, *of in zip(tiles, *limits, strict=True)] for limits in rounds)
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
    head = p.group * _rows(p.span, m, n, p.group) * min(n, KEYS)
    heads = max(1, _elements(p.q.device) // head)
    per_head, per_batch = min(kv_heads, heads), max(1, min(b, heads // kv_heads))
    if any(x is not None and x.shape[0] > 1 for x in (p.span.lo, p.span.hi)):
        # Batches whose tiles differ each skip their own, one at a time, unless a step costs more by itself than that.
        per_batch = max(1, min(per_batch, _elements(p.q.device) // 8 // (kv_heads * p.group * m * n)))
    tiles = _tiles_by_round(p, per_batch)
    for i in range(0, b, per_batch):
        for h in range(0, kv_heads, per_head):
            stop = min(h + per_head, kv_heads)
            yield Share(
                slice(i, min(i + per_batch, b)),
                slice(h, stop),
                slice(h * p.group, stop * p.group),
                tiles[i // per_batch if len(tiles) > 1 else 0],
            )


def seen(p: Problem) -> tuple[Tensor, Tensor] | None:
    """`reached`, where lo and hi say so; what left and right say, tiles skip by themselves."""
    return reached(p) if bounded_per_row(p.span) else None


def reached(p: Problem) -> tuple[Tensor, Tensor]:
    """bool (B or 1, 1, M, 1) and (B or 1, 1, N, 1): rows that see a key and keys that a row sees, by the span alone.

    What is padding may hold NaN, and a product with a weight of zero would let it through.
    """
    lo, hi = _bounds(p)
    keys = torch.arange(p.shape[3], device=p.q.device).expand(lo.shape[0], -1).contiguous()
    # Neither bound decreases, so the rows with lo <= j are the first ones and those with j < hi are the last ones.
    found = torch.searchsorted(hi, keys, right=True) < torch.searchsorted(lo, keys, right=True)
    return (lo < hi)[:, None, :, None], found[:, None, :, None]
