"""Scores and normalizers: properties that hold exactly, and objects."""

from __future__ import annotations

import copy
import doctest
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn import attention, attention_varlen, explain, scores, testing
from fused_attn.testing import Case
from tests.parity import within_budget

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
def test_cosine_ignores_the_length_of_vectors(backend: str, size: float, qkv: tuple[Tensor, ...]) -> None:
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
    within_budget(
        "lse", lse, *(torch.tensor(13.0, dtype=x).log().expand_as(lse) for x in (torch.float64, torch.float32))
    )
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
def test_sigmoid_weights_are_independent(backend: str, qkv: tuple[Tensor, ...]) -> None:
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


def test_bilinear_without_modifiers_goes_to_sdpa(qkv: tuple[Tensor, ...]) -> None:
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


# ---------------------------------------- objects

MADE: dict[str, tuple[Any, str]] = {
    "bilinear": (lambda: scores.Bilinear(torch.eye(6)), "scores.Bilinear(<torch.float32 tensor of shape (6, 6)>)"),
    "cosine": (lambda: scores.Cosine(4), "scores.Cosine(4.0)"),
    "distance": (lambda: scores.Distance(torch.ones(2)), "scores.Distance(<torch.float32 tensor of shape (2,)>)"),
    "additive": (lambda: scores.Additive(torch.ones(6)), "scores.Additive(<torch.float32 tensor of shape (6,)>)"),
}


@pytest.mark.parametrize("name", MADE)
def test_a_score_is_data(name: str, qkv: tuple[Tensor, ...]) -> None:
    make, shown = MADE[name]
    score = make()
    assert repr(score) == shown and [x == score for x, _ in ((f(), 0) for f, _ in MADE.values())].count(True) == 1
    for again in (pickle.loads(pickle.dumps(score)), copy.deepcopy(score), copy.copy(score), score.to("cpu")):
        assert again == score and torch.equal(attention(*qkv, score=again), attention(*qkv, score=score))
    assert type(score)(score.parameter * 2) != score
    moved = score.to("meta").parameter
    assert not isinstance(moved, Tensor) or moved.is_meta
    with pytest.raises(TypeError, match="unhashable"):
        hash(score)


def test_explanations_are_data(qkv: tuple[Tensor, ...]) -> None:
    found = explain(*qkv, softcap=2.0)
    for again in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found)):
        assert again == found and str(again) == str(found)


def test_explain_draws_no_random_number(qkv: tuple[Tensor, ...]) -> None:
    before = torch.get_rng_state()
    explain(*qkv, dropout_p=0.1)
    starts = torch.tensor([0, 4, 9], dtype=torch.int32)
    explain(*(randn(9, 2, 4) for _ in range(3)), cu_seqlens_q=starts, cu_seqlens_k=starts, dropout_p=0.1)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------- distances far from the origin

SMALL = {"b": 2, "hq": 2, "hkv": 1, "m": 9, "n": 13, "d": 6, "dv": 5, "score": "distance", "parameter": "h"}
FAR = {
    "lse": Case("lse", **SMALL, return_lse=True),
    "causal": Case("causal", **SMALL, causal=True, alignment="bottom_right"),
    "padded": Case("padded", **SMALL, masks=("lengths_q",)),
    "sigmoid": Case("sigmoid", **SMALL, normalizer="sigmoid", masks=("random_b11n",)),
    "ragged": Case("ragged", **SMALL | {"b": 3}, lengths=((4, 5), (0, 3), (9, 13)), causal=True,
                   alignment="bottom_right"),
}  # fmt: skip
TYPES = (torch.float32, torch.float16, torch.bfloat16)


KERNELS = [("triton", "lse", torch.float16, 1000.0), ("triton", "ragged", torch.float32, 1000.0)]


@pytest.mark.parametrize(
    ("backend", "name", "dtype", "offset"),
    [*itertools.product(("tiled",), FAR, TYPES, (0.0, 100.0, 1e4)), *KERNELS],
    ids=str,
)
def test_a_distance_far_from_the_origin(backend: str, name: str, dtype: torch.dtype, offset: float) -> None:
    """The budget of the same points near it: its terms are those of q and k before they are moved away."""
    available(backend)
    inputs = testing.make_inputs(FAR[name], dtype)
    near = testing.expect(inputs)
    with torch.no_grad():
        for tensors in (inputs.tensors, inputs.clean):
            for x in "qk":
                tensors[x] += offset
    far = testing.expect(inputs)
    expected = testing.Expected(far.oracle, far.plain, near.absolute)
    testing.compare(inputs, testing.run_public(inputs, backend), expected, name)


