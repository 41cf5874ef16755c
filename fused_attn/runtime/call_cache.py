"""A cache of bound and dispatched calls, keyed by everything that binding and dispatch depend on.

A `CachedCall` stands for all calls that differ only in the contents of tensors. The first call with a key adds it, the
second fills its `CachedCall`, the third is recorded if the backend has `record`, and later ones are replayed. The key
holds the arguments and the state of torch. The cache is bypassed while torch compiles, traces, transforms or profiles,
and for tensor subclasses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, is_inference_mode_enabled
from torch.compiler import is_compiling
from torch.nn import Parameter

from ..backends.sdpa.kernel import Repeated
from ..spec import checks, storage
from ..spec.options import TENSOR_COUNT as OPTIONAL
from ..spec.options import Options
from ..spec.problem import DIFFERENTIABLE, Mask, Problem
from ..spec.torch_internals import any_autocast, deterministic_algorithms, float32_matmul_precision, observed
from . import autograd, dispatch, environment, ops
from .autocast import no_autocast

# The names of a call's tensors, in the order of the operators: checkpoints compare what first and later calls save, one
# by one.
NAMES = ("q", "k", "v", "bias", "slopes", "sink", "mask", "q_starts", "k_starts")
MASK = NAMES.index("mask")
FOUR_DIMS = (*range(NAMES.index("bias") + 1), MASK)  # of these tensors
POSITIONS = tuple(NAMES.index(name) if name in NAMES else None for name in ops.NAMES)
VALUE_TYPES = {int, float, bool, str, tuple, type(None)}  # of options in a key; items of tuples are checked too
LIMIT = 4096  # of cached calls

Tensors = tuple[Any, ...]  # tensors and None

# Heads-first views of q, k and v by layout.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "bshd": lambda x: x.transpose(1, 2),
    "packed": lambda x: x.transpose(0, 1)[None],
}

HIP = torch.version.hip is not None


def _key(tensors: Tensors, values: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Options, the state of torch, and the tensors without contents; None if a tensor has no memory of its own."""
    if observed():
        return None
    parts = [
        values, is_grad_enabled(), is_inference_mode_enabled(), deterministic_algorithms(), float32_matmul_precision()
    ]  # fmt: skip
    try:
        for x in tensors:
            if x is None:
                parts.append(None)
                continue
            if type(x) is not Tensor and type(x) is not Parameter:
                return None
            where = x.data_ptr()
            if not where or x.is_neg():  # a wrapper has no memory; a view may have a lazy negation
                return None
            parts += x.shape, x.stride(), x.dtype, x.device, x.requires_grad, where & 15
            if HIP:  # the compiler uses 32-bit offsets for short buffers
                parts.append(x.untyped_storage().nbytes() < 2**31)
        if any_autocast() and torch.is_autocast_enabled(tensors[0].device.type):
            parts.append(torch.get_autocast_dtype(tensors[0].device.type))
    except (AttributeError, RuntimeError):  # no q, or a tensor without strides or memory of its own
        return None
    return tuple(parts)


