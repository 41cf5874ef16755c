"""Which transform of torch tensors are under, and a backward that supports them all.

An operator that has no rule for a transform could give a silent zero.
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
    """Whether any tensor can be under one."""
    return forward_ad_active() or functorch_active()


def transform_of(tensors: Iterable[Tensor]) -> str | None:
    """By name. Inside a transform of torch.func every tensor counts as transformed."""
    if functorch_active():
        return "torch.func transforms"
    return "forward-mode AD" if forward_ad_active() and any(map(_tangent, tensors)) else None


def transform_of_cotangents(*cotangents: Tensor | None) -> str | None:
    """The same of what a backward is given, which autograd may also batch by itself (is_grads_batched)."""
    given = [x for x in cotangents if x is not None]
    batched = any(map(is_autograd_batched, given))
    return "is_grads_batched" if batched else transform_of(given)


def forward_mode(*tensors: Tensor | None) -> bool:
    """Whether tensors may carry tangents; inside torch.func.jvp all of them may, beneath other wrappers too."""
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

    It can be differentiated again where grad mode is on. Arguments may be one tensor, or made from one another: the
    gradients are those of views, one for each argument, and a second derivative goes on from the views to the caller's
    tensors. torch.func may be transforming the cotangents; the arguments come from outside of it.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad(), functorch_disabled():
        views = [x.view_as(x) if x is not None and need else x for x, need in zip(arguments, needs, strict=True)]
        results = function(*views)
    kept = [(y, g) for y, g in zip(results, cotangents, strict=True) if g is not None]
    outputs, given = [y for y, _ in kept], [g for _, g in kept]
    wanted = [x for x, need in zip(views, needs, strict=True) if need and x is not None]
    found = iter(torch.autograd.grad(outputs, wanted, given, create_graph=again, materialize_grads=True))
    return tuple(next(found) if need else None for need in needs)


class Version:
    """The version of a tensor, without its memory, so that hooks may move that while in-place changes are noticed."""

    __slots__ = ("_counter", "_first")

    def __init__(self, x: Tensor) -> None:
        self._counter = x.detach()
        if dispatch_mode_count() == 0:  # modes that trace do not know how to
            self._counter.data = x.new_empty(0)  # other memory under the same counter
        self._first = version(x)

    def changed(self) -> bool:
        return version(self._counter) != self._first


def by_operations(dout: Tensor, dlse: Tensor | None) -> bool:
    """Whether a backward must be made of operations that torch knows: to differentiate it again, or forward."""
    return torch.is_grad_enabled() or forward_mode(dout, dlse)
