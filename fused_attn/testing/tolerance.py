"""The tolerance rule: the largest error of a result relative to float64.

    |got - oracle| <= 2 E + 8 eps(dtype) max|oracle| + 8 eps(float32) A,    E = max|plain - oracle|

oracle is float64, plain is plain PyTorch in dtype, and A sums absolute terms (see `absolute_sums`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """The result of one comparison: the largest absolute error, the budget of the worst element, and share, that
    element's error / budget."""

    error: float
    budget: float
    share: float


def assert_within_budget(
    name: str,
    got: Tensor,
    oracle: Tensor,
    plain: Tensor,
    absolute: Tensor,
    dtype: torch.dtype,
    *,
    rounded: bool = False,
) -> Row:
    """Raise AssertionError unless |got - oracle| <= 2 E + 8 eps(dtype) max|oracle| + 8 eps(float32) A, elementwise.

    Args:
        name: of the tensor, for the error message.
        got: the result to check, of any shape and floating dtype.
        oracle: float64, the same shape: the exact result for the same rounded inputs.
        plain: the same formula in plain PyTorch, computed in dtype; E is its largest error.
        absolute: A: the result with every term of its sums replaced by its absolute value. Cancellation errors are
            proportional to it.
        dtype: of the computation.
        rounded: add eps(dtype) to the factor of A, for gradients of parameters in half precision, whose delta is
            computed from the rounded output.

    In float64, `plain` is computed in float32: E is scaled by eps(float64) / eps(float32) and multiplied by 1.5 for
    the oracle's own error, and eps(float64) replaces eps(float32). NaN must be NaN, an infinity the same infinity, and
    the result is exactly zero where A is zero.

    >>> import torch
    >>> from fused_attn import testing
    >>> x, y = torch.rand(1000), torch.rand(1000)
    >>> oracle = torch.dot(x.double(), y.double())
    >>> testing.assert_within_budget("dot", (x * y).sum(), oracle, torch.dot(x, y), oracle, torch.float32).share < 1
    True
    """
    if got.shape != oracle.shape:
        raise AssertionError(f"{name}: shape {tuple(got.shape)}, expected {tuple(oracle.shape)}")
    got, plain = got.detach().double(), plain.detach()
    finite = oracle.isfinite()
    wrong = torch.where(finite, ~got.isfinite(), ~((got == oracle) | (got.isnan() & oracle.isnan())))
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: got {got[where].item()}, expected {oracle[where].item()} at {where};"
            f" {int(wrong.sum())} of {wrong.numel()} elements are wrong"
        )
    error = torch.where(finite, (got - oracle).abs(), 0.0)
    if error.numel() == 0:
        return Row(0.0, 0.0, 0.0)
    budget = allowed(oracle, plain, absolute, dtype, rounded=rounded)
    share = torch.where(error == 0, 0.0, error / budget)
    worst = int(share.argmax())
    row = Row(error.max().item(), budget.flatten()[worst].item(), share.max().item())
    if row.share > 1:
        where = tuple(torch.unravel_index(torch.tensor(worst), share.shape))
        where = tuple(int(x) for x in where)
        raise AssertionError(
            f"{name}: got {got[where].item():.9g}, expected {oracle[where].item():.9g} at {where};"
            f" error {error[where].item():.3g}, budget {row.budget:.3g};"
            f" {int((share > 1).sum())} of {share.numel()} elements exceed their budget"
        )
    return row


def allowed(oracle: Tensor, plain: Tensor, absolute: Tensor, dtype: torch.dtype, *, rounded: bool = False) -> Tensor:
    """The right side of the rule, elementwise; the tensors must not be empty."""
    finite = oracle.isfinite()
    allowance = torch.where(finite & plain.isfinite(), (plain.double() - oracle).abs(), 0.0)
    peak = torch.where(finite, oracle.abs(), 0.0)
    eps, fine = torch.finfo(dtype).eps, min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    if dtype == torch.float64:
        allowance = 1.5 * allowance * (eps / torch.finfo(torch.float32).eps)
    noise = 8 * (fine + eps if rounded else fine) * absolute.nan_to_num(0.0)
    budget = 2 * allowance.amax() + 8 * eps * peak.amax() + noise
    return torch.where(absolute == 0, 0.0, budget)
