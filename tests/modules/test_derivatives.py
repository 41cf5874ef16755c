"""Higher derivatives and torch.func transforms of the layers, against torch's layers in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import fused_attn
from fused_attn.modules import weights as weights_module
from tests.modules.layers import B, E, causal, padding, pair
from tests.modules.test_scored import SCORED, scored
from tests.parity import randn, within_budget

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

KEYS = 10

Function = Callable[[Tensor], tuple[Tensor, Tensor]]  # x (B, 10, E) -> output and weights


def both(x: tuple[Tensor, Tensor]) -> Tensor:
    """A loss that depends on outputs and weights."""
    return x[0].sin().sum() + 20 * x[1].square().sum()


def double_backward(f: Function, x: Tensor, t: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(both(f(x)), x, create_graph=True)
    return torch.cat((first, torch.autograd.grad(first.cos().sum(), x)[0]))


def of_weights_alone(f: Function, x: Tensor, t: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(x)[1].sin().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.cos().sum(), x, create_graph=True)
    return torch.cat((first, second, torch.autograd.grad(second.square().sum(), x)[0]))


def dual(f: Function, x: Tensor, t: Tensor) -> Tensor:
    with forward_ad.dual_level():
        found = f(forward_ad.make_dual(x, t))
        return torch.cat([forward_ad.unpack_dual(y).tangent.flatten() for y in found])


def dual_of_backward(f: Function, x: Tensor, t: Tensor) -> Tensor:
    """Forward over a backward whose call was made before."""
    x = x.clone().requires_grad_()
    weights = f(x)[1]
    with forward_ad.dual_level():
        cotangent = forward_ad.make_dual(torch.ones_like(weights), weights.detach())
        return forward_ad.unpack_dual(torch.autograd.grad(weights, x, cotangent)[0]).tangent


def batched(f: Function, x: Tensor, t: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    weights = f(x)[1]
    cotangents = torch.stack((weights.detach(), weights.detach().cos()))
    return torch.autograd.grad(weights, x, cotangents, is_grads_batched=True)[0]


TRANSFORMS: dict[str, Callable[[Function, Tensor, Tensor], Any]] = {
    "double backward": double_backward,
    "of weights alone": of_weights_alone,
    "dual": dual,
    "dual of backward": dual_of_backward,
    "batched": batched,
    "grad": lambda f, x, t: torch.func.grad(lambda y: both(f(y)))(x),
    "jvp": lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1],
    "vjp": lambda f, x, t: torch.func.vjp(f, x)[1](f(x)),
    "vmap": lambda f, x, t: torch.func.vmap(f)(torch.stack((x, t))),
    "vmap of grad": lambda f, x, t: torch.func.vmap(torch.func.grad(lambda y: both(f(y))))(torch.stack((x, t))),
    "jacrev": lambda f, x, t: torch.func.jacrev(lambda y: f(y)[1][:, :2, :3])(x),
    "jacfwd": lambda f, x, t: torch.func.jacfwd(lambda y: f(y + 0 * x)[1].sum((0, 1)))(x[:1]),
    "jvp of grad": lambda f, x, t: torch.func.jvp(torch.func.grad(lambda y: both(f(y))), (x,), (t,))[1],
}
OPTIONS: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "plain": lambda x: {},
    "every head": lambda x: {"average_attn_weights": False},
    "masks": lambda x: {"key_padding_mask": padding(10, 4, 1), "attn_mask": causal(KEYS, KEYS)},
    "mask from x": lambda x: {"attn_mask": x[0] @ x[1].mT},
}


@pytest.fixture(params=("few keys", "many keys"))
def keys(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of one pass, and of more keys than that."""
    if request.param == "many keys":
        monkeypatch.setattr(weights_module, "COLUMNS", 3)
        monkeypatch.setattr(weights_module, "WIDE", 6)


def compare(transform: str, ours: Function, theirs: Function, x: Tensor) -> None:
    got, expected = (TRANSFORMS[transform](f, x, randn(*x.shape, seed=9).double()) for f in (ours, theirs))
    torch.testing.assert_close(got, expected)


