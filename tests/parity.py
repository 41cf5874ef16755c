"""Random tensors, the tolerance rule for results without a `Case`, and the largest tensor of a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_attn import testing


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(31**i * n for i, n in enumerate(shape)))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def within_budget(name: str, ours: Tensor, oracle: Tensor, plain: Tensor) -> None:
    """The tolerance rule, with the answer's own size as the size of its terms."""
    absolute = torch.where(oracle.isfinite(), oracle.abs(), 0.0)
    absolute = absolute.amax().expand_as(oracle) if oracle.numel() else oracle
    testing.assert_within_budget(name, ours, oracle, plain, absolute, ours.dtype)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() >= x.numel() * x.element_size():
                self.elements = max(self.elements, x.numel())
        return result
