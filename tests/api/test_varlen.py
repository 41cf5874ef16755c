"""attention_varlen: checks, bounds, memory and compilation; its values are tested in backends/test_parity.py."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fused_attn
from fused_attn import Mask, attention, attention_varlen, scores, testing
from fused_attn.spec import checks
from fused_attn.spec.problem import Problem, Ragged
from fused_attn.spec.ragged import locate, padded, sums
from tests.parity import Largest

BACKENDS = ("triton", "tiled", "reference")
LENGTHS = ((33, 20), (0, 9), (5, 0), (1, 1), (40, 70), (20, 3))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if reasons := testing.why_not("ragged", request.param):
        pytest.skip(reasons[0])
    return request.param


def starts(lengths: Any) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).int()


def packed(lengths: Any = LENGTHS, hq: int = 2, hkv: int = 1, d: int = 16, grad: bool = True, seed: int = 0) -> list:
    """q, k, v and both starts."""
    generator = torch.Generator().manual_seed(seed)
    rows, keys = ([x[i] for x in lengths] for i in range(2))
    shapes = (sum(rows), hq, d), (sum(keys), hkv, d), (sum(keys), hkv, d)
    tensors = [torch.randn(x, generator=generator).requires_grad_(grad) for x in shapes]
    return [*tensors, starts(rows), starts(keys)]


def parts(x: Tensor, cuts: Tensor) -> list[Tensor]:
    return list(x.split(cuts.diff().tolist()))


# ----------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    "words",
    (
        {},
        {"causal": True, "alignment": "bottom_right", "softcap": 2.0},
        {"window": (9, 4), "alignment": "top_left", "alibi_slopes": torch.tensor([0.1, 0.4])},
        {"normalizer": "softmax1", "causal": True, "alignment": "top_left"},
        {"score": scores.Cosine(3.0)},
    ),
    ids=("plain", "causal", "window", "softmax1", "cosine"),
)
def test_each_sequence_equals_a_separate_call(backend: str, words: dict[str, Any]) -> None:
    """Bit by bit: neighbours change nothing, in the results and in the gradients."""
    q, k, v, *cuts = packed()
    out, lse = attention_varlen(q, k, v, *cuts, return_lse=True, backend=backend, **words)
    dout = torch.randn(out.shape)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    by_rows = zip(*(parts(x, cuts[0]) for x in (q, out, lse, dout, grads[0])), strict=True)
    by_keys = zip(*(parts(x, cuts[1]) for x in (k, v, *grads[1:])), strict=True)
    for (own_q, own_out, own_lse, own_dout, dq), (own_k, own_v, *dkv) in zip(by_rows, by_keys, strict=True):
        leaves = [x.detach()[None].requires_grad_() for x in (own_q, own_k, own_v)]
        alone, alone_lse = attention(*leaves, layout="bshd", return_lse=True, backend=backend, **words)
        assert torch.equal(alone[0], own_out)
        assert torch.equal(alone_lse[0].T, own_lse)
        for x, own in zip(torch.autograd.grad(alone, leaves, own_dout[None]), (dq, *dkv), strict=True):
            assert torch.equal(x[0], own)


def test_nan_stays_in_its_sequence(backend: str) -> None:
    """Although tiles of one sequence end in the midst of the next one's memory."""
    for which, row in (("q", 40), ("k", 40), ("v", 31)):
        tensors = packed(tuple((n, n) for n in (17, 0, 30, 20)))
        words = {"causal": True, "alignment": "top_left", "backend": backend}
        clean = attention_varlen(*tensors, **words)
        expected = torch.autograd.grad(clean.square().sum(), tensors[:3])
        with torch.no_grad():
            tensors["qkv".index(which)][row] = torch.nan
        dirty = attention_varlen(*tensors, **words)
        grads = torch.autograd.grad(dirty.square().sum(), tensors[:3])
        other = torch.ones(67, dtype=torch.bool)
        other[17:47] = False
        assert dirty[row if which == "q" else 46].isnan().any()
        for x, y in zip((dirty, *grads), (clean, *expected), strict=True):
            assert torch.equal(x[other], y[other])


