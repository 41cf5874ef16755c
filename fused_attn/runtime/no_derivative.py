"""Results without a derivative: they know what they were computed from, and backward through them raises."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

_library = torch.library.Library("fused_attn", "FRAGMENT")
_library.define("refuse(Tensor grad, SymInt[] shape, str message) -> Tensor")


def _refuse(grad: Tensor, shape: list[int], message: str) -> NoReturn:
    raise NotImplementedError(message)


# An operator, so that a compiler can trace the backward, which raises when it runs.
_library.impl("refuse", _refuse, "CompositeExplicitAutograd")
torch.library.register_fake("fused_attn::refuse", lambda grad, shape, message: grad.new_empty(shape))


def underived(message: str, found: tuple[Tensor | None, ...], *sources: Any) -> tuple[Any, ...]:
    """found, through which backward raises NotImplementedError(message) where one of the sources requires grad."""
    needing = [x for x in sources if isinstance(x, Tensor) and x.requires_grad]
    if not needing or not torch.is_grad_enabled():
        return found
    return _Underived.apply(message, len(found), *found, *needing)


class _Underived(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, message: str, count: int, *found_and_sources: Tensor | None) -> tuple[Tensor | None, ...]:
        found, sources = found_and_sources[:count], found_and_sources[count:]
        ctx.message, ctx.count, ctx.shapes = message, count, [x.shape for x in sources if x is not None]
        ctx.mark_non_differentiable(*(x for x in found if x is not None and not x.is_floating_point()))
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = next(x for x in grads if x is not None)
        refused = [torch.ops.fused_attn.refuse(grad, shape, ctx.message) for shape in ctx.shapes]
        return (None,) * (2 + ctx.count) + tuple(refused)
