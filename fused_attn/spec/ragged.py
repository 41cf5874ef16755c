"""Sequences of different lengths one behind another: where each begins, and which part of a tensor it has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = {
    "q", "out", "dout", "lse", "dlse", "peak", "log_sum", "row_terms",
    "entropy", "max_logit", "top_k_indices", "top_k_weights",
}  # fmt: skip
KEYS = {"k", "v", "key_terms", "key_mass"}
PLANES = {"bias", "mask"}


class Sequence(NamedTuple):
    """Sequence `number`, whose queries and keys are these rows of packed tensors (1, H, T, ...)."""

    number: int
    rows: slice
    keys: slice

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)."""
        return self.rows.stop - self.rows.start, self.keys.stop - self.keys.start

    def part(self, name: str, x: Tensor) -> Tensor:
        """What a tensor of the whole batch, by its name, holds for this sequence: a view, which may be written to."""
        if name in ROWS or name in KEYS:
            return x[:, :, self.rows if name in ROWS else self.keys]
        if name in PLANES:
            x = x if x.shape[0] == 1 else x[self.number : self.number + 1]
            for dim, length in zip((2, 3), self.shape, strict=True):
                x = x if x.shape[dim] == 1 else x.narrow(dim, 0, length)
            return x
        return x[self.number : self.number + 1] if name == "slopes" and x.ndim == 2 else x


@dataclass(frozen=True, eq=False)
class Ragged:
    """B sequences behind one another, in tensors (1, H, T, ...).

    q, k: int32 (B + 1,), where the queries and the keys of each begin, and where the last one ends. max_q, max_k: no
    sequence is longer. alignment: the diagonals j = i + offset of all of them; offset is 0 for "top_left" and None, and
    N - M of each sequence for "bottom_right". square: queries and keys are known to begin at the same places.
    """

    q: Tensor
    k: Tensor
    max_q: int
    max_k: int
    alignment: str | None = None
    square: bool = False

    @property
    def batch(self) -> int:
        return self.q.shape[0] - 1

    @property
    def bottom_right(self) -> bool:
        """Whether diagonals differ between the sequences."""
        return self.alignment == "bottom_right" and not self.square

    def sequences(self) -> Iterator[Sequence]:
        """Each of them, in order. Reads where they begin, and so waits for a device."""
        q, k = self.q.tolist(), self.k.tolist()
        for b in range(self.batch):
            yield Sequence(b, slice(q[b], q[b + 1]), slice(k[b], k[b + 1]))

    def offsets(self) -> Tensor | int:
        """int64 (B, 1): how far right each sequence's diagonal lies; 0 where all of them begin at the first key."""
        return (self.k.diff() - self.q.diff()).long()[:, None] if self.bottom_right else 0


def places(starts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """(b, i), int64 (total,) each: which sequence each of the packed rows belongs to, and its index there."""
    index = torch.arange(total, device=starts.device, dtype=starts.dtype)
    b = torch.searchsorted(starts[1:].contiguous(), index, right=True).clamp_max(max(0, len(starts) - 2))
    return b, index - starts[b]


def sums(x: Tensor, starts: Tensor) -> Tensor:
    """Packed (1, H, T), added up over each sequence: (B, H)."""
    return torch.segment_reduce(x[0].T.contiguous(), "sum", offsets=starts.long(), axis=0, initial=0.0)


def padded(x: Tensor, starts: Tensor, longest: int) -> Tensor:
    """Packed (1, H, T, ...) as (B, H, longest, ...), zeros behind each sequence's end."""
    found = x.new_zeros((len(starts) - 1, x.shape[1], longest, *x.shape[3:]))
    b, i = places(starts, x.shape[2])
    found[b, :, i] = x[0].transpose(0, 1)
    return found
