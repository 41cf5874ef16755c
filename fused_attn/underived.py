"""Results without a derivative: they know what they were computed from, and backward through them raises."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor


def underived(message: str, found: tuple[Tensor | None, ...], *sources: Any) -> tuple[Any, ...]:
    """found, through which backward raises NotImplementedError(message) where one of the sources requires grad."""
    needing = [x for x in sources if isinstance(x, Tensor) and x.requires_grad]
    if not needing or not torch.is_grad_enabled():
        return found
    return _Underived.apply(message, len(found), *found, *needing)


class _Underived(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, message: str, count: int, *found_and_sources: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.message = message
        found = found_and_sources[:count]
        ctx.mark_non_differentiable(*(x for x in found if x is not None and not x.is_floating_point()))
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise NotImplementedError(ctx.message)
