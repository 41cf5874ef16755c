"""flash-attn's forward and backward functions without autograd, and S_dmask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn.compat import flash_attn as flash
from tests.compat.flash import DIM, HEADS, KV_HEADS, RAGGED, WORDS, of_batch, paged, starts_of
from tests.parity import within_budget

Passes = Callable[..., Tensor]
PASSES = ("plain", "causal", "window", "alibi", "softcap", "all")


def passed(words: dict[str, Any], dropout_p: float = 0.0) -> dict[str, Any]:
    """The arguments that a pass has instead of a function's."""
    left, right = words.get("window_size", (-1, -1))
    return {
        "dropout_p": dropout_p, "softmax_scale": words.get("softmax_scale", DIM**-0.5),
        "causal": words.get("causal", False), "window_size_left": left, "window_size_right": right,
        "softcap": words.get("softcap", 0.0), "alibi_slopes": words.get("alibi_slopes"),
    }  # fmt: skip


def drawn(b: int = 2, m: int = 7, n: int = 13, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (b, m, HEADS, DIM), (b, n, KV_HEADS, DIM), (b, n, KV_HEADS, DIM), (b, m, HEADS, DIM)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def slopes_of(words: dict[str, Any], b: int) -> dict[str, Any]:
    slopes = words.get("alibi_slopes")
    return words if slopes is None or slopes.ndim == 1 else {**words, "alibi_slopes": slopes[:b]}


@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
@pytest.mark.parametrize("name", PASSES)
def test_dense(name: str, dropout_p: float) -> None:
    """Values, gradients and row sums of both passes are those of the function."""
    words = slopes_of(WORDS[name], 2)
    q, k, v, dout = drawn()
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.manual_seed(1)
    expected, expected_lse, _ = flash.flash_attn_func(*leaves, dropout_p, **words, return_attn_probs=True)
    torch.manual_seed(1)
    own = passed(words, dropout_p)
    out, lse, weights, state = flash._flash_attn_forward(q, k, v, **own, return_softmax=False)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse) and weights.shape == (0,)
    assert state.shape == (2,) and state.dtype == torch.int64
    found = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    delta = flash._flash_attn_backward(dout, q, k, v, out, lse, *found, **own, deterministic=True, rng_state=state)
    for x, y in zip(found, torch.autograd.grad(expected, leaves, dout), strict=True):
        torch.testing.assert_close(x, y)
    assert delta.shape == (2, HEADS, 128) and not delta[..., 7:].any()
    sums = [(dout.to(x) * out.to(x)).sum(-1).transpose(1, 2) for x in (torch.float64, torch.float32)]
    within_budget("delta", delta[..., :7], *sums)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_parts_of_the_keys(dtype: torch.dtype) -> None:
    """As a ring does: forward over each part, merged; backward over each part with the merged out and lse."""
    q, k, v, dout = drawn(n=12, dtype=dtype)
    own = passed({})

    def whole(kind: torch.dtype) -> list[Tensor]:
        leaves = [x.to(kind).requires_grad_() for x in (q, k, v)]
        out, _ = of_batch([(7, 12)] * 2, {})(*(x.flatten(0, 1) for x in leaves))
        out = out.unflatten(0, (2, 7))
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(kind))]

    parts = [(k[:, i : i + 4], v[:, i : i + 4]) for i in (0, 4, 8)]
    states = [flash._flash_attn_forward(q, *x, **own, return_softmax=False)[:2] for x in parts]
    lse = torch.stack([x[1] for x in states]).logsumexp(0)
    out = sum((x[1] - lse).exp().transpose(1, 2)[..., None] * x[0] for x in states).to(dtype)
    dq, dk, dv = torch.zeros_like(q), torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
    for i, part in enumerate(parts):
        into = [torch.empty_like(q), *(x[:, 4 * i : 4 * i + 4] for x in (dk, dv))]
        flash._flash_attn_backward(dout, q, *part, out, lse, *into, **own, deterministic=False)
        dq += into[0]
    oracle, plain = whole(torch.float64), whole(dtype)
    for name, *columns in zip(("out", "dq", "dk", "dv"), (out, dq, dk, dv), oracle, plain, strict=True):
        within_budget(name, *columns)


