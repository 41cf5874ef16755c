"""Results without a derivative: backward through them raises, instead of stopping silently."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

_library = torch.library.Library("fused_attn", "FRAGMENT")
_library.define("refuse(Tensor grad, SymInt[] shape, str message) -> Tensor")


def _refuse(grad: Tensor, shape: list[int], message: str) -> NoReturn:
    raise NotImplementedError(message)


# An operator, so that a compiler can trace the backward; it raises when it runs.
_library.impl("refuse", _refuse, "CompositeExplicitAutograd")
torch.library.register_fake("fused_attn::refuse", lambda grad, shape, message: grad.new_empty(shape))


def without_derivative(message: str, results: tuple[Tensor | None, ...], *sources: Any) -> tuple[Any, ...]:
    """The results; if a source requires grad, backward through them raises NotImplementedError(message)."""
    needing = [x for x in sources if isinstance(x, Tensor) and x.requires_grad]
    if not needing or not torch.is_grad_enabled():
        return results
    return _WithoutDerivative.apply(message, len(results), *results, *needing)


class _WithoutDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, message: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        results, sources = tensors[:count], tensors[count:]
        ctx.message, ctx.count, ctx.shapes = message, count, [x.shape for x in sources if x is not None]
        ctx.mark_non_differentiable(*(x for x in results if x is not None and not x.is_floating_point()))
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = next(x for x in grads if x is not None)
        grads_of_sources = (torch.ops.fused_attn.refuse(grad, shape, ctx.message) for shape in ctx.shapes)
        return (*(None,) * (2 + ctx.count), *grads_of_sources)
