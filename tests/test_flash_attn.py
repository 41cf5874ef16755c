"""flash-attn's door: every function means what its documentation says, by a small oracle written from nothing else."""

from __future__ import annotations

import doctest
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn.compat import bert_padding
from fused_attn.compat import flash_attn as door
from tests.layers import within_budget

HEADS, KV_HEADS, DIM = 4, 2, 8

WORDS_SAID = ["dropout_p=0.0", "softmax_scale=None", "causal=False", "window_size=(-1, -1)", "softcap=0.0",
         "alibi_slopes=None", "deterministic=False", "return_attn_probs=False"]  # fmt: skip
STARTS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
SIGNATURES: dict[str, list[str]] = {
    "flash_attn_func": ["q", "k", "v", *WORDS_SAID],
    "flash_attn_kvpacked_func": ["q", "kv", *WORDS_SAID],
    "flash_attn_qkvpacked_func": ["qkv", *WORDS_SAID],
    "flash_attn_varlen_func": ["q", "k", "v", *STARTS, *WORDS_SAID, "block_table=None"],
    "flash_attn_varlen_kvpacked_func": ["q", "kv", *STARTS, *WORDS_SAID],
    "flash_attn_varlen_qkvpacked_func": ["qkv", "cu_seqlens", "max_seqlen", *WORDS_SAID],
    "flash_attn_with_kvcache": [
        "q", "k_cache", "v_cache", "k=None", "v=None", "rotary_cos=None", "rotary_sin=None", "cache_seqlens=None",
        "cache_batch_idx=None", "cache_leftpad=None", "block_table=None", "softmax_scale=None", "causal=False",
        "window_size=(-1, -1)", "softcap=0.0", "rotary_interleaved=True", "alibi_slopes=None", "num_splits=0",
        "return_softmax_lse=False",
    ],
}  # fmt: skip


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
            out, lse, weights = getattr(door, name)(*given, **words, return_attn_probs=True)
            assert weights is None
            assert torch.equal(out, getattr(door, name)(*given, **words))
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


@pytest.mark.parametrize("words", WORDS)
def test_varlen(backend: str, words: str) -> None:
    check(varlen("flash_attn_varlen_func"), RAGGED, WORDS[words])


@pytest.mark.parametrize("words", ["plain", "all"])
@pytest.mark.parametrize(("name", "kv_heads"), [(name.replace("attn_", "attn_varlen_"), h) for name, h in PACKED])
def test_varlen_packed(backend: str, name: str, kv_heads: int, words: str) -> None:
    check(varlen(name), [(5, 5), (0, 0), (1, 1), (7, 7)], WORDS[words], kv_heads)


def test_on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("FUSED_ATTN_BACKEND", "triton")
    check(dense("flash_attn_func"), LENGTHS["more queries"], WORDS["all"])
    check(varlen("flash_attn_varlen_func"), RAGGED, WORDS["all"])


def test_varlen_lengths_need_not_be_ints() -> None:
    """Transformers hands over what it read off a tensor as a tensor."""
    q, starts = torch.randn(7, 2, 8), starts_of([3, 4])
    expected = door.flash_attn_varlen_func(q, q, q, starts, starts, 4, 4, causal=True)
    longest = starts.diff().max()
    assert torch.equal(door.flash_attn_varlen_func(q, q, q, starts, starts, longest, longest, causal=True), expected)


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


