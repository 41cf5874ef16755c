"""S_dmask: the attention weights and which of them dropout has dropped, formed beside the call that applied it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..api.statistics import attention_map
from ..spec.dropout import Dropout


def dense_weights(q: Tensor, k: Tensor, dropout: Dropout | None, words: dict[str, Any]) -> Tensor:
    """(B, Hq, Sq, Sk) of q (B, Sq, Hq, D) and k (B, Sk, Hkv, D): the weights before dropout, negative where dropped.

    In q's dtype, without a derivative. words: keywords of `attention`.
    """
    return _of_sequences(q, q.unbind(), k.unbind(), (q.shape[1], k.shape[1]), dropout, words)


def packed_weights(
    q: Tensor, k: Tensor, starts_q: Tensor, starts_k: Tensor, longest: tuple[int, int], dropout: Dropout | None,
    words: dict[str, Any],
) -> Tensor:  # fmt: skip
    """(B, Hq, *longest) of packed (T, H, D), 0 beyond a sequence. Reads where the sequences begin."""
    rows, keys = (x.diff().tolist() for x in (starts_q, starts_k))
    return _of_sequences(q, q.split(rows), k.split(keys), longest, dropout, words)


def _of_sequences(
    q: Tensor, rows: Sequence[Tensor], keys: Sequence[Tensor], longest: tuple[int, int], dropout: Dropout | None,
    words: dict[str, Any],
) -> Tensor:  # fmt: skip
    slopes = words["alibi_slopes"]
    found = q.new_zeros(len(rows), q.shape[-2], *longest)
    for b, (own_q, own_k) in enumerate(zip(rows, keys, strict=True)):
        own = words if slopes is None or slopes.ndim == 1 else {**words, "alibi_slopes": slopes[b : b + 1]}
        weights = attention_map(own_q[None], own_k[None], layout="bshd", alignment="bottom_right", **own)[0]
        m, n = weights.shape[1:]
        found[b, :, :m, :n] = weights if dropout is None else torch.where(_kept(dropout, b, weights), weights, -weights)
    return found


def _kept(dropout: Dropout, b: int, weights: Tensor) -> Tensor:
    """bool (H, M, N) of sequence b, head by head: the random words take many times the memory."""
    heads, m, n = weights.shape
    i, j = (torch.arange(size, device=weights.device) for size in (m, n))
    numbers = torch.arange(b * heads, (b + 1) * heads, device=weights.device)
    return torch.stack([dropout.materialize(number, i, j) for number in numbers])
