"""Calls that have been made before: what binding and dispatch found out about them, by everything that they asked.

A `Call` stands for all calls that agree in all but the contents of their tensors. The first is noted, the second is
learned from, the third is recorded if its backend can be (`record`), and the others are replayed. What a call depends
on beside its arguments, the state of torch, is part of its key. Where torch is compiling, tracing, transforming or
watching, or a tensor is more than plain memory, nothing is looked up and the long way is taken.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn import Parameter

from . import autograd, ops
from .spec import DIFFERENTIABLE, Problem

TENSORS = ("q", "k", "v", "mask", "bias", "slopes", "sink")  # that a call may hold; scale and softcap as numbers
PLAIN = {int, float, bool, str, type(None)}
RECORDED = (None, "hopper", "triton")  # the backends asked for with which a call may be one that records
LIMIT = 4096  # calls kept

Given = tuple[Any, ...]  # tensors and None

_C = torch._C
HIP = torch.version.hip is not None


def _state(device: Any) -> tuple[Any, ...] | None:
    """What torch would do to a call beside what is asked of it; None where it transforms, traces or watches."""
    if (
        forward_ad._current_level >= 0
        or _C._are_functorch_transforms_active()
        or _C._len_torch_dispatch_stack()
        or _C._len_torch_function_stack()
        or _C._is_tracing()
        or torch.autograd._profiler_enabled()
    ):
        return None
    autocast = _C._is_any_autocast_enabled() and torch.is_autocast_enabled(device.type)
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        _C._get_deterministic_algorithms(),
        _C._get_float32_matmul_precision(),
        torch.get_autocast_dtype(device.type) if autocast else None,
    )


def _key(tensors: Given, words: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Words, the state of torch, and all of the tensors but their contents; None where a tensor is not plain memory."""
    parts: list[Any] = [words]
    try:
        for x in tensors:
            if x is None:
                parts.append(None)
                continue
            if type(x) is not Tensor and type(x) is not Parameter:
                return None
            where = x.data_ptr()
            if not where or x.is_neg():  # a wrapper has no memory; a view may be kept with its sign turned
                return None
            parts += x.shape, x.stride(), x.dtype, x.device, x.requires_grad, where & 15
            if HIP:  # where short buffers are addressed by 32-bit offsets
                parts.append(x.untyped_storage().nbytes() < 2**31)
        state = _state(tensors[0].device)
    except (AttributeError, RuntimeError):  # no q, or a tensor without strides or memory of its own
        return None
    return None if state is None else (state, *parts)


def find(tensors: Given, words: tuple[Any, ...], backend: str | None) -> Call | None:
    """The call of these tensors and options; None at its first time, and where the long way is the only one.

    words: the options, all but tensors and the backend; they are told apart by type as well.
    """
    if torch.compiler.is_compiling():
        return None
    asked = backend or os.environ.get("FUSED_ATTN_BACKEND") or None
    if asked not in RECORDED or not (asked or (isinstance(tensors[0], Tensor) and tensors[0].is_cuda)):
        return None
    kinds = tuple(map(type, words))
    if not PLAIN.issuperset(kinds):
        words = tuple(y for x in words for y in (x if type(x) is tuple else (x,)))
        inside = tuple(map(type, words))
        if not PLAIN.issuperset(inside):
            return None
        kinds += inside
    key = _key(tensors, (asked, kinds, words))
    if key is None:
        return None
    call = _calls.get(key)
    if call is None:  # many calls are made once
        if len(_calls) >= LIMIT:
            _calls.clear()
        _calls[key] = Call()
    return call


