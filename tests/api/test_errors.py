"""Wrong arguments raise ValueError or TypeError naming the argument, its value and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

import fused_attn
from fused_attn import BackendError, Mask, attention, scaled_dot_product_attention, scores

B, HQ, HKV, M, N, D, DV = 2, 4, 2, 5, 7, 8, 6


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def call(**changed: Any) -> Any:
    """A right call of `attention`, with something changed."""
    given = {"q": zeros(B, HQ, M, D), "k": zeros(B, HKV, N, D), "v": zeros(B, HKV, N, DV)} | changed
    return attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)


def test_unchanged_arguments_are_valid() -> None:
    assert call().shape == (B, HQ, M, DV)


# argument, the bad value, the error, and words that its message holds: what it was and what is allowed
ATTENTION = [
    ("q", [1.0], TypeError, "expected a tensor, got list"),
    ("q", None, TypeError, "expected a tensor, got NoneType"),
    ("scale", 10**400, ValueError, "must fit a float, got an int of 1329 bits"),
    ("softcap", 10**400, ValueError, "must fit a float"),
    ("dropout_p", 10**400, ValueError, "must fit a float"),
    ("k", None, TypeError, "expected a tensor, got NoneType"),
    ("v", "v", TypeError, "expected a tensor, got str"),
    ("q", zeros(HQ, M, D), ValueError, "expected 4 dimensions, got shape (4, 5, 8); pass q[None], or call scaled_dot_"),
    ("k", zeros(N, D), ValueError, "expected 4 dimensions, got shape (7, 8); pass k[None, None], or call scaled_dot_"),
    ("k", zeros(1, B, HKV, N, D), ValueError, "got shape (1, 2, 2, 7, 8); pass k.flatten(0, -4), or call scaled_dot_"),
    ("v", zeros(D), ValueError, "expected 4 dimensions, got shape (8,)"),
    ("q", zeros(B, HQ, M, D, dtype=torch.int64), TypeError, "torch.int64"),
    ("q", zeros(B, HQ, M, D, dtype=torch.complex64), TypeError, "torch.complex64"),
    ("k", zeros(B, HKV, N, D, dtype=torch.float16), TypeError, "expected q's torch.float32, got torch.float16"),
    ("v", zeros(B, HKV, N, DV, dtype=torch.float64), TypeError, "expected q's torch.float32, got torch.float64"),
    ("k", zeros(B, HKV, N, D, device="meta"), ValueError, "expected q's device cpu, got meta"),
    ("k", zeros(3, HKV, N, D), ValueError, "expected q's batch size 2, got shape (3, 2, 7, 8)"),
    ("v", zeros(3, HKV, N, DV), ValueError, "(3, 2, 7, 6)"),
    ("k", zeros(B, HKV, N, D + 1), ValueError, "expected q's head dim 8, got shape (2, 2, 7, 9)"),
    ("v", zeros(B, HKV, N + 1, DV), ValueError, "(2, 2, 8, 6)"),
    ("v", zeros(B, HQ, N, DV), ValueError, "(2, 4, 7, 6)"),
    ("v", zeros(B, HKV, N, 0), ValueError, "head dim must be at least 1, got shape (2, 2, 7, 0)"),
    ("scale", "big", TypeError, "expected a float or a tensor, got str 'big'"),
    ("scale", True, TypeError, "expected a float or a tensor, got bool True"),
    ("scale", zeros(3), ValueError, "expected shape () or (4,), got (3,)"),
    ("scale", zeros(4, dtype=torch.float64), TypeError, "expected float32, got torch.float64"),
    ("scale", zeros(4, device="meta"), ValueError, "expected q's device cpu, got meta"),
    ("softcap", 0.0, ValueError, "must be None (off) or > 0, got 0.0"),
    ("softcap", -3, ValueError, "must be None (off) or > 0, got -3"),
    ("softcap", torch.nan, ValueError, "must be None (off) or > 0, got nan"),
    ("softcap", zeros(4), ValueError, "expected shape (), got (4,)"),
    ("softcap", "hard", TypeError, "expected a float or a tensor, got str 'hard'"),
    ("bias", 1.0, TypeError, "expected a tensor, got float 1.0"),
    ("bias", zeros(M, N + 1), ValueError, "shape (5, 8) does not broadcast to (B, Hq, M, N) = (2, 4, 5, 7)"),
    ("bias", zeros(1, B, HQ, M, N), ValueError, "does not broadcast"),
    ("bias", zeros(M, N, dtype=torch.bool), TypeError, "got torch.bool; pass it as mask="),
    ("bias", zeros(M, N, device="meta"), ValueError, "got meta"),
    ("sink", zeros(HKV), ValueError, "expected shape (4,), got (2,)"),
    ("sink", 0.0, TypeError, "expected a tensor, got float 0.0"),
    ("sink", zeros(HQ, dtype=torch.float16), TypeError, "got torch.float16"),
    ("mask", zeros(M, N), TypeError, "tensor of shape (5, 7); pass values added to the scores as bias="),
    (
        "mask",
        zeros(M, N, dtype=torch.int64),
        TypeError,
        "expected a bool tensor, got torch.int64 tensor of shape (5, 7)",
    ),
    ("mask", zeros(B, N, dtype=torch.uint8), TypeError, "got torch.uint8 tensor of shape (2, 7); pass mask != 0"),
    (
        "mask",
        torch.tensor([7, 4]),
        TypeError,
        "got torch.int64 tensor of shape (2,); if it holds the number of keys of ",
    ),
    ("mask", zeros(B, N, dtype=torch.bool), ValueError, "if it is (B, N), pass mask[:, None, None]"),
    ("mask", zeros(B, M, N, dtype=torch.bool), ValueError, "if it is (B, M, N), pass mask[:, None]"),
    ("mask", zeros(B, 1, N, dtype=torch.bool), ValueError, "if it is (B, M, N), pass mask[:, None]"),
    ("bias", zeros(B, M, N), ValueError, "if it is (B, M, N), pass bias[:, None]"),
    ("bias", zeros(B, N), ValueError, "if it is (B, N), pass bias[:, None, None]"),
    ("mask", "causal", TypeError, "expected a bool tensor or a fused_attn.Mask, got str 'causal'"),
    ("mask", zeros(M, 1, 1, 1, N, dtype=torch.bool), ValueError, "does not broadcast"),
    ("mask", zeros(3, N, dtype=torch.bool), ValueError, "shape (3, 7) does not broadcast to (B, Hq, M, N)"),
    ("mask", zeros(M, N, dtype=torch.bool, device="meta"), ValueError, "expected q's device cpu, got meta"),
    ("window", 3, TypeError, "expected a pair (left, right), got int 3"),
    ("window", (1, 2, 3), TypeError, "expected a pair (left, right), got tuple (1, 2, 3)"),
    ("dropout_p", 1.5, ValueError, "must lie in [0, 1], got 1.5"),
    ("dropout_p", -0.1, ValueError, "must lie in [0, 1], got -0.1"),
    ("dropout_p", torch.nan, ValueError, "must lie in [0, 1], got nan"),
    ("dropout_p", "half", TypeError, "got str 'half'"),
    ("seed", 1.0, TypeError, "expected None, an int or a 0-d integer tensor, got float 1.0"),
    ("seed", zeros(2, dtype=torch.int64), TypeError, "0-d integer tensor"),
    ("seed", torch.tensor(1.0), TypeError, "0-d integer tensor"),
    ("seed", torch.tensor(True), TypeError, "0-d integer tensor, got torch.bool"),
    ("score", "additive", ValueError, "fused_attn.scores, Additive(w), Bilinear(w), Cosine(t) or Distance(h), got str"),
    ("score", scores.Additive, ValueError, "one of fused_attn.scores, Additive(w), Bilinear(w), Cosine(t) or Distance"),
    ("normalizer", "entmax", ValueError, "expected one of ('softmax', 'softmax1', 'sigmoid'), got str 'entmax'"),
    ("layout", "sbhd", ValueError, "expected one of ('bhsd', 'bshd'), got str 'sbhd'"),
    ("scale", 1e39, ValueError, "must fit float32"),
    ("backend", "cuda", ValueError, "expected None or one of ('hopper', 'triton', 'sdpa', 'tiled', 'reference')"),
    ("backend", "", ValueError, "'reference'), got str ''"),
    ("backend", 0, ValueError, "'reference'), got int 0"),
    ("backend", False, ValueError, "'reference'), got bool False"),
    ("alignment", "top", ValueError, "('top_left', 'bottom_right'), got str 'top'"),
]


@pytest.mark.parametrize(
    ("name", "value", "error", "words"), ATTENTION, ids=[f"{x[0]}-{i}" for i, x in enumerate(ATTENTION)]
)
def test_attention(name: str, value: Any, error: type[Exception], words: str) -> None:
    """One argument at a time."""
    with pytest.raises(error, match=f"{name}: .*{re.escape(words)}"):
        call(**{name: value} | ({"dropout_p": 0.5} if name == "seed" else {}))


COMBINED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("causal needs an alignment", {"causal": True}, ValueError, "alignment: .*M = 5 and N = 7.*got None"),
    ("a window needs one", {"window": (1, 0)}, ValueError, "alignment: .*M = 5 and N = 7.*got None"),
    ("ALiBi needs one", {"alibi_slopes": zeros(HQ)}, ValueError, "alignment: alibi_slopes with M = 5 and N = 7"),
    ("a mask object needs one", {"mask": Mask.causal(), "alignment": "top_left"}, ValueError,
     r"alignment: Mask.causal\(\) with M = 5 and N = 7 needs one of its own, .*got None"),
    ("ALiBi of a wrong shape", {"alibi_slopes": zeros(3), "alignment": "top_left"}, ValueError,
     r"alibi_slopes: expected shape \(4,\) or \(2, 4\), got \(3,\)"),
    ("ALiBi that is no tensor", {"alibi_slopes": 0.1, "alignment": "top_left"}, TypeError,
     "alibi_slopes: expected a tensor, got float 0.1"),
    ("window below zero", {"window": (-1, 0), "alignment": "top_left"}, ValueError, "window: left .*>= 0, got -1"),
    ("window of floats", {"window": (1, 0.5), "alignment": "top_left"}, TypeError, "right: expected .*int, got .* 0.5"),
    ("lengths of another batch", {"mask": Mask.lengths(torch.ones(3, dtype=torch.int32))}, ValueError,
     r"Mask.lengths\(kv\): expected one length for each of the 2 batches, got shape \(3,\)"),
    ("prefix lengths of another batch", {"mask": Mask.prefix(torch.ones(3, dtype=torch.int32), "top_left")}, ValueError,
     r"Mask.prefix\(lengths\): expected one length for each of the 2 batches, got shape \(3,\)"),
    ("ids of another length", {"mask": Mask.segments(torch.arange(M))}, ValueError,
     r"Mask.segments\(kv_ids\): expected shape \(7,\) or \(2, 7\), got \(5,\)"),
    ("ids of another length, in any order", {"mask": Mask.segments(torch.arange(M), sorted=False)}, ValueError,
     r"Mask.segments\(kv_ids\): expected shape \(7,\) or \(2, 7\), got \(5,\)"),
    ("ids elsewhere", {"mask": Mask.segments(zeros(M, dtype=torch.int32, device="meta"),
     zeros(N, dtype=torch.int32, device="meta"), sorted=False)}, ValueError, "mask: expected q's device cpu, got meta"),
    ("blocks of another grid", {"mask": Mask.blocks(torch.ones(2, 4, 3, 3) > 0, 2)}, ValueError,
     r"Mask.blocks\(allowed\): shape \(2, 4, 3, 3\) does not broadcast to \(B, Hq, ceil\(M / 2\), .*= \(2, 4, 3, 4\)"),
    ("blocks elsewhere", {"mask": Mask.blocks(zeros(3, 4, device="meta") > 0, 2)}, ValueError,
     "mask: expected q's device cpu, got meta"),
    ("sinks without an alignment", {"mask": Mask.window(1, 0, sinks=2)}, ValueError,
     "alignment: .*M = 5 and N = 7.*got None"),
    ("groups that do not divide", {"q": zeros(B, 3, M, D)}, ValueError,
     "k: 2 key-value heads do not divide the 3 query heads"),
    ("no key-value heads", {"k": zeros(B, 0, N, D), "v": zeros(B, 0, N, DV)}, ValueError,
     "k: 0 key-value heads do not divide the 4 query heads"),
    ("no channels", {"q": zeros(B, HQ, M, 0), "k": zeros(B, HKV, N, 0)}, ValueError,
     r"q: the head dim must be at least 1, got shape \(2, 4, 5, 0\)"),
    ("additive weights of another head dim", {"score": scores.Additive(zeros(D + 1))}, ValueError,
     r"score.w: expected shape \(8,\) or \(4, 8\), got \(9,\)"),
    ("a matrix of another head dim", {"score": scores.Bilinear(zeros(D, D + 1))}, ValueError,
     r"score.w: expected shape \(8, 8\) or \(4, 8, 8\), got \(8, 9\)"),
    ("a temperature for each key-value head", {"score": scores.Cosine(zeros(HKV))}, ValueError,
     r"score.t: expected shape \(\) or \(4,\), got \(2,\)"),
    ("a temperature of another type", {"score": scores.Cosine(zeros(HQ, dtype=torch.float16))}, TypeError,
     "score.t: expected float32, got torch.float16"),
    ("a bandwidth elsewhere", {"score": scores.Distance(zeros(HQ, device="meta"))}, ValueError,
     "score.h: expected q's device cpu, got meta"),
    ("a distance with a softcap", {"score": scores.Distance(1.0), "softcap": 2.0}, ValueError,
     "softcap: scores.Distance has none"),
    ("a key's head dim beside a cosine", {"k": zeros(B, HKV, N, D + 1), "score": scores.Cosine(1.0)}, ValueError,
     r"k: expected q's head dim 8, got shape \(2, 2, 7, 9\)"),
    ("softmax1 with a sink", {"normalizer": "softmax1", "sink": zeros(HQ)}, ValueError,
     'sink: normalizer "softmax1" takes none'),
    ("a sigmoid with a sink", {"normalizer": "sigmoid", "sink": zeros(HQ)}, ValueError,
     'sink: normalizer "sigmoid" takes none'),
    ("the log-sum-exp of a sigmoid", {"normalizer": "sigmoid", "return_lse": True}, ValueError,
     'return_lse: normalizer "sigmoid" has no log-sum-exp'),
    ("a seed too large", {"dropout_p": 0.5, "seed": 2**63}, ValueError, "seed: must fit int64, got 92233720368547"),
    ("heads of the bshd layout", {"q": zeros(B, M, 3, D), "k": zeros(B, N, 2, D), "v": zeros(B, N, 2, DV),
     "layout": "bshd"}, ValueError, "k: 2 key-value heads do not divide the 3 query heads"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "changed", "error", "words"), COMBINED, ids=[x[0] for x in COMBINED])
def test_combinations(what: str, changed: dict[str, Any], error: type[Exception], words: str) -> None:
    """What is wrong only together with something else."""
    with pytest.raises(error, match=words):
        call(**changed)


MASKS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: Mask.tensor(zeros(2, 2)), TypeError, "mask: expected a bool tensor, got torch.float32"),
    (lambda: Mask(torch.ones(2, 2) > 0), TypeError, r"Mask: expected no .*of shape \(2, 2\); .*Mask.tensor\(\.\.\.\)"),
    (lambda: Mask("causal"), TypeError, r"Mask: expected no argument, got str 'causal'; .*Mask.causal\(\)"),
    (lambda: Mask((torch.ones(2, 2) > 0,)), TypeError, "Mask: expected conditions, .*got torch.bool tensor"),
    (lambda: Mask([]), TypeError, "Mask: expected no argument, got list"),
    (lambda: Mask.causal() & zeros(2, 2), TypeError, "mask: expected a bool tensor"),
    (lambda: Mask.lengths(torch.ones(2)), TypeError, r"^Mask.lengths\(kv\): .* integer tensor, got torch.float32"),
    (lambda: Mask.lengths([1, 2]), TypeError, r"^Mask.lengths\(kv\): expected an integer tensor, got list \[1, 2\]"),
    (lambda: Mask.lengths(torch.ones(2, 2).int()), ValueError, r"^Mask.lengths\(kv\): .*rank 1, got shape \(2, 2\)"),
    (lambda: Mask.lengths(torch.arange(2), torch.ones(2)), TypeError, r"^Mask.lengths\(q\): .* integer tensor"),
    (lambda: Mask.prefix(torch.ones(2, dtype=torch.bool)), TypeError, r"^Mask.prefix\(lengths\): .* integer tensor"),
    (lambda: Mask.segments(torch.ones(2)), TypeError, r"^Mask.segments\(q_ids\): .* integer tensor, got torch.float32"),
    (
        lambda: Mask.segments(torch.arange(2), torch.tensor([[True]])),
        TypeError,
        r"^Mask.segments\(kv_ids\): .*torch.bool",
    ),
    (
        lambda: Mask.segments(torch.tensor([0, 1]), torch.tensor([0], device="meta")),
        ValueError,
        r"^Mask.segments\(kv_ids\): expected q_ids' device cpu, got meta",
    ),
    (lambda: Mask.segments(torch.tensor([0, 1]), sorted="yes"), TypeError, "sorted: expected None or a bool, got str"),
    (lambda: Mask.segments(torch.tensor(3)), ValueError, r"^Mask.segments\(q_ids\): .* rank 1 or 2, got shape \(\)"),
    (lambda: Mask.window(-1, 0), ValueError, "window: left must be None \\(unbounded\\) or >= 0, got -1"),
    (lambda: Mask.window(True, 0), TypeError, "window: left: expected None or an int, got bool True"),
    (lambda: Mask.window(1, 0, sinks=-1), ValueError, "sinks: must be >= 0, got -1"),
    (lambda: Mask.window(1, 0, sinks=1.0), TypeError, "sinks: expected an int, got float 1.0"),
    (lambda: Mask.blocks(zeros(2, 2), 4), TypeError, r"^Mask.blocks\(allowed\): .* bool tensor, got torch.float32"),
    (lambda: Mask.blocks([[True]], 4), TypeError, r"^Mask.blocks\(allowed\): .* bool tensor, got list"),
    (lambda: Mask.blocks(zeros(2, 2) > 0, 0), ValueError, "block: must be >= 1, got 0"),
    (lambda: Mask.blocks(zeros(2, 2) > 0, (4, -1)), ValueError, r"block: must be >= 1, got \(4, -1\)"),
    (
        lambda: Mask.blocks(zeros(2, 2) > 0, (4, 4, 4)),
        TypeError,
        r"block: expected an int or a pair of ints, got tuple",
    ),
    (lambda: Mask.blocks(zeros(2, 2) > 0, True), TypeError, "block: expected an int or a pair of ints, got bool True"),
]


@pytest.mark.parametrize(("make", "error", "words"), MASKS, ids=range(len(MASKS)))
def test_masks(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def sdpa(**changed: Any) -> Any:
    given = {"query": zeros(B, HQ, M, D), "key": zeros(B, HQ, N, D), "value": zeros(B, HQ, N, DV)} | changed
    return scaled_dot_product_attention(**given)


SDPA: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("mask and causal", {"attn_mask": zeros(M, N, dtype=torch.bool), "is_causal": True}, ValueError,
     "attn_mask: must be None when is_causal"),
    ("lengths of key and value", {"value": zeros(B, HQ, N - 1, DV)}, ValueError,
     r"value: expected key's length 7, got shape \(2, 4, 6, 6\)"),
    ("grouped heads", {"key": zeros(B, HKV, N, D), "value": zeros(B, HKV, N, DV)}, ValueError,
     "query, key, value: leading dims do not broadcast: .*; key and value with fewer heads need enable_gqa=True"),
    ("a mask on meta", {"attn_mask": zeros(M, N, dtype=torch.bool, device="meta")}, ValueError,
     "attn_mask: expected query's device cpu, got meta"),
    ("a mask of integers", {"attn_mask": zeros(M, N, dtype=torch.int32)}, TypeError,
     "attn_mask: .*got torch.int32; pass attn_mask != 0"),
    ("a padding mask", {"attn_mask": zeros(B, N, dtype=torch.bool)}, ValueError,
     r"attn_mask: .*if it is \(B, N\), pass attn_mask\[:, None, None\]"),
    ("a mask of doubles", {"attn_mask": zeros(M, N, dtype=torch.float64)}, TypeError, "attn_mask: .*got torch.float64"),
    ("a mask that is no tensor", {"attn_mask": [[True]]}, TypeError, "attn_mask: expected a tensor"),
    ("a mask that does not fit", {"attn_mask": zeros(M, M)}, ValueError,
     r"attn_mask: shape \(5, 5\) does not broadcast to \(2, 4, 5, 7\)"),
    ("rank 1", {"query": zeros(D)}, ValueError, r"query: expected at least 2 dimensions, got shape \(8,\)"),
    ("mixed dtypes", {"key": zeros(B, HQ, N, D, dtype=torch.float16)}, TypeError,
     "key: expected query's torch.float32, got torch.float16"),
    ("integers", {"query": zeros(B, HQ, M, D, dtype=torch.int32)}, TypeError, "query: .*got torch.int32"),
    ("key on meta", {"key": zeros(B, HQ, N, D, device="meta")}, ValueError, "key: expected query's device cpu"),
    ("head dims", {"key": zeros(B, HQ, N, D + 1)}, ValueError,
     r"key: expected query's head dim 8, got shape \(2, 4, 7, 9\)"),
    ("heads without enable_gqa", {"key": zeros(B, HKV, N, D), "value": zeros(B, HKV, N, DV)}, ValueError,
     r"query, key, value: .*do not broadcast.*\(2, 2, 7, 8\)"),
    ("batches", {"key": zeros(3, HQ, N, D)}, ValueError, r"query, key, value: .*do not broadcast.*key \(3, 4, 7, 8\)"),
    ("groups that do not divide", {"key": zeros(B, 3, N, D), "value": zeros(B, 3, N, DV), "enable_gqa": True},
     ValueError, "3 key-value heads do not divide the 4 query heads"),
    ("groups at rank 2", {"query": zeros(M, D), "key": zeros(N, D), "value": zeros(N, DV), "enable_gqa": True},
     ValueError, r"query: .*enable_gqa.*got shape \(5, 8\)"),
    ("dropout above one", {"dropout_p": 2.0}, ValueError, r"dropout_p: must lie in \[0, 1\], got 2.0"),
    ("value that is no tensor", {"value": 3}, TypeError, "value: expected a tensor, got int 3"),
    ("query that is None", {"query": None}, TypeError, "query: expected a tensor, got NoneType"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "words"),
    (
        ("q", zeros(M, HQ, D), r"q: expected 4 dimensions, got shape \(5, 4, 8\); pass q\[None\]$"),
        ("k", zeros(N, D), r"k: expected 4 dimensions, got shape \(7, 8\); pass k\[None, :, None\]$"),
        ("v", zeros(1, B, N, HKV, DV), r"v: expected 4 dimensions, .*; pass v\.flatten\(0, -4\)$"),
    ),
)
def test_wrong_rank_in_layout_bshd(name: str, value: torch.Tensor, words: str) -> None:
    """scaled_dot_product_attention, which takes rows for heads there, is not advised."""
    given = {"q": zeros(B, M, HQ, D), "k": zeros(B, N, HKV, D), "v": zeros(B, N, HKV, DV), "layout": "bshd"}
    with pytest.raises(ValueError, match=words):
        call(**given | {name: value})


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int16, torch.int32, torch.uint32))
def test_a_seed_is_a_tensor_of_any_integers(dtype: torch.dtype) -> None:
    expected = call(v=torch.ones(B, HKV, N, DV), dropout_p=0.5, seed=7)
    assert torch.equal(call(v=torch.ones(B, HKV, N, DV), dropout_p=0.5, seed=torch.tensor(7, dtype=dtype)), expected)


@pytest.mark.parametrize(("what", "changed", "error", "words"), SDPA, ids=[x[0] for x in SDPA])
def test_sdpa(what: str, changed: dict[str, Any], error: type[Exception], words: str) -> None:
    """scaled_dot_product_attention refuses what torch's function in part lets pass."""
    assert sdpa().shape == (B, HQ, M, DV)
    with pytest.raises(error, match=words):
        sdpa(**changed)


