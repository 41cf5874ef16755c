"""S_dmask: the attention weights with the dropout pattern as their sign, computed apart from the attention call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..api.statistics import attention_map
from ..spec.dropout import Dropout


def dense_weights(q: Tensor, k: Tensor, dropout: Dropout | None, options: dict[str, Any]) -> Tensor:
    """The weights before dropout, negative where dropped, of q (B, Sq, Hq, D) and k (B, Sk, Hkv, D): (B, Hq, Sq, Sk).

    In q's dtype, without a derivative. options: of `attention`.
    """
    return _of_sequences(q, q.unbind(), k.unbind(), (q.shape[1], k.shape[1]), dropout, options)


def packed_weights(
    q: Tensor, k: Tensor, starts_q: Tensor, starts_k: Tensor, longest: tuple[int, int], dropout: Dropout | None,
    options: dict[str, Any],
) -> Tensor:  # fmt: skip
    """The same of packed q and k (T, H, D): (B, Hq, *longest), 0 beyond a sequence. Synchronizes a device."""
    rows, keys = (x.diff().tolist() for x in (starts_q, starts_k))
    return _of_sequences(q, q.split(rows), k.split(keys), longest, dropout, options)


def _of_sequences(
    q: Tensor, rows: Sequence[Tensor], keys: Sequence[Tensor], longest: tuple[int, int], dropout: Dropout | None,
    options: dict[str, Any],
) -> Tensor:  # fmt: skip
    slopes = options["alibi_slopes"]
    result = q.new_zeros(len(rows), q.shape[-2], *longest)
    for b, (own_q, own_k) in enumerate(zip(rows, keys, strict=True)):
        own = options if slopes is None or slopes.ndim == 1 else {**options, "alibi_slopes": slopes[b : b + 1]}
        weights = attention_map(own_q[None], own_k[None], layout="bshd", alignment="bottom_right", **own)[0]
        m, n = weights.shape[1:]
        result[b, :, :m, :n] = (
            weights if dropout is None else torch.where(_kept(dropout, b, weights), weights, -weights)
        )
    return result


def _kept(dropout: Dropout, b: int, weights: Tensor) -> Tensor:
    """bool (H, M, N): the kept weights of sequence b. Head by head, because random numbers need much more memory."""
    heads, m, n = weights.shape
    i, j = (torch.arange(size, device=weights.device) for size in (m, n))
    numbers = torch.arange(b * heads, (b + 1) * heads, device=weights.device)
    return torch.stack([dropout.materialize(number, i, j) for number in numbers])
