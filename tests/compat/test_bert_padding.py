"""bert_padding: between padded batches and packed tokens, with gradients and errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fused_attn.compat import bert_padding


def test_unpad_and_pad() -> None:
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    unused = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    x = torch.randn(3, 4, 2, 5).requires_grad_()
    for kind in (torch.int64, torch.int32, torch.bool):
        packed, indices, starts, longest, used = bert_padding.unpad_input(x, mask.to(kind))
        assert torch.equal(packed, x[mask.bool()])
        assert indices.tolist() == [0, 2, 3, 8, 9]
        assert (starts.tolist(), starts.dtype) == ([0, 3, 3, 5], torch.int32)
        assert (longest, used.tolist(), used.dtype) == (3, [3, 0, 2], torch.int32)
    wider, indices, starts, longest, used = bert_padding.unpad_input(x, mask, unused)
    assert torch.equal(wider, x[(mask + unused).bool()])
    assert (indices.tolist(), starts.tolist(), longest) == ([0, 1, 2, 3, 7, 8, 9], [0, 4, 5, 7], 4)
    assert used.tolist() == [3, 0, 2]

    packed, indices, *_ = bert_padding.unpad_input(x, mask)
    for places in (indices, indices.int()):
        back = bert_padding.pad_input(packed, places, 3, 4)
        assert torch.equal(back, x * mask[..., None, None])
    dback = torch.randn(3, 4, 2, 5)
    (dx,) = torch.autograd.grad(back, x, dback)
    assert torch.equal(dx, dback * mask[..., None, None])


def test_padding_of_nothing() -> None:
    packed, indices, starts, longest, used = bert_padding.unpad_input(torch.randn(0, 4, 2), torch.zeros(0, 4))
    assert (packed.shape, indices.shape, starts.tolist(), longest, used.shape) == ((0, 2), (0,), [0], 0, (0,))
    assert bert_padding.pad_input(packed, indices, 0, 4).shape == (0, 4, 2)
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(2, 4\)"):
        bert_padding.unpad_input(torch.randn(2, 4, 2), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"unused_mask: expected shape \(2, 4\)"):
        bert_padding.unpad_input(torch.randn(2, 4, 2), torch.zeros(2, 4), torch.zeros(2, 3))


def test_concatenated_sequences() -> None:
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 0, 2, 0, 0, 0], [0] * 6, [6, 0, 0, 0, 0, 0]])
    x = torch.randn(4, 6, 3, requires_grad=True)
    expected = [x[0, :2], x[0, 2:5], x[1, :3], x[1, 3:5], x[3]]
    for kind in (torch.int64, torch.int32, torch.uint8):
        packed, indices, starts, longest = bert_padding.unpad_input_for_concatenated_sequences(x, lengths.to(kind))
        assert torch.equal(packed, torch.cat(expected))
        assert torch.equal(packed, x.flatten(0, 1)[indices])
        assert (starts.tolist(), starts.dtype, longest) == ([0, 2, 5, 8, 10, 16], torch.int32, 6)
    (dx,) = torch.autograd.grad(packed.sum(), x)
    assert torch.equal(dx.sum((1, 2)), torch.tensor([15.0, 15.0, 0.0, 18.0]))
    nothing = bert_padding.unpad_input_for_concatenated_sequences(x, torch.zeros(4, 6, dtype=torch.int32))
    assert nothing[0].shape == (0, 3) and nothing[2].tolist() == [0] and nothing[3] == 0


def test_concatenated_sequences_that_do_not_fit() -> None:
    x = torch.randn(2, 3, 4)
    for lengths in ([[2, 2, 0], [1, 0, 0]], [[2, -1, 1], [1, 0, 0]]):
        with pytest.raises(ValueError, match="attention_mask_in_length: expected lengths >= 0, of at most 3 tokens"):
            bert_padding.unpad_input_for_concatenated_sequences(x, torch.tensor(lengths))
    with pytest.raises(ValueError, match=r"attention_mask_in_length: expected shape \(2, 3\)"):
        bert_padding.unpad_input_for_concatenated_sequences(x, torch.zeros(2, 2, dtype=torch.int32))
    with pytest.raises(TypeError, match="attention_mask_in_length: expected an integer tensor"):
        bert_padding.unpad_input_for_concatenated_sequences(x, torch.zeros(2, 3))


def test_residual() -> None:
    """Gradients of both results add up."""
    x, places = torch.randn(5, 2, 3, requires_grad=True), torch.tensor([4, 1])
    selected, residual = bert_padding.index_first_axis_residual(x, places)
    assert torch.equal(selected, x[places]) and torch.equal(residual, x)
    dselected, dresidual = torch.randn(2, 2, 3), torch.randn(5, 2, 3)
    (dx,) = torch.autograd.grad((selected, residual), x, (dselected, dresidual))
    expected = dresidual.clone()
    expected[places] += dselected
    assert torch.equal(dx, expected)


def test_sizes_of_any_kind() -> None:
    packed = torch.randn(2, 3)
    padded = bert_padding.pad_input(packed, torch.tensor([0, 3]), np.int8(2), torch.tensor(2))
    assert torch.equal(padded, bert_padding.pad_input(packed, torch.tensor([0, 3]), 2, 2))
    with pytest.raises(TypeError, match="seqlen: expected an int, got float"):
        bert_padding.pad_input(packed, torch.tensor([0, 3]), 2, 2.0)


def test_indices_out_of_range() -> None:
    packed, places = torch.randn(2, 3), torch.tensor([0, 4])
    with pytest.raises(ValueError, match="indices: expected 0 <= indices < 4, got some from 0 to 4"):
        bert_padding.pad_input(packed, places, 2, 2)
    for wrong in (torch.tensor([0, 5]), torch.tensor([-1, 0])):
        with pytest.raises(ValueError, match="indices: expected 0 <= indices < 5, got some from"):
            bert_padding.index_first_axis(torch.randn(5, 3), wrong)
    with pytest.raises(ValueError, match="indices: expected one for each of the 2 rows, got 1"):
        bert_padding.pad_input(packed, places[:1], 3, 2)
    with pytest.raises(TypeError, match="indices: expected an integer tensor"):
        bert_padding.index_first_axis_residual(packed, places.float())