def test_dropout_is_that_of_the_padded_batch(backend: str) -> None:
    """Which weights live: seen through values that are a unit matrix."""
    q, k, _, *cuts = packed(((9, 12), (3, 5), (16, 16)), hkv=2, grad=False)
    longest, words = 16, {"dropout_p": 0.5, "seed": 7, "backend": backend}
    v = torch.cat([torch.eye(longest)[:n, None].expand(n, 2, longest) for n in (12, 5, 16)])
    out = attention_varlen(q, k, v, *cuts, **words)
    sides = zip((q, k, v), (cuts[0], cuts[1], cuts[1]), strict=True)
    dense = [padded(x.transpose(0, 1)[None], own, longest) for x, own in sides]
    whole = attention(*dense, mask=Mask.lengths(cuts[1].diff()), **words).transpose(1, 2)
    for b, own in enumerate(parts(out, cuts[0])):
        assert torch.equal(own == 0, whole[b, : len(own)] == 0)
        assert 0.2 < (own[..., : cuts[1].diff()[b]] != 0).double().mean() < 0.8


@pytest.mark.parametrize(
    "lengths", ((), ((0, 0),), ((0, 5), (0, 0)), ((4, 0),)), ids=("none", "zero", "keys", "queries")
)
def test_empty_batches(backend: str, lengths: Any) -> None:
    q, k, v, *cuts = packed(lengths)
    out, lse = attention_varlen(
        q, k, v, *cuts, return_lse=True, sink=None, max_seqlen_q=7, max_seqlen_k=7, backend=backend
    )
    assert out.shape == q.shape and not out.any() and (lse == -torch.inf).all() and lse.shape == q.shape[:2]
    if out.requires_grad:
        assert not any(x.any() for x in torch.autograd.grad(out.sum(), (q, k, v), allow_unused=True) if x is not None)


def test_statistics_of_short_sequences(backend: str) -> None:
    """Places are a sequence's own, and those that it has no keys for are missing."""
    q, k, _, *cuts = packed(((3, 2), (4, 6)), grad=False)
    cut = {"cu_seqlens_q": cuts[0], "cu_seqlens_k": cuts[1]}
    found = fused_attn.attention_stats(q, k, top_k=4, key_mass=True, **cut, backend=backend)
    assert found.top_k_indices.shape == (7, 2, 4) and found.key_mass.shape == (8, 2)
    assert set(found.top_k_indices[:3].unique().tolist()) == {-1, 0, 1}
    assert set(found.top_k_indices[3:].unique().tolist()) <= set(range(6))
    assert not found.top_k_weights[:3, :, 2:].any()
    with pytest.raises(ValueError, match="max_seqlen_q, max_seqlen_k: only with cu_seqlens_q"):
        fused_attn.attention_stats(q, k, max_seqlen_q=3)
    with pytest.raises(ValueError, match="at most the 8 keys"):
        fused_attn.attention_stats(q, k, top_k=9, **cut)


# -------------------------------------------------------------------------------------------------- what it promises

READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "item"}


class NoReading(TorchDispatchMode):
    """Refuses what waits for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::") in READS:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **kwargs or {})


@pytest.fixture
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read for free, and kernels are not run."""
    if reasons := testing.why_not("ragged", "triton"):
        pytest.skip(reasons[0])
    monkeypatch.setattr(checks, "readable", lambda x: False)
    monkeypatch.setattr(fused_attn.api.varlen, "readable", lambda x: False)
    monkeypatch.setattr(fused_attn.backends.triton.launcher, "launch", lambda *args, **options: None)


LONGEST = {"max_seqlen_q": 40, "max_seqlen_k": 70}
ASYNCHRONOUS: dict[str, Any] = {
    "plain": {},
    "causal": {"causal": True, "alignment": "bottom_right", "alibi_slopes": torch.rand(6, 2)},
    "dropout": {"dropout_p": 0.3, "sink": torch.zeros(2, requires_grad=True)},
    "additive": {"score": scores.Additive(torch.ones(16)), "window": (4, 4), "alignment": "top_left"},
    "distance": {"score": scores.Distance(2.0), "causal": True, "alignment": "bottom_right"},
    "prefix": {"mask": Mask.prefix(torch.arange(6)), "alignment": "bottom_right", **LONGEST},
    "lengths": {"mask": Mask.lengths(torch.arange(6)), **LONGEST},
    "ids": {"mask": Mask.segments(torch.arange(40) % 3, torch.arange(70) % 3, sorted=False), **LONGEST},
    "sinks": {"mask": Mask.window(4, 0, "bottom_right", sinks=2), "alignment": "bottom_right", **LONGEST},
    "bias": {"bias": torch.zeros(2, 40, 70, requires_grad=True), **LONGEST},
    "bias_rows": {"bias": torch.zeros(6, 2, 40, 1, requires_grad=True), **LONGEST},
}