# ---------------------------------------------------------------------------------------------------- explicit choice


@pytest.mark.parametrize("backend", ("hopper", "sdpa"))
def test_an_explicit_backend_never_falls_back(backend: str) -> None:
    """BackendError, a ValueError, lists every reason; explain lists the same."""
    x = zeros(1, 2, 4, 8)
    options = {"softcap": 1.0, "sink": zeros(2), "return_lse": True, "backend": backend}
    reasons = fused_attn.explain(x, x, x, **options).reasons[backend]
    assert len(reasons) >= (3 if backend == "sdpa" else 1)
    with pytest.raises(BackendError) as refusal:
        attention(x, x, x, **options)
    assert isinstance(refusal.value, ValueError) and all(reason in str(refusal.value) for reason in reasons)


def test_float64_on_triton_is_refused() -> None:
    x = zeros(1, 2, 4, 8, dtype=torch.float64)
    with pytest.raises(BackendError, match="float64"):
        attention(x, x, x, backend="triton")


def test_environment_variable_counts_as_explicit(monkeypatch: pytest.MonkeyPatch) -> None:
    x = zeros(1, 2, 4, 8)
    monkeypatch.setenv("FUSED_ATTN_BACKEND", "sdpa")
    assert fused_attn.explain(x, x, x).backend == "sdpa"
    with pytest.raises(BackendError, match="backend 'sdpa', which FUSED_ATTN_BACKEND chose, cannot run this call: "):
        attention(x, x, x, sink=zeros(2))
    with pytest.raises(BackendError, match="backend 'sdpa' cannot run this call: "):
        attention(x, x, x, sink=zeros(2), backend="sdpa")
    for wrong in ("", 0, False):  # the argument wins, right or wrong
        with pytest.raises(ValueError, match=f"^backend: expected None or one of .*, got {type(wrong).__name__}"):
            attention(x, x, x, backend=wrong)
    monkeypatch.setenv("FUSED_ATTN_BACKEND", "")
    assert fused_attn.explain(x, x, x, sink=zeros(2)).backend == "tiled"  # empty is unset
    assert attention(x, x, x, sink=zeros(2), backend="tiled").shape == x.shape
    monkeypatch.setenv("FUSED_ATTN_BACKEND", "fastest")
    with pytest.raises(ValueError, match=r"FUSED_ATTN_BACKEND: expected one of .*got str 'fastest'"):
        attention(x, x, x)


