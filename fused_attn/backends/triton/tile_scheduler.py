"""The tile that each program works on: by arithmetic in a dense batch, by a schedule in a packed (varlen) one.

A schedule is made on the device, without synchronisation. It has a slot for every tile that the lengths allow, at most
total // block + B.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.tile_scheduler import schedule_kernel
from ...kernels.types import Ragged
from ...spec.problem import Problem
from . import launcher, views

CHUNK, SEQUENCES = 64, 64  # slots per program, and sequences that it reads at a time


def lengths(p: Problem) -> tuple[int, int]:
    """M and N in memory: the lengths, or the totals of a packed batch."""
    return p.q.shape[2], p.k.shape[2]


def tiles(p: Problem, block: int, by_keys: bool = False) -> int:
    """The number of tiles of rows, or of keys, per head and batch entry; of a packed batch, the most that its lengths
    allow."""
    length = lengths(p)[by_keys]
    return -(-length // block) if p.ragged is None else length // block + p.ragged.batch


def programs(p: Problem, block: int, heads: int, by_keys: bool = False) -> int:
    """The grid: a program per tile and head."""
    return tiles(p, block, by_keys) * heads * (p.shape[0] if p.ragged is None else 1)


def ragged(p: Problem, block: int, by_keys: bool = False, in_order: bool = False) -> Ragged | None:
    """A packed batch as the kernels read it, with the schedule of tiles of rows, or of keys; None for a dense batch.

    The longest tiles come first, so that no long sequence is left for the end. in_order: as they are in memory.
    """
    if p.ragged is None:
        return None
    starts = [x.contiguous() for x in (p.ragged.q, p.ragged.k)]
    left, right = None if p.span.sinks else p.span.left, p.span.right
    if by_keys:
        left, right = (None if x is None else -x for x in (right, left))
    left, right, aligned = views._bound(left), views._bound(right), views.encode_int(int(p.ragged.bottom_right))
    entries = _schedule(starts[by_keys], starts[not by_keys], tiles(p, block, by_keys), block, left, right, aligned)
    return Ragged(*starts, entries if in_order else entries.sort(descending=True).values, aligned)


def ragged_rows(starts: Tensor, total: int, block: int) -> Ragged:
    """The same for a single tensor, in order."""
    starts = starts.contiguous()
    count = total // block + len(starts) - 1
    aligned = views.encode_int(0)
    return Ragged(starts, starts, _schedule(starts, starts, count, block, None, None, aligned), aligned)


def _schedule(
    own: Tensor, other: Tensor, count: int, block: int, left: int | None, right: int | None, aligned: int
) -> Tensor:
    entries = torch.empty(count, dtype=torch.int64, device=own.device)
    launcher.launch(
        schedule_kernel,
        -(-count // CHUNK),
        *(own, other, left, right, aligned, entries, count, len(own) - 1, block),
        CHUNK=CHUNK,
        SEQUENCES=SEQUENCES,
        num_warps=4,
    )
    return entries