@pytest.mark.parametrize("words", ["plain", "causal", "window", "all"])
def test_varlen_over_pages(backend: str, words: str) -> None:
    rows, cols = ([x[side] for x in RAGGED] for side in (0, 1))
    q, k, v = (
        torch.randn(sum(rows), HEADS, DIM),
        torch.randn(sum(cols), KV_HEADS, DIM),
        torch.randn(sum(cols), KV_HEADS, DIM),
    )
    torch.manual_seed(1)
    k_pages, table = paged(k, cols, 4)
    torch.manual_seed(1)
    v_pages, _ = paged(v, cols, 4)
    where = starts_of(rows), starts_of(cols), torch.tensor(max(rows)), max(cols)
    out, lse, _ = door.flash_attn_varlen_func(
        q, k_pages, v_pages, *where, **WORDS[words], return_attn_probs=True, block_table=table
    )
    oracle = of_batch(RAGGED, WORDS[words])
    exact, plain = oracle(q.double(), k.double(), v.double()), oracle(q, k, v)
    within_budget("out", out, exact[0], plain[0])
    within_budget("lse", lse.T, exact[1], plain[1])


# --- with a cache


def turned(x: Tensor, places: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (S, H, D), each row's pairs of dims turned by the angles of its place."""
    half = cos.shape[1]
    c, s = (y.to(x.dtype)[places][:, None] for y in (cos, sin))
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    )
    a, b = x[..., first], x[..., second]
    found = x.clone()
    found[..., first], found[..., second] = a * c - b * s, a * s + b * c
    return found


