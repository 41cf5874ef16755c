"""The one tolerance rule: how far a result may be from float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """How one tensor fared: its largest error, and the largest share of its budget that any element used."""

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
    """The one tolerance rule: |got - oracle| <= 2 E + 8 eps(dtype) max|oracle| + 8 eps(float32) A, elementwise.

    oracle is float64 on the same rounded inputs. E is the largest error of `plain`, the same formula in plain PyTorch
    and in dtype. A, elementwise, is the quantity with every term taken absolute: cancellation noise grows with it.
    `rounded` adds eps(dtype) to the last term, for parameter sums in half precision, where delta sees the rounded
    output. In float64, where the oracle is plain PyTorch itself, `plain` is float32's; its error is scaled by the two
    epsilons and counted a third time for the oracle's own, and eps(float64) stands for eps(float32). NaN must be NaN,
    an infinity the same infinity, and a quantity none of whose terms is nonzero must be exactly zero.
    """
    if got.shape != oracle.shape:
        raise AssertionError(f"{name}: shape {tuple(got.shape)}, expected {tuple(oracle.shape)}")
    got, plain = got.detach().double(), plain.detach()
    finite = oracle.isfinite()
    wrong = torch.where(finite, ~got.isfinite(), ~((got == oracle) | (got.isnan() & oracle.isnan())))
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {got[where].item()} where the oracle has {oracle[where].item()}, at {where}"
            f" and {int(wrong.sum()) - 1} other places of {wrong.numel()}"
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
            f"{name}: {got[where].item():.9g} where the oracle has {oracle[where].item():.9g}, at {where};"
            f" error {error[where].item():.3g}, budget {row.budget:.3g}, over budget at"
            f" {int((share > 1).sum())} of {share.numel()} places"
        )
    return row


def allowed(oracle: Tensor, plain: Tensor, absolute: Tensor, dtype: torch.dtype, *, rounded: bool = False) -> Tensor:
    """The right side of the rule, elementwise, of what has elements."""
    finite = oracle.isfinite()
    allowance = torch.where(finite & plain.isfinite(), (plain.double() - oracle).abs(), 0.0)
    peak = torch.where(finite, oracle.abs(), 0.0)
    eps, fine = torch.finfo(dtype).eps, min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    if dtype == torch.float64:
        allowance = 1.5 * allowance * (eps / torch.finfo(torch.float32).eps)
    noise = 8 * (fine + eps if rounded else fine) * absolute.nan_to_num(0.0)
    budget = 2 * allowance.amax() + 8 * eps * peak.amax() + noise
    return torch.where(absolute == 0, 0.0, budget)
