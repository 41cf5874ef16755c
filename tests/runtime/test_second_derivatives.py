"""Second derivatives equal the reference's, and create_graph does not change the first.

Arguments that are one tensor, or made from one another, have partial derivatives of their own. A backward that goes
through the caller's graph counts them several times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import fused_attn
from fused_attn import attention, attention_varlen, scaled_dot_product_attention, scores, testing
from fused_attn.compat import flash_attn
from fused_attn.testing.cases import CASES, LEAVES
from tests.parity import within_budget

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning", "ignore:The PyTorch API of nested tensors"
)

Call = Callable[[Tensor, str], Tensor]  # what is to be differentiated, of x, by a backend


def numbers(x: Tensor) -> Tensor:
    """0 for NaN and infinities, which then have no part in a derivative."""
    return x.nan_to_num(0.0, 0.0, 0.0)


def derivatives(call: Call, x: Tensor, backend: str, create_graph: bool = True) -> tuple[Tensor, ...]:
    """The first gradient of x and, with create_graph, that of its sum with random weights."""
    (first,) = torch.autograd.grad(call(x, backend).sin().sum(), x, create_graph=create_graph)
    if not create_graph:
        return (first,)
    return first.detach(), torch.autograd.grad(numbers(first), x, leaf(*x.shape, seed=9).detach().to(x))[0]


def check(call: Call, x: Tensor, backend: str = "tiled") -> None:
    """Derivatives are the reference's, and NaN where it has NaN.

    Where arguments are made from one another, each gradient is a sum of all: so is A of the tolerance rule.
    """
    oracle = derivatives(call, x, "reference")
    plain = derivatives(call, x.detach().float().requires_grad_(), "reference")
    for create_graph in (False, True):
        found = derivatives(call, x, backend, create_graph)
        for name, *columns in zip(("first", "second"), found, oracle, plain, strict=False):
            absolute = numbers(columns[1]).abs().sum().expand_as(x)
            label = f"{name}, create_graph={create_graph}"
            testing.assert_within_budget(label, *columns, absolute, torch.float64)


def result(found: Any) -> Tensor:
    """One tensor of all results."""
    if not isinstance(found, tuple):
        return found
    return torch.cat([y.nan_to_num(neginf=0.0).flatten() for y in found if y is not None])


def leaf(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


# ------------------------------------------------------------------------------- arguments that depend on one another

SHAPE = (2, 2, 5, 4)
V = leaf(*SHAPE, seed=1).detach()
ALIKE: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "q is k is v": lambda x: (x, x, x),
    "q is k": lambda x: (x, x, V.to(x)),
    "k from q": lambda x: (x, x * 1.5, V.to(x)),
    "v from k": lambda x: (V.to(x), (k := x.sin()), k * k),
    "q from v": lambda x: (x @ (v := V.to(x)).mT @ v / 9, v, x),
    "views": lambda x: (x, x.flip(2), x.transpose(0, 1)),
}
# What is made from q, beside it: (5, 5) of its products, or as many numbers as there are heads.
PAIRS, HEADS = (lambda q: q[:1] @ q[:1].mT), (lambda q: q.square().mean((0, 2, 3)))
OPTIONS: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "plain": lambda q: {},
    "causal": lambda q: {"causal": True},
    "bias": lambda q: {"bias": PAIRS(q)},
    "scale": lambda q: {"scale": HEADS(q)},
    "softcap": lambda q: {"softcap": q.square().mean() + 1.0, "scale": HEADS(q)},
    "alibi": lambda q: {"alibi_slopes": HEADS(q)},
    "sink": lambda q: {"sink": HEADS(q), "window": (1, 0)},
    "sink is scale": lambda q: {"sink": (x := HEADS(q)), "scale": x, "alibi_slopes": x},
    "dropout": lambda q: {"dropout_p": 0.4, "seed": 3},
    "sigmoid": lambda q: {"normalizer": "sigmoid", "bias": PAIRS(q)},
    "softmax1": lambda q: {"normalizer": "softmax1"},
    "lse": lambda q: {"return_lse": True, "causal": True, "bias": PAIRS(q)},
    "bilinear": lambda q: {"score": scores.Bilinear(q[0].mT @ q[0] / 10)},
    "cosine": lambda q: {"score": scores.Cosine(HEADS(q))},
    "distance": lambda q: {"score": scores.Distance(1.0 + HEADS(q))},
    "additive": lambda q: {"score": scores.Additive(q[0, :, 0])},
    "bshd": lambda q: {"layout": "bshd"},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("alike", ALIKE)
def test_arguments_of_one_tensor(alike: str, options: str) -> None:
    def call(x: Tensor, backend: str) -> Tensor:
        q, k, v = ALIKE[alike](x)
        return result(attention(q, k, v, **OPTIONS[options](q), backend=backend))

    check(call, leaf(*SHAPE))


@pytest.mark.parametrize("options", [x for x in OPTIONS if x != "bshd"])
def test_second_derivatives_are_numerically_right(options: str) -> None:
    x = leaf(1, 1, 3, 2)

    def call(x: Tensor) -> Tensor:
        return result(attention(x, 2 * x, x, **OPTIONS[options](x), backend="tiled"))

    assert torch.autograd.gradgradcheck(call, [x])


def chained(inputs: testing.Inputs, x: Tensor) -> testing.Inputs:
    """The same inputs plus their parts of x, which is 0, each with derivatives by those before it.

    The values stay the case's own: to move huge ones would leave nothing but rounding errors to compare. NaN of one
    tensor's gradient is not handed on to those before it, so that the rest of theirs can be compared.
    """
    generator, tensors, change = torch.Generator().manual_seed(7), {}, x.new_zeros(())
    own = x.split([y.numel() for y in inputs.tensors.values()])
    for (name, y), part in zip(inputs.tensors.items(), own, strict=True):
        move = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(x) * change
        if move.requires_grad:
            move.register_hook(numbers)
        tensors[name] = y.detach().to(x) + part.view(y.shape) + move
        change = change + 0.1 * numbers(tensors[name]).mean() if y.numel() else change
        change = change - change.detach()
    return replace(inputs, tensors=tensors)


QUICK = {
    "causal", "distance", "everything", "lengths", "ragged_everything", "runs", "values_huge_equal", "values_nan_q",
    "window_sinks_wide",
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[] if x in QUICK else pytest.mark.nightly) for x, c in CASES.items()
     if torch.float64 in c.dtypes and "large" not in c.tags and c.backward and set(LEAVES) == set(c.needs)],
)  # fmt: skip
def test_every_case(name: str) -> None:
    """Every tensor of a case made from those before it. With an infinite scale all is NaN, and must stay so."""
    case = CASES[name]
    if case.values.startswith("nan"):
        case = replace(case, hq=2)  # a head without NaN beside the one that has it
    inputs = testing.make_inputs(case, torch.float64)

    def call(x: Tensor, backend: str) -> Tensor:
        made = chained(inputs, x)
        function: Any = attention if made.ragged is None else attention_varlen
        return result(function(*made.qkv, **made.kwargs, backend=backend))

    size = sum(y.numel() for y in inputs.tensors.values())
    check(call, torch.zeros(size, dtype=torch.float64, requires_grad=True))


# ------------------------------------------------------------------------------------------------------ entry points

STARTS = torch.tensor([0, 3, 3, 5], dtype=torch.int32)


def nested(x: Tensor) -> Tensor:
    q: Any = torch.nested.nested_tensor_from_jagged(x, STARTS.long())
    return attention(q, q, q, layout="bshd").values()


# Each of x (5, 2, 8), three times.
ENTRY_POINTS: dict[str, Callable[..., Any]] = {
    "attention": lambda x, **o: attention(x[None], x[None], x[None], layout="bshd", **o),
    "varlen": lambda x, **o: attention_varlen(x, x, x, STARTS, STARTS, **o),
    "sdpa": lambda x, **o: scaled_dot_product_attention(x, x, x, **o),
    "sdpa with mask": lambda x, **o: scaled_dot_product_attention(x, x, x, x[:1, :, :2], **o),
    "sdpa 5-d": lambda x, **o: scaled_dot_product_attention(x[None, None], x[None, None], x[None, None], **o),
}
# These take no backend; the variable names it.
BY_VARIABLE: dict[str, Callable[[Tensor], Any]] = {
    "flash_attn": lambda x: flash_attn.flash_attn_func(x[None], x[None], x[None], causal=True),
    "flash_attn varlen": lambda x: flash_attn.flash_attn_varlen_func(x, x, x, STARTS, STARTS, 3, 3),
    "flash_attn packed": lambda x: flash_attn.flash_attn_qkvpacked_func(torch.stack((x, x, x), 1)[None]),
    "module": lambda x: heads_of_16(x.dtype)(*[x.flatten(1)] * 3),
    "module without weights": lambda x: heads_of_16(x.dtype)(*[x.flatten(1)] * 3, need_weights=False)[0],
    "module in torch": lambda x: torch.nn.functional.layer_norm(
        heads_of_16(x.dtype)(*[x.flatten(1)] * 3, need_weights=False)[0], (16,)
    ),
}


def heads_of_16(dtype: torch.dtype) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return fused_attn.modules.MultiheadAttention(16, 2, dtype=dtype)


def test_jagged_tensors_are_refused() -> None:
    """torch cannot differentiate again where it makes a jagged tensor or takes its values."""
    x = leaf(5, 2, 8)
    with pytest.raises(NotImplementedError, match="nested"):
        derivatives(lambda x, _: nested(x), x, "tiled")


@pytest.fixture(params=[*ENTRY_POINTS, *BY_VARIABLE])
def entry_point(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """A call of x (5, 2, 8) and a backend."""

    def call(x: Tensor, backend: str) -> Tensor:
        if request.param in ENTRY_POINTS:
            return result(ENTRY_POINTS[request.param](x, backend=backend))
        monkeypatch.setenv("FUSED_ATTN_BACKEND", backend)
        return result(BY_VARIABLE[request.param](x))

    return call


def test_entry_points(entry_point: Callable[..., Tensor]) -> None:
    check(entry_point, leaf(5, 2, 8))


def test_errors_name_the_backends_with_second_derivatives(entry_point: Callable[..., Tensor]) -> None:
    """Kernels have the first derivative; what they lack is refused by name, and never a silent zero."""
    pytest.importorskip("triton")
    x = leaf(5, 2, 8).detach().float().requires_grad_()
    for _ in range(3):  # calls that are seen for the first time, learned and repeated
        out = entry_point(x, "triton")
        (first,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
        with pytest.raises(fused_attn.TransformError, match=r'"triton" .*double backward; "tiled" and "reference"'):
            first.sum().backward()
    (oracle,) = derivatives(entry_point, x.detach().double().requires_grad_(), "reference", create_graph=False)
    within_budget("first", first, oracle, derivatives(entry_point, x, "reference", create_graph=False)[0])


@pytest.mark.parametrize("backend", ("tiled", "reference", "triton"))
def test_forward_mode_is_right_or_refused(entry_point: Callable[..., Tensor], backend: str) -> None:
    x = leaf(5, 2, 8).detach().to(torch.float32 if backend == "triton" else torch.float64)
    with forward_ad.dual_level():
        try:
            entry_point(forward_ad.make_dual(x, x.flip(0)), backend)
        except NotImplementedError:  # TransformError, or torch's own of jagged tensors
            return
    assert backend != "triton"
    forward = {"check_forward_ad": True, "check_backward_ad": False, "fast_mode": True}
    assert torch.autograd.gradcheck(lambda x: entry_point(x, backend), [x.requires_grad_()], **forward)


@pytest.mark.parametrize("name", ("q", "k_cache", "v_cache", "k_new", "v_new", "sink", "alibi_slopes", "scale"))
def test_forward_mode_of_decoding_is_refused(name: str) -> None:
    shapes = {"q": 1, "k_cache": 5, "v_cache": 5, "k_new": 1, "v_new": 1}
    given = {x: torch.ones(1, n, 2, 8) for x, n in shapes.items()}
    given |= {"sink": torch.zeros(2), "alibi_slopes": torch.ones(2), "scale": torch.tensor(0.5)}
    lengths = torch.tensor([3], dtype=torch.int32)
    x = given[name]
    with pytest.raises(fused_attn.TransformError), forward_ad.dual_level():
        fused_attn.attention_decode(**given | {name: forward_ad.make_dual(x, x)}, cache_seqlens=lengths)
    with pytest.raises(fused_attn.TransformError):
        torch.func.jvp(lambda x: fused_attn.attention_decode(**given | {name: x}, cache_seqlens=lengths), (x,), (x,))


# ------------------------------------------------------------------------------------- transforms of a call made before


def vjp_of(backend: str, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """The backward of a call as a function of its cotangent, and two cotangents."""
    x, a, b = (leaf(1, 2, 5, 8, seed=seed).detach().to(dtype) for seed in range(3))
    out = attention(x.requires_grad_(), a, b, softcap=2.0, backend=backend)
    return lambda g: torch.autograd.grad(out, x, g, retain_graph=True)[0], a, b


def dual_of_vjp(vjp: Callable[[Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(vjp(forward_ad.make_dual(a, b))).tangent


OF_VJP: dict[str, Callable[..., Tensor]] = {
    "dual": dual_of_vjp,
    "jvp": lambda vjp, a, b: torch.func.jvp(vjp, (a,), (b,))[1],
    "jvp of vmap": lambda vjp, a, b: torch.func.jvp(torch.func.vmap(vjp), (a[None],), (b[None],))[1][0],
    "vmap of jvp": lambda vjp, a, b: torch.func.vmap(lambda t: torch.func.jvp(vjp, (a,), (t,))[1])(b[None])[0],
}


@pytest.mark.parametrize("backend", ("tiled", "reference"))
@pytest.mark.parametrize("transform", OF_VJP)
def test_forward_mode_of_a_backward(transform: str, backend: str) -> None:
    """It is linear, so its derivative in a direction is its value there."""
    vjp, a, b = vjp_of(backend, torch.float64)
    tangent = OF_VJP[transform](vjp, a, b)
    torch.testing.assert_close(tangent, vjp(b))
    assert not tangent.requires_grad


@pytest.mark.parametrize("transform", OF_VJP)
def test_forward_mode_of_a_backward_is_refused(transform: str) -> None:
    pytest.importorskip("triton")
    with pytest.raises(fused_attn.TransformError, match=r'"triton" .*of the backward; "tiled" and "reference"'):
        OF_VJP[transform](*vjp_of("triton", torch.float32))


@pytest.mark.parametrize("backend", ("tiled", "reference", "triton"))
def test_batched_cotangents(backend: str) -> None:
    """torch.autograd.grad(..., is_grads_batched=True), which jacobian(vectorize=True) uses."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    x, a, b = (leaf(1, 2, 5, 8, seed=seed).detach().to(dtype) for seed in range(3))
    out = attention(x.requires_grad_(), a, b, softcap=2.0, backend=backend)
    expected = torch.stack([torch.autograd.grad(out, x, g, retain_graph=True)[0] for g in (a, b)])
    batched = {"outputs": out, "inputs": x, "grad_outputs": torch.stack((a, b)), "is_grads_batched": True}
    torch.testing.assert_close(torch.autograd.grad(**batched, retain_graph=True)[0], expected)
    if backend == "triton":
        with pytest.raises(fused_attn.TransformError, match="is_grads_batched"):
            torch.autograd.grad(**batched, create_graph=True)
        return
    (first,) = torch.autograd.grad(**batched, create_graph=True)
    (second,) = torch.autograd.grad(first.sin().sum(), x, retain_graph=True)
    one_by_one = [torch.autograd.grad(out, x, g, create_graph=True)[0] for g in (a, b)]
    torch.testing.assert_close(second, torch.autograd.grad(torch.stack(one_by_one).sin().sum(), x)[0])
