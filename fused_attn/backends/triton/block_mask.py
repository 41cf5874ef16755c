"""Spans as the kernels read them, and block masks where visibility is no interval.

A block mask is made by torch operations on the device, without synchronisation, for the tile sizes of one
configuration. For each tile of rows, and transposed for each tile of keys, it lists the tiles of the other side in
which something is visible: the partial tiles first, then the full ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.types import BlockMask, Blocks, Span
from ...spec.masks import padded_span
from ...spec.problem import Pattern, Problem
from ...tuning import Config
from . import views

Visited = tuple[Tensor, Tensor]  # bool: some of the tile is visible; all of it is


def pair_span(p: Problem) -> Span:
    """Rows over keys, for a kernel that is given one tile per program."""
    return _patterned(views.span(p.span), p.pattern, transposed=False)


def row_span(p: Problem, c: Config) -> Span:
    """Rows over keys, for a kernel that sweeps over the keys."""
    span = pair_span(p)
    return span._replace(block_mask=_block_mask(*tiles_of_keys(_padded(p), c))) if p.needs_block_mask else span


def _padded(p: Problem) -> Problem:
    """A packed batch as a padded one."""
    return p if p.ragged is None else p.replace(span=padded_span(p.span, p.ragged))


def key_span(p: Problem, c: Config, kinds: bool = False) -> Span:
    """Keys over rows, for a kernel that sweeps over the rows. kinds: for one that goes through all tiles in order."""
    if not p.needs_block_mask:
        return views.transposed_span(p.span, p.shape[3])
    p = _padded(p)
    start, stop = _visible_rows(p)
    span = Span(lo=views.vector(start), hi=views.vector(stop))
    block_mask = _block_mask(*_tiles_of_rows(p, c, start, stop), kinds)
    return _patterned(span, p.pattern, transposed=True)._replace(block_mask=block_mask)


def _patterned(span: Span, pattern: Pattern | None, transposed: bool) -> Span:
    if pattern is None:
        return span
    if pattern.q_ids is not None:
        ids = [views.vector(x) for x in (pattern.q_ids, pattern.kv_ids)]
        span = span._replace(**dict(zip(("others", "ids") if transposed else ("ids", "others"), ids, strict=True)))
    if pattern.blocks is not None:
        size = pattern.height, pattern.width
        blocks, size = (pattern.blocks.mT, size[::-1]) if transposed else (pattern.blocks, size)
        strides = tuple(map(views.encode_int, views.strides_of(blocks.shape, blocks.stride())))
        span = span._replace(blocks=Blocks(blocks, strides, tuple(map(views.encode_int, size))))
    return span


def _visible_rows(p: Problem) -> tuple[Tensor, Tensor]:
    """int32 (B or 1, N): key j is visible to no row outside of start <= i < stop; to none at all if nothing reaches
    it."""
    m, n = p.shape[2:]
    start, stop = torch.broadcast_tensors(*p.span.row_bounds(m, torch.arange(n, device=p.q.device)))
    if p.pattern is not None:
        reached = p.pattern.visible_keys(start, stop)
        start, stop = torch.where(reached, start, m), torch.where(reached, stop, 0)
    return start.int(), stop.int()


def tiles_of_keys(p: Problem, c: Config) -> Visited:
    """(B or 1, Hq or 1, tiles of rows, tiles of keys): the tiles that rows visit."""
    span, (m, n) = p.span, p.shape[2:]
    index = torch.arange(m, device=p.q.device)
    owned = _indices(p, m, c.BLOCK_M)
    lo, hi = span.bounds(index, n)
    some, whole = _visited(lo, hi, owned, n, c.BLOCK_N)
    if span.sinks:
        near = index + span.left
        both = ((lo, hi.clamp_max(span.sinks)), (torch.maximum(lo, near), hi))
        some = torch.stack([_visited(*x, owned, n, c.BLOCK_N)[0] for x in both]).any(0)
        # A tile between the sinks and the window of the last row that sees anything is not full.
        begin = torch.arange(0, n, c.BLOCK_N, device=p.q.device)
        far = torch.where(lo < hi, near, 0)[:, owned].amax(-1, keepdim=True)
        whole = some & whole & ((begin + c.BLOCK_N <= span.sinks) | (far <= begin.clamp_min(span.sinks)))
    return _with_pattern(p, c, some[:, None], whole[:, None], transposed=False)


def _tiles_of_rows(p: Problem, c: Config, start: Tensor, stop: Tensor) -> Visited:
    """(B or 1, Hq or 1, tiles of keys, tiles of rows): the tiles that keys visit."""
    m, n = p.shape[2:]
    some, whole = _visited(start, stop, _indices(p, n, c.BLOCK_N), m, c.BLOCK_M)
    return _with_pattern(p, c, some[:, None], whole[:, None], transposed=True)


def _with_pattern(p: Problem, c: Config, some: Tensor, whole: Tensor, transposed: bool) -> Visited:
    if p.pattern is None:
        return some, whole
    m, n = p.shape[2:]
    found = p.pattern.tiles(_indices(p, m, c.BLOCK_M), _indices(p, n, c.BLOCK_N))
    left, full = (x.mT for x in found) if transposed else found
    some = some & left
    return some, some & whole & full


def _indices(p: Problem, length: int, block: int) -> Tensor:
    """(tiles, block): the indices of each tile; the last index repeats beyond the end."""
    tiles = -(-length // block)
    return torch.arange(tiles * block, device=p.q.device).clamp_max(length - 1).view(tiles, block)


def _visited(lo: Tensor, hi: Tensor, owned: Tensor, limit: int, block: int) -> Visited:
    """(B or 1, tiles owned, tiles visited), from intervals (B or 1, length). Indices that see nothing do not count."""
    lo, hi = (x[:, owned] for x in torch.broadcast_tensors(lo, hi))
    fully_masked = lo >= hi
    begin = torch.arange(0, limit, block, device=lo.device)
    first, last = lo.masked_fill(fully_masked, limit).amin(-1), hi.masked_fill(fully_masked, 0).amax(-1)
    some = (first[..., None] < begin + block) & (last[..., None] > begin)
    full_first, full_last = lo.masked_fill(fully_masked, 0).amax(-1), hi.masked_fill(fully_masked, limit).amin(-1)
    return some, some & (full_first[..., None] <= begin) & (full_last[..., None] >= begin + block)


def _block_mask(some: Tensor, whole: Tensor, kinds: bool = False) -> BlockMask:
    """See kernels/types.py. kinds: 0, 1 or 2 for each tile in order, for a skipped, partial or full one."""
    partial = some & ~whole
    body = some.int() + whole if kinds else torch.where(some, whole.int(), 2).argsort(dim=-1, stable=True)
    counts = (x.sum(-1, keepdim=True) for x in (partial, whole))
    block_mask = torch.cat((*counts, body), -1).int()
    return BlockMask(
        block_mask, tuple(map(views.encode_int, views.strides_of(block_mask.shape, block_mask.stride())[:3]))
    )
