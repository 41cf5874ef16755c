"""Derivatives of the operators: a Function for eager mode, and the same formula registered for compilers.

Saved for backward, all through `save_for_backward` so that hooks can move them: the inputs, out, and each row's maximum
and log-sum separately. An out that was changed in place is recomputed. Double backward works for backends that are also
written in plain autograd (those with `attention`); the others raise.
"""

from __future__ import annotations

from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor

from ..spec.problem import DIFFERENTIABLE, Problem, TransformError
from ..spec.torch_internals import below_autograd, jit_tracing
from ..spec.transforms import Version, by_operations, transform_of_cotangents, vjp
from . import ops


def attend(p: Problem, backend: str, untraced: bool = False) -> tuple[Tensor, Tensor]:
    """(out, lse) by the operator, differentiable if an input requires grad.

    untraced: nothing traces or transforms the call, so the backend is called directly, which is faster.
    """
    if torch.compiler.is_compiling() or jit_tracing():
        # Compilers and torch.jit.trace record the operator, which has the formula registered below.
        return torch.ops.fused_attn.forward(*ops.flatten(p, backend))[:2]
    if p.differentiable:
        return _apply(p if untraced else None, *ops.flatten(p, backend))[:2]
    return (ops.serving(p, backend).forward(p) if untraced else _forward(*ops.flatten(p, backend)))[:2]


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator below the autograd layer of the dispatcher, for calls without a derivative."""
    with below_autograd():
        return torch.ops.fused_attn.forward(*args)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out, _, *normaliser = output
    ctx.mark_non_differentiable(*normaliser)
    ctx.save_for_backward(*inputs[: ops.TENSOR_COUNT], out.data, *normaliser)
    ctx.settings, ctx.version = inputs[ops.TENSOR_COUNT :], Version(out)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, ctx.needs_input_grad, dout, dlse)


def _gradients(
    ctx: Any, needs_input_grad: tuple[bool, ...], dout: Tensor | None, dlse: Tensor | None
) -> tuple[Tensor | None, ...]:
    *tensors, out, peak, log_sum = ctx.saved_tensors
    if ctx.version.changed():
        out, _lse, peak, log_sum = _forward(*tensors, *ctx.settings)
    needs = list(needs_input_grad[: len(DIFFERENTIABLE)])
    absent = (None,) * (len(tensors) + len(ctx.settings) - len(DIFFERENTIABLE))
    if dout is None and dlse is None:
        return (None,) * len(DIFFERENTIABLE) + absent
    if dout is None:
        dout = _zeros(out)
    args = (*tensors, *ctx.settings)
    if by_operations(dout, dlse):
        grads = differentiable_gradients(args, (out, peak, log_sum), dout, dlse, needs)
    else:
        grads = torch.ops.fused_attn.backward(*args, out, peak, log_sum, dout, dlse, needs)
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True)) + absent


def _zeros(out: Tensor) -> Tensor:
    """Zeros of out's shape: one element, expanded."""
    return out.new_zeros(()).expand(out.shape)


def differentiable_gradients(
    args: tuple[Any, ...], saved: tuple[Tensor, ...], dout: Tensor, dlse: Tensor | None, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients that support double backward and forward mode, or raise when either is attempted.

    saved: out, peak and log_sum.
    """
    backend, count = args[-1], len(DIFFERENTIABLE)
    attention = getattr(ops.backend_module(backend), "attention", None)
    if attention is not None:
        return vjp(lambda *x: attention(ops.rebuild((*x, *args[count:]))[0]), args[:count], needs, (dout, dlse))
    transform = transform_of_cotangents(dout, dlse)
    if transform is not None:
        raise _unsupported(backend, f"{transform} of the backward")
    return _OnceDifferentiable.apply(backend, *args, *saved, dout, dlse, needs)


class Attention(torch.autograd.Function):
    """The arguments of `ops.flatten` -> the operator's results; given their Problem, the operator is bypassed."""

    @staticmethod
    def forward(ctx: Any, p: Problem | None, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        result = _forward(*args) if p is None else ops.serving(p, args[-1]).forward(p)
        _setup_context(ctx, args, result)
        ctx.context = copy_context()
        return result

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        # On a GPU backward runs in a thread of its own, which does not inherit context variables.
        needs = ctx.needs_input_grad[1:]
        return None, *ctx.context.copy().run(_gradients, ctx, needs, dout, dlse)


class _OnceDifferentiable(torch.autograd.Function):
    """The backward operator, whose own backward raises."""

    @staticmethod
    def forward(ctx: Any, backend: str, *args: Any) -> tuple[Tensor, ...]:
        ctx.backend = backend
        return torch.ops.fused_attn.backward(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise _unsupported(ctx.backend, "double backward")


def _unsupported(backend: str, transform: str) -> TransformError:
    return TransformError(f'backend="{backend}" does not support {transform}; "tiled" and "reference" do')


# The base class's apply: `Function.apply` also binds default arguments, in Python, at every call. It does not support
# functorch; dispatch sends no transformed tensor here.
_apply = super(torch.autograd.Function, Attention).apply


class _RepeatedCall(torch.autograd.Function):
    """A repeated call: the `call_cache.CachedCall` and its tensors -> (out, lse)."""

    @staticmethod
    def forward(ctx: Any, call: Any, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        out, lse, *normaliser = call.forward(tensors)
        ctx.save_for_backward(*tensors, out.data, *normaliser)
        ctx.call, ctx.context, ctx.version = call, copy_context(), Version(out)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        if dout is None and dlse is None:
            return (None,) * (1 + len(needs))
        saved = ctx.saved_tensors
        if ctx.version.changed():
            tensors = saved[: len(needs)]
            out, _, *normaliser = ctx.call.forward(tensors)
            saved = (*tensors, out, *normaliser)
        if dout is None:
            dout = _zeros(saved[-3])
        backward = ctx.call.differentiable_backward if by_operations(dout, dlse) else ctx.call.backward
        return None, *ctx.context.copy().run(backward, (*saved, dout, dlse), needs)


repeated = super(torch.autograd.Function, _RepeatedCall).apply

torch.library.register_autograd("fused_attn::forward", _backward, setup_context=_setup_context)
