"""torch's CPU kernel as the `sdpa` backend: its inputs, unseen keys, and the corrections of its results."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attn
from fused_attn import Mask, attention, attention_varlen, testing
from fused_attn.api import attention as api
from fused_attn.backends.sdpa import kernel, pieces
from fused_attn.runtime import call_cache
from fused_attn.testing import Case
from tests.parity import within_budget

HALF = (torch.float16, torch.bfloat16)
SMALL = {"b": 2, "hq": 4, "m": 33, "d": 16}
QKV = ("q", "k", "v")
SHAPES = ("bhmn", "b1mn", "1hmn", "11mn", "b11n", "1h1n", "111n", "bhm1", "11m1", "1111")
TAKEN = {
    **{f"bias {x}": Case("here", **SMALL, bias=x, needs=QKV) for x in SHAPES},
    "mask": Case("here", **SMALL, masks=("random_11mn",)),
    "mask and bias": Case("here", **SMALL, masks=("random_11mn",), bias="b11n", needs=QKV),
    "mask, causal": Case("here", **SMALL, masks=("random_11mn",), causal=True),
    "mask, grouped": Case("here", **SMALL | {"hkv": 2}, masks=("random_11mn",)),
    "grouped, causal": Case("here", **SMALL | {"hkv": 1}, causal=True),
    "cross": Case("here", **SMALL, n=47, bias="11mn", needs=QKV),
    "one query": Case("here", b=2, hq=4, m=1, n=47, d=16, bias="b11n", needs=QKV),
    "one query, grouped": Case("here", b=2, hq=4, hkv=2, m=1, n=47, d=16, bias="b11n", needs=QKV),
    "one query a head, grouped": Case("here", b=2, hq=4, hkv=2, m=1, n=47, d=16, bias="bhmn", needs=QKV),
    "bshd": Case("here", **SMALL, layout="bshd", bias="11mn", needs=QKV),
}


@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
@pytest.mark.parametrize("name", TAKEN)
def test_supported_calls_go_to_torch(name: str, dtype: torch.dtype) -> None:
    """Masks and biases of every broadcast shape, each twice more, when the call is one of those made before."""
    assert testing.why_not(TAKEN[name], "sdpa", dtype) == []
    testing.check_parity(TAKEN[name], "sdpa", dtype)
    inputs = testing.make_inputs(TAKEN[name], dtype)
    assert fused_attn.explain(*inputs.qkv, **inputs.kwargs).backend == "sdpa"
    expected = testing.expect(inputs)
    for _ in range(3):
        testing.compare(inputs, testing.run_public(inputs, None), expected, name)


def test_bias_that_requires_grad_goes_to_tiled() -> None:
    q, bias = torch.randn(1, 2, 5, 8), torch.zeros(5, 5, requires_grad=True)
    assert fused_attn.explain(q, q, q, bias=bias).backend == "tiled"
    with torch.no_grad():
        assert fused_attn.explain(q, q, q, bias=bias).backend == "sdpa"


@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
@pytest.mark.parametrize("grad", (False, True), ids=("inference", "training"))
@pytest.mark.parametrize("name", QKV)
def test_zero_tensors(name: str, grad: bool, compiled: bool) -> None:
    """torch's dispatcher gives them strides of 0, which torch's kernel does not heed."""
    tensors = {x: torch.randn(1, 2, 5, 8) for x in QKV}
    dense = tensors | {name: torch.zeros(1, 2, 5, 8)}
    tensors[name] = torch._efficientzerotensor((1, 2, 5, 8))

    def outcome(tensors: dict[str, Tensor]) -> list[Tensor]:
        leaves = [x.requires_grad_() if grad else x for x in tensors.values()]
        out = function(*leaves)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)] if grad else [out]

    function = attention
    expected = outcome(dense)
    function = torch.compile(attention, backend="eager") if compiled else attention
    assert all(map(torch.equal, outcome(tensors), expected))


# ------------------------------------------------------------------------------------------------------------- pieces


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Scores of a head that each call of the kernel computes from here on."""
    found: list[int] = []

    def spy(q: Tensor, k: Tensor, *rest: Any, **more: Any) -> Any:
        found.append(q.shape[0] * q.shape[2] * k.shape[2])
        return inner(q, k, *rest, **more)

    inner = kernel.sdpa_on_cpu
    monkeypatch.setattr(kernel, "sdpa_on_cpu", spy)
    return found


