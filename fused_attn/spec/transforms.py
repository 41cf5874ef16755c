"""Detection of torch's transforms (torch.func, forward AD), and a backward that supports all of them.

An operator without a rule for a transform could return zero gradients silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .torch_internals import (
    dispatch_mode_count,
    forward_ad_active,
    functorch_active,
    functorch_disabled,
    is_autograd_batched,
    version,
)


def transforming() -> bool:
    """True if any tensor can be under a transform."""
    return forward_ad_active() or functorch_active()


def transform_of(tensors: Iterable[Tensor]) -> str | None:
    """The transform that tensors are under, by name. Inside torch.func every tensor counts as transformed."""
    if functorch_active():
        return "torch.func transforms"
    return "forward-mode AD" if forward_ad_active() and any(map(_tangent, tensors)) else None


def transform_of_cotangents(*cotangents: Tensor | None) -> str | None:
    """The same for the cotangents of a backward, which autograd may also batch (is_grads_batched)."""
    present = [x for x in cotangents if x is not None]
    batched = any(map(is_autograd_batched, present))
    return "is_grads_batched" if batched else transform_of(present)


def forward_mode(*tensors: Tensor | None) -> bool:
    """True if tensors may carry tangents. Inside torch.func all count: other wrappers can hide tangents."""
    if not forward_ad_active():
        return False
    return functorch_active() or any(_tangent(x) for x in tensors if x is not None)


def _tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


def vjp(
    function: Callable[..., Sequence[Tensor]],
    arguments: Sequence[Tensor | None],
    needs: Sequence[bool],
    cotangents: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Backward of function(*arguments) by plain autograd: a gradient for each argument that needs one.

    The result is differentiable if grad mode is on. Gradients are taken with respect to a view of each argument,
    because arguments may be the same tensor or depend on each other; second derivatives flow through the views.
    torch.func may transform the cotangents, but not the arguments.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad(), functorch_disabled():
        views = [x.view_as(x) if x is not None and need else x for x, need in zip(arguments, needs, strict=True)]
        results = function(*views)
    kept = [(y, g) for y, g in zip(results, cotangents, strict=True) if g is not None]
    outputs, grad_outputs = [y for y, _ in kept], [g for _, g in kept]
    wanted = [x for x, need in zip(views, needs, strict=True) if need and x is not None]
    grads = iter(torch.autograd.grad(outputs, wanted, grad_outputs, create_graph=again, materialize_grads=True))
    return tuple(next(grads) if need else None for need in needs)


class Version:
    """A tensor's version counter without its memory: detects in-place changes, and hooks may still move the tensor."""

    __slots__ = ("_counter", "_first")

    def __init__(self, x: Tensor) -> None:
        self._counter = x.detach()
        if dispatch_mode_count() == 0:  # tracing modes do not support this
            self._counter.data = x.new_empty(0)  # other memory under the same counter
        self._first = version(x)

    def changed(self) -> bool:
        return version(self._counter) != self._first


def by_operations(dout: Tensor, dlse: Tensor | None) -> bool:
    """True if a backward must consist of torch's own operations: for double backward or forward mode."""
    return torch.is_grad_enabled() or forward_mode(dout, dlse)