class Call:
    """All calls of one key. known: how it was bound is known, and by which backend it can be made again.

    Of its tensors, in the order of `TENSORS`, it speaks without the absent ones at the end.
    """

    __slots__ = ("_backward", "_forward", "backend", "count", "differentiable", "known", "settings")

    def __init__(self) -> None:
        self.known = False
        self._forward: Any = None
        self._backward: dict[tuple[Any, ...], Any] = {}

    def learn(self, tensors: Given, p: Problem, backend: str) -> None:
        """A call of this key was bound to p and went to that backend."""
        if not hasattr(ops.launcher(backend) if backend in ops.LAUNCHERS else None, "record"):
            return
        flat = ops.flatten(p, backend)
        self.backend, self.settings = backend, flat[ops.TENSORS :]
        self.count = max(i for i, x in enumerate(tensors) if x is not None) + 1
        self.differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in p.tensors().values())
        # Binding may have made tensors, from what is not known here.
        self.known = all(x is y for x, y in zip(flat, self._flat(tensors), strict=True)) and not p.empty

    def _flat(self, tensors: Given) -> tuple[Any, ...]:
        """The operators' arguments, as `ops.flatten` gives them."""
        all_of_them: Given = tensors + (None,) * (len(TENSORS) - len(tensors))
        q, k, v, mask, bias, slopes, sink = all_of_them
        return q, k, v, None, None, bias, slopes, sink, mask, None, None, None, *self.settings

    def __call__(self, tensors: Given) -> tuple[Tensor, Tensor]:
        """(out, lse)"""
        given = tensors[: self.count]
        return autograd.again(self, *given) if self.differentiable else self.forward(given)

    def forward(self, given: Given) -> tuple[Tensor, Tensor]:
        """(out, lse) without a derivative."""
        found = None if self._forward is None else self._forward(given)
        if found is not None:
            return found
        with torch.autocast(given[0].device.type, enabled=False):
            if self._forward is not None:
                return torch.ops.fused_attn.forward(*self._flat(given))
            found, self._forward = ops.launcher(self.backend).record(self._work_forward, given)
        return found

    def _work_forward(self, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        return ops.launcher(self.backend).forward(ops.rebuild(self._flat(given))[0])

    def backward(self, given: Given, needs: tuple[bool, ...]) -> Given:
        """The gradients that needs asks for. given: the tensors, out, lse, dout and dlse."""
        key = _key(given, needs)
        replay = self._backward.get(key) if key is not None else None
        found = None if replay is None else replay(given)
        if found is not None:
            return found
        names = frozenset(name for name, need in zip(TENSORS, needs, strict=False) if need)
        if key is None or replay is not None:
            wanted = [name in names for name in DIFFERENTIABLE]
            args = (*self._flat(given[: self.count]), *given[self.count :], wanted)
            return self._shown(torch.ops.fused_attn.backward(*args), needs)

        def work(*given: Any) -> Given:
            p, _ = ops.rebuild(self._flat(given[: self.count]))
            grads = ops.launcher(self.backend).backward(p, *given[self.count :], names)
            return tuple(grads.get(name) for name in TENSORS[: self.count])

        with torch.autocast(given[0].device.type, enabled=False):
            found, replay = ops.launcher(self.backend).record(work, given)
        if replay is not None:
            if len(self._backward) >= LIMIT:
                self._backward.clear()
            self._backward[key] = replay
        return found

    def again(self, given: Given, needs: tuple[bool, ...]) -> Given:
        """As `backward`, by operations that can be differentiated in their turn, or that say that they cannot."""
        names = [name for name, need in zip(TENSORS, needs, strict=False) if need]
        out, lse, dout, dlse = given[self.count :]
        wanted = [name in names for name in DIFFERENTIABLE]
        return self._shown(
            autograd.differentiable(self._flat(given[: self.count]), out, lse, dout, dlse, wanted), needs
        )

    def _shown(self, grads: Given, needs: tuple[bool, ...]) -> Given:
        """Gradients in the order of DIFFERENTIABLE as those of the call's tensors."""
        by_name = dict(zip(DIFFERENTIABLE, grads, strict=True))
        return tuple(by_name[name] if need else None for name, need in zip(TENSORS, needs, strict=False))


_calls: dict[tuple[Any, ...], Call] = {}
