"""Calls that have been made before: what binding and dispatch found out about them, by everything that they asked.

A `Call` stands for all calls that agree in all but the contents of their tensors. The first is noted, the second is
learned from, the third is recorded if its backend can be (`record`), and the others are replayed. What a call depends
on beside its arguments, the state of torch, is part of its key. Where torch is compiling, tracing, transforming or
watching, or a tensor is more than plain memory, nothing is looked up and the long way is taken.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn import Parameter

from . import autograd, environment, native, ops
from .spec import DIFFERENTIABLE, Problem

TENSORS = ("q", "k", "v", "mask", "bias", "slopes", "sink")  # that a call may hold; scale and softcap as numbers
PLAIN = {int, float, bool, str, type(None)}
RECORDED = (None, "hopper", "triton", "sdpa")  # the backends asked for with which a call may be made again
DEVICES = ("cpu", "cuda")  # where that may be, with none asked for
LIMIT = 4096  # calls kept

Given = tuple[Any, ...]  # tensors and None

_C = torch._C
HIP = torch.version.hip is not None


def _watched() -> bool:
    """Whether torch transforms, traces or watches what is done."""
    return (
        forward_ad._current_level >= 0
        or _C._are_functorch_transforms_active()
        or _C._len_torch_dispatch_stack() > 0
        or _C._len_torch_function_stack() > 0
        or _C._is_tracing()
        or torch.autograd._profiler_enabled()
    )


def _settings() -> tuple[Any, ...]:
    """What else a call may depend on, wherever its tensors are."""
    return torch.is_grad_enabled(), _C._get_deterministic_algorithms(), _C._get_float32_matmul_precision()


def _key(tensors: Given, words: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Words, the state of torch, and all of the tensors but their contents; None where a tensor is not plain memory."""
    if _watched():
        return None
    parts = [words, _settings(), torch.is_inference_mode_enabled()]
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
        if _C._is_any_autocast_enabled() and torch.is_autocast_enabled(tensors[0].device.type):
            parts.append(torch.get_autocast_dtype(tensors[0].device.type))
    except (AttributeError, RuntimeError):  # no q, or a tensor without strides or memory of its own
        return None
    return tuple(parts)


class Alike:
    """Whether tensors are as others were, asked of torch once and not fact by fact.

    It is dynamo's own guard: types, dtypes, devices, sizes, strides, requires_grad, and the keys that torch would
    dispatch by, those of the thread included. Addresses are ours to ask, and have to be multiples of 16.
    """

    __slots__ = ("_check", "_present", "_settings")

    def __init__(self, tensors: Given) -> None:
        present = [i for i, x in enumerate(tensors) if x is not None]
        self._present = None if len(present) == len(tensors) else present
        tensors = tuple(tensors[i] for i in present)
        sizes, strides = [list(x.shape) for x in tensors], [list(x.stride()) for x in tensors]
        guards: Any = _C._dynamo.guards
        guard = guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        self._check, self._settings = guard.check, _settings()

    @staticmethod
    def of(tensors: Given) -> Alike | None:
        """None where the guard would not see all that counts."""
        if HIP or _C._is_any_autocast_enabled() or not _guards_see():
            return None
        if not all(x is None or (isinstance(x, Tensor) and x.data_ptr() % 16 == 0) for x in tensors):
            return None
        return Alike(tensors)

    def __call__(self, tensors: Given) -> bool:
        """Of tensors of which the same ones are None."""
        if self._present is not None:
            tensors = tuple([tensors[i] for i in self._present])
        for x in tensors:  # dynamo's guard asks for strides, and ends the process where there are none
            if getattr(x, "is_nested", True) or x.layout is not torch.strided:
                return False
        if _watched() or not self._check(*tensors) or _settings() != self._settings:
            return False
        places = 0
        for x in tensors:
            places |= x.data_ptr()
        return not places & 15