CACHE_WORDS = {name: WORDS[name] for name in ("plain", "causal", "window", "all")}
CACHES = {
    "read": {},
    "append": {"new": 3},
    "rotary": {"new": 3, "interleaved": True},
    "neox": {"new": 3, "interleaved": False},
    "rows": {"new": 3, "rows": [4, 0, 2]},
    "leftpad": {"leftpad": [2, 0, 3]},
    "leftpad-rotary": {"new": 3, "interleaved": True, "leftpad": [2, 0, 3]},
    "pages": {"page": 4},
    "pages-append": {"new": 3, "interleaved": False, "page": 4},
}  # fmt: skip


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("words", CACHE_WORDS)
def test_kvcache(backend: str, words: str, cache: str) -> None:
    given, said = CACHES[cache], dict(CACHE_WORDS[words])
    said.pop("deterministic", None)
    torch.manual_seed(0)
    b, m, room, before = 3, 3, 20, [9, 6, 12]
    rows, new = given.get("rows", list(range(b))), given.get("new", 0)
    q, k, v = torch.randn(b, m, HEADS, DIM), torch.randn(b, new, KV_HEADS, DIM), torch.randn(b, new, KV_HEADS, DIM)
    caches = [torch.randn(5, room, KV_HEADS, DIM) for _ in range(2)]
    angles = torch.randn(room + new, 3)
    cos, sin = angles.cos(), angles.sin()
    options: dict[str, Any] = {"cache_seqlens": torch.tensor(before, dtype=torch.int32), **said}
    if "alibi_slopes" in said:
        options["alibi_slopes"] = said["alibi_slopes"] = said["alibi_slopes"][:b]
    if new:
        options |= {"k": k, "v": v}
    if "interleaved" in given:
        options |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": given["interleaved"]}
    if "rows" in given:
        options["cache_batch_idx"] = torch.tensor(rows, dtype=torch.int32)
    if "leftpad" in given:
        options["cache_leftpad"] = torch.tensor(given["leftpad"], dtype=torch.int32)
    held = [x[:b].clone() for x in caches] if "rows" not in given else [x.clone() for x in caches]
    if "page" in given:
        order = torch.randperm(b * room // given["page"])
        options["block_table"] = order.argsort().view(b, -1).int()
        held = [x.unflatten(1, (-1, given["page"])).flatten(0, 1)[order] for x in held]

    def contents() -> list[Tensor]:
        if "page" in given:
            return [x[options["block_table"].long()].flatten(1, 2) for x in held]
        return held

    out, lse = door.flash_attn_with_kvcache(q, *held, **options, return_softmax_lse=True)

    moves = said.get("causal", False) or said.get("window_size", (-1, -1)) != (-1, -1)

    def oracle(dtype: torch.dtype, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """out, lse and the keys of one sequence."""
        mine, fresh = q[i].to(dtype), k[i].to(dtype)
        if "interleaved" in given:
            mine = turned(mine, before[i] + torch.arange(m) * moves, cos, sin, given["interleaved"])
            fresh = turned(fresh, before[i] + torch.arange(new), cos, sin, given["interleaved"])
        old_k, old_v = (x[rows[i], given.get("leftpad", [0] * b)[i] : before[i]].to(dtype) for x in caches)
        slopes = said.get("alibi_slopes")
        keys, values = torch.cat((old_k, fresh)), torch.cat((old_v, v[i].to(dtype)))
        return *documented(mine, keys, values, said, None if slopes is None else slopes[i]), fresh

    for i in range(b):
        exact, plain = oracle(torch.float64, i), oracle(torch.float32, i)
        within_budget("out", out[i], exact[0], plain[0])
        within_budget("lse", lse[i].T, exact[1], plain[1])
        after = contents()
        written = slice(before[i], before[i] + new)
        within_budget("keys", after[0][rows[i], written], exact[2], plain[2])
        assert torch.equal(after[1][rows[i], written], v[i])
        for x, original in zip(after, caches, strict=True):
            assert torch.equal(x[rows[i], : before[i]], original[rows[i], : before[i]])
            assert torch.equal(x[rows[i], before[i] + new :], original[rows[i], before[i] + new :])


def test_kvcache_lengths_as_a_number_or_none() -> None:
    q, k, v = torch.randn(2, 1, HEADS, DIM), torch.randn(2, 9, KV_HEADS, DIM), torch.randn(2, 9, KV_HEADS, DIM)
    full = door.flash_attn_with_kvcache(q, k, v)
    assert torch.equal(full, door.flash_attn_with_kvcache(q, k, v, cache_seqlens=9))
    six = door.flash_attn_with_kvcache(q, k, v, cache_seqlens=6)
    assert torch.equal(six, door.flash_attn_with_kvcache(q, k[:, :6], v[:, :6]))
    split = door.flash_attn_with_kvcache(q, k, v, num_splits=2)
    within_budget("split", split, door.flash_attn_with_kvcache(q.double(), k.double(), v.double()), full)


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


def test_dropout_of_packed_sequences() -> None:
    """The same as of a batch of them."""
    x = torch.randn(2, 9, 4, 8)
    starts = starts_of([9, 9])

    def batch(dtype: torch.dtype) -> Tensor:
        torch.manual_seed(5)
        return door.flash_attn_func(*(x.to(dtype),) * 3, dropout_p=0.5, causal=True).flatten(0, 1)

    torch.manual_seed(5)
    packed = door.flash_attn_varlen_func(*(x.flatten(0, 1),) * 3, starts, starts, 9, 9, dropout_p=0.5, causal=True)
    within_budget("packed", packed, batch(torch.float64), batch(torch.float32))


def test_what_changes_no_value_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    for name in ("attention", "attention_varlen", "attention_decode"):
        monkeypatch.setattr(door, name, lambda *args, **words: given.append(words))
    q, starts = torch.randn(1, 5, 2, 8), starts_of([5])
    for asked in (False, True):
        door.flash_attn_func(q, q, q, deterministic=asked)
        door.flash_attn_varlen_func(q[0], q[0], q[0], starts, starts, 5, 4, deterministic=asked)
        assert [x["deterministic"] for x in given] == [asked, asked]
        assert (given[1]["max_seqlen_q"], given[1]["max_seqlen_k"]) == (5, 4)
        given.clear()
    for asked, passed in ((0, None), (1, 1), (3, 3)):
        door.flash_attn_with_kvcache(q, q, q, num_splits=asked)
        assert given.pop()["num_splits"] == passed


def test_errors() -> None:
    q = torch.randn(1, 5, 2, 8)
    with pytest.raises(NotImplementedError, match=r"return_attn_probs.*dropout_p = 0\.5"):
        door.flash_attn_func(q, q, q, dropout_p=0.5, return_attn_probs=True)
    with pytest.raises(TypeError, match="window_size: expected a pair"):
        door.flash_attn_func(q, q, q, window_size=3)
    with pytest.raises(TypeError, match="window_size: expected ints"):
        door.flash_attn_func(q, q, q, window_size=(None, 0))
    with pytest.raises(ValueError, match=r"qkv: expected shape \(B, S, 3, H, D\).*\(1, 5, 2, 8\)"):
        door.flash_attn_qkvpacked_func(q)
    with pytest.raises(ValueError, match=r"kv: expected shape \(B, S, 2, H, D\)"):
        door.flash_attn_kvpacked_func(q, torch.randn(1, 5, 3, 2, 8))
    with pytest.raises(ValueError, match="k: 2 key-value heads do not divide"):
        door.flash_attn_func(torch.randn(1, 5, 3, 8), q, q)


def test_varlen_errors() -> None:
    q, starts = torch.randn(5, 2, 8), starts_of([2, 3])
    with pytest.raises(ValueError, match=r"qkv: expected shape \(T, 3, H, D\)"):
        door.flash_attn_varlen_qkvpacked_func(q, starts, 3)
    with pytest.raises(ValueError, match=r"kv: expected shape \(T, 2, H, D\)"):
        door.flash_attn_varlen_kvpacked_func(q, q, starts, starts, 3, 3)
    with pytest.raises(NotImplementedError, match="return_attn_probs"):
        door.flash_attn_varlen_func(q, q, q, starts, starts, 3, 3, dropout_p=0.1, return_attn_probs=True)
    with pytest.raises(ValueError, match="max_seqlen_q: a sequence is 3 long, got 2"):
        door.flash_attn_varlen_func(q, q, q, starts, starts, 2, 3)
    pages, table = paged(q, [2, 3], 2)
    with pytest.raises(NotImplementedError, match="dropout_p: 0 with block_table"):
        door.flash_attn_varlen_func(q, pages, pages, starts, starts, 3, 3, dropout_p=0.1, block_table=table)
    with pytest.raises(ValueError, match="max_seqlen_q: a sequence is 3 long, got 2"):
        door.flash_attn_varlen_func(q, pages, pages, starts, starts, 2, 3, block_table=table)
    with pytest.raises(ValueError, match=r"cu_seqlens_k: expected cu_seqlens_q's shape \(3,\)"):
        door.flash_attn_varlen_func(q, pages, pages, starts, starts[:2], 3, 3, block_table=table)
    with pytest.raises(TypeError, match="cu_seqlens_q: expected an int32 tensor"):
        door.flash_attn_varlen_func(q, pages, pages, starts.long(), starts, 3, 3, block_table=table)
    with pytest.raises(ValueError, match="grad"):
        door.flash_attn_varlen_func(q.clone().requires_grad_(), pages, pages, starts, starts, 3, 3, block_table=table)


def test_kvcache_errors() -> None:
    q, k = torch.randn(2, 1, 2, 8), torch.randn(2, 9, 2, 8)
    with pytest.raises(ValueError, match="cache_seqlens: with k"):
        door.flash_attn_with_kvcache(q, k, k, q, q)
    with pytest.raises(ValueError, match="rotary_sin: expected with rotary_cos"):
        door.flash_attn_with_kvcache(q, k, k, q, q, rotary_cos=torch.randn(9, 4), cache_seqlens=3)
    with pytest.raises(ValueError, match="rotary_cos: turns k"):
        door.flash_attn_with_kvcache(
            q, k, k, rotary_cos=torch.randn(9, 4), rotary_sin=torch.randn(9, 4), cache_seqlens=3
        )


@pytest.mark.parametrize("room", [door, bert_padding], ids=lambda room: room.__name__)
def test_examples(room: Any) -> None:
    assert doctest.testmod(room, raise_on_error=True).attempted >= len(room.__all__)


# --- bert_padding


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
