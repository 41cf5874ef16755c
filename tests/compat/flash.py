"""An oracle for flash-attn's functions, written from its documentation, and their calls on packed tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_attn.compat import flash_attn as flash
from tests.parity import within_budget

HEADS, KV_HEADS, DIM = 4, 2, 8

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
            out, lse, weights = getattr(flash, name)(*given, **words, return_attn_probs=True)
            assert weights is None
            assert torch.equal(out, getattr(flash, name)(*given, **words))
            assert lse.shape == (b, q.shape[2], q.shape[1])
            return out.flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)

        return run

    return prepare


def starts_of(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def varlen(name: str) -> Callable:
    """A function over packed tensors."""

    def prepare(lengths: list[tuple[int, int]], words: dict[str, Any]) -> Callable:
        rows, cols = ([x[side] for x in lengths] for side in (0, 1))
        where = starts_of(rows), starts_of(cols), max(rows), max(cols)

        def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            given = {
                "flash_attn_varlen_func": lambda: (q, k, v, *where),
                "flash_attn_varlen_kvpacked_func": lambda: (q, torch.stack((k, v), 1), *where),
                "flash_attn_varlen_qkvpacked_func": lambda: (torch.stack((q, k, v), 1), where[0], where[2]),
            }[name]()
            out, lse, weights = getattr(flash, name)(*given, **words, return_attn_probs=True)
            assert weights is None
            assert torch.equal(out, getattr(flash, name)(*given, **words))
            assert lse.shape == (q.shape[1], q.shape[0])
            return out, lse.T

        return run

    return prepare


def check(prepare: Callable, lengths: list[tuple[int, int]], words: dict[str, Any], kv_heads: int = KV_HEADS) -> None:
    """out, lse and every gradient of a function of packed tensors, held to the budget."""
    torch.manual_seed(0)
    slopes = words.get("alibi_slopes")
    if slopes is not None and slopes.ndim == 2:
        words = {**words, "alibi_slopes": slopes[: len(lengths)]}
    tokens, keys = (sum(x[side] for x in lengths) for side in (0, 1))
    leaves = [torch.randn(tokens, HEADS, DIM), torch.randn(keys, kv_heads, DIM), torch.randn(keys, kv_heads, DIM)]
    dout, dlse = torch.randn(tokens, HEADS, DIM), torch.randn(tokens, HEADS)

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
        "alibi_slopes": torch.linspace(0, 1, 20).view(5, 4),
    },
}  # fmt: skip
RAGGED = [(5, 9), (0, 3), (1, 0), (7, 7), (6, 2)]
LENGTHS = {"more keys": [(7, 13)] * 2, "more queries": [(13, 7)] * 2, "alike": [(9, 9)] * 2}
PACKED = [("flash_attn_func", KV_HEADS), ("flash_attn_kvpacked_func", KV_HEADS), ("flash_attn_qkvpacked_func", HEADS)]


def paged(x: Tensor, lengths: Sequence[int], page: int) -> tuple[Tensor, Tensor]:
    """Packed (T, ...) scattered over pages (P, page, ...) of NaN, in no order, and the table of the pages."""
    needed = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(needed) + 2).int()
    pages = torch.full((len(order), page, *x.shape[1:]), torch.nan)
    table = torch.full((len(lengths), max(needed)), -1, dtype=torch.int32)
    for b, (part, first) in enumerate(zip(x.split(list(lengths)), itertools.accumulate([0, *needed]), strict=False)):
        table[b, : needed[b]] = order[first : first + needed[b]]
        for j, row in enumerate(part):
            pages[table[b, j // page], j % page] = row
    return pages, table
