"""Packed (varlen) sequences: where each begins, and which slice of a tensor it has."""

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
    """Sequence `number`: the slices of its queries and keys in packed tensors (1, H, T, ...)."""

    number: int
    rows: slice
    keys: slice

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)."""
        return self.rows.stop - self.rows.start, self.keys.stop - self.keys.start

    def part(self, name: str, x: Tensor) -> Tensor:
        """This sequence's part of a tensor of the whole batch, by the tensor's name: a writable view."""
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
    """B sequences packed one after another in tensors (1, H, T, ...).

    q, k: int32 (B + 1,), the start of each sequence's queries and keys, and the end of the last one. max_q, max_k:
    upper bounds of the lengths. alignment: each sequence has its own diagonal j = i + offset; offset is 0 for
    "top_left" and None, and the sequence's N - M for "bottom_right". square: q and k are known to be equal.
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
        """True if the diagonal's offset can differ between sequences."""
        return self.alignment == "bottom_right" and not self.square

    def sequences(self) -> Iterator[Sequence]:
        """Each sequence, in order. Reads the starts, which synchronizes with the device."""
        q, k = self.q.tolist(), self.k.tolist()
        for b in range(self.batch):
            yield Sequence(b, slice(q[b], q[b + 1]), slice(k[b], k[b + 1]))

    def offsets(self) -> Tensor | int:
        """int64 (B, 1): the offset of each sequence's diagonal; the number 0 if all are 0."""
        return (self.k.diff() - self.q.diff()).long()[:, None] if self.bottom_right else 0


def locate(starts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """(b, i), int64 (total,) each: the sequence of each packed row, and the row's index in it."""
    index = torch.arange(total, device=starts.device, dtype=starts.dtype)
    b = torch.searchsorted(starts[1:].contiguous(), index, right=True).clamp_max(max(0, len(starts) - 2))
    return b, index - starts[b]


def sums(x: Tensor, starts: Tensor) -> Tensor:
    """Sums of packed (1, H, T) over each sequence: (B, H)."""
    return torch.segment_reduce(x[0].T.contiguous(), "sum", offsets=starts.long(), axis=0, initial=0.0)


def padded(x: Tensor, starts: Tensor, longest: int) -> Tensor:
    """Packed (1, H, T, ...) as (B, H, longest, ...), padded with zeros."""
    result = x.new_zeros((len(starts) - 1, x.shape[1], longest, *x.shape[3:]))
    b, i = locate(starts, x.shape[2])
    result[b, :, i] = x[0].transpose(0, 1)
    return result