@pytest.mark.parametrize("name", ASYNCHRONOUS)
@pytest.mark.usefixtures("on_a_device")
def test_triton_does_not_synchronize(name: str) -> None:
    tensors = packed()
    with NoReading():
        out = attention_varlen(*tensors, backend="triton", **ASYNCHRONOUS[name])
        torch.autograd.grad(out.sum(), tensors[:3])


@pytest.mark.usefixtures("on_a_device")
@pytest.mark.parametrize("name", ("prefix", "lengths", "sinks", "bias"))
def test_bias_and_mask_need_the_longest_lengths(name: str) -> None:
    words = {x: y for x, y in ASYNCHRONOUS[name].items() if x not in LONGEST}
    with pytest.raises(ValueError, match=r"max_seqlen_|broadcast"):
        attention_varlen(*packed(), **words, backend="triton")


@pytest.mark.usefixtures("on_a_device")
def test_memory_does_not_grow_with_the_longest() -> None:
    """Nothing is as large as the padded batch, forward or backward."""
    tensors = packed(((900, 900), *[(1, 1)] * 99), hq=1, hkv=1)
    with Largest() as largest:
        out = attention_varlen(*tensors, causal=True, alignment="bottom_right", backend="triton")
        torch.autograd.grad(out.sum(), tensors[:3])
    assert largest.elements == tensors[0].numel()


def test_the_same_bits_every_time(backend: str) -> None:
    found = []
    for _ in range(2):
        tensors = packed()
        words = {"causal": True, "alignment": "bottom_right", "dropout_p": 0.3, "seed": 5}
        out = attention_varlen(*tensors, **words, backend=backend)
        found.append([out, *torch.autograd.grad(out.square().sum(), tensors[:3])])
    assert all(torch.equal(x, y) for again in found[1:] for x, y in zip(found[0], again, strict=True))


@pytest.mark.parametrize("backend", ("triton", "tiled", None))
def test_compiles_whole(backend: str | None) -> None:
    """The reference does not: it is no operator, and reads where sequences begin, as torch's op would have to here."""
    if backend and testing.why_not("ragged", backend):
        pytest.skip("no triton")

    def call(q: Tensor, k: Tensor, v: Tensor, cuts: Tensor, backend: str | None) -> Tensor:
        return attention_varlen(q.sin(), k, v, cuts, cuts, causal=True, backend=backend).cos()

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for lengths in ((5, 0, 9), (20, 3, 4)):
        q, k, v, cuts, _ = packed(tuple((n, n) for n in lengths))
        got, expected = compiled(q, k, v, cuts, backend), call(q, k, v, cuts, backend or "tiled")
        assert torch.equal(got, expected)
        grads = (torch.autograd.grad(y.sum(), (q, k, v)) for y in (got, expected))
        assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


LIES = (
    (starts([5, 2]), starts([3, 3]), "cu_seqlens_q: .* to the 9 packed rows, got 0 to 7"),
    (starts([-2, 11]), starts([3, 3]), "cu_seqlens_q: .* got one that descends"),
    (starts([4, 5]), starts([3, 3]) + 1, "cu_seqlens_k: .* got 1 to 7$"),
    (torch.tensor([4, 5], dtype=torch.int32), starts([6]), "cu_seqlens_q: .* got 4 to 5; if these are lengths, pass"),
    (starts([8, 1]), starts([3, 3]), "max_seqlen_q: a sequence is 8 long, got 7"),
)


def test_compiled_calls_check_lengths_at_run_time() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(attention_varlen, fullgraph=True, backend="aot_eager")
    q, k, v = torch.randn(9, 2, 8), *torch.randn(2, 6, 2, 8)
    words = {"max_seqlen_q": 7, "max_seqlen_k": 6, "backend": "tiled"}
    for *cuts, message in LIES:
        with pytest.raises(ValueError, match=message):
            compiled(q, k, v, *cuts, **words)
    fine = starts([4, 5]), starts([3, 3])
    torch.testing.assert_close(compiled(q, k, v, *fine, **words), attention_varlen(q, k, v, *fine, **words))


