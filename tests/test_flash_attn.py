"""flash-attn's door: every function means what its documentation says, by a small oracle written from nothing else."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn import testing
from fused_attn.compat import bert_padding
from fused_attn.compat import flash_attn as door

HEADS, KV_HEADS, DIM = 4, 2, 8

DENSE = ["dropout_p=0.0", "softmax_scale=None", "causal=False", "window_size=(-1, -1)", "softcap=0.0",
         "alibi_slopes=None", "deterministic=False", "return_attn_probs=False"]  # fmt: skip
SIGNATURES = {
    "flash_attn_func": ["q", "k", "v", *DENSE],
    "flash_attn_kvpacked_func": ["q", "kv", *DENSE],
    "flash_attn_qkvpacked_func": ["qkv", *DENSE],
}


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float32)


def within_budget(name: str, ours: Tensor, oracle: Tensor, plain: Tensor) -> None:
    """The tolerance rule, with the answer's own size as the size of its terms."""
    finite = torch.where(oracle.isfinite(), oracle.abs(), 0.0)
    size = finite.amax().expand_as(oracle) if oracle.numel() else finite
    testing.assert_within_budget(name, ours, oracle, plain, size, torch.float32)


# --- the oracle


def documented(q: Tensor, k: Tensor, v: Tensor, words: dict[str, Any], slopes: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out (Sq, H, D), lse (Sq, H)) of one sequence, in the dtype of its tensors."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scale, cap = words.get("softmax_scale"), words.get("softcap", 0.0)
    left, right = words.get("window_size", (-1, -1))
    s = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    s = cap * torch.tanh(s / cap) if cap > 0 else s
    place = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
    key = torch.arange(k.shape[0])
    seen = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool)
    if words.get("causal", False):
        seen = seen & (key <= place)
    if left >= 0:
        seen = seen & (key >= place - left)
    if right >= 0:
        seen = seen & (key <= place + right)
    if slopes is not None:
        s = s - slopes.to(s.dtype)[:, None, None] * (place - key).abs()
    weights = torch.where(seen, torch.exp(s), 0.0)  # scores here are small; no largest one is taken off
    total = weights.sum(-1)
    some = torch.where(total > 0, total, 1.0)
    out = torch.einsum("hqk,khd->qhd", weights / some[..., None], v)
    return out, torch.where(total > 0, some.log(), -torch.inf).T


def of_batch(lengths: list[tuple[int, int]], words: dict[str, Any]) -> Callable:
    """The oracle of packed q, k, v: one sequence after another."""
    rows, cols = ([x[side] for x in lengths] for side in (0, 1))

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        slopes = words.get("alibi_slopes")
        own = [slopes[b] if slopes is not None and slopes.ndim == 2 else slopes for b in range(len(lengths))]
        parts = zip(q.split(rows), k.split(cols), v.split(cols), own, strict=True)
        outs, lses = zip(*(documented(a, b, c, words, s) for a, b, c, s in parts), strict=True)
        return torch.cat(outs), torch.cat(lses)

    return run


# --- the functions, all as functions of packed q, k and v


def dense(name: str) -> Callable:
    """A function over (B, S, ...), of packed tensors whose sequences have one length."""

    def prepare(lengths: list[tuple[int, int]], words: dict[str, Any]) -> Callable:
        b = len(lengths)

        def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            q, k, v = (x.unflatten(0, (b, -1)) for x in (q, k, v))
            given = {
                "flash_attn_func": lambda: (q, k, v),
                "flash_attn_kvpacked_func": lambda: (q, torch.stack((k, v), 2)),
                "flash_attn_qkvpacked_func": lambda: (torch.stack((q, k, v), 2),),
            }[name]()
            out, lse, weights = getattr(door, name)(*given, **words, return_attn_probs=True)
            assert weights is None
            assert torch.equal(out, getattr(door, name)(*given, **words))
            assert lse.shape == (b, q.shape[2], q.shape[1])
            return out.flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)

        return run

    return prepare


def check(prepare: Callable, lengths: list[tuple[int, int]], words: dict[str, Any], kv_heads: int = KV_HEADS) -> None:
    """out, lse and every gradient of a function of packed tensors, held to the budget."""
    torch.manual_seed(0)
    tokens, keys = (sum(x[side] for x in lengths) for side in (0, 1))
    leaves = [randn(tokens, HEADS, DIM), randn(keys, kv_heads, DIM), randn(keys, kv_heads, DIM)]
    dout, dlse = randn(tokens, HEADS, DIM), randn(tokens, HEADS)

    def run(function: Callable, dtype: torch.dtype) -> list[Tensor]:
        own = [x.to(dtype).requires_grad_() for x in leaves]
        out, lse = function(*own)
        found = torch.where(lse.isfinite(), lse, 0.0)
        grads = torch.autograd.grad((out * dout.to(dtype)).sum() + (found * dlse.to(dtype)).sum(), own)
        return [out.detach(), lse.detach(), *grads]

    oracle, plain = (run(of_batch(lengths, words), dtype) for dtype in (torch.float64, torch.float32))
    ours = run(prepare(lengths, words), torch.float32)
    for name, *columns in zip(("out", "lse", "dq", "dk", "dv"), ours, oracle, plain, strict=True):
        within_budget(name, *columns)
    blind = oracle[1] == -torch.inf
    assert torch.equal(ours[0][blind], torch.zeros_like(ours[0][blind]))


WORDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"softmax_scale": 0.7},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "left": {"window_size": (3, -1)},
    "right": {"window_size": (-1, 0)},
    "causal-window": {"causal": True, "window_size": (2, 4)},
    "softcap": {"softcap": 0.8},
    "no-softcap": {"softcap": -1.0},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 1.0])},
    "all": {
        "causal": True, "window_size": (4, 0), "softcap": 1.5, "softmax_scale": 0.6, "deterministic": True,
        "alibi_slopes": torch.tensor([[0.5, 0.25, 0.125, 1.0], [0.3, 0.2, 0.1, 0.0]]),
    },
}  # fmt: skip
LENGTHS = {"more keys": [(7, 13)] * 2, "more queries": [(13, 7)] * 2, "alike": [(9, 9)] * 2}
PACKED = [("flash_attn_func", KV_HEADS), ("flash_attn_kvpacked_func", KV_HEADS), ("flash_attn_qkvpacked_func", HEADS)]


@pytest.fixture(params=["tiled", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The functions take no backend; the environment names it."""
    monkeypatch.setenv("FUSED_ATTN_BACKEND", request.param)
    yield request.param


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("words", WORDS)
def test_dense(backend: str, words: str, lengths: str) -> None:
    check(dense("flash_attn_func"), LENGTHS[lengths], WORDS[words])


@pytest.mark.parametrize("words", ["plain", "all"])
@pytest.mark.parametrize(("name", "kv_heads"), PACKED)
def test_packed(backend: str, name: str, kv_heads: int, words: str) -> None:
    check(dense(name), LENGTHS["alike"], WORDS[words], kv_heads)


def test_documented_masks() -> None:
    """The two pictures of flash-attn's documentation, read off by values that are one-hot."""
    pictures = {(2, 5): [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], (5, 2): [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]}
    for (m, n), picture in pictures.items():
        q, k, v = torch.zeros(1, m, 1, 8), torch.zeros(1, n, 1, 8), torch.eye(n, 8)[None, :, None]
        seen = door.flash_attn_func(q, k, v, causal=True)[0, :, 0, :n] > 0
        assert seen.long().tolist() == picture


# --- what all of them share


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    parameters = inspect.signature(getattr(door, name)).parameters.values()
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    shown = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    assert shown == SIGNATURES[name]


def test_all_is_said() -> None:
    assert set(door.__all__) == set(SIGNATURES)


def test_half_precision_and_wider_inputs() -> None:
    """bfloat16, and what flash-attn refuses: float32, a head dim of its own for v."""
    q, k, v = (torch.randn(1, 5, 2, d, dtype=torch.bfloat16) for d in (24, 24, 40))
    out: Any = door.flash_attn_func(q, k, v)
    assert out.shape == (1, 5, 2, 40)
    assert out.dtype == torch.bfloat16


def test_dropout() -> None:
    """Seeded by the default generator; a share p of the weights goes, and the others grow."""
    q, k, v = (
        torch.zeros(1, 32, 2, 16),
        torch.zeros(1, 16, 2, 16),
        torch.eye(16).expand(2, 16, 16).transpose(0, 1)[None],
    )

    def run() -> Tensor:
        torch.manual_seed(3)
        return door.flash_attn_func(q, k, v, dropout_p=0.25)

    weights = run()
    assert torch.equal(weights, run())
    kept = weights > 0
    assert abs(kept.double().mean().item() - 0.75) < 5 * (0.25 * 0.75 / kept.numel()) ** 0.5
    within_budget("kept", weights[kept], torch.full_like(weights[kept], 1 / 12).double(),
                  torch.full_like(weights[kept], 1 / 16) / 0.75)  # fmt: skip


def test_errors() -> None:
    q = randn(1, 5, 2, 8)
    with pytest.raises(NotImplementedError, match=r"return_attn_probs.*dropout_p = 0\.5"):
        door.flash_attn_func(q, q, q, dropout_p=0.5, return_attn_probs=True)
    with pytest.raises(TypeError, match="window_size: expected a pair"):
        door.flash_attn_func(q, q, q, window_size=3)
    with pytest.raises(TypeError, match="window_size: expected ints"):
        door.flash_attn_func(q, q, q, window_size=(None, 0))
    with pytest.raises(ValueError, match=r"qkv: expected shape \(B, S, 3, H, D\).*\(1, 5, 2, 8\)"):
        door.flash_attn_qkvpacked_func(q)
    with pytest.raises(ValueError, match=r"kv: expected shape \(B, S, 2, H, D\)"):
        door.flash_attn_kvpacked_func(q, randn(1, 5, 3, 2, 8))
    with pytest.raises(ValueError, match="k: 2 key-value heads do not divide"):
        door.flash_attn_func(randn(1, 5, 3, 8), q, q)


@pytest.mark.parametrize("room", [door, bert_padding], ids=lambda room: room.__name__)
def test_examples(room: Any) -> None:
    assert doctest.testmod(room, raise_on_error=True).attempted >= len(room.__all__)


# --- bert_padding


def test_unpad_and_pad() -> None:
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    unused = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    x = randn(3, 4, 2, 5).requires_grad_()
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
    dback = randn(3, 4, 2, 5)
    (dx,) = torch.autograd.grad(back, x, dback)
    assert torch.equal(dx, dback * mask[..., None, None])


def test_padding_of_nothing() -> None:
    packed, indices, starts, longest, used = bert_padding.unpad_input(randn(0, 4, 2), torch.zeros(0, 4))
    assert (packed.shape, indices.shape, starts.tolist(), longest, used.shape) == ((0, 2), (0,), [0], 0, (0,))
    assert bert_padding.pad_input(packed, indices, 0, 4).shape == (0, 4, 2)
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(2, 4\)"):
        bert_padding.unpad_input(randn(2, 4, 2), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"unused_mask: expected shape \(2, 4\)"):
        bert_padding.unpad_input(randn(2, 4, 2), torch.zeros(2, 4), torch.zeros(2, 3))
