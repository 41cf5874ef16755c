"""Parity checks: the output and every gradient of a backend against float64, within the tolerance rule."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from ..spec.problem import HALF, Problem
from .absolute_sums import absolute_sums
from .cases import PARAMETERS, Case
from .inputs import Inputs, make_inputs
from .tolerance import Row, assert_within_budget


@dataclass(frozen=True)
class Parity:
    """The result of one check: a `Row` for each tensor, named "out", "lse", "dq" and so on."""

    case: Case
    backend: str
    dtype: torch.dtype
    rows: dict[str, Row]


def results(problem: Problem, inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """out, lse and every gradient of the reference, computed in dtype with plain autograd."""
    out, lse = reference.attention(problem, dtype)
    outputs = {"out": out} if problem.sigmoid else {"out": out, "lse": lse}
    return outputs | gradients(out, lse, problem.tensors(), inputs)


def gradients(out: Tensor, lse: Tensor | None, leaves: dict[str, Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """The gradient of each leaf that requires one, by name; zeros if it does not depend on it. out is heads-first."""
    leaves = {name: x for name, x in leaves.items() if x.requires_grad}
    pairs = [
        (y, g)
        for y, g in ((out, inputs.dout), (lse, inputs.dlse))
        if y is not None and g is not None and y.requires_grad
    ]
    if not leaves or not pairs:
        return {name: torch.zeros_like(x) for name, x in leaves.items()}
    outputs, cotangents = zip(*((y, g.to(y.dtype)) for y, g in pairs), strict=True)
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), grads, strict=True)}


@dataclass(frozen=True, eq=False)
class Expected:
    """The expected results of a case, by name: three arguments of `assert_within_budget`."""

    oracle: dict[str, Tensor]
    plain: dict[str, Tensor]
    absolute: dict[str, Tensor]


def expect(inputs: Inputs) -> Expected:
    """Compute the expected results of a case, on the device of its inputs.

    >>> from fused_attn import testing
    >>> testing.expect(testing.make_inputs("plain")).oracle["out"].dtype
    torch.float64
    """
    dtype = inputs.tensors["q"].dtype
    exact = inputs.clean_problem(torch.float64)
    oracle = results(exact, inputs, torch.float64)
    plain = results(inputs.clean_problem(dtype), inputs, torch.float32 if dtype == torch.float64 else dtype)
    return Expected(oracle, plain, absolute_sums(exact, inputs))


def compare(inputs: Inputs, got: dict[str, Tensor], expected: Expected, label: str) -> dict[str, Row]:
    """Apply the tolerance rule to every result in got, by name; "out" and "lse" are outputs, other names gradients.

    label begins the message of the AssertionError, which lists every tensor that failed.

    >>> from fused_attn import testing
    >>> inputs = testing.make_inputs("plain")
    >>> got = testing.run_public(inputs, "tiled")
    >>> sorted(testing.compare(inputs, got, testing.expect(inputs), "plain"))
    ['dk', 'dq', 'dv', 'out']
    """
    dtype = inputs.tensors["q"].dtype
    columns = (expected.oracle, expected.plain, expected.absolute)
    rows, failures = {}, []
    for name, x in got.items():
        key = name if name in ("out", "lse") else f"d{name}"
        own = torch.promote_types(dtype, torch.float32) if name == "lse" else dtype
        oracle, plain, absolute = (column[name].detach() for column in columns)
        x = x.reshape(oracle.shape) if name == "bias" else x
        try:
            rounded = name in PARAMETERS and dtype in HALF
            rows[key] = assert_within_budget(key, x, oracle, plain, absolute, own, rounded=rounded)
        except AssertionError as failure:
            failures.append(str(failure))
    if failures:
        raise AssertionError(f"{label}: " + "; ".join(failures))
    return rows


# ---------------------------------------------------------------------------------------------------------- runners


def run_public(inputs: Inputs, backend: str | None) -> dict[str, Tensor]:
    """out, lse (if the case returns it) and every gradient, from `fused_attn.attention` or `attention_varlen`."""
    from ..api.attention import attention
    from ..api.varlen import attention_varlen

    call: Any = attention if inputs.ragged is None else attention_varlen
    result = call(*inputs.qkv, **inputs.kwargs, backend=backend)
    out, lse = result if inputs.case.return_lse else (result, None)
    if inputs.ragged is not None:
        out, lse = out.transpose(0, 1)[None], None if lse is None else lse.T[None]
    out = out.transpose(1, 2) if inputs.case.layout == "bshd" else out
    got = {"out": out} if lse is None else {"out": out, "lse": lse}
    return got | (gradients(out, lse, inputs.tensors, inputs) if inputs.case.backward else {})


@torch.no_grad()
def run_module(inputs: Inputs, module: ModuleType) -> dict[str, Tensor]:
    """The same from the forward and backward of a backend module, such as `fused_attn.backends.tiled.attention`."""
    with torch.enable_grad():
        p = inputs.problem().lower()
    out, lse, *normalizer = module.forward(p)
    got = {"out": out} if p.sigmoid else {"out": out, "lse": lse}
    operands = {name: x for name, x in p.tensors().items() if x.requires_grad}
    if operands:
        dout = torch.zeros_like(out) if inputs.dout is None else inputs.dout
        grads = module.backward(p, out, *normalizer, dout, inputs.dlse, frozenset(operands))
        # Gradients of operands -> gradients of leaves, through `lower`.
        cotangents = [grads[name] for name in operands]
        leaf_grads = torch.autograd.grad(list(operands.values()), list(inputs.leaves.values()), cotangents)
        got |= dict(zip(inputs.leaves, leaf_grads, strict=True))
    return got


def why_not(case: Case | str, backend: str, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> list[str]:
    """Every reason why a backend cannot run a case; empty if it can.

    >>> import torch
    >>> from fused_attn import testing
    >>> testing.why_not("plain", "sdpa", torch.float64)
    ["torch's kernel runs in float16, bfloat16 and float32, not in torch.float64"]
    """
    from ..runtime.dispatch import explain

    return explain(make_inputs(case, dtype, device).problem(), backend).reasons.get(backend, [])


def check_parity(
    case: Case | str,
    backend: str | ModuleType | None,
    dtype: torch.dtype = torch.float32,
    device: Any = "cpu",
    *,
    seed: int = 0,
) -> Parity:
    """Check the output and every gradient of a case against float64 by the tolerance rule.

    Args:
        case: a key of `CASES`, or a `Case`.
        backend: a name (the case runs through the public functions; None selects one), or a module with forward and
            backward, which are called directly.
        dtype, device: of the inputs.
        seed: of their values.

    Raises AssertionError naming every tensor that failed, or whatever the backend raises.

    >>> from fused_attn import testing
    >>> parity = testing.check_parity("gqa_3", "tiled")
    >>> parity.rows["dq"].share < 1
    True
    """
    inputs = make_inputs(case, dtype, device, seed)
    name = backend.__name__.rpartition(".")[2] if isinstance(backend, ModuleType) else str(backend)
    label = f"{inputs.case.name} on {name} in {str(dtype).removeprefix('torch.')}"
    expected = expect(inputs)
    got = run_module(inputs, backend) if isinstance(backend, ModuleType) else run_public(inputs, backend)
    inputs.check_untouched()
    for x, g in got.items():
        own = inputs.tensors.get(x)
        if own is not None and g.dtype != own.dtype:
            raise AssertionError(f"{label}: d{x} is {g.dtype}, expected {own.dtype}")
    return Parity(inputs.case, name, dtype, compare(inputs, got, expected, label))
