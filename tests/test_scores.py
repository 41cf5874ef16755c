"""Scores and normalizers by what must hold of them whatever the tolerance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_attn import attention, explain, scores

BACKENDS = ("triton", "tiled", "reference")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def available(backend: str) -> None:
    x = randn(1, 1, 2, 2)
    if reasons := explain(x, x, x, backend=backend).reasons.get(backend):
        pytest.skip(reasons[0])


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return randn(2, 2, 9, 6), randn(2, 2, 13, 6, seed=1), randn(2, 2, 13, 5, seed=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", (2.0**-12, 2.0**80))
def test_cosine_knows_no_length(backend: str, size: float, qkv: tuple[Tensor, ...]) -> None:
    """huge and small vectors: powers of two change no bit, though the squares of the huge ones overflow."""
    available(backend)
    q, k, v = qkv
    expected = attention(q, k, v, score=scores.Cosine(4.0), backend=backend)
    assert torch.equal(attention(q * size, k, v, score=scores.Cosine(4.0), backend=backend), expected)
    assert torch.equal(attention(q, k * size, v, score=scores.Cosine(4.0), backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_vectors_score_zero(backend: str, qkv: tuple[Tensor, ...]) -> None:
    """A query without direction is as near to every key; and its gradient is finite."""
    available(backend)
    _, k, v = qkv
    q = torch.zeros(2, 2, 9, 6, requires_grad=True)
    t = torch.tensor(4.0, requires_grad=True)
    out, lse = attention(q, k, v, score=scores.Cosine(t), return_lse=True, backend=backend)
    torch.testing.assert_close(lse, torch.log(torch.tensor(13.0)).expand_as(lse))
    found = torch.autograd.grad((out.sum(), lse.sum()), (q, t))
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_distance_keeps_the_norm_of_the_query(backend: str) -> None:
    """The log-sum-exp of one key at the query itself is 0, wherever the two are."""
    available(backend)
    x = randn(1, 1, 1, 8) * 3
    _, lse = attention(x, x, x, score=scores.Distance(2.0), return_lse=True, backend=backend)
    terms = x.square().sum() / 4  # what cancels
    assert lse.abs().item() < 8 * torch.finfo(torch.float32).eps * terms


@pytest.mark.parametrize("backend", BACKENDS)
def test_softmax1_is_a_sink_of_zero(backend: str, qkv: tuple[Tensor, ...]) -> None:
    available(backend)
    out, lse = attention(*qkv, normalizer="softmax1", return_lse=True, backend=backend)
    other, lse_of_sink = attention(*qkv, sink=torch.zeros(2), return_lse=True, backend=backend)
    assert torch.equal(out, other)
    assert torch.equal(lse, lse_of_sink)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sigmoid_weighs_each_key_by_itself(backend: str, qkv: tuple[Tensor, ...]) -> None:
    """Keys that join change nothing for those that are there, and a row that sees nothing gives zeros."""
    available(backend)
    q, k, v = qkv
    parts = [slice(0, 5), slice(5, 13)]
    options = {"normalizer": "sigmoid", "backend": backend}
    whole = attention(q, k, v, **options)
    halves = sum(attention(q, k[:, :, x], v[:, :, x], **options) for x in parts)
    torch.testing.assert_close(whole, halves)
    blind = torch.arange(9)[:, None] > 3
    assert not attention(q, k, v, mask=blind, **options)[:, :, :4].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_follows_the_order_of_q_through_a_matrix(backend: str) -> None:
    """A bilinear score makes other queries; the answer still lies in memory as q does."""
    available(backend)
    q = randn(2, 9, 2, 6).transpose(1, 2)
    k = randn(2, 2, 13, 4)
    out = attention(q, k, k, score=scores.Bilinear(randn(6, 4)), backend=backend)
    assert out.stride() == (72, 4, 8, 1)


def test_a_plain_bilinear_score_goes_to_torch(qkv: tuple[Tensor, ...]) -> None:
    q, k, v = qkv
    assert explain(q, k, k, score=scores.Bilinear(randn(6, 6))).backend == "sdpa"
    assert explain(q, k, v, score=scores.Additive(randn(6))).backend == "tiled"


@pytest.mark.parametrize("scale", (None, 0.5))
def test_default_scales(scale: float | None, qkv: tuple[Tensor, ...]) -> None:
    """D ** -0.5 for products, 1 for the others; a given scale always multiplies."""
    q, k, v = qkv
    eye = torch.eye(6)
    bilinear = attention(q, k, v, score=scores.Bilinear(eye), scale=scale, backend="reference")
    torch.testing.assert_close(bilinear, attention(q, k, v, scale=scale, backend="reference"))
    doubled = attention(q, k, v, score=scores.Cosine(6.0), scale=scale, backend="reference")
    torch.testing.assert_close(
        doubled, attention(q, k, v, score=scores.Cosine(1.0), scale=6.0 * (scale or 1.0), backend="reference")
    )