def quick(transform: str, options: str) -> bool:
    return options == "mask from x" or transform in ("double backward", "jvp")


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize(
    ("transform", "options"),
    [pytest.param(t, o, marks=[] if quick(t, o) else pytest.mark.nightly) for t in TRANSFORMS for o in OPTIONS],
)
def test_transforms(transform: str, options: str) -> None:
    layers = (x.double() for x in pair(batch_first=True))
    ours, theirs = ((lambda x, f=f: f(x, x, x, **OPTIONS[options](x))) for f in layers)
    compare(transform, ours, theirs, randn(B, KEYS, E).double())


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize(
    "transform",
    ("double backward", "dual", *(pytest.param(x, marks=pytest.mark.nightly) for x in ("of weights alone", "jvp"))),
)
@pytest.mark.parametrize("name", SCORED)
def test_scored_layers(name: str, transform: str) -> None:
    """Of x (B, 10, 6), whose first entries are the query."""
    layers = (x.double() for x in scored(name, num_heads=2))
    ours, theirs = ((lambda x, f=f: f(x[..., :5], x, need_weights=True)) for f in layers)
    compare(transform, ours, theirs, randn(B, KEYS, 6).double())


@pytest.mark.usefixtures("keys")
def test_parameters() -> None:
    """By functional_call, as meta-learning does."""
    found = []
    for layer in pair(batch_first=True):
        layer.double()
        x = randn(1, 5, E).double()

        def loss(parameters: dict[str, Tensor], layer: nn.Module = layer, x: Tensor = x) -> Tensor:
            return both(torch.func.functional_call(layer, parameters, (x, x, x)))

        def after_a_step(parameters: dict[str, Tensor], loss: Callable = loss) -> Tensor:
            return loss({name: y - 0.1 * torch.func.grad(loss)(parameters)[name] for name, y in parameters.items()})

        found.append(torch.func.grad(after_a_step)(dict(layer.named_parameters())))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("transform", ("double backward", "jvp"))
def test_transforms_around_the_length_threshold(transform: str) -> None:
    layers = [x.double() for x in pair(batch_first=True)]
    for n in (weights_module.COLUMNS, weights_module.COLUMNS + 1):
        key = randn(1, n, E, seed=1).double()
        ours, theirs = ((lambda x, f=f, key=key: f(x, key * x.mean(), key)) for f in layers)
        compare(transform, ours, theirs, randn(1, 3, E).double())


@pytest.mark.usefixtures("keys")
def test_dropout() -> None:
    """With the seed of one call, weights and outputs are functions that autograd knows, twice."""
    ours, _ = pair(batch_first=True, dropout=0.3)
    ours.double().train()

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        return ours(x, x, x)

    assert torch.autograd.gradgradcheck(call, [randn(1, 3, E).double().requires_grad_()])


@pytest.mark.usefixtures("keys")
def test_first_gradients_with_create_graph() -> None:
    """The same, for every input and parameter, whether they are to be differentiated again or not."""
    ours, _ = pair(batch_first=True)
    ours.double()
    x = randn(B, KEYS, E).double().requires_grad_()
    leaves = [x, *ours.parameters()]
    with_graph, without = (
        torch.autograd.grad(both(ours(x, x, x, attn_mask=x[0] @ x[1].mT)), leaves, create_graph=create_graph)
        for create_graph in (True, False)
    )
    torch.testing.assert_close(with_graph, without)


@pytest.mark.usefixtures("keys")
def test_derivatives_of_weights_name_the_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' weights have a first derivative; never part of a second one."""
    pytest.importorskip("triton")
    monkeypatch.setenv("FUSED_ATTN_BACKEND", "triton")
    ours, theirs = pair(batch_first=True)
    x = randn(1, 4, E).requires_grad_()
    (found,) = torch.autograd.grad(ours(x, x, x)[1].sin().sum(), x, create_graph=True)
    (plain,) = torch.autograd.grad(theirs(x, x, x)[1].sin().sum(), x)
    y = x.detach().double().requires_grad_()
    (oracle,) = torch.autograd.grad(theirs.double()(y, y, y)[1].sin().sum(), y)
    within_budget("dx", found, oracle, plain)
    with pytest.raises(fused_attn.TransformError, match=r'"triton" .*double backward; "tiled" and "reference"'):
        found.sum().backward()
    with pytest.raises(fused_attn.TransformError):
        dual(lambda x: ours(x, x, x), x.detach(), x.detach())