def distant(*shape: int, seed: int = 0) -> Tensor:
    return randn(*shape, seed=seed) + 1000


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", (torch.nan, torch.inf))
def test_nan_keys_affect_only_their_rows(backend: str, wrong: float) -> None:
    available(backend)
    q, k, v = distant(1, 1, 8, 6), distant(1, 1, 8, 6, seed=1), randn(1, 1, 8, 5, seed=2)
    options: dict[str, Any] = {"score": scores.Distance(1.0), "causal": True, "backend": backend}
    expected = attention(q, k, v, **options)[:, :, :7]
    k[:, :, 7] = wrong
    torch.testing.assert_close(attention(q, k, v, **options)[:, :, :7], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_keys_change_no_bit(backend: str) -> None:
    available(backend)
    q, k, v = distant(1, 1, 8, 6), distant(1, 1, 8, 6, seed=1), randn(1, 1, 8, 5, seed=2)
    options: dict[str, Any] = {"score": scores.Distance(1.0), "mask": torch.arange(8) < 7, "backend": backend}
    expected = attention(q, k, v, **options)
    k[:, :, 7] = 0
    assert torch.equal(attention(q, k, v, **options), expected)


@pytest.mark.parametrize("backend", ("triton", "tiled"))
@pytest.mark.parametrize("mask", (False, True))
def test_packed_distance_equals_dense_distance(backend: str, mask: bool) -> None:
    """Bit for bit, with neighbours at other places."""
    available(backend)
    lengths = (3, 6, 2)
    starts = torch.tensor((0, 3, 9, 11), dtype=torch.int32)
    places = torch.tensor((1000.0, -50.0, 0.0)).repeat_interleave(torch.tensor(lengths))[:, None, None]
    q, k, v = randn(11, 2, 6) + places, randn(11, 1, 6, seed=1) + places, randn(11, 1, 5, seed=2)
    shown = torch.ones(3, 1, 6, 6, dtype=torch.bool)
    shown[0, :, :3, 1] = shown[1, :, :, 4] = False
    k[1] = k[7] = 0  # far from their neighbours; hidden from all rows that there are in the first sequence
    options: dict[str, Any] = {"score": scores.Distance(2.0), "backend": backend}
    longest = {"mask": shown if mask else None, "max_seqlen_q": 6, "max_seqlen_k": 6}
    packed = attention_varlen(q, k, v, starts, starts, **longest, **options)
    for b, n in enumerate(lengths):
        own = slice(starts[b], starts[b] + n)
        own_mask = shown[b, :, :n, :n] if mask else None
        alone = attention(*(x[None, own] for x in (q, k, v)), layout="bshd", mask=own_mask, **options)
        assert torch.equal(packed[own], alone[0])


def test_lowered_scores_keep_every_gradient() -> None:
    """Against float64 by finite differences, which do move the middle of the keys."""
    q, k, v = distant(1, 2, 3, 4).double(), distant(1, 1, 5, 4, seed=1).double(), randn(1, 1, 5, 3, seed=2).double()
    h = torch.tensor(2.0, dtype=torch.float64)
    given = [x.requires_grad_() for x in (q, k, v, h)]

    def f(q: Tensor, k: Tensor, v: Tensor, h: Tensor) -> Tensor:
        return attention(q, k, v, score=scores.Distance(h), backend="tiled")

    assert torch.autograd.gradcheck(f, given, eps=1e-4, atol=1e-6)


# ---------------------------------------- vectors that a score rewrites, in half precision

WIDE = {"b": 2, "hq": 4, "m": 9, "n": 13, "d": 16, "dv": 5, "score": "bilinear"}
BILINEAR = {
    "shared": Case("shared", **WIDE, parameter="dc", dk=24),
    "heads": Case("heads", **WIDE, hkv=2, parameter="hdc", dk=16, scale_tensor="h", causal=True, alignment="top_left"),
    "ragged": Case("ragged", **WIDE | {"b": 3}, lengths=((4, 5), (0, 3), (9, 13)), parameter="hdc", dk=16),
}


@pytest.mark.parametrize("backend", ("triton", "tiled"))
@pytest.mark.parametrize("name", BILINEAR)
def test_bilinear_products_beyond_float16(name: str, backend: str) -> None:
    """q . w does not fit into float16, and the scores are what they were. The ragged case has rows without keys."""
    available(backend)
    inputs = testing.make_inputs(BILINEAR[name], torch.float16)
    with torch.no_grad():
        for tensors in (inputs.tensors, inputs.clean):
            for x, factor in (("q", 2.0**7), ("parameter", 2.0**10), ("k", 2.0**-17)):
                tensors[x] *= factor
        inputs.dout.mul_(2.0**-7)  # dk is as large as q . w
    products = inputs.tensors["q"].double() @ inputs.tensors["parameter"].double()
    assert products.abs().max() > 2 * torch.finfo(torch.float16).max
    testing.compare(inputs, testing.run_public(inputs, backend), testing.expect(inputs), name)


@pytest.mark.parametrize("score", ("bilinear", "cosine"))
@pytest.mark.parametrize("dtype", TYPES[1:], ids=str)
@pytest.mark.parametrize("backend", (None, "tiled"))
def test_tiled_rounds_no_rewritten_vector(backend: str | None, dtype: torch.dtype, score: str) -> None:
    """At most twice the error of the reference, which rounds nothing but the output."""
    q, k, v = (randn(1, 2, 32, 64, seed=i).to(dtype) for i in range(3))
    parameter = randn(64, 64, seed=3).to(dtype) if score == "bilinear" else torch.tensor(40.0)
    make = scores.Bilinear if score == "bilinear" else scores.Cosine
    exact = attention(q.double(), k.double(), v.double(), score=make(parameter.double()), backend="reference")
    ours, reference = (
        (attention(q, k, v, score=make(parameter), backend=x) - exact).abs().max() for x in (backend, "reference")
    )
    assert ours <= 2 * reference
    assert attention(q, k, v, score=make(parameter), backend=backend).dtype == dtype


def test_examples() -> None:
    assert doctest.testmod(scores, raise_on_error=True).attempted >= 14
