"""flash-attn's functions: signatures, numbers of any type, and the errors of wrong arguments."""

from __future__ import annotations

import doctest
import functools
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version

from fused_attn import BackendError
from fused_attn.compat import bert_padding
from fused_attn.compat import flash_attn as flash
from tests.compat.flash import paged, starts_of

WORDS_SAID = ["dropout_p=0.0", "softmax_scale=None", "causal=False", "window_size=(-1, -1)", "softcap=0.0",
         "alibi_slopes=None", "deterministic=False", "return_attn_probs=False"]  # fmt: skip
STARTS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
PASSED = ["dropout_p", "softmax_scale", "causal", "window_size_left", "window_size_right", "softcap", "alibi_slopes"]
BACK = ["dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv"]
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
    "_flash_attn_forward": ["q", "k", "v", *PASSED, "return_softmax"],
    "_flash_attn_backward": [*BACK, *PASSED, "deterministic", "rng_state=None"],
    "_flash_attn_varlen_forward": [
        "q", "k", "v", *STARTS, *PASSED[:3], "window_size_left=-1", "window_size_right=-1", "softcap=0.0",
        "alibi_slopes=None", "return_softmax=False", "block_table=None", "leftpad_k=None", "seqused_k=None",
        "zero_tensors=False", "num_splits=0",
    ],
    "_flash_attn_varlen_backward": [
        *BACK, *STARTS, *PASSED, "deterministic", "rng_state=None", "zero_tensors=False",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    parameters = inspect.signature(getattr(flash, name)).parameters.values()
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    shown = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    assert shown == SIGNATURES[name]


def test_every_public_function_is_checked() -> None:
    assert set(flash.__all__) == {name for name in SIGNATURES if name[0] != "_"}


def test_deterministic_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    for name in ("attention", "attention_varlen", "attention_decode"):
        monkeypatch.setattr(flash, name, lambda *args, **words: given.append(words) or (None, None))
    q, starts = torch.randn(1, 5, 2, 8), starts_of([5])
    for asked in (False, True):
        flash.flash_attn_func(q, q, q, deterministic=asked)
        flash.flash_attn_varlen_func(q[0], q[0], q[0], starts, starts, 5, 4, deterministic=asked)
        assert [x["deterministic"] for x in given] == [asked, asked]
        assert (given[1]["max_seqlen_q"], given[1]["max_seqlen_k"]) == (5, 4)
        given.clear()
    for asked, passed in ((0, None), (1, 1), (3, 3)):
        flash.flash_attn_with_kvcache(q, q, q, num_splits=asked)
        assert given.pop()["num_splits"] == passed


PAIRS = {
    "list": [3, 1],
    "numpy ints": (np.int8(3), np.uint64(1)),
    "array": np.array([3, 1], dtype=np.uint8),
    "tensor": torch.tensor([3, 1]),
    "0-d tensors": (torch.tensor(3), torch.tensor(1, dtype=torch.int16)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_windows_of_any_kind(pair: str) -> None:
    """flash-attn's own tests give windows as tensors; -1, unbounded, comes in every kind too."""
    q, starts = torch.randn(2, 7, 2, 8), starts_of([7, 7])
    given = PAIRS[pair]
    packed, cache = q.flatten(0, 1), (q.clone(), q.clone())
    for run in (
        lambda w: flash.flash_attn_func(q, q, q, window_size=w),
        lambda w: flash.flash_attn_varlen_func(packed, packed, packed, starts, starts, 7, 7, window_size=w),
        lambda w: flash.flash_attn_with_kvcache(q, *cache, window_size=w),
    ):
        assert torch.equal(run(given), run((3, 1)))
    left = flash.flash_attn_func(q, q, q, window_size=type(given)([-1, 1]) if pair == "list" else torch.tensor([-1, 1]))
    assert torch.equal(left, flash.flash_attn_func(q, q, q, window_size=(-1, 1)))


ELSEWHERE = "flash-attn has none; fused_attn.attention takes mask=, bias=, sink="
HINTS = [
    ("is_causal", "here it is causal="),
    ("dropout", "here it is dropout_p="),
    ("scale", "here it is softmax_scale="),
    ("sm_scale", "here it is softmax_scale="),
    ("window", r"here it is window_size=\(left, right\), where -1 is unbounded"),
    ("return_lse", "here it is return_attn_probs=, which returns the log-sum-exp too"),
    ("attn_mask", ELSEWHERE),
    ("sink", ELSEWHERE),
    ("windowsize", "did you mean window_size="),
    ("cu_seqlens", "flash_attn_varlen_func takes packed sequences"),
    ("enable_gqa", "grouped heads need no keyword"),
    ("temperature", ""),
]
CACHE_HINTS = [
    ("page_table", "here it is block_table="),
    ("k_new", "here it is k="),
    ("rotary", "here it is rotary_cos=, rotary_sin= and rotary_interleaved="),
    ("return_attn_probs", "here it is return_softmax_lse="),
    ("return_lse", "did you mean return_softmax_lse="),
    ("scale", "here it is softmax_scale="),
    ("temperature", ""),
]
X = torch.zeros(1, 4, 2, 8)
CALLS: dict[str, tuple[Any, list[tuple[str, str]]]] = {
    "flash_attn_func": (lambda **words: flash.flash_attn_func(X, X, X, **words), HINTS),
    "flash_attn_qkvpacked_func": (lambda **words: flash.flash_attn_qkvpacked_func(X[:, :, None], **words), HINTS),
    "flash_attn_with_kvcache": (lambda **words: flash.flash_attn_with_kvcache(X, X, X, **words), CACHE_HINTS),
}


@pytest.mark.parametrize("name", CALLS)
def test_keywords_of_other_libraries(name: str) -> None:
    """The keyword is named as it was given, and the error is both kinds that callers expect."""
    call, hints = CALLS[name]
    for keyword, hint in hints:
        words = rf"^{name}\(\) got an unexpected keyword argument '{keyword}'" + (f"; {hint}" if hint else "$")
        with pytest.raises(TypeError, match=words) as refusal:
            call(**{keyword: None})
        assert isinstance(refusal.value, RuntimeError)


def test_heads_before_rows() -> None:
    """There is no layout to choose here."""
    q, k = torch.zeros(2, 4, 8, 16), torch.zeros(2, 2, 6, 16)
    with pytest.raises(ValueError, match=r"6 key-value heads .*; if dim 1 counts heads, transpose\(1, 2\) q, k and v$"):
        flash.flash_attn_func(q, k, k)


@pytest.mark.parametrize("kind", (np.int8, np.uint16, torch.tensor), ids=lambda kind: kind.__name__)
def test_numbers_of_any_kind(kind: Any) -> None:
    q, starts = torch.randn(7, 2, 8), starts_of([3, 4])
    words = {"softmax_scale": np.float32(0.5), "softcap": np.float16(2), "dropout_p": np.float64(0), "causal": np.True_}
    plain = {"softmax_scale": 0.5, "softcap": 2.0, "causal": True}
    found = flash.flash_attn_varlen_func(q, q, q, starts, starts, kind(4), kind(4), **words)
    assert torch.equal(found, flash.flash_attn_varlen_func(q, q, q, starts, starts, 4, 4, **plain))
    k, v = torch.randn(2, 1, 9, 2, 8)
    new = torch.randn(1, 1, 2, 8)
    found = flash.flash_attn_with_kvcache(q[None, :1], k, v, new, new, cache_seqlens=kind(6), num_splits=kind(0))
    assert torch.equal(k[:, 6], new[:, 0]) and torch.equal(v[:, 6], new[:, 0])
    assert torch.equal(found, flash.flash_attn_with_kvcache(q[None, :1], k, v, cache_seqlens=7))


LEAVES = ("q", "k_cache", "v_cache", "k", "v", "alibi_slopes", "softmax_scale")


@pytest.mark.parametrize("name", LEAVES)
def test_caches_have_no_derivative(name: str) -> None:
    """What requires grad changes no value, and backward through the result says what to call."""
    given = dict(zip(LEAVES, (torch.randn(2, n, 2, 8) for n in (1, 9, 9, 1, 1)), strict=False))
    given |= {"alibi_slopes": torch.rand(2), "softmax_scale": torch.tensor(0.3)}
    expected = flash.flash_attn_with_kvcache(**{x: y.clone() for x, y in given.items()}, cache_seqlens=5)
    given[name].requires_grad_()
    out, lse = flash.flash_attn_with_kvcache(**given, cache_seqlens=5, return_softmax_lse=True)
    assert torch.equal(out, expected)
    for x in (out, lse):
        with pytest.raises(NotImplementedError, match="flash_attn_with_kvcache: its result has no derivative"):
            x.sum().backward()
    assert given[name].grad is None
    with torch.no_grad():
        assert not flash.flash_attn_with_kvcache(**given, cache_seqlens=5).requires_grad


def test_pages_have_no_derivative() -> None:
    q, starts = torch.randn(5, 2, 8, requires_grad=True), starts_of([2, 3])
    pages, table = paged(q.detach(), [2, 3], 2)
    out = flash.flash_attn_varlen_func(q, pages, pages, starts, starts, 3, 3, block_table=table, causal=True)
    plain = flash.flash_attn_varlen_func(q, q.detach(), q.detach(), starts, starts, 3, 3, causal=True)
    torch.testing.assert_close(out, plain)
    with pytest.raises(NotImplementedError, match=r"flash_attn_varlen_func with block_table: .* without block_table"):
        out.sum().backward()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, as it traces
def test_caches_compiled_have_no_derivative() -> None:
    torch._dynamo.reset()
    q, (k, v) = torch.randn(2, 1, 2, 8, requires_grad=True), torch.randn(2, 2, 9, 2, 8)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q: torch.Tensor) -> torch.Tensor:
        return flash.flash_attn_with_kvcache(q.sin(), k, v, cache_seqlens=5, window_size=(3, 0))

    out = step(q)
    torch.testing.assert_close(out, flash.flash_attn_with_kvcache(q.sin(), k, v, cache_seqlens=5, window_size=(3, 0)))
    with pytest.raises(NotImplementedError, match="flash_attn_with_kvcache: its result has no derivative"):
        out.sum().backward()


def test_version() -> None:
    """Libraries compare it with the release that they need; its local part says that this is not that package."""
    assert Version("2.8.0") <= Version(flash.__version__) < Version("2.9") and Version(flash.__version__).local


def test_errors() -> None:
    q = torch.randn(1, 5, 2, 8)
    with pytest.raises(TypeError, match="window_size: expected a pair"):
        flash.flash_attn_func(q, q, q, window_size=3)
    for wrong in ((1.5, 0), (True, 0), torch.tensor([1.0, 0.0]), ("3", "0")):
        with pytest.raises(TypeError, match="window_size: expected two ints, -1 for unbounded, got"):
            flash.flash_attn_func(q, q, q, window_size=wrong)
    for wrong in (torch.tensor([1, 2, 3]), np.array(3), "31", {3, 1}):
        with pytest.raises(TypeError, match="window_size: expected a pair"):
            flash.flash_attn_func(q, q, q, window_size=wrong)
    with pytest.raises(TypeError, match="return_attn_probs: expected a bool, got str 'no'"):
        flash.flash_attn_func(q, q, q, return_attn_probs="no")
    with pytest.raises(TypeError, match="dropout_p: expected a float, got str"):
        flash.flash_attn_func(q, q, q, dropout_p="0.5")
    with pytest.raises(TypeError, match="window_size: expected two ints"):
        flash.flash_attn_func(q, q, q, window_size=(None, 0))
    with pytest.raises(ValueError, match=r"qkv: expected shape \(B, S, 3, H, D\).*\(1, 5, 2, 8\)"):
        flash.flash_attn_qkvpacked_func(q)
    with pytest.raises(ValueError, match=r"kv: expected shape \(B, S, 2, H, D\)"):
        flash.flash_attn_kvpacked_func(q, torch.randn(1, 5, 3, 2, 8))
    with pytest.raises(ValueError, match=r"q: expected 4 dimensions, got shape \(5, 2, 8\); pass q\[None\]$"):
        flash.flash_attn_func(q[0], q, q)
    with pytest.raises(ValueError, match="k: 2 key-value heads do not divide"):
        flash.flash_attn_func(torch.randn(1, 5, 3, 8), q, q)


def test_varlen_errors() -> None:
    q, starts = torch.randn(5, 2, 8), starts_of([2, 3])
    with pytest.raises(ValueError, match=r"qkv: expected shape \(T, 3, H, D\)"):
        flash.flash_attn_varlen_qkvpacked_func(q, starts, 3)
    with pytest.raises(ValueError, match=r"kv: expected shape \(T, 2, H, D\)"):
        flash.flash_attn_varlen_kvpacked_func(q, q, starts, starts, 3, 3)
    with pytest.raises(ValueError, match="max_seqlen_q: a sequence is 3 long, got 2"):
        flash.flash_attn_varlen_func(q, q, q, starts, starts, 2, 3)
    pages, table = paged(q, [2, 3], 2)
    with pytest.raises(NotImplementedError, match="dropout_p: must be 0 with block_table"):
        flash.flash_attn_varlen_func(q, pages, pages, starts, starts, 3, 3, dropout_p=0.1, block_table=table)
    with pytest.raises(ValueError, match="max_seqlen_q: a sequence is 3 long, got 2"):
        flash.flash_attn_varlen_func(q, pages, pages, starts, starts, 2, 3, block_table=table)
    with pytest.raises(ValueError, match=r"cu_seqlens_k: expected cu_seqlens_q's shape \(3,\)"):
        flash.flash_attn_varlen_func(q, pages, pages, starts, starts[:2], 3, 3, block_table=table)
    with pytest.raises(TypeError, match=r"cu_seqlens_q: expected an integer tensor, got torch.float32"):
        flash.flash_attn_varlen_func(q, pages, pages, starts.float(), starts, 3, 3, block_table=table)
    words = {"block_table": table}
    with pytest.raises(ValueError, match="max_seqlen_k: a sequence is 3 long, got 2"):
        flash.flash_attn_varlen_func(q, pages, pages, starts, starts, 3, 2, **words)
    with pytest.raises(TypeError, match=r"cu_seqlens_k: expected an integer tensor, got torch.bool"):
        flash.flash_attn_varlen_func(q, pages, pages, starts, starts > 0, 3, 3, **words)
    with pytest.raises(ValueError, match="cu_seqlens_k: expected q's device cpu, got meta"):
        flash.flash_attn_varlen_func(q, pages, pages, starts, starts.to("meta"), 3, 3, **words)
    with pytest.raises(ValueError, match=r"cu_seqlens_k: .* got one that descends"):
        flash.flash_attn_varlen_func(q, pages, pages, starts, starts.flip(0) - starts[-1], 3, 3, **words)
    with pytest.raises(ValueError, match=r"cache_seqlens: expected 0 <= cache_seqlens <= 4 .* got 6"):
        flash.flash_attn_varlen_func(q, pages, pages, starts, starts * 3, 3, 9, **words)
    with pytest.raises(ValueError, match="max_seqlen_q: a sequence is 3 long, got 2"):
        flash.flash_attn_varlen_func(q, q, q, starts, starts, np.int8(2), 3)
    with pytest.raises(ValueError, match="max_seqlen_k: a sequence is 3 long, got 2"):
        flash.flash_attn_varlen_func(q, q, q, starts, starts, 3, torch.tensor(2))


def test_kvcache_errors() -> None:
    q, k = torch.randn(2, 1, 2, 8), torch.randn(2, 9, 2, 8)
    for said, given in (("float 3.0", 3.0), ("bool True", True), ("list", [3, 3]), ("ndarray", np.array([3, 3]))):
        with pytest.raises(TypeError, match=f"cache_seqlens: expected an integer tensor or an int, got {said}"):
            flash.flash_attn_with_kvcache(q, k, k, cache_seqlens=given)
    with pytest.raises(ValueError, match=r"cache_seqlens: expected 0 <= cache_seqlens <= 9 .*room for 9, got 10"):
        flash.flash_attn_with_kvcache(q, k, k, cache_seqlens=10)
    with pytest.raises(ValueError, match=r"cache_seqlens: expected 0 <= cache_seqlens <= 8 with 1 new keys .* got -1"):
        flash.flash_attn_with_kvcache(q, k, k.clone(), q, q, cache_seqlens=-1)
    with pytest.raises(TypeError, match="return_softmax_lse: expected a bool, got str"):
        flash.flash_attn_with_kvcache(q, v := k.clone(), k.clone(), q, q, cache_seqlens=8, return_softmax_lse="no")
    assert torch.equal(k, v)  # nothing was written
    with pytest.raises(TypeError, match=r"num_splits: expected an int, got float 1.5"):
        flash.flash_attn_with_kvcache(q, k, k, num_splits=1.5)
    with pytest.raises(ValueError, match="cache_seqlens: required with k"):
        flash.flash_attn_with_kvcache(q, k, k, q, q)
    with pytest.raises(ValueError, match="rotary_sin: expected a tensor if and only if"):
        flash.flash_attn_with_kvcache(q, k, k, q, q, rotary_cos=torch.randn(9, 4), cache_seqlens=3)
    with pytest.raises(ValueError, match="rotary_cos: requires k"):
        flash.flash_attn_with_kvcache(
            q, k, k, rotary_cos=torch.randn(9, 4), rotary_sin=torch.randn(9, 4), cache_seqlens=3
        )


@pytest.mark.parametrize("module", [flash, bert_padding], ids=lambda module: module.__name__)
def test_examples(module: Any) -> None:
    assert doctest.testmod(module, raise_on_error=True).attempted >= len(module.__all__)


def test_errors_have_the_types_of_flash_attn() -> None:
    """RuntimeErrors, by the names that arguments have there."""
    q, pages = torch.randn(1, 1, 2, 8), torch.randn(2, 4, 4, 2, 8).unbind()
    table = torch.zeros(1, 1, dtype=torch.int32)
    starts = starts_of([1])
    run = functools.partial(flash.flash_attn_with_kvcache, q, *pages, block_table=table)
    assert run(cache_seqlens=torch.tensor([4], dtype=torch.int32)).shape == q.shape
    wrong: list[tuple[Any, type[Exception], str]] = [
        (lambda: run(cache_seqlens=torch.tensor([5], dtype=torch.int32)), ValueError, "cache_seqlens: .* block_table"),
        (
            lambda: run(q, q, cache_seqlens=torch.tensor([4], dtype=torch.int32)),
            ValueError,
            "1 new keys .* block_table",
        ),
        (lambda: run(cache_seqlens=5), ValueError, "cache_seqlens: .* in the 1 pages of a row of block_table, got 5"),
        (lambda: run(q[0], q[0], cache_seqlens=1), ValueError, r"^k: expected \(B, T, Hkv, D\), got"),
        (lambda: run(q, None, cache_seqlens=1), ValueError, r"^v: expected a tensor beside k, got None"),
        (lambda: flash.flash_attn_func(q, q, q.half()), TypeError, "^v: expected q's torch.float32"),
        (lambda: flash.flash_attn_kvpacked_func(q, q, softmax_scale="1"), ValueError, "^kv: expected shape"),
        (lambda: flash.flash_attn_func(q, q, q, softmax_scale="1"), TypeError, "^softmax_scale: expected a float"),
        (lambda: flash.flash_attn_varlen_func(q, q, q, starts, starts, 1, 1), ValueError, "^q: expected packed"),
        (
            lambda: flash._flash_attn_forward(q, q, q, 2.0, None, False, -1, -1, 0, None, False),
            ValueError,
            "^dropout_p",
        ),
    ]
    for call, kind, message in wrong:
        with pytest.raises(RuntimeError, match=message) as raised:
            call()
        assert isinstance(raised.value, kind)


def test_errors_of_backends_keep_their_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_ATTN_BACKEND", "sdpa")
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(BackendError, match="sdpa"):
        flash.flash_attn_func(q, q, q, softcap=1.0)
