"""The weights that attention gave to its values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..api import attention

COLUMNS = 128  # weights found in one pass


def attention_weights(q: Tensor, k: Tensor, *, average: bool, **options: Any) -> Tensor:
    """(B, Hq, M, N), or their mean over heads (B, M, N): what `attention` averages values by, dropout included.

    Values that are columns of the identity come out as the weights of those keys. Takes the options of `attention`, in
    q's dtype, and is as differentiable as that; q, k (B, H, length, D). Memory beside the answer is linear in length.
    """
    n = k.shape[2]
    parts = []
    for start in range(0, n, COLUMNS):
        columns = torch.eye(n, min(COLUMNS, n - start), dtype=q.dtype, device=q.device).roll(start, 0)
        part: Any = attention(q, k, columns.expand(*k.shape[:2], -1, -1), **options)
        parts.append(part.mean(1) if average else part)
    if not parts:
        return q.new_empty(*q.shape[:1], *(() if average else q.shape[1:2]), q.shape[2], 0)
    return torch.cat(parts, -1)