@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
@pytest.mark.parametrize("name", ("plain", "all"))
def test_varlen(name: str, dropout_p: float) -> None:
    words = slopes_of(WORDS[name], len(RAGGED))
    rows, cols = ([x[side] for x in RAGGED] for side in (0, 1))
    q, k, v = torch.randn(sum(rows), HEADS, DIM), *torch.randn(2, sum(cols), KV_HEADS, DIM)
    where, dout = (starts_of(rows), starts_of(cols), max(rows), max(cols)), torch.randn(sum(rows), HEADS, DIM)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.manual_seed(1)
    expected, expected_lse, _ = flash.flash_attn_varlen_func(
        *leaves, *where, dropout_p, **words, return_attn_probs=True
    )
    torch.manual_seed(1)
    own = passed(words, dropout_p)
    out, lse, weights, state = flash._flash_attn_varlen_forward(q, k, v, *where, **own)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse) and weights.shape == (0,)
    found = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    delta = flash._flash_attn_varlen_backward(
        dout, q, k, v, out, lse, *found, *where, **own, deterministic=True, rng_state=state
    )
    for x, y in zip(found, torch.autograd.grad(expected, leaves, dout), strict=True):
        torch.testing.assert_close(x, y)
    assert delta.shape == (HEADS, sum(rows) + 128 * len(rows))
    sums = [(dout.to(x) * out.to(x)).sum(-1).T for x in (torch.float64, torch.float32)]
    for b, start in enumerate(where[0][:-1].tolist()):
        at = start + 128 * b
        own_rows = slice(start, start + rows[b])
        within_budget("delta", delta[:, at : at + rows[b]], *(x[:, own_rows] for x in sums))
        assert not delta[:, at + rows[b] : at + rows[b] + 128].any()


def test_leftpad_and_seqused() -> None:
    """leftpad_k and seqused_k, of packed keys, and seqused_k of pages."""
    q, k, v = torch.randn(5, HEADS, DIM), *torch.randn(2, 12, KV_HEADS, DIM)
    starts, ends = starts_of([2, 0, 3]), [(0, 4), (4, 5), (5, 12)]
    first, used = torch.tensor([1, 0, 2]).int(), torch.tensor([4, 0, 5]).int()
    where = starts, starts_of([4, 1, 7])
    own = passed({"causal": True})
    left = [slice(a + f, a + n) for (a, _), f, n in zip(ends, first.tolist(), used.tolist(), strict=True)]
    keys, values = (torch.cat([x[part] for part in left]) for x in (k, v))
    expected = flash._flash_attn_varlen_forward(q, keys, values, starts, starts_of([3, 0, 3]), 3, 3, **own)
    found = flash._flash_attn_varlen_forward(q, k, v, *where, 3, 7, **own, leftpad_k=first, seqused_k=used)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    torch.manual_seed(2)
    pages, table = paged(k, [4, 1, 7], 2)
    torch.manual_seed(2)
    value_pages, _ = paged(v, [4, 1, 7], 2)
    found = flash._flash_attn_varlen_forward(
        q, pages, value_pages, *where, 3, 7, **own, block_table=table, leftpad_k=first, seqused_k=used
    )
    torch.testing.assert_close(found[0], expected[0])
    with pytest.raises(ValueError, match="seqused_k: expected 0 <= seqused_k <= 4, the keys of sequence 0, got 5"):
        flash._flash_attn_varlen_forward(q, k, v, *where, 3, 7, **own, seqused_k=used + 1)
    with pytest.raises(RuntimeError, match="num_splits > 1 is not supported for packed queries, got 2"):
        flash._flash_attn_varlen_forward(q, k, v, *where, 3, 7, **own, num_splits=2)
    with pytest.raises(TypeError, match="leftpad_k: expected an integer tensor"):
        flash._flash_attn_varlen_forward(q, k, v, *where, 3, 7, **own, leftpad_k=first.float())


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int64))
@pytest.mark.parametrize("paged_keys", (False, True))
def test_starts_and_lengths_are_integers_of_any_width(dtype: torch.dtype, paged_keys: bool) -> None:
    """Of more rows than the narrowest type counts."""
    torch.manual_seed(0)
    q, x = torch.randn(250, HEADS, DIM), torch.randn(250, KV_HEADS, DIM)
    starts, table = starts_of([100, 0, 150]), None
    used = torch.tensor([60, 0, 150]).int()
    if paged_keys:
        x, table = paged(x, [100, 0, 150], 16)

    def run(cast: Callable[[Tensor], Tensor]) -> Tensor:
        own = passed({"causal": True})
        where = {"block_table": None if table is None else cast(table), "seqused_k": cast(used)}
        return flash._flash_attn_varlen_forward(q, x, x, cast(starts), cast(starts), 150, 150, **own, **where)[0]

    assert torch.equal(run(lambda x: x.to(dtype)), run(lambda x: x))


