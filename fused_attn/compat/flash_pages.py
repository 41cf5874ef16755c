"""Packed queries over a paged cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..api.decode import attention_decode
from ..spec.checks import as_int, describe
from ..spec.ragged import locate
from . import flash_arguments as arguments


def over_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    block_table: Tensor,
    options: dict[str, Any],
    leftpad: Tensor | None = None,
    used: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (out (Tq, Hq, D), lse (Tq, Hq)), without gradients.

    Each sequence's queries are placed at the end of max_seqlen_q rows, so that all sequences are aligned bottom-right.
    """
    rows = arguments.lengths("q", cu_seqlens_q, q.shape[0], max_seqlen_q, q.device)
    keys = arguments.lengths("k", cu_seqlens_k, None, max_seqlen_k, q.device)
    if len(keys) != len(rows):
        shapes = tuple(cu_seqlens_q.shape), describe(cu_seqlens_k)
        raise ValueError(f"cu_seqlens_k: expected cu_seqlens_q's shape {shapes[0]}, got {shapes[1]}")
    longest = as_int("max_seqlen_q", max_seqlen_q)
    sequence, row = locate(cu_seqlens_q, q.shape[0])
    row = row + (longest - rows)[sequence]
    padded = q.new_zeros(len(rows), longest, *q.shape[1:]).index_put((sequence, row), q)
    out, lse = attention_decode(
        padded, k, v, cache_seqlens=keys if used is None else used, cache_leftpad=leftpad, page_table=block_table,
        return_lse=True, **options,
    )  # fmt: skip
    return out[sequence, row], lse.transpose(1, 2)[sequence, row]