def test_autocast(backend: str) -> None:
    tensors = packed()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention_varlen(*tensors, backend=backend)
    assert out.dtype == torch.bfloat16
    half = [x.detach().bfloat16() for x in tensors[:3]]
    assert torch.equal(out, attention_varlen(*half, *tensors[3:], backend=backend))


@pytest.mark.parametrize("backend", ("tiled", "reference"))
def test_second_derivatives(backend: str) -> None:
    q, k, v, *cuts = packed(((3, 4), (0, 2), (2, 2)), hq=2, hkv=1, d=3)
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    words = {"causal": True, "alignment": "top_left", "backend": backend}
    assert torch.autograd.gradcheck(lambda *x: attention_varlen(*x, *cuts, **words), leaves)
    assert torch.autograd.gradgradcheck(lambda *x: attention_varlen(*x, *cuts, **words), leaves)


# ------------------------------------------------------------------------------------------------------- schedules


def problem(lengths: Any, span: Any = None, alignment: str = "bottom_right") -> Problem:
    q, k, v, *cuts = packed(lengths, 1, 1, 4, grad=False)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    ragged = Ragged(*cuts, q.shape[2], k.shape[2], alignment)
    return Problem(q, k, v, 1.0, span=span or fused_attn.spec.problem.Span(), ragged=ragged)


def unpacked(keys: Tensor) -> list[list[int]]:
    """(sequence, tile) of each slot; -1 for no tile."""
    none = 2**22 - 1
    return [[x >> 22 & none, -1 if x & none == none else x & none] for x in keys.tolist()]


LISTS = st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=9)
SPANS = st.sampled_from([(None, None), (None, 0), (-3, 5), (2, None), (-20, 0)])