def test_fully_masked_rows() -> None:
    q, k, v, dout = drawn(m=13, n=7)
    own = passed({"causal": True})
    out, lse, *_ = flash._flash_attn_forward(q, k, v, **own, return_softmax=False)
    assert (lse[..., :6] == -torch.inf).all() and not out[:, :6].any()
    for given in (lse, lse.masked_fill(lse == -torch.inf, torch.inf)):  # flash-attn's own kernels write +inf
        dq = torch.full_like(q, torch.nan)
        flash._flash_attn_backward(dout, q, k, v, out, given, dq, None, None, **own, deterministic=True)
        assert not dq[:, :6].any() and dq.isfinite().all() and dq[:, 6:].any()


def test_passes_have_no_derivative() -> None:
    q, k, v, dout = drawn()
    out, lse, weights, _ = flash._flash_attn_forward(q.requires_grad_(), k, v, **passed({}), return_softmax=True)
    for x in (out, lse, weights):
        with pytest.raises(NotImplementedError, match=r"_flash_attn_forward: .* call flash_attn_func"):
            x.sum().backward()
    with pytest.raises(ValueError, match=r"rng_state: with dropout expected the int64 \(2,\) of the forward, got None"):
        flash._flash_attn_backward(dout, q, k, v, out, lse, q, k, v, **passed({}, 0.1), deterministic=True)


# --- S_dmask


def weighted(equation: str, weights: Tensor, values: Tensor, p: float) -> list[Tensor]:
    """Values weighted by those of S_dmask's weights that dropout keeps, in float64 and in float32."""
    kept = weights.relu() / (1 - p)
    return [torch.einsum(equation, kept.to(x), values.to(x)) for x in (torch.float64, torch.float32)]


