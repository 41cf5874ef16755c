"""Partial attention results: a state (out, lse) is a weighted average of values and the log of the total weight.

Merging states over disjoint keys gives the state over their union; `empty` is its identity. With m = max of the lses,
    lse = m + log(sum exp(lse_i - m)),   out = sum exp(lse_i - lse) * out_i.
Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018. LSEs are natural logs and hold no sink.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def empty(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Fill with the state of no keys: zeros with log-weight -inf."""
    return out.zero_(), lse.fill_(-torch.inf)


def merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Join states over disjoint keys, in the order given. out (..., Dv), lse (...)."""
    stacked = torch.stack([x.to(torch.promote_types(x.dtype, torch.float32)) for x in lses])
    peak = stacked.detach().amax(0)
    # Without any key, exp(-inf - -inf) would be NaN; any finite peak gives 0.
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    weights = torch.exp(stacked - peak)
    total = weights.sum(0)
    nonempty = total > 0
    lse = torch.where(nonempty, peak + torch.log(torch.where(nonempty, total, 1.0)), -torch.inf)
    lse = torch.where(torch.isnan(total), total, lse)
    share = weights / torch.where(nonempty | torch.isnan(total), total, 1.0)
    out: Any = sum(share[i][..., None] * x.to(share.dtype) for i, x in enumerate(outs))
    return out.to(outs[0].dtype), lse