@given(LISTS, st.sampled_from((16, 32)), st.booleans(), SPANS, st.sampled_from(("top_left", "bottom_right")))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_tile_has_one_slot_and_the_longest_come_first(
    lengths: Any, block: int, by_keys: bool, bounds: Any, alignment: str
) -> None:
    tile_scheduler = pytest.importorskip("fused_attn.backends.triton.tile_scheduler")
    span = fused_attn.spec.problem.Span(*bounds)
    p = problem(lengths, span, alignment)
    slots = unpacked(tile_scheduler.ragged(p, block, by_keys).schedule)
    assert len(slots) * 3 == tile_scheduler.programs(p, block, 3, by_keys)
    wanted = [(b, i) for b, x in enumerate(lengths) for i in range(-(-x[by_keys] // block))]
    assert sorted(map(tuple, (x for x in slots if x[1] >= 0))) == wanted
    assert all(0 <= b < len(lengths) for b, _ in slots)

    def seen(b: int, tile: int) -> int:
        """The width of what a tile sees, by the whole matrix."""
        m, n = lengths[b]
        far = n - m if alignment == "bottom_right" else 0
        grid = span.shifted(far).materialize(torch.arange(m), torch.arange(n), n)[0, 0]
        grid = grid.T if by_keys else grid
        some = grid[tile * block : (tile + 1) * block].any(0).nonzero()
        return int(some[-1] - some[0] + 1) if len(some) else 0

    work = [seen(b, i) for b, i in slots if i >= 0]
    inside = [-(-x // 64) for x in work if x]
    assert inside == sorted(inside, reverse=True)
    assert unpacked(tile_scheduler.ragged(p, block, by_keys, in_order=True).schedule)[: len(wanted)] == list(
        map(list, wanted)
    )


def test_schedule_balances_one_long_sequence() -> None:
    """Turns taken by whichever of 16 programs is free end within a tenth of the best that there is."""
    tile_scheduler = pytest.importorskip("fused_attn.backends.triton.tile_scheduler")
    lengths = [(n, n) for n in [40] * 50 + [1500] + [40] * 50 + [700]]
    p = problem(lengths, fused_attn.spec.problem.Span(right=0))
    work = [min(lengths[b][1], (i + 1) * 64) for b, i in unpacked(tile_scheduler.ragged(p, 64).schedule) if i >= 0]
    free = [0] * 16
    for x in work:
        free[free.index(min(free))] += x
    assert max(free) <= 1.1 * max(sum(work) / 16, max(work))


@given(LISTS)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_locate_and_padded(lengths: Any) -> None:
    rows = [x[0] for x in lengths]
    cuts, total = starts(rows), sum(rows)
    b, i = locate(cuts, total)
    assert list(zip(b.tolist(), i.tolist(), strict=True)) == [(n, j) for n, m in enumerate(rows) for j in range(m)]
    x = torch.arange(2.0 * total).view(1, 2, total)
    whole = padded(x, cuts, max(rows))
    for n, own in enumerate(x[0].split(rows, 1)):
        assert torch.equal(whole[n, :, : rows[n]], own) and not whole[n, :, rows[n] :].any()
    assert torch.equal(sums(x, cuts), whole.sum(2))


# ---------------------------------------------------------------------------------------------------------- bad input


def changed(**words: Any) -> dict[str, Any]:
    q, k, v, cu_q, cu_k = packed(grad=False)
    return {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k} | words


CUTS = starts([x[0] for x in LENGTHS])
BAD: dict[str, tuple[dict[str, Any], type, str]] = {
    "floating starts": ({"cu_seqlens_q": CUTS.float()}, TypeError, "cu_seqlens_q: expected an integer tensor, got"),
    "starts beyond int32": ({"cu_seqlens_q": CUTS + 2**32 * (torch.arange(7) == 6)}, ValueError, "cu_seqlens_q: .* 99"),
    "a list": ({"cu_seqlens_q": CUTS.tolist()}, TypeError, "cu_seqlens_q: expected an integer tensor, got list"),
    "two dims": ({"cu_seqlens_q": CUTS[None]}, ValueError, r"cu_seqlens_q: expected shape \(B \+ 1,\)"),
    "no start": ({"cu_seqlens_q": CUTS[:0]}, ValueError, r"cu_seqlens_q: expected shape \(B \+ 1,\)"),
    "not from zero": ({"cu_seqlens_q": CUTS + 1}, ValueError, "cu_seqlens_q: .* from 0 to the 99 packed rows, got 1"),
    "not to the end": ({"cu_seqlens_q": CUTS.clamp_max(90)}, ValueError, "cu_seqlens_q: .* got 0 to 90"),
    "descending": ({"cu_seqlens_q": CUTS[[0, 2, 1, 4, 3, 5, 6]]}, ValueError, "cu_seqlens_q: .* one that descends"),
    "another device": ({"cu_seqlens_k": CUTS.to("meta")}, ValueError, "cu_seqlens_k: expected q's device cpu"),
    "another batch": ({"cu_seqlens_k": torch.tensor([0, 103]).int()}, ValueError, "cu_seqlens_k: expected"),
    "four dims": ({"q": torch.zeros(1, 99, 2, 16)}, ValueError, r"q: expected packed \(T, H, D\)"),
    "heads": ({"k": torch.zeros(103, 3, 16), "v": torch.zeros(103, 3, 16)}, ValueError, "k: 3 key-value heads"),
    "dtype": ({"k": torch.zeros(103, 1, 16).half()}, TypeError, "k: expected q's torch.float32"),
    "longest": ({"max_seqlen_q": 39}, ValueError, "max_seqlen_q: a sequence is 40 long, got 39"),
    "longest, negative": ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q: expected None or an int >= 0, got -1"),
    "longest, of numpy": ({"max_seqlen_q": np.uint8(39)}, ValueError, "max_seqlen_q: a sequence is 40 long, got 39"),
    "longest, of torch": ({"max_seqlen_k": torch.tensor(69)}, ValueError, "max_seqlen_k: .* 70 long, got 69"),
    "longest, a flag": ({"max_seqlen_k": True}, TypeError, "max_seqlen_k: expected None or an int"),
    "starts that are flags": ({"cu_seqlens_k": CUTS > 0}, TypeError, "cu_seqlens_k: .* integer tensor, got torch.bool"),
    "longest, a float": ({"max_seqlen_k": 90.0}, TypeError, "max_seqlen_k: expected None or an int"),
    "alignment": ({"causal": True}, ValueError, "alignment: causal or window needs .*one tensor of starts"),
    "two alignments": (
        {"mask": Mask.causal("top_left"), "alignment": "bottom_right"}, ValueError, "alignment: expected that of all",
    ),
    "slopes": ({"alibi_slopes": torch.zeros(5, 2), "alignment": "top_left"}, ValueError, "alibi_slopes: expected"),
    "bias": ({"bias": torch.zeros(40, 71)}, ValueError, "bias: shape .* does not broadcast"),
    "mask": ({"mask": torch.ones(7, 1, 1, 70, dtype=torch.bool)}, ValueError, "mask: shape .* does not broadcast"),
    "sdpa": ({"backend": "sdpa", "return_lse": True}, fused_attn.BackendError, "torch's kernel has no log-sum-exp"),
    "hopper": ({"backend": "hopper"}, fused_attn.BackendError, "a ragged batch is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    words, error, message = BAD[name]
    if name == "hopper":
        pytest.importorskip("triton")
    with pytest.raises(error, match=message):
        attention_varlen(**changed(**words))


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int16, torch.int64, torch.uint64))
def test_starts_are_integers_of_any_width(backend: str, dtype: torch.dtype) -> None:
    """Also one tensor for both, which says that they are alike, so that causal needs no alignment."""
    q, k, v, *cuts = packed(grad=False)
    expected = attention_varlen(q, k, v, *cuts, backend=backend)
    assert torch.equal(attention_varlen(q, k, v, *(x.to(dtype) for x in cuts), backend=backend), expected)
    starts = cuts[0].to(dtype)
    found = attention_varlen(q, q, q, starts, starts, causal=True, backend=backend)
    assert torch.equal(found, attention_varlen(q, q, q, cuts[0], cuts[0], causal=True, backend=backend))


@pytest.mark.parametrize("kind", (np.int8, np.uint64, torch.tensor), ids=lambda kind: kind.__name__)
def test_max_seqlen_of_any_integer_type(kind: Any) -> None:
    """It says the shape of a mask."""
    words = {"mask": torch.rand(6, 1, 50, 90) < 0.5}
    expected = attention_varlen(**changed(max_seqlen_q=50, max_seqlen_k=90, **words))
    given = changed(max_seqlen_q=kind(50), max_seqlen_k=kind(90), **words)
    assert torch.equal(attention_varlen(**given), expected)


def test_explain() -> None:
    q, k, v, *cuts = packed(grad=False)
    words = {"cu_seqlens_q": cuts[0], "cu_seqlens_k": cuts[1]}
    assert fused_attn.explain(q, k, v, **words).backend == "sdpa"
    assert fused_attn.explain(q, k, v, **words, softcap=2.0).backend == "tiled"
    with pytest.raises(ValueError, match="alignment: causal or window"):
        fused_attn.explain(q, k, v, **words, causal=True)


def test_starts_on_a_device_are_checked_under_debug() -> None:
    here = torch.zeros(1)
    with FakeTensorMode():
        there = torch.empty(1, device="cuda")  # outside the mode, no more than its device
    assert checks.readable(here) and not checks.readable(there)
    with fused_attn.debug():
        assert checks.readable(there)
        with fused_attn.debug(False):
            assert not checks.readable(there)
    assert not checks.readable(there)


def test_alignment_is_optional_for_equal_lengths() -> None:
    q, k, v, cuts, _ = packed(tuple((n, n) for n in (5, 0, 9)), grad=False)
    same = [attention_varlen(q, k, v, cuts, cuts, causal=True, alignment=x) for x in (None, "top_left", "bottom_right")]
    assert all(torch.equal(same[0], x) for x in same)


def test_flops_count_existing_scores() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    tensors = packed()
    count = sum(m * n for m, n in LENGTHS)
    with FlopCounterMode(display=False) as counter:
        out = attention_varlen(*tensors, backend="tiled")
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 2 * 2 * 2 * count * 16
    assert counter.get_total_flops() == forward + 5 * 2 * 2 * count * 16


def test_pairs_of_options() -> None:
    """Two at a time, on tiled against the reference, through the one tolerance rule."""
    options = {"causal": True, "softcap_tensor": True, "sink": True, "dropout_p": 0.3, "alibi": "bh", "bias": "b11n"}
    for one, two in itertools.combinations(options, 2):
        words = {one: options[one], two: options[two], "softcap": 3.0 if "softcap_tensor" in (one, two) else None}
        case = testing.Case("here", lengths=((9, 12), (0, 3), (5, 0), (20, 18)), d=8, alignment="bottom_right", **words)
        testing.check_parity(case, "tiled")