LENGTHS = torch.tensor([70, 41, 0, 16])
IDS = torch.tensor([0] * 20 + [1] * 33 + [4] * 17)
PIECES: dict[str, tuple[dict[str, Any], int]] = {
    "lengths": ({"mask": Mask.lengths(LENGTHS)}, 70 * (70 + 48 + 16)),
    "lengths of both": ({"mask": Mask.lengths(LENGTHS, LENGTHS)}, 70 * 70 + 41 * 48 + 16 * 16),
    "lengths, causal": ({"mask": Mask.lengths(LENGTHS), "causal": True}, 70 * (70 + 48 + 16)),
    "segments": ({"mask": Mask.segments(IDS)}, 4 * (20 * 32 + 33 * 48 + 17 * 17)),
    "segments, causal": ({"mask": Mask.segments(IDS), "causal": True}, 4 * (20 * 32 + 33 * 48 + 17 * 17)),
    "segments of some": ({"mask": Mask.segments(IDS, IDS - 1)}, 4 * 20 * 48),
    "segments, tensor": ({"mask": Mask.segments(IDS) & (torch.rand(70, 70) > 0.3)}, 4 * (20 * 32 + 33 * 48 + 17 * 17)),
}  # fmt: skip


def judged(call: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> None:
    """out and gradients of a call by no backend in particular, against the reference in float64.

    A of the rule is the largest value's everywhere: a row that sees one key has gradients that cancel to zero.
    """
    leaves = [x.clone().requires_grad_() for x in tensors]
    exact = [x.double().requires_grad_() for x in tensors]
    out, oracle = call(*leaves), call(*exact, backend="reference")
    dout = torch.randn_like(out)
    got = [out, *torch.autograd.grad(out, leaves, dout)]
    wanted = [oracle, *torch.autograd.grad(oracle, exact, dout.double())]
    plain = call(*leaves, backend="reference")
    plains = [plain, *torch.autograd.grad(plain, leaves, dout)]
    for name, x, y, z in zip(("out", "q", "k", "v"), got, wanted, plains, strict=True):
        absolute = y.abs().amax().expand_as(y)
        testing.assert_within_budget(name, x, y, z, absolute, torch.float32)


@pytest.mark.parametrize("group", (1, 2))
@pytest.mark.parametrize("name", PIECES)
def test_invisible_keys_are_skipped(name: str, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options, scores = PIECES[name]
    q, k, v = torch.randn(4, 4, 70, 16), *(torch.randn(4, 4 // group, 70, 16) for _ in range(2))
    calls = counted(monkeypatch)
    assert fused_attn.explain(q, k, v, **options).backend == "sdpa"
    judged(lambda *x, **more: attention(*x, **options, **more), (q, k, v))
    assert sum(calls) == scores


def padding(lengths: Tensor, n: int, left: bool = False) -> Tensor:
    at = torch.arange(n)
    seen = at < lengths[:, None]
    return seen.flip(1) if left else seen


PADDED = {
    "right": padding(LENGTHS, 70)[:, None, None],
    "left": padding(LENGTHS, 70, left=True)[:, None, None],
    "one for all": padding(LENGTHS[1:2], 70)[:, None, None],
    "expanded": padding(LENGTHS, 70)[:, None, None].expand(-1, 1, 70, -1),
    "in full": padding(LENGTHS, 70)[:, None, None].expand(-1, 1, 70, -1).contiguous(),
}


@pytest.mark.parametrize("options", ({}, {"causal": True}), ids=("full", "causal"))
@pytest.mark.parametrize("name", PADDED)
def test_mask_padding_is_skipped(name: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bool mask that hides the ends of the keys from all rows costs what lengths cost."""
    monkeypatch.setattr(pieces, "PADDED", 1)
    calls = counted(monkeypatch)
    q, k, v = (torch.randn(4, 2, 70, 16) for _ in range(3))
    for _ in range(3):
        judged(lambda *x, **more: attention(*x, mask=PADDED[name], **options, **more), (q, k, v))
    assert sum(calls) < 3 * 4 * 70 * 70


@pytest.mark.parametrize("mask", (padding(LENGTHS, 70)[:, None, None] ^ (torch.arange(70) == 3),
                                  torch.rand(4, 1, 70, 70) > 0.5, torch.ones(4, 1, 1, 70, dtype=torch.bool)),
                         ids=("hole", "random", "nothing"))  # fmt: skip
def test_other_masks_are_additive(mask: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PADDED", 1)
    calls = counted(monkeypatch)
    q, k, v = (torch.randn(4, 2, 70, 16) for _ in range(3))
    judged(lambda *x, **more: attention(*x, mask=mask, **more), (q, k, v))
    assert calls == [4 * 70 * 70]


@pytest.mark.parametrize("options", ({"mask": Mask.window(3, 0)}, {"mask": Mask.prefix(torch.tensor([35]))},
                                     {"causal": True, "alignment": "bottom_right"}),
                         ids=("window", "prefix", "bottom right"))  # fmt: skip
def test_other_spans_go_to_tiled(options: dict[str, Any]) -> None:
    q, k = torch.randn(1, 2, 40, 16), torch.randn(1, 2, 50 if "causal" in options else 40, 16)
    assert fused_attn.explain(q, k, k, **options).backend == "tiled"


def test_small_pieces_go_to_tiled() -> None:
    q = torch.randn(1, 2, 40, 16)
    assert fused_attn.explain(q, q, q, mask=Mask.segments(torch.arange(40) // 2)).backend == "tiled"


# ------------------------------------------------------------------------------------------------------- what is mended


@pytest.mark.parametrize("bad", (math.nan, math.inf))
@pytest.mark.parametrize("name", ("k", "v"))
@pytest.mark.parametrize("options", ({"mask": Mask.lengths(LENGTHS)}, {"causal": True, "alignment": "top_left"}),
                         ids=("lengths", "causal"))  # fmt: skip
def test_invisible_keys_may_hold_nan(options: dict, name: str, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those behind the end of a sequence, of which the kernel reads some, and those behind the last diagonal."""
    q, k, v = torch.randn(4, 2, 33, 16), torch.randn(4, 2, 70, 16), torch.randn(4, 2, 70, 16)
    assert fused_attn.explain(q, k, v, **options).backend == "sdpa"
    expected = attention(q, k, v, **options)
    hidden = {"k": k, "v": v}[name]
    hidden[1, :, 41:] = bad
    hidden[2, :, 33:] = bad
    torch.testing.assert_close(attention(q, k, v, **options), expected)


@pytest.mark.parametrize("again", (0, 3), ids=("first", "repeated"))
@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
def test_nan_propagates(dtype: torch.dtype, again: int) -> None:
    """In any row of q, the whole of it too, in k, and in a bias."""
    q, k, v, bias = (torch.randn(s, dtype=dtype) for s in ((1, 2, 35, 16), (1, 2, 70, 16), (1, 2, 70, 16), (35, 70)))
    for _ in range(again):
        attention(q, k, v), attention(q, k, v, bias=bias)
    whole, key, plane = q.clone(), k.clone(), bias.clone()
    whole[0, 0, 7], key[0, 1, 9, 3], plane[3, 5] = math.nan, math.nan, math.nan
    assert attention(whole, k, v)[0, 0, 7].isnan().all()
    assert attention(whole, k, v)[0, 0, 8].isfinite().all()
    assert attention(q, key, v)[0, 1].isnan().all()
    assert attention(q, k, v, bias=plane)[:, :, 3].isnan().all()


@pytest.mark.parametrize("value", (-1e4, -1e9, torch.finfo(torch.float32).min))
def test_rows_of_a_finite_minimum(value: float) -> None:
    """Their weights are equal, in the gradient too."""
    mask = torch.zeros(4, 4)
    mask[1] = value
    q, k, v = (torch.randn(1, 1, 4, 16) for _ in range(3))
    assert fused_attn.explain(q, k, v, bias=mask).backend == "sdpa"
    for _ in range(3):
        judged(lambda *x, **more: attention(*x, bias=mask.to(x[0].dtype), **more), (q, k, v))


@pytest.mark.parametrize("value", (100.0, 1000.0, 65536.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_equal_large_logits(value: float, dtype: torch.dtype) -> None:
    q, k = (torch.full((1, 1, n, 16), value, dtype=dtype) for n in (4, 16))
    v = torch.randn(1, 1, 16, 16).to(dtype).requires_grad_()
    for _ in range(3):
        (found,) = torch.autograd.grad(attention(q, k, v).sum(), v)
        assert torch.equal(found, torch.full_like(v, 0.25))


@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
def test_a_mask_in_vector_instructions(dtype: torch.dtype) -> None:
    """Bytes of a mask become 0 and -inf, however they lie and whatever a byte that is not 0 holds."""
    dense = torch.rand(2, 1, 65, 70) > 0.5
    odd = torch.randint(0, 3, (2, 1, 65, 70), dtype=torch.uint8).view(torch.bool)
    for mask in (dense, dense.mT, dense.expand(2, 3, 65, 70), odd):
        assert mask.numel() > kernel.FEW
        added = kernel.additive_mask(mask, None, dtype)
        assert torch.equal(
            added, torch.zeros(mask.shape, dtype=dtype).masked_fill_(mask.view(torch.uint8) == 0, -math.inf)
        )


def test_fully_masked_rows() -> None:
    """Zeros, and no gradient, whatever their cotangent is."""
    mask = torch.rand(6, 6) > 0.3
    mask[2] = False
    q, k, v = (torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3))
    out = attention(q, k, v, mask=mask, backend="sdpa")
    assert (out[:, :, 2] == 0).all()
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    assert (grads[0][:, :, 2] == 0).all()
    dout[:, :, 2] = 1e30
    assert all(map(torch.equal, grads, torch.autograd.grad(out, (q, k, v), dout)))


@pytest.mark.parametrize("name", ("k", "v"))
@pytest.mark.parametrize("m", (1, 4, 17))
@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
def test_gradients_ignore_keys_after_the_last_row(compiled: bool, m: int, name: str) -> None:
    """The kernel's backward multiplies what its forward never reads."""
    if compiled and m != 4:
        pytest.skip("one size is compiled")

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal=True, alignment="top_left")

    given = {"q": torch.randn(2, 2, m, 8), "k": torch.randn(2, 2, 33, 8), "v": torch.randn(2, 2, 33, 8)}
    clean = [x.clone().requires_grad_() for x in given.values()]
    given[name][:, :, m:] = math.nan
    dirty = [x.requires_grad_() for x in given.values()]
    run = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
    wanted, got = (torch.autograd.grad(f(*x).sum(), x) for f, x in ((call, clean), (run, dirty)))
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", (None, "sdpa", "tiled", "reference"))
def test_a_scale_of_zero_hides_no_nan(backend: str | None) -> None:
    q, k = torch.randn(1, 1, 2, 64), torch.randn(1, 1, 5, 64)
    q[0, 0, 0, 3] = math.nan
    out = attention(q, k, k, scale=0.0, backend=backend)
    assert out[0, 0, 0].isnan().all() and out[0, 0, 1].isfinite().all()


# ---------------------------------------------------------------------------------------------------- repeated calls


@pytest.mark.parametrize("given", ("mask", "bias"))
@pytest.mark.parametrize("rank", (2, 3, 4))
def test_masks_of_any_rank_are_repeated(given: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And queries without heads or batch, in the SDPA wrapper."""
    mask = torch.rand(9, 9)[(None,) * (rank - 2)]
    mask = mask > 0.3 if given == "mask" else mask
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    expected = attention(q, k, v, **{given: mask})
    wrapped = fused_attn.scaled_dot_product_attention
    fewer = [x[0] for x in (q, k, v)] if rank < 4 else [q, k, v]
    attention(q, k, v, **{given: mask}), wrapped(*fewer, mask), wrapped(*fewer, mask)
    monkeypatch.setattr(api, "bind", lambda *x, **more: pytest.fail("bound again"))
    assert torch.equal(attention(q, k, v, **{given: mask}), expected)
    assert torch.equal(wrapped(*fewer, mask).view_as(expected), expected)


def test_repeated_calls_have_the_strides_of_the_first() -> None:
    q, k = torch.randn(1, 3, 5, 7).expand(3, -1, -1, -1), torch.randn(3, 3, 2, 7)
    assert len({attention(q, k, k).stride() for _ in range(4)}) == 1


@pytest.mark.parametrize("grad", (False, True), ids=("inference", "training"))
@pytest.mark.parametrize("name", ("bias b1mn", "mask", "grouped, causal", "bshd"))
def test_third_call_skips_binding(name: str, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = testing.make_inputs(replace(TAKEN[name], backward=grad, memory="dense"))

    def call() -> Tensor:
        with torch.set_grad_enabled(grad):
            return attention(*inputs.qkv, **inputs.kwargs)

    call(), call()
    monkeypatch.setattr(api, "bind", lambda *x, **more: pytest.fail("bound again"))
    expected = testing.expect(inputs)
    testing.compare(inputs, testing.run_public(inputs, None) if grad else {"out": heads_first(inputs, call())},
                    expected, name)  # fmt: skip


def heads_first(inputs: testing.Inputs, out: Tensor) -> Tensor:
    return out.transpose(1, 2) if inputs.case.layout == "bshd" else out


@pytest.mark.parametrize("options", ({}, {"causal": True}), ids=("full", "causal"))
@pytest.mark.parametrize("grad", (False, True), ids=("inference", "training"))
@pytest.mark.parametrize("how", ("lengths", "padding b11n", "padding b1mn"))
def test_repeated_calls_read_changed_values(
    how: str, grad: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths and padding are read at each call, which gives the bits of a first call."""
    monkeypatch.setattr(pieces, "PADDED", 1)
    bound = []
    bind = api.bind
    monkeypatch.setattr(api, "bind", lambda *x, **more: bound.append(1) or bind(*x, **more))
    lengths = torch.zeros(2, dtype=torch.int64)
    mask: Any = Mask.lengths(lengths) if how == "lengths" else torch.zeros(2, 1, 33 if "m" in how else 1, 33).bool()

    def call(x: list[Tensor]) -> list[Tensor]:
        out = attention(*x, mask=mask, **options)
        if not grad:
            return [out]
        first = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return [out, *first, *torch.autograd.grad(sum(y.sum() for y in first), x)]

    call_cache._calls.clear()
    for step, own in enumerate(((33, 20), (33, 20), (33, 20), (5, 33), (5, 33), (0, 7), (19, 19), (33, 1))):
        lengths.copy_(torch.tensor(own))
        if how != "lengths":
            mask.copy_(padding(lengths, 33)[:, None, None])
        x = [torch.randn(2, 2, 33, 8, requires_grad=grad) for _ in QKV]
        bound.clear()
        found = call(x)
        assert len(bound) == (step < 2)
        with monkeypatch.context() as alone:
            alone.setattr(call_cache, "_calls", {})
            assert all(map(torch.equal, found, call(x)))
    if how == "lengths":
        lengths.fill_(34)
        with pytest.raises(ValueError, match=r"^Mask.lengths\(kv\): expected lengths from 0 to N = 33"):
            call(x)


def test_a_repeated_call_by_name_does_not_fall_back() -> None:
    """Lengths that give too many small pieces are refused, as by the first call of their shape."""
    q, k, lengths = torch.randn(32, 1, 128, 16), torch.randn(32, 1, 64, 16), torch.full((32,), 64)
    for _ in range(3):
        attention(q, k, k, mask=Mask.lengths(lengths), backend="sdpa")
    lengths.copy_(1 + torch.arange(32) % 2)
    with pytest.raises(fused_attn.BackendError, match="only full and top-left causal"):
        attention(q, k, k, mask=Mask.lengths(lengths), backend="sdpa")


def test_cached_calls_keep_no_tensor() -> None:
    import gc
    import weakref

    q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    for _ in range(3):
        attention(q, k, v, mask=torch.ones(9, 9, dtype=torch.bool)).sum().backward()
    gone = weakref.ref(q)
    del q
    gc.collect()
    assert gone() is None


# -------------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("name", ("mask", "grouped, causal", "bias b1mn", "lengths", "padding"))
def test_second_derivatives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of calls of torch's kernel, which has none: the same as the reference's, for one tensor given three times too."""
    monkeypatch.setattr(pieces, "PADDED", 1)
    options = {
        "mask": {"mask": torch.rand(1, 1, 9, 9) > 0.3}, "grouped, causal": {"causal": True},
        "bias b1mn": {"bias": torch.randn(2, 1, 9, 9)}, "lengths": {"mask": Mask.lengths(torch.tensor([9, 4]))},
        "padding": {"mask": padding(torch.tensor([9, 4]), 9)[:, None, None]},
    }[name]  # fmt: skip
    x = torch.randn(2, 2, 9, 8) / 2  # a second derivative of steep weights is ill-conditioned

    def second(dtype: torch.dtype, **more: Any) -> Tensor:
        own = x.to(dtype).requires_grad_()
        words = {
            key: y.to(dtype) if isinstance(y, Tensor) and y.is_floating_point() else y for key, y in options.items()
        }
        k = own[:, :1] * 2 if name.startswith("grouped") else own
        (first,) = torch.autograd.grad(attention(own, k, k, **words, **more).square().sum(), own, create_graph=True)
        return torch.cat([first.flatten(), torch.autograd.grad(first.square().sum(), own)[0].flatten()])

    oracle = second(torch.float64, backend="reference")
    absolute = oracle.abs().amax().expand_as(oracle)
    plain = second(torch.float32, backend="reference")
    assert fused_attn.explain(x, x, x, **options).backend == "sdpa"
    testing.assert_within_budget("second", second(torch.float32), oracle, plain, absolute, torch.float32)


def test_starts_that_change_after_the_call() -> None:
    """A second derivative is that of the sequences that there were."""
    q, k, starts = torch.randn(9, 2, 8, requires_grad=True), torch.randn(9, 2, 8), torch.tensor([0, 4, 9]).int()
    loss = attention_varlen(q, k, k, starts, starts).square().sum()
    (before,) = torch.autograd.grad(loss, q, create_graph=True)
    starts[1] = 7
    (after,) = torch.autograd.grad(loss, q, create_graph=True)
    assert torch.equal(before, after)


def test_a_decoded_out_may_be_changed_in_place() -> None:
    """Query heads of a group are folded into rows, and what comes back is no view."""
    q, k = torch.randn(2, 4, 1, 8, requires_grad=True), torch.randn(2, 2, 9, 8)
    for _ in range(3):
        out = attention(q, k, k)
        (expected,) = torch.autograd.grad(out.sum(), q, retain_graph=True)
        out += 1.0
        assert torch.equal(torch.autograd.grad(out.sum(), q)[0], expected)


def test_batched_gradients_of_pieces() -> None:
    q, k = torch.randn(2, 4, 9, 8, requires_grad=True), torch.randn(2, 2, 9, 8)
    out = attention(q, k, k, mask=Mask.lengths(torch.tensor([3, 7])))
    douts = torch.randn(2, *out.shape)
    (batched,) = torch.autograd.grad(out, q, douts, is_grads_batched=True, retain_graph=True)
    for x, dout in zip(batched, douts, strict=True):
        torch.testing.assert_close(x, torch.autograd.grad(out, q, dout, retain_graph=True)[0])


# --------------------------------------------------------------------------------------------------------- compilers


def test_compiled_calls_recompute_wrong_results() -> None:
    """The operator, which a compiler sees, finds NaN and rows of a finite minimum by itself."""
    compiled = torch.compile(lambda q, k, v, bias: attention(q, k, v, bias=bias), backend="aot_eager", fullgraph=True)
    q, k, v = (torch.randn(1, 2, 9, 16, requires_grad=True) for _ in range(3))
    bias = torch.zeros(9, 9)
    bias[1] = -1e9
    got, plain = (torch.autograd.grad(f(q, k, v, bias).sum(), (q, k, v)) for f in (compiled, plainly))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    oracle = torch.autograd.grad(plainly(*exact, bias.double()).sum(), exact)
    for name, *columns in zip(("dq", "dk", "dv"), got, oracle, plain, strict=True):
        within_budget(name, *columns)
    with torch.no_grad():
        q[0, 0, 7] = math.nan
        assert compiled(q, k, v, bias)[0, 0, 7].isnan().all()


def plainly(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5 + bias, -1) @ v


@pytest.mark.parametrize("causal", (False, True))
def test_packed_sequences_equal_separate_calls(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, whatever they are packed with."""
    calls = counted(monkeypatch)
    x, starts = torch.randn(93, 2, 16), torch.tensor([0, 60, 60, 93], dtype=torch.int32)
    mask = Mask.lengths(torch.tensor([60, 60, 60]))  # bounds, of a sequence without rows too
    out = attention_varlen(x, x, x, starts, starts, causal=causal, mask=mask, max_seqlen_q=60, max_seqlen_k=60)
    assert calls == [60 * 60, 33 * 33]
    for own in (slice(0, 60), slice(60, 93)):
        alone = x[own].transpose(0, 1)[None]
        assert torch.equal(out[own].transpose(0, 1)[None], attention(alone, alone, alone, causal=causal))


def test_masks_of_packed_sequences() -> None:
    """They count from each sequence's first row, so the kernel is not given them."""
    x, starts, seen = torch.randn(30, 2, 16), torch.tensor([0, 17, 30], dtype=torch.int32), torch.rand(17, 17) > 0.3
    options = {"mask": seen, "max_seqlen_q": 17, "max_seqlen_k": 17}
    found = fused_attn.explain(x, x, x, cu_seqlens_q=starts, cu_seqlens_k=starts, **options)
    assert found.backend == "tiled" and "packed" in found.reasons["sdpa"][0]
    out = attention_varlen(x, x, x, starts, starts, **options)
    second = x[17:].transpose(0, 1)[None]
    torch.testing.assert_close(out[17:].transpose(0, 1)[None], attention(second, second, second, mask=seen[:13, :13]))
