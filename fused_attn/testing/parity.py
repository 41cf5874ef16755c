"""The parity check that every backend, test and benchmark shares: one forward, and every gradient."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from ..spec.problem import HALF, Problem
from .absolute_sums import absolutes
from .cases import PARAMETERS, Case
from .inputs import Inputs, make_inputs
from .tolerance import Row, assert_within_budget


@dataclass(frozen=True)
class Parity:
    """The verdict on one case."""

    case: Case
    backend: str
    dtype: torch.dtype
    rows: dict[str, Row]


def results(problem: Problem, inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """out, lse and every gradient by plain autograd through the reference, computed in dtype."""
    out, lse = reference.attention(problem, dtype)
    found = {"out": out} if problem.sigmoid else {"out": out, "lse": lse}
    return found | gradients(out, lse, problem.tensors(), inputs)


def gradients(out: Tensor, lse: Tensor | None, leaves: dict[str, Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """The gradient of each leaf that wants one, by name; zero where no path leads to it. out is heads-first."""
    leaves = {name: x for name, x in leaves.items() if x.requires_grad}
    pairs = [
        (y, g)
        for y, g in ((out, inputs.dout), (lse, inputs.dlse))
        if y is not None and g is not None and y.requires_grad
    ]
    if not leaves or not pairs:
        return {name: torch.zeros_like(x) for name, x in leaves.items()}
    outputs, cotangents = zip(*((y, g.to(y.dtype)) for y, g in pairs), strict=True)
    found = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), found, strict=True)}


@dataclass(frozen=True, eq=False)
class Expected:
    """What a case's results must be: by name, the float64 oracle, plain PyTorch in dtype, and A."""

    oracle: dict[str, Tensor]
    plain: dict[str, Tensor]
    absolute: dict[str, Tensor]


def expect(inputs: Inputs) -> Expected:
    """The three columns of the tolerance rule, computed on the inputs' own device."""
    dtype = inputs.tensors["q"].dtype
    exact = inputs.clean_problem(torch.float64)
    oracle = results(exact, inputs, torch.float64)
    plain = results(inputs.clean_problem(dtype), inputs, torch.float32 if dtype == torch.float64 else dtype)
    return Expected(oracle, plain, absolutes(exact, inputs))


def compare(inputs: Inputs, got: dict[str, Tensor], expected: Expected, label: str) -> dict[str, Row]:
    """Every result against its budget; the error lists every tensor that failed."""
    dtype = inputs.tensors["q"].dtype
    columns = (expected.oracle, expected.plain, expected.absolute)
    rows, failures = {}, []
    for name, x in got.items():
        shown = name if name in ("out", "lse") else f"d{name}"
        own = torch.promote_types(dtype, torch.float32) if name == "lse" else dtype
        oracle, plain, absolute = (column[name].detach() for column in columns)
        x = x.reshape(oracle.shape) if name == "bias" else x
        try:
            rounded = name in PARAMETERS and dtype in HALF
            rows[shown] = assert_within_budget(shown, x, oracle, plain, absolute, own, rounded=rounded)
        except AssertionError as failure:
            failures.append(str(failure))
    if failures:
        raise AssertionError(f"{label}: " + "; ".join(failures))
    return rows


# ---------------------------------------------------------------------------------------------------------- runners


def run_public(inputs: Inputs, backend: str | None) -> dict[str, Tensor]:
    """out, lse (where asked) and every gradient through `fused_attn.attention`, or `attention_varlen`."""
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
    """The same by a linear-memory backend's own forward and backward, beneath autograd."""
    with torch.enable_grad():
        p = inputs.problem().lower()
    out, lse, *normaliser = module.forward(p)
    got = {"out": out} if p.sigmoid else {"out": out, "lse": lse}
    operands = {name: x for name, x in p.tensors().items() if x.requires_grad}
    if operands:
        dout = torch.zeros_like(out) if inputs.dout is None else inputs.dout
        grads = module.backward(p, out, *normaliser, dout, inputs.dlse, frozenset(operands))
        # The way back through what lowering did, which for most operands is nothing.
        cotangents = [grads[name] for name in operands]
        back = torch.autograd.grad(list(operands.values()), list(inputs.leaves.values()), cotangents)
        got |= dict(zip(inputs.leaves, back, strict=True))
    return got


def why_not(case: Case | str, backend: str, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> list[str]:
    """Every reason why a backend cannot run a case; empty where it can."""
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
    """Run a case forward and through every gradient, and hold each result to its budget.

    backend is a name, taken through the public `attention`, or a module with forward and backward, called directly.
    Raises AssertionError naming every tensor that failed; what the backend itself raises passes through.
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
