"""Between padded batches and packed tokens, by the names and results of flash-attn's bert_padding. Differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import describe

__all__ = ["index_first_axis", "index_put_first_axis", "pad_input", "unpad_input"]


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """hidden_states (B, S, ...) and a mask (B, S), bool or int, nonzero = a token ->
    (packed (T, ...), indices (T,) int64, cu_seqlens (B + 1,) int32, max_seqlen, seqused (B,) int32).

    indices are places in the flattened (B * S,). unused_mask (B, S): further tokens that get a place in packed and in
    cu_seqlens, and are not counted by seqused. Finding T and max_seqlen waits for a GPU.

    >>> import torch
    >>> from fused_attn.compat.bert_padding import unpad_input
    >>> mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    >>> packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(torch.randn(2, 3, 8), mask)
    >>> packed.shape, indices.tolist(), cu_seqlens.tolist(), max_seqlen, seqused.tolist()
    (torch.Size([3, 8]), [0, 1, 3], [0, 2, 3], 2, [2, 1])
    """
    for name, mask in (("attention_mask", attention_mask), ("unused_mask", unused_mask)):
        if mask is not None and mask.shape != hidden_states.shape[:2]:
            raise ValueError(f"{name}: expected shape {tuple(hidden_states.shape[:2])}, got {describe(mask)}")
    used = attention_mask != 0
    placed = used if unused_mask is None else used | (unused_mask != 0)
    lengths = placed.sum(-1, dtype=torch.int32)
    indices = placed.flatten().nonzero().flatten()
    return (
        index_first_axis(hidden_states.flatten(0, 1), indices),
        indices,
        F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
        int(lengths.max()) if len(lengths) else 0,
        used.sum(-1, dtype=torch.int32),
    )


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """packed (T, ...) and the places (T,) that `unpad_input` found -> (batch, seqlen, ...), zeros where no token is.

    >>> import torch
    >>> from fused_attn.compat.bert_padding import pad_input
    >>> pad_input(torch.ones(2, 1), torch.tensor([0, 3]), 2, 2).flatten().tolist()
    [1.0, 0.0, 0.0, 1.0]
    """
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """input (N, ...) and places (T,) -> (T, ...).

    >>> import torch
    >>> from fused_attn.compat.bert_padding import index_first_axis
    >>> index_first_axis(torch.tensor([[1], [2], [3]]), torch.tensor([0, 2])).tolist()
    [[1], [3]]
    """
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """values (T, ...) and their places (T,), all different -> (first_axis_dim, ...), zeros elsewhere.

    >>> import torch
    >>> from fused_attn.compat.bert_padding import index_put_first_axis
    >>> index_put_first_axis(torch.tensor([[1], [3]]), torch.tensor([0, 2]), 3).tolist()
    [[1], [0], [3]]
    """
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices.long(), values)