@pytest.mark.parametrize("name", PASSES)
def test_dropped_weights(name: str) -> None:
    """Of a dense batch and of packed sequences: out is made of exactly the weights that S_dmask says are kept."""
    words, p = slopes_of(WORDS[name], 2), 0.4
    q, k, v, _ = drawn()
    torch.manual_seed(3)
    out, _, weights = flash.flash_attn_func(q, k, v, p, **words, return_attn_probs=True)
    assert weights.shape == (2, HEADS, 7, 13) and weights.dtype == q.dtype
    values = v.repeat_interleave(HEADS // KV_HEADS, 2)
    within_budget("out", out, *weighted("bhqk,bkhd->bqhd", weights, values, p))
    # Without dropout they sum to one, and they are what flash_attn_func weighs values by.
    one_hot = torch.eye(13).expand(2, KV_HEADS, 13, 13).transpose(1, 2)
    exact = flash.flash_attn_func(q, k, one_hot, **words).transpose(1, 2)
    torch.testing.assert_close(weights.abs(), exact)
    kept = weights[exact > 0] > 0
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
    torch.manual_seed(3)
    assert torch.equal(out, flash.flash_attn_func(q, k, v, p, **words))  # asking changes nothing

    starts = starts_of([7, 7]), starts_of([13, 13])
    torch.manual_seed(3)
    packed = (x.flatten(0, 1) for x in (q, k, v))
    _, _, found = flash.flash_attn_varlen_func(*packed, *starts, 7, 13, p, **words, return_attn_probs=True)
    torch.testing.assert_close(found, weights)


@pytest.mark.parametrize("backend", ("tiled", "triton"))
def test_every_backend_drops_the_same(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed or not: out and S_dmask of one seed are the reference's, and the same weights are dropped."""
    if backend == "triton":
        pytest.importorskip("triton")
    starts, found = (starts_of([7, 7]), starts_of([13, 13]), 7, 13), []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
        q, k, v = (x.to(dtype) for x in drawn()[:3])
        monkeypatch.setenv("FUSED_ATTN_BACKEND", name)
        torch.manual_seed(5)
        out, _, weights = flash.flash_attn_func(q, k, v, 0.4, causal=True, return_attn_probs=True)
        torch.manual_seed(5)
        packed = (x.flatten(0, 1) for x in (q, k, v))
        out_packed, _, own = flash.flash_attn_varlen_func(*packed, *starts, 0.4, causal=True, return_attn_probs=True)
        found.append((out, weights, out_packed.unflatten(0, (2, 7)), own))
    for name, *columns in zip(("out", "S_dmask", "packed out", "packed S_dmask"), *found, strict=True):
        within_budget(name, *columns)
    assert torch.equal(found[0][1].signbit(), found[1][1].signbit())


def test_dropped_weights_of_sequences_of_different_lengths() -> None:
    rows, cols = ([x[side] for x in RAGGED] for side in (0, 1))
    q, k, v = torch.randn(sum(rows), HEADS, DIM), *torch.randn(2, sum(cols), KV_HEADS, DIM)
    where = starts_of(rows), starts_of(cols), torch.tensor(max(rows)), max(cols)
    words = {"causal": True, "alibi_slopes": torch.rand(len(RAGGED), HEADS), "return_attn_probs": True}
    out, _, weights = flash.flash_attn_varlen_func(q, k, v, *where, 0.5, **words)
    assert weights.shape == (len(RAGGED), HEADS, max(rows), max(cols))
    values = v.repeat_interleave(HEADS // KV_HEADS, 1).split(cols)
    for b, (own, found) in enumerate(zip(values, out.split(rows), strict=True)):
        m, n = RAGGED[b]
        within_budget("out", found, *weighted("hqk,khd->qhd", weights[b, :, :m, :n], own, 0.5))
        assert not weights[b, :, m:].any() and not weights[b, :, :, n:].any()
    packed = flash.flash_attn_varlen_kvpacked_func(q, torch.stack((k, v), 1), *where, 0.5, **words)
    assert packed[2].shape == weights.shape


def test_signs_of_weights_that_are_zero() -> None:
    """Half precision loses small weights; their signs still tell."""
    q, k = torch.zeros(1, 64, 1, 8).half(), torch.zeros(1, 32, 1, 8).half()
    slopes = torch.tensor([40.0])
    *_, weights = flash.flash_attn_func(q, k, k, 0.5, alibi_slopes=slopes, return_attn_probs=True)
    hidden = weights == 0
    assert hidden.double().mean() > 0.9 and 0.4 < weights[hidden].signbit().double().mean() < 0.6


def test_return_softmax() -> None:
    q, k, v, _ = drawn()
    words = {"causal": True}
    torch.manual_seed(4)
    *_, expected = flash.flash_attn_func(q, k, v, 0.3, **words, return_attn_probs=True)
    torch.manual_seed(4)
    _, _, weights, _ = flash._flash_attn_forward(q, k, v, **passed(words, 0.3), return_softmax=True)
    assert torch.equal(weights, expected)
    _, _, weights, _ = flash._flash_attn_forward(q, k, v, **passed(words), return_softmax=True)
    assert torch.equal(weights, expected.abs())


def test_backward_through_weights_raises() -> None:
    q, k, v, _ = drawn()
    *_, weights = flash.flash_attn_func(q.requires_grad_(), k, v, 0.3, return_attn_probs=True)
    with pytest.raises(NotImplementedError, match="no derivative"):
        weights.sum().backward()
