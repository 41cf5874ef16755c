"""flash-attn's `bert_padding`: conversion between padded batches and packed tokens. Differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec.checks import as_int, check_integers, describe, readable

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Pack the tokens of a padded batch.

    hidden_states (B, S, ...) and a mask (B, S), bool or int, nonzero = a token ->
    (packed (T, ...), indices (T,) int64, cu_seqlens (B + 1,) int32, max_seqlen, seqused (B,) int32).

    indices point into the flattened (B * S,). unused_mask (B, S): further tokens that are packed and counted by
    cu_seqlens, but not by seqused. T and max_seqlen are read from a GPU, which synchronizes.

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


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Pack rows that each hold several sequences.

    hidden_states (B, S, ...) and lengths -> (packed (T, ...), indices (T,) int64, cu_seqlens (sequences + 1,) int32,
    max_seqlen).

    attention_mask_in_length: integers (B, S). The positive ones of a row are the lengths of its sequences, which are
    contiguous from the first token on; the rest of the row is padding. Synchronizes a GPU.

    >>> import torch
    >>> from fused_attn.compat.bert_padding import unpad_input_for_concatenated_sequences
    >>> lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0]])
    >>> packed, indices, starts, longest = unpad_input_for_concatenated_sequences(torch.randn(2, 6, 8), lengths)
    >>> packed.shape, indices.tolist(), starts.tolist(), longest
    (torch.Size([9, 8]), [0, 1, 2, 3, 4, 6, 7, 8, 9], [0, 2, 5, 9], 4)
    """
    name, in_rows = "attention_mask_in_length", attention_mask_in_length
    check_integers(name, in_rows, 2)
    if in_rows.shape != hidden_states.shape[:2]:
        raise ValueError(f"{name}: expected shape {tuple(hidden_states.shape[:2])}, got {describe(in_rows)}")
    size, totals = in_rows.shape[1], in_rows.sum(-1)
    if readable(in_rows) and bool(((in_rows < 0).any(-1) | (totals > size)).any()):
        raise ValueError(f"{name}: expected lengths >= 0, of at most {size} tokens in a row, got {in_rows.tolist()}")
    used = torch.arange(size, device=in_rows.device) < totals[:, None]
    lengths = in_rows.flatten()[in_rows.flatten().nonzero().flatten()]
    indices = used.flatten().nonzero().flatten()
    return (
        index_first_axis(hidden_states.flatten(0, 1), indices),
        indices,
        F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
        int(lengths.max()) if len(lengths) else 0,
    )


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Undo `unpad_input`: packed (T, ...) and its indices (T,) -> (batch, seqlen, ...), with zeros as padding.

    >>> import torch
    >>> from fused_attn.compat.bert_padding import pad_input
    >>> pad_input(torch.ones(2, 1), torch.tensor([0, 3]), 2, 2).flatten().tolist()
    [1.0, 0.0, 0.0, 1.0]
    """
    batch, seqlen = as_int("batch", batch), as_int("seqlen", seqlen)
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Select rows: input (N, ...) and indices (T,) -> (T, ...).

    >>> import torch
    >>> from fused_attn.compat.bert_padding import index_first_axis
    >>> index_first_axis(torch.tensor([[1], [2], [3]]), torch.tensor([0, 2])).tolist()
    [[1], [3]]
    """
    _check_indices(indices, input.shape[0])
    return input.index_select(0, indices)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """`index_first_axis`, and input itself for a residual connection; both differentiable.

    >>> import torch
    >>> from fused_attn.compat.bert_padding import index_first_axis_residual
    >>> selected, residual = index_first_axis_residual(torch.tensor([[1], [2], [3]]), torch.tensor([0, 2]))
    >>> selected.tolist(), residual.tolist()
    ([[1], [3]], [[1], [2], [3]])
    """
    return index_first_axis(input, indices), input.view_as(input)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Scatter rows: values (T, ...) and distinct indices (T,) -> (first_axis_dim, ...), zeros elsewhere.

    >>> import torch
    >>> from fused_attn.compat.bert_padding import index_put_first_axis
    >>> index_put_first_axis(torch.tensor([[1], [3]]), torch.tensor([0, 2]), 3).tolist()
    [[1], [0], [3]]
    """
    size = as_int("first_axis_dim", first_axis_dim)
    _check_indices(indices, size, len(values))
    return values.new_zeros(size, *values.shape[1:]).index_copy(0, indices.long(), values)


def _check_indices(indices: Tensor, size: int, count: int | None = None) -> None:
    """Check that there are count indices (None: any number) and that they are below size."""
    check_integers("indices", indices, 1)
    if count not in (None, len(indices)):
        raise ValueError(f"indices: expected one for each of the {count} rows, got {len(indices)}")
    if readable(indices) and len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < size:
        lowest, highest = int(indices.min()), int(indices.max())
        raise ValueError(f"indices: expected 0 <= indices < {size}, got some from {lowest} to {highest}")
