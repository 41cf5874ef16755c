"""Which program owns which tile: of a batch by arithmetic, of ragged sequences by a table of turns.

A table is made on the device, without waiting for it, and has as many turns as there may be tiles, total // block + B.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.turns import turns_kernel
from ...kernels.types import Ragged
from ...spec.problem import Problem
from . import launcher, views

CHUNK, SEQUENCES = 64, 64  # turns of a program, and sequences that it looks at together


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
    """What kernels read of ragged sequences, with the turns of tiles of rows, or of keys; None of a batch.

    The longest come first, so that a long sequence does not begin when the others have ended; in_order: as they lie.
    """
    if p.ragged is None:
        return None
    starts = [x.contiguous() for x in (p.ragged.q, p.ragged.k)]
    left, right = None if p.span.sinks else p.span.left, p.span.right
    if by_keys:
        left, right = (None if x is None else -x for x in (right, left))
    left, right, aligned = views._bound(left), views._bound(right), views.encode(int(p.ragged.bottom_right))
    keys = _keys(starts[by_keys], starts[not by_keys], tiles(p, block, by_keys), block, left, right, aligned)
    return Ragged(*starts, keys if in_order else keys.sort(descending=True).values, aligned)


def alone(starts: Tensor, total: int, block: int) -> Ragged:
    """The same of one tensor by itself, in order."""
    starts = starts.contiguous()
    count = total // block + len(starts) - 1
    return Ragged(starts, starts, _keys(starts, starts, count, block, None, None, views.encode(0)), views.encode(0))


def _keys(
    own: Tensor, other: Tensor, count: int, block: int, left: int | None, right: int | None, aligned: int
) -> Tensor:
    keys = torch.empty(count, dtype=torch.int64, device=own.device)
    launcher.launch(
        turns_kernel,
        -(-count // CHUNK),
        *(own, other, left, right, aligned, keys, count, len(own) - 1, block),
        CHUNK=CHUNK,
        SEQUENCES=SEQUENCES,
        num_warps=4,
    )
    return keys
