"""Which program owns which tile: of a batch by arithmetic, of ragged sequences by a table of turns.

A table is made by operations of torch on the device, without waiting for it. Its turns are as many as there may be
tiles, total // block + B, and those that are left over are -1; the longest come first, so that a long sequence does not
begin when the others have ended.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.types import Ragged
from ..spec import Problem
from . import views


def lengths(p: Problem) -> tuple[int, int]:
    """M and N of what lies in memory: of each of a batch, or of all sequences together."""
    return p.q.shape[2], p.k.shape[2]


def tiles(p: Problem, block: int, by_keys: bool = False) -> int:
    """For how many tiles of rows, or of keys, there is room in each head of each of a batch."""
    length = lengths(p)[by_keys]
    return -(-length // block) if p.ragged is None else length // block + p.ragged.batch


def programs(p: Problem, block: int, heads: int, by_keys: bool = False) -> int:
    """The grid: a program for each tile of each head."""
    return tiles(p, block, by_keys) * heads * (p.shape[0] if p.ragged is None else 1)


def turns(p: Problem, block: int, by_keys: bool = False, in_order: bool = False) -> Ragged | None:
    """What kernels read of ragged sequences, with the turns of tiles of rows, or of keys; None of a batch."""
    if p.ragged is None:
        return None
    starts = [x.contiguous() for x in (p.ragged.q, p.ragged.k)]
    b, tile = _tiles(starts[by_keys], lengths(p)[by_keys], block)
    if not in_order:
        order = _work(p, b, tile, block, by_keys).argsort(descending=True, stable=True)
        b, tile = b[order], tile[order]
    table = torch.stack((b, tile), 1).int()
    return Ragged(*starts, table, views.code(int(p.ragged.bottom_right)))


def alone(starts: Tensor, total: int, block: int) -> Ragged:
    """The same of one tensor by itself, in order."""
    starts = starts.contiguous()
    return Ragged(starts, starts, torch.stack(_tiles(starts, total, block), 1).int(), views.code(0))


def _tiles(starts: Tensor, total: int, block: int) -> tuple[Tensor, Tensor]:
    """(sequence, tile) of each turn, in order; the tile is -1 where there is none."""
    batch = len(starts) - 1
    count = (starts.diff() + (block - 1)) // block
    ends = count.cumsum(0)
    index = torch.arange(total // block + batch, device=starts.device)
    b = torch.searchsorted(ends, index, right=True).clamp_max(batch - 1)
    tile = index - (ends - count)[b]
    return b, torch.where(tile < count[b], tile, -1)


def _work(p: Problem, b: Tensor, tile: Tensor, block: int, by_keys: bool) -> Tensor:
    """How many of the other side each tile sees, as far as numbers tell; -1 for no tile."""
    ragged: Any = p.ragged
    left, right = p.span.left, p.span.right
    own, other = ragged.q.diff(), ragged.k.diff()
    shift: Any = ragged.offsets()
    if by_keys:
        own, other, shift = other, own, -shift
        left, right = (None if x is None else -x for x in (right, left))
    shift = shift if isinstance(shift, int) else shift[b, 0]
    start = tile * block
    lo, hi = torch.zeros_like(start), other[b].long()
    if left is not None and not p.span.sinks:
        lo = (start + left + shift).clamp_min(0)
    if right is not None:
        stop = torch.minimum(start + block, own[b])
        hi = torch.minimum(hi, stop + right + shift)
    return torch.where(tile < 0, -1, (hi - lo).clamp_min(0))