@functools.cache
def _guards_see() -> bool:
    """Whether this torch's guards tell apart what they are trusted with; they are no public part of it."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(2, 4, 4)
        others = (
            x[:, :, :3], x.mT, x.double(), x.clone().requires_grad_(), torch.nn.Parameter(x, requires_grad=False),
            x.to("meta"), torch._neg_view(x),
        )  # fmt: skip
        try:
            alike = Alike((x, x))
            if not alike((x, x.clone())) or any(alike((x, y)) for y in others):
                return False
            with torch.inference_mode():
                return not alike((x, x))
        except (AttributeError, TypeError):
            return False


def find(tensors: Given, words: tuple[Any, ...], backend: str | None) -> Call | None:
    """The call of these tensors and options; None at its first time, and where the long way is the only one.

    words: the options, all but tensors and the backend; they are told apart by type as well.
    """
    if torch.compiler.is_compiling():
        return None
    asked = backend or environment.backend
    if asked not in RECORDED or not (asked or (isinstance(tensors[0], Tensor) and tensors[0].device.type in DEVICES)):
        return None
    kinds = tuple(map(type, words))
    if not PLAIN.issuperset(kinds):
        words = tuple(y for x in words for y in (x if type(x) is tuple else (x,)))
        inside = tuple(map(type, words))
        if not PLAIN.issuperset(inside):
            return None
        kinds += inside
    name = (asked, kinds, words, *[x is None for x in tensors])
    last = _last.get(name)
    if last is not None and last[0](tensors[: last[1].count]):
        return last[1]
    key = _key(tensors, name)
    if key is None:
        return None
    call = _calls.get(key)
    if call is None:  # many calls are made once
        if len(_calls) >= LIMIT:
            _calls.clear()
            _last.clear()
        _calls[key] = Call()
    elif call.known:
        call.alike = call.alike or Alike.of(tensors[: call.count])
        if call.alike is not None:
            _last[name] = call.alike, call
    return call


class Call:
    """All calls of one key. known: how it was bound is known, and by which backend it can be made again.

    Of its tensors, in the order of `TENSORS`, it speaks without the absent ones at the end.
    """

    __slots__ = (
        "_backward", "_forward", "_last", "alike", "backend", "count", "differentiable", "kernel", "known", "settings",
    )  # fmt: skip

    def __init__(self) -> None:
        self.known = False
        self.kernel: native.Repeated | None = None  # torch's own, where that is what computes it
        self._forward: Any = None
        self._backward: dict[tuple[Any, ...], Any] = {}
        self.alike: Alike | None = None
        self._last: tuple[tuple[bool, ...], Alike, Any] | None = None  # the last backward: needs, tensors, replay

    def learn(self, tensors: Given, p: Problem, backend: str) -> None:
        """A call of this key was bound to p and went to that backend."""
        self.count = max(i for i, x in enumerate(tensors) if x is not None) + 1
        if backend == "sdpa":
            own = p.q, p.k, p.v, p.mask, p.bias
            self.kernel = native.Repeated.of(p) if all(map(_is_view, own, tensors)) else None
            self.known = self.kernel is not None
            return
        if not hasattr(ops.launcher(backend) if backend in ops.LAUNCHERS else None, "record"):
            return
        flat = ops.flatten(p, backend)
        self.backend, self.settings = backend, flat[ops.TENSORS :]
        self.differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in p.tensors().values())
        # Binding may have made tensors, from what is not known here.
        self.known = all(x is y for x, y in zip(flat, self._flat(tensors), strict=True)) and not p.empty

    def _flat(self, tensors: Given) -> tuple[Any, ...]:
        """The operators' arguments, as `ops.flatten` gives them."""
        all_of_them: Given = tensors + (None,) * (len(TENSORS) - len(tensors))
        q, k, v, mask, bias, slopes, sink = all_of_them
        absent = (None,) * (ops.TENSORS - 12)  # behind the mask
        return q, k, v, None, None, bias, slopes, sink, None, None, None, mask, *absent, *self.settings

    def __call__(self, tensors: Given) -> tuple[Tensor, Tensor | None] | None:
        """(out, lse); None: these tensors hold something for which the call must be bound again."""
        if self.kernel is not None:
            out = self.kernel(*map(_four_dims, tensors[:5]))
            return None if out is None else (out[(0,) * (4 - tensors[0].ndim)], None)
        given = tensors[: self.count]
        return autograd.again(self, *given) if self.differentiable else self.forward(given)[:2]

    def forward(self, given: Given) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(out, lse, peak, log_sum) without a derivative."""
        found = None if self._forward is None else self._forward(given)
        if found is not None:
            return found
        with torch.autocast(given[0].device.type, enabled=False):
            if self._forward is not None:
                return torch.ops.fused_attn.forward(*self._flat(given))
            found, self._forward = ops.launcher(self.backend).record(self._work_forward, given)
        return found

    def _work_forward(self, *given: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return ops.launcher(self.backend).forward(ops.rebuild(self._flat(given))[0])

    def backward(self, given: Given, needs: tuple[bool, ...]) -> Given:
        """The gradients that needs asks for. given: the tensors, out, peak, log_sum, dout, dlse."""
        alone = given[-1] is None  # most often the lse has no cotangent
        if self._last is not None and alone:
            same, alike, again = self._last
            found = again(given) if same == needs and alike(given[:-1]) else None
            if found is not None:
                return found
        key = _key(given, needs)
        replay = self._backward.get(key) if key is not None else None
        found = None if replay is None else replay(given)
        if found is not None:
            seen = Alike.of(given[:-1]) if alone else None
            if seen is not None:
                self._last = needs, seen, replay
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
        *saved, dout, dlse = given[self.count :]
        wanted = [name in names for name in DIFFERENTIABLE]
        flat = self._flat(given[: self.count])
        return self._shown(autograd.differentiable(flat, tuple(saved), dout, dlse, wanted), needs)

    def _shown(self, grads: Given, needs: tuple[bool, ...]) -> Given:
        """Gradients in the order of DIFFERENTIABLE as those of the call's tensors."""
        by_name = dict(zip(DIFFERENTIABLE, grads, strict=True))
        return tuple(by_name[name] if need else None for name, need in zip(TENSORS, needs, strict=False))


def _four_dims(x: Any) -> Any:
    """With leading dims of 1; None is None."""
    return x if x is None or x.ndim == 4 else x[(None,) * (4 - x.ndim)]


def _is_view(bound: Tensor | None, given: Tensor | None) -> bool:
    """Whether binding took a tensor as it is, or with leading dims of 1."""
    if bound is given or bound is None or given is None or given.ndim >= 4:
        return bound is given
    return bound.data_ptr() == given.data_ptr() and tuple(bound.shape) == (1,) * (4 - given.ndim) + tuple(given.shape)


_calls: dict[tuple[Any, ...], Call] = {}
_last: dict[tuple[Any, ...], tuple[Alike, Call]] = {}  # of each name, the last