def cached(bind: Callable[..., Problem]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A function that binds, dispatches and runs a call, (out, lse) heads first; repeated calls skip the first two.

    bind(q, k, v, options, layout, starts, others) returns a Problem. The last two are optional: starts, the start
    tensors of packed sequences; others, any other hashable value that it depends on.
    """

    @functools.wraps(bind)
    def call(
        q: Tensor, k: Tensor, v: Tensor, options: Options, layout: str, backend: str | None, *extra: Any
    ) -> tuple[Tensor, Tensor | None]:
        tensors = (q, k, v, *options[:OPTIONAL], *(extra[0] if extra else ()))
        cached_call, untraced = lookup(tensors, options, layout, backend, extra)
        known = cached_call is not None and cached_call.known
        if cached_call is not None and known:
            result = cached_call(_heads_first(tensors, layout))
            if result is not None:
                return result
        p = bind(q, k, v, options, layout, *extra)
        with no_autocast(q):
            name, p = dispatch.choose(p, backend)
            # Torch's kernel, which was wrong here, does not run again: a checkpoint would count what it saves twice.
            result = dispatch.run(p, "tiled" if known else name, untraced)
        if cached_call is not None and not known:
            cached_call.learn(_heads_first(tensors, layout), p, name)
        return result

    return call


def _heads_first(tensors: Tensors, layout: str) -> Tensors:
    """The tensors, with q, k and v as heads-first views."""
    view = VIEWS.get(layout)
    return tensors if view is None else (*map(view, tensors[:3]), *tensors[3:])


def lookup(
    tensors: Tensors, options: Options, layout: str, backend: str | None, extra: tuple[Any, ...]
) -> tuple[CachedCall | None, bool]:
    """The cached call of these tensors and options, None at the first call; and whether nothing traces the call.

    The key holds the options' types too, because 1 equals True.
    """
    if is_compiling():
        return None, False
    requested = environment.read() if backend is None else backend
    values = options[OPTIONAL:] + extra[1:]
    packed = bool(extra and extra[0])
    if packed:
        values += (extra[0][0] is extra[0][1],)
    if type(tensors[MASK]) is Mask:
        lengths = tensors[MASK].kv_lengths
        if lengths is None:
            return None, False
        tensors, values = (*tensors[:MASK], lengths, *tensors[MASK + 1 :]), (*values, "Mask.lengths")
    kinds = tuple(map(type, values))
    if tuple in kinds:
        values = tuple(y for x in values for y in (x if type(x) is tuple else (x,)))
        kinds += tuple(map(type, values))
    key = _key(tensors, (layout, kinds, requested, values))
    if key is None:
        return None, False
    if packed and (tensors[0] is None or checks.readable(tensors[0])):  # the starts are checked at each call
        return None, VALUE_TYPES.issuperset(kinds)
    try:
        cached_call = _calls.get(key)
    except TypeError:  # an option that cannot be hashed
        return None, False
    if cached_call is not None:
        return cached_call, True
    if not VALUE_TYPES.issuperset(kinds):
        return None, False
    if _recorded(requested, tensors[0]):
        if len(_calls) >= LIMIT:
            _calls.clear()
        _calls[key] = CachedCall()
    return None, True


def replayed(
    function: Callable[..., Tensors], arguments: tuple[Any, ...], backend: str | None, alias: tuple[Any, Any]
) -> Tensors:
    """function(*arguments, backend, untraced), recorded at the second call of a key and replayed from the third on.

    untraced: nothing traces the call. For functions that read no tensor on a device. alias: two tensors; whether they
    overlap is part of the key.
    """
    if is_compiling() or observed():
        return function(*arguments, backend, False)
    requested = environment.read() if backend is None else backend
    q = arguments[0]
    if requested not in (None, "triton") or not isinstance(q, Tensor) or checks.readable(q):
        return function(*arguments, backend, True)
    lengths = tuple([len(x) if type(x) is tuple else -1 for x in arguments])
    flat = [y for x in arguments for y in (x if type(x) is tuple else (x,))]
    tensors = tuple([x for x in flat if isinstance(x, Tensor)])
    values = tuple([Tensor if isinstance(x, Tensor) else x for x in flat])
    kinds = tuple(map(type, flat))
    try:
        key = _key(tensors, (function, requested, lengths, kinds, values, _overlap(*alias)))
        replay = None if key is None else _replays.get(key, MISSING)
    except (RuntimeError, TypeError):  # a tensor without a storage, or an argument that cannot be hashed
        return function(*arguments, backend, False)
    if key is None:
        return function(*arguments, backend, False)
    if replay is MISSING:
        if len(_replays) >= LIMIT:
            _replays.clear()
        _replays[key] = None
        return function(*arguments, backend, True)
    if replay is not None:
        result = replay(tensors)
        return function(*arguments, backend, True) if result is None else result

    def work(*args: Tensor) -> Tensors:
        remaining = iter(args)
        items = iter([next(remaining) if isinstance(x, Tensor) else x for x in flat])
        rebuilt = [next(items) if n < 0 else tuple([next(items) for _ in range(n)]) for n in lengths]
        return function(*rebuilt, backend, True)

    result, _replays[key] = ops.backend_module("triton").record(work, tensors)
    return result


def _overlap(x: Any, y: Any) -> bool:
    return isinstance(x, Tensor) and isinstance(y, Tensor) and storage.overlap(x, y)


def _recorded(requested: Any, q: Any) -> bool:
    """True if the backend, None where the package chooses, may support repeated calls."""
    chosen = requested is None and isinstance(q, Tensor) and q.device.type in ("cpu", "cuda")
    return chosen or requested in ("hopper", "triton", "sdpa")


class CachedCall:
    """All calls of one key. known: `learn` has succeeded, so the call can be repeated.

    Its tensors are in the order of `NAMES`, without the absent ones at the end.
    """

    __slots__ = (
        "_backward", "_forward", "backend", "count", "differentiable", "fewer_dims", "kernel", "known", "settings",
        "takes_lengths",
    )  # fmt: skip

    def __init__(self) -> None:
        self.known = False
        self.kernel: Repeated | None = None  # torch's kernel, for the backend sdpa
        self._forward: Any = None
        self._backward: dict[tuple[Any, ...], Any] = {}

    def learn(self, tensors: Tensors, p: Problem, backend: str) -> None:
        """Learn from a call of this key that was bound to p and computed by a backend."""
        self.count = max(i for i, x in enumerate(tensors) if x is not None) + 1
        self.takes_lengths = isinstance(tensors[MASK], Mask)
        self.fewer_dims = any(isinstance(tensors[i], Tensor) and tensors[i].ndim < 4 for i in FOUR_DIMS)
        if self.fewer_dims:
            if self.takes_lengths:
                return
            tensors = _four_dims(tensors)
        if backend == "sdpa":
            args = (*tensors[:3], None if self.takes_lengths else tensors[MASK], tensors[3])
            if all(map(_same, (p.q, p.k, p.v, p.mask, p.bias), args)):
                self.kernel = Repeated.of(p, self.takes_lengths)
            self.known = self.kernel is not None
            return
        if not hasattr(ops.backend_module(backend) if backend in ops.BACKEND_MODULES else None, "record"):
            return
        flat = ops.flatten(p, backend)
        self.backend, self.settings = backend, flat[ops.TENSOR_COUNT :]
        self.differentiable = p.differentiable
        # Binding may have created tensors, which cannot be recreated here.
        self.known = all(map(_same, flat, self._flat(tensors))) and not p.empty

    def _flat(self, tensors: Tensors) -> tuple[Any, ...]:
        """The operators' arguments, as by `ops.flatten`."""
        count = len(tensors)
        return *(tensors[i] if i is not None and i < count else None for i in POSITIONS), *self.settings

    def __call__(self, tensors: Tensors) -> tuple[Tensor, Tensor | None] | None:
        """(out, lse); None if the contents of the tensors are invalid or need the backend `tiled`."""
        if self.fewer_dims:
            tensors = _four_dims(tensors)
        if self.kernel is not None:
            q, k, v, bias, mask = *tensors[:4], tensors[MASK]
            out = self.kernel(q, k, v, mask.kv_lengths if self.takes_lengths else mask, bias)
            return None if out is None else (out, None)
        args = tensors[: self.count]
        return autograd.repeated(self, *args) if self.differentiable else self.forward(args)[:2]

    def forward(self, args: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(out, lse, peak, log_sum) without a derivative."""
        results = None if self._forward is None else self._forward(args)
        if results is not None:
            return results
        with torch.autocast(args[0].device.type, enabled=False):
            if self._forward is not None:
                return torch.ops.fused_attn.forward(*self._flat(args))
            results, self._forward = ops.backend_module(self.backend).record(self._work_forward, args)
        return results

    def _work_forward(self, *args: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return ops.backend_module(self.backend).forward(ops.rebuild(self._flat(args))[0])

    def backward(self, args: Tensors, needs: tuple[bool, ...]) -> Tensors:
        """The gradients where `needs` is True. args: the tensors, out, peak, log_sum, dout, dlse."""
        key = _key(args, needs)
        replay = self._backward.get(key) if key is not None else None
        results = None if replay is None else replay(args)
        if results is not None:
            return results
        names = frozenset(name for name, need in zip(NAMES, needs, strict=False) if need)
        if key is None or replay is not None:
            wanted = [name in names for name in DIFFERENTIABLE]
            args = (*self._flat(args[: self.count]), *args[self.count :], wanted)
            return self._per_tensor(torch.ops.fused_attn.backward(*args), needs)

        def work(*args: Any) -> Tensors:
            p, _ = ops.rebuild(self._flat(args[: self.count]))
            grads = ops.backend_module(self.backend).backward(p, *args[self.count :], names)
            return tuple(grads.get(name) for name in NAMES[: self.count])

        with torch.autocast(args[0].device.type, enabled=False):
            results, replay = ops.backend_module(self.backend).record(work, args)
        if replay is not None:
            if len(self._backward) >= LIMIT:
                self._backward.clear()
            self._backward[key] = replay
        return results

    def differentiable_backward(self, args: Tensors, needs: tuple[bool, ...]) -> Tensors:
        """`backward` by differentiable operations, or by ones whose backward raises."""
        names = [name for name, need in zip(NAMES, needs, strict=False) if need]
        *saved, dout, dlse = args[self.count :]
        wanted = [name in names for name in DIFFERENTIABLE]
        flat = self._flat(args[: self.count])
        return self._per_tensor(autograd.differentiable_gradients(flat, tuple(saved), dout, dlse, wanted), needs)

    def _per_tensor(self, grads: Tensors, needs: tuple[bool, ...]) -> Tensors:
        """Gradients in the order of the call's tensors, from the order of DIFFERENTIABLE."""
        by_name = dict(zip(DIFFERENTIABLE, grads, strict=True))
        return tuple(by_name[name] if need else None for name, need in zip(NAMES, needs, strict=False))


def _four_dims(tensors: Tensors) -> Tensors:
    """The tensors, with leading dims of 1 where binding adds them: a mask (M, N) is (1, 1, M, N)."""
    found = list(tensors)
    for i in FOUR_DIMS:
        if found[i] is not None:
            found[i] = found[i][(None,) * (4 - found[i].ndim)]
    return tuple(found)


def _same(x: Any, y: Any) -> bool:
    """True for one object, equal numbers, or two views of the same elements."""
    if x is y or not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return x is y or (not isinstance(x, Tensor) and not isinstance(y, Tensor) and x == y)
    layouts = ((z.data_ptr(), z.shape, z.stride(), z.dtype) for z in (x, y))
    return next(layouts) == next(layouts)


_calls: dict[tuple[Any, ...], CachedCall] = {}
_replays: dict[tuple[Any, ...], Any] = {}  # None after the first call
MISSING = object()