# -------------------------------------------------------------------------------------------------- not implemented yet


@pytest.mark.parametrize("name", ("parallel", "record"))
def test_names_not_implemented_yet(name: str) -> None:
    assert not hasattr(fused_attn, name)
    with pytest.raises(AttributeError, match=f"'fused_attn' has no attribute '{name}'; it is not implemented yet"):
        getattr(fused_attn, name)


@pytest.mark.parametrize("module", (fused_attn, fused_attn.compat), ids=lambda module: module.__name__)
def test_attributes_that_do_not_exist(module: ModuleType) -> None:
    assert not hasattr(module, "nonsense") and not hasattr(module, "flex")
    with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'nonsense'$"):
        _ = module.nonsense


SCORES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: scores.Additive(32), TypeError, "score.w: expected a tensor, got int 32"),
    (lambda: scores.Bilinear([[1.0]]), TypeError, r"score.w: expected a tensor, got list \[\[1.0\]\]"),
    (lambda: scores.Cosine(True), TypeError, "score.t: expected a float or a tensor, got bool True"),
    (lambda: scores.Distance("wide"), TypeError, "score.h: expected a float or a tensor, got str 'wide'"),
    (lambda: scores.Distance(0), ValueError, "score.h: must be finite and not 0, got 0.0"),
    (lambda: scores.Distance(float("inf")), ValueError, "score.h: must be finite and not 0, got inf"),
]


