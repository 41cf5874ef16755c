"""PyTorch backends against numerical derivatives in float64; torch.func transforms are right or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fused_attn
from fused_attn import testing
from fused_attn.testing.cases import EVERYTHING, Case
from tests.parity import within_budget

SMALL = {"hq": 2, "m": 4, "n": 5, "d": 3, "dv": 2}
CASES = {
    c.name: c
    for c in (
        Case("plain", **SMALL),
        Case("causal_lse", **SMALL, causal=True, alignment="top_left", return_lse=True),
        Case("window_tall", **SMALL | {"m": 6, "n": 3}, window=(1, 0), alignment="bottom_right", return_lse=True),
        Case("masked_rows", **SMALL | {"m": 6}, masks=("some_rows",), return_lse=True),
        Case("lengths", **SMALL, b=2, masks=("lengths",)),
        Case("gqa", **SMALL | {"hq": 4, "hkv": 2}),
        Case("bias", **SMALL, bias="h1n"),
        Case("alibi", **SMALL, alibi="bh", alignment="bottom_right"),
        Case("softcap", **SMALL, softcap=0.7, softcap_tensor=True, return_lse=True),
        Case("scale", **SMALL, scale_tensor="h"),
        Case("sink", **SMALL | {"m": 6}, sink=True, masks=("some_rows",), return_lse=True),
        Case("dropout", **SMALL, dropout_p=0.3),
        Case("empty", **SMALL | {"n": 0}, sink=True, return_lse=True),
        Case("everything", softcap_tensor=True, scale_tensor="h", **EVERYTHING | SMALL | {"hkv": 1}),
    )
}


def function_of(case: Case, backend: str | None) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A case as a function of its differentiable tensors alone."""
    inputs = testing.make_inputs(case, torch.float64)
    names = ["alibi_slopes" if x == "slopes" else x for x in inputs.clean]

    def call(*tensors: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return fused_attn.attention(**inputs.kwargs | dict(zip(names, tensors, strict=True)), backend=backend)

    return call, [x.clone().requires_grad_() for x in inputs.clean.values()]


@pytest.mark.parametrize("backend", ("tiled", "reference"))
@pytest.mark.parametrize("name", CASES)
def test_gradcheck(backend: str, name: str) -> None:
    call, leaves = function_of(CASES[name], backend)
    finite = call if not CASES[name].return_lse else lambda *x: [y.nan_to_num(neginf=0.0) for y in call(*x)]
    assert gradcheck(finite, leaves, check_forward_ad=False)


@pytest.mark.parametrize("backend", ("tiled", "reference"))
@pytest.mark.parametrize("name", CASES)
def test_forward_ad(backend: str, name: str) -> None:
    """Forward-mode derivatives against numerical ones."""
    call, leaves = function_of(CASES[name], backend)
    finite = call if not CASES[name].return_lse else lambda *x: [y.nan_to_num(neginf=0.0) for y in call(*x)]
    assert gradcheck(finite, leaves, check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("backend", ("tiled", "reference"))
@pytest.mark.parametrize("name", ("plain", "window_tall", "masked_rows", "gqa", "sink", "dropout", "everything"))
def test_gradgradcheck(backend: str, name: str) -> None:
    """Double backward against numerical derivatives of the backward."""
    call, leaves = function_of(CASES[name], backend)
    finite = call if not CASES[name].return_lse else lambda *x: [y.nan_to_num(neginf=0.0) for y in call(*x)]
    assert gradgradcheck(finite, leaves)


# ------------------------------------------------------------------------------------------------------- transforms


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def qkv(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, 2, 5, 4, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))


TRANSFORMS = {
    "grad": lambda f, q, k, v: torch.func.grad(lambda x: f(x, k, v).sin().sum())(q),
    "jvp": lambda f, q, k, v: torch.func.jvp(lambda x: f(x, k, v), (q,), (v,))[1],
    "vmap": lambda f, q, k, v: torch.func.vmap(lambda x: f(x, k, v))(torch.stack((q, v))),
    "vmap_grad": lambda f, q, k, v: torch.func.vmap(torch.func.grad(lambda x: f(x, k, v).sin().sum()))(
        torch.stack((q, v))
    ),
    "jvp_of_grad": lambda f, q, k, v: torch.func.jvp(torch.func.grad(lambda x: f(q, x, v).sin().sum()), (k,), (v,))[1],
    "hessian": lambda f, q, k, v: torch.func.hessian(lambda x: f(x, k, v).sin().sum())(q),
    "dual": lambda f, q, k, v: dual(f, q, k, v),
    "double_backward": lambda f, q, k, v: double_backward(f, q, k, v),
}


def dual(f: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(q, forward_ad.make_dual(k, v), v)).tangent


def double_backward(f: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(q, k, v).sin().sum(), q, create_graph=True)
    return torch.autograd.grad(first.square().sum(), q)[0]


@pytest.mark.parametrize(
    ("backend", "transform"),
    # Left to itself, dispatch may take torch's own operator, which says no to a double backward only when it is asked.
    [(b, t) for b in ("tiled", "reference", None) for t in TRANSFORMS if b or t != "double_backward"],
)
def test_transforms_are_right(backend: str | None, transform: str) -> None:
    """With no backend named, dispatch finds one that has the transform."""
    run = TRANSFORMS[transform]
    got = run(lambda q, k, v: fused_attn.attention(q, k, v, backend=backend), *qkv())
    within_budget(transform, got, run(naive, *qkv()), run(naive, *qkv(torch.float32)))


@pytest.mark.parametrize("backend", ("triton", "sdpa"))
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_refused(backend: str, transform: str) -> None:
    """Never a silent zero: a backend without the transform raises."""
    if testing.why_not("plain", backend):
        pytest.skip(testing.why_not("plain", backend)[0])
    run, inputs = TRANSFORMS[transform], qkv(torch.float32)
    if (backend, transform) == ("sdpa", "double_backward"):  # the one that it has
        got = run(lambda q, k, v: fused_attn.attention(q, k, v, backend=backend), *inputs)
        within_budget(transform, got, run(naive, *qkv()), run(naive, *inputs))
        return
    with pytest.raises(NotImplementedError):
        run(lambda q, k, v: fused_attn.attention(q, k, v, backend=backend), *inputs)


def test_float64_agrees_with_torch() -> None:
    """The oracle itself against torch's math backend, where that is exact: an oracle needs a witness."""
    q, k, v = (torch.randn(2, h, 9, 8, dtype=torch.float64) for h in (4, 2, 2))
    bias = torch.randn(2, 1, 9, 9, dtype=torch.float64)
    exact, plain = (
        torch.nn.functional.scaled_dot_product_attention(*x[:3], attn_mask=x[3], enable_gqa=True)
        for x in ((q, k, v, bias), [x.float() for x in (q, k, v, bias)])
    )
    within_budget("out", fused_attn.attention(q, k, v, bias=bias, backend="reference"), exact, plain)


def test_half_precision_is_computed_in_float32() -> None:
    case = replace(testing.CASES["plain"], backward=False)
    inputs = testing.make_inputs(case, torch.bfloat16)
    out = testing.run_public(inputs, "reference")["out"]
    exact = testing.expect(inputs).oracle["out"]
    assert torch.equal(out, exact.float().bfloat16()) or (out - exact).abs().max() <= exact.abs().max() * 2**-8
