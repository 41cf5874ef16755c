"""A launch cache in front of Triton's binder, which takes longer than the launch.

The binder reads every argument of every launch to find the compiled kernel. `signature` reads the same properties of
the arguments and ignores the rest, so launches with equal signatures share the kernel that the binder chose for the
first. Two launches that the binder treats alike may have different signatures, which costs a second call of the binder.
The reverse must not happen: it would run a kernel compiled for other arguments.

`launch_context` holds everything else that a launch depends on (hooks, debugging, the driver, the device). It is read
at each launch, and so is the stream. Triton handles the whole launch if a hook is set, if kernels are interpreted, or
if its version is not in VERSIONS.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
from torch import Tensor
from torch.nn import Parameter
from triton import knobs
from triton.compiler import CompiledKernel
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.language import constexpr
from triton.runtime import JITFunction, driver
from triton.tools.tensor_descriptor import TensorDescriptor

VERSIONS = ("3.6.", "3.7.")  # versions whose JITFunction.run and CompiledKernel this file was written for
ENABLED = triton.__version__.startswith(VERSIONS) and not knobs.runtime.interpret
LIMIT = 4096  # entries
CONSTANTS = {int, float, bool, str, type(None)}  # types of compile-time arguments
DESCRIPTORS = (TensorDescriptor, GluonDescriptor)

INT32, INT64 = range(-(2**31), 2**31), range(-(2**63), 2**63)


class Unknown(Exception):
    """An argument of a type that this cache does not know."""


class Compiled:
    """A compiled kernel, and the further arguments of its launcher."""

    __slots__ = ("constants", "function", "kernel", "metadata", "run")

    def __init__(self, kernel: Any, compiled: Any, constants: tuple[Any, ...]) -> None:
        self.kernel = kernel  # kept alive while its id is in a key
        self.run, self.function, self.metadata = compiled.run, compiled.function, compiled.packed_metadata
        self.constants = constants

    def __call__(self, grid: int, stream: int, args: tuple[Any, ...]) -> None:
        self.run(grid, 1, 1, stream, self.function, self.metadata, None, None, None, *args, *self.constants)


_compiled: dict[tuple[Any, ...], Compiled] = {}


def launch_context() -> tuple[Any, ...] | None:
    """What a launch depends on, beside its kernel and arguments; None if it must not be cached.

    Empty if Triton handles every launch.
    """
    if not ENABLED:
        return ()
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or runtime.add_stages_inspection_hook:
        return None
    active = driver.active
    return active, active.get_current_device(), runtime.debug, knobs.compilation.instrumentation_mode


def stream(context: tuple[Any, ...]) -> int | None:
    """The current stream, which may differ from launch to launch."""
    return context[0].get_current_stream(context[1]) if context else None


def launch(kernel: Any, grid: int, args: tuple[Any, ...], options: dict[str, Any]) -> Compiled | None:
    """Launch. Returns the compiled kernel if the next launch with this signature may use it directly."""
    context = launch_context()
    key = signature(kernel, args, options, context[1]) if context and isinstance(kernel, JITFunction) else None
    found = None if key is None else _compiled.get((context, *key))
    if found is not None:
        found(grid, stream(context), args)
        return found
    compiled = kernel[(grid,)](*args, **options)
    if key is None or type(compiled) is not CompiledKernel:
        return None
    if len(_compiled) >= LIMIT:
        _compiled.clear()
    constants = tuple(options[name] for name in kernel.arg_names[len(args) :])
    found = _compiled[(context, *key)] = Compiled(kernel, compiled, constants)
    return found


def signature(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], device: int) -> tuple[Any, ...] | None:
    """What the binder reads of a launch, as a hashable tuple; None if an argument is unknown."""
    kinds = tuple(map(type, options.values()))
    parameters = _parameters(kernel, len(args))
    if kernel.pre_run_hooks or not CONSTANTS.issuperset(kinds) or not options.keys() >= parameters.constants:
        return None
    hip = kernel.device_caches[device][2].backend == "hip"
    classes: list[Any] = []
    try:
        for i in parameters.unspecialized:
            classes.append(_width(args[i]) if type(args[i]) is int else classify(args[i], hip))
        _classify([args[i] for i in parameters.others], classes, hip)
    except Unknown:
        return None
    return id(kernel), *classes, *options.items(), kinds


class Parameters(NamedTuple):
    """Of a kernel: the places of integers that it is not specialised on, the other places, and the constants' names."""

    unspecialized: tuple[int, ...]
    others: tuple[int, ...]
    constants: set[str]


@functools.lru_cache(1024)
def _parameters(kernel: Any, count: int) -> Parameters:
    """count: of arguments; the parameters after them are constants."""
    unspecialized = tuple(i for i, x in enumerate(kernel.params[:count]) if x.do_not_specialize)
    others = tuple(i for i in range(count) if i not in unspecialized)
    return Parameters(unspecialized, others, set(kernel.arg_names[count:]))


def classify(x: Any, hip: bool = False) -> tuple[Any, ...]:
    """The class of one argument: what the binder distinguishes."""
    classes: list[Any] = []
    _classify((x,), classes, hip)
    return tuple(classes)


def _width(x: int) -> str:
    """The type of an integer."""
    return "i32" if x in INT32 else "i64" if x in INT64 else "u64"


# By id, what is found at many launches: the object itself, so that its id is not used again, and its class.
_kept: dict[int, tuple[Any, object]] = {}
_classes: dict[tuple[Any, ...], object] = {}  # one object for each class, which hashes and compares by identity


def keep(x: Any) -> Any:
    """x, a constexpr or a tuple without tensors, for the life of the process; its class is read once."""
    if len(_kept) < LIMIT:
        _kept[id(x)] = x, _class(x)
    return x


def _class(x: Any) -> object:
    if type(x) is constexpr:
        if type(x.value) not in CONSTANTS:
            raise Unknown(constexpr)
        found = constexpr, type(x.value), x.value
    else:
        found = classify(x)
    return _classes.setdefault(found, object())


def _classify(items: Sequence[Any], classes: list[Any], hip: bool) -> None:
    """Append the classes of items, and of those of nested tuples, to one list: cheaper than a tuple per level.

    A launch has about 100 items, so the frequent types come first, and an integer is classified without a call.
    """
    add = classes.append
    for x in items:
        kind = type(x)
        if kind is int:  # what a kernel may be specialised on: being 1, the width, and divisibility by 16
            if -0x80000000 <= x < 0x80000000:
                add("1" if x == 1 else "i32" if x & 15 else "i32x16")
            else:
                add(_width(x) if x & 15 else _width(x) + "x16")
        elif x is None or kind is float or kind is bool:
            add(kind)
        elif (kept := _kept.get(id(x))) is not None:
            add(kept[1])
        elif kind is constexpr:
            add(_class(keep(x)))
        elif kind is Tensor or kind is Parameter:
            classes += x.dtype, x.data_ptr() % 16 == 0
            if hip:  # buffers below 2 GB have 32-bit offsets
                add(x.untyped_storage().nbytes() < 2**31)
        elif isinstance(x, tuple):
            classes += kind, len(x)
            _classify(x, classes, hip)
        elif kind in DESCRIPTORS:
            classes += kind, x.base.dtype, tuple(x.block_shape), getattr(x, "layout", None)
        else:
            raise Unknown(kind)