@pytest.mark.parametrize(("make", "error", "words"), SCORES, ids=range(len(SCORES)))
def test_scores(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    """What is wrong with a score alone is said where it is made."""
    with pytest.raises(error, match=words):
        make()


# ------------------------------------------------------------------------------------------- large values are not shown

LARGE = torch.arange(10_000.0).view(100, 100)


@pytest.mark.parametrize("value", (LARGE.numpy(), LARGE.tolist(), "x" * 9_999), ids=("array", "list", "string"))
@pytest.mark.parametrize("name", ("q", "scale", "mask", "window", "alignment", "bias", "alibi_slopes", "softcap",
                                  "sink", "dropout_p", "seed", "normalizer", "layout", "score", "causal"))  # fmt: skip
def test_errors_are_short(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError)) as refusal:
        call(**{name: value} | ({"dropout_p": 0.5} if name == "seed" else {}))
    assert len(str(refusal.value)) < 300


def test_merge_states() -> None:
    out, lse = zeros(1, 2, 3, 4), zeros(1, 2, 3)
    with pytest.raises(ValueError, match="lses: expected one for each of the 2 outs"):
        fused_attn.merge_states([out, out], [lse])
    with pytest.raises(ValueError, match=r"outs\[1\].*\(1, 2, 3, 5\)"):
        fused_attn.merge_states([out, zeros(1, 2, 3, 5)], [lse, lse])
    with pytest.raises(ValueError, match="layout: expected one of"):
        fused_attn.merge_states([out], [lse], layout="sbhd")
    with pytest.raises(TypeError, match=r"outs: expected a list of tensors, got torch.float32 tensor of shape"):
        fused_attn.merge_states(out, [lse])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"lses: expected a list of tensors, got list \[None\]"):
        fused_attn.merge_states([out], [None])  # type: ignore[list-item]


def test_warmup() -> None:
    with pytest.raises(ValueError, match=r"shapes: .*got tuple \(1, 2, 3\)"):
        fused_attn.warmup([(1, 2, 3)], device="cpu")
    with pytest.raises(ValueError, match=r"^device: torch has no nowhere here: "):
        fused_attn.warmup([(1, 1, 1, 1, 1, 1)], device="nowhere")
    with pytest.raises(TypeError, match="dtypes: expected torch's dtypes, got str 'float32'"):
        fused_attn.warmup([(1, 1, 1, 1, 1, 1)], device="cpu", dtypes=["float32"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="backward: expected a bool, got str 'no'"):
        fused_attn.warmup([(1, 1, 1, 1, 1, 1)], device="cpu", backward="no")  # type: ignore[arg-type]
