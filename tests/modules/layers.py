"""Comparison of two nn layers: values and gradients, held to the tolerance rule."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_attn import testing
from fused_attn.modules import MultiheadAttention
from fused_attn.modules import weights as weights_module
from tests.parity import randn

NESTED = "ignore:The PyTorch API of nested tensors"

B, M, N, E, H = 3, 7, 10, 8, 2

Results = dict[str, Tensor]

Call = tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]  # a module, what it is given by place, and by name


def randomised(module: nn.Module) -> nn.Module:
    """Every parameter drawn anew, biases too, which start as zeros."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=i, dtype=parameter.dtype) * 0.5)
    return module


def pair(**options: Any) -> tuple[MultiheadAttention, nn.MultiheadAttention]:
    """Ours and torch's with the same parameters."""
    theirs = randomised(nn.MultiheadAttention(**{"embed_dim": E, "num_heads": H} | options))
    ours = MultiheadAttention(**{"embed_dim": E, "num_heads": H} | options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def batch(batch_first: bool = False, kdim: int = E, vdim: int = E, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = randn(B, M, E), randn(B, N, kdim), randn(B, N, vdim, seed=1)
    return (query, key, value) if batch_first else tuple(x.transpose(0, 1) for x in (query, key, value))


def causal(m: int, n: int) -> Tensor:
    return torch.ones(m, n, dtype=torch.bool).triu(1)


def padding(*lengths: int) -> Tensor:
    return torch.arange(N) >= torch.tensor(lengths)[:, None]


def floats(call: Call) -> dict[str, Tensor]:
    """Every float input and every parameter, by name; an input that has two places is named by the later."""
    module, args, options = call
    given = {f"argument {i}": x for i, x in enumerate(args)} | options
    given = {name: x for name, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return {name: x for x, name in {x: name for name, x in given.items()}.items()} | dict(module.named_parameters())


def nearby(call: Call, seed: int) -> Call:
    """A copy with every number moved by a rounding, up or down."""
    call = copy.deepcopy(call)
    for i, x in enumerate(floats(call).values()):
        x.data *= 1 + torch.finfo(x.dtype).eps * randn(*x.shape, seed=100 * seed + i).sign()
    return call


def run(call: Call, dtype: torch.dtype) -> Results:
    """In dtype: the outputs, and the gradients of every float input and every parameter."""
    module, args, options = call = copy.deepcopy(call)
    for x in floats(call).values():
        x.data = x.data.to(dtype)
        x.requires_grad_()
    found = module(*args, **options)
    return outputs_and_gradients(
        [x for x in (found if isinstance(found, tuple) else (found,)) if x is not None], floats(call)
    )


def outputs(layer: nn.Module, *args: Tensor, **options: Any) -> list[Tensor]:
    return [x for x in layer(*args, **options) if x is not None]


def outputs_and_gradients(outputs: list[Tensor], leaves: dict[str, Tensor]) -> Results:
    """The gradients of one sum over the outputs, the same in every dtype."""
    cotangents = [torch.arange(x.numel()).view(x.shape).cos().to(x.dtype) for x in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents, retain_graph=True, allow_unused=True)
    found = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    return found | {
        name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(leaves.items(), grads, strict=True)
    }


def judge(got: Results, *others: tuple[Results, Results], dtype: torch.dtype | None = None) -> Results:
    """By the tolerance rule; others: torch's in float32 and in float64, for these inputs and for nearby ones.

    E is the largest error of all of torch's runs, because a single one may be lucky. Returns what was judged.
    """
    oracle = others[0][1]
    for name, x in got.items():
        error = max((plain[name] - exact[name]).abs().max() for plain, exact in others)
        plain = oracle[name] + error
        testing.assert_within_budget(name, x, oracle[name], plain, plain.abs().amax().expand_as(x), dtype or x.dtype)
    return got


def agree(
    ours: nn.Module, theirs: nn.Module, args: tuple[Tensor, ...], options: dict[str, Any], others: int = 1
) -> Results:
    """Ours against torch's in float64, values and gradients. Returns ours."""
    got = run((ours, args, options), torch.float32)
    # torch's hint would hide the keys that it adds from everybody; the mask itself says the same of the others.
    call = theirs, args, {name: x for name, x in options.items() if name != "is_causal"}
    calls = [call, *(nearby(call, seed) for seed in range(others))]
    found = [(run(x, torch.float32), run(x, torch.float64)) for x in calls]
    assert got.keys() == found[0][0].keys()
    return judge(got, *found)


def autocast_agrees(ours: nn.Module, theirs: nn.Module, args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
    found = []
    for layer in (ours, theirs):
        leaves = {name: x.requires_grad_() for name, x in floats((layer, args, options)).items()}
        with torch.autocast("cpu", torch.bfloat16):
            got = outputs(layer, *args, **options)
        assert [x.dtype for x in got] == [torch.bfloat16] * len(got)
        found.append(outputs_and_gradients(got, leaves))
    judge(found[0], (found[1], run((theirs, args, options), torch.float64)), dtype=torch.bfloat16)


@pytest.fixture(params=("few_keys", "many_keys"))
def few_and_many_keys(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to come by weights; with many keys the second, and its derivative in several passes."""
    if request.param == "many_keys":
        monkeypatch.setattr(weights_module, "COLUMNS", 3)
