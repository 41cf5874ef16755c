"""A launch cache in front of Triton's binder, which costs more than the launch.

The binder reads every argument of every launch to learn which compiled kernel serves it. `signature` asks the same of
the arguments and forgets everything else, so launches of one signature share the compiled kernel that the binder chose
for the first of them. It may tell more launches apart than the binder does, which costs a second question; it must
never tell fewer, which would run a kernel that was compiled for other arguments.

What is not an argument (hooks, debugging, the driver, the device) is asked at each launch, and so is the stream. Where
a hook wants to see launches, where kernels are interpreted, and under a triton whose launch protocol has not been read,
Triton does all of it.
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor
from torch.nn import Parameter
from triton import knobs
from triton.compiler import CompiledKernel
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.language import constexpr
from triton.runtime import JITFunction, driver
from triton.tools.tensor_descriptor import TensorDescriptor

READ = ("3.6.", "3.7.")  # the versions whose JITFunction.run and CompiledKernel were read
KNOWN = triton.__version__.startswith(READ) and not knobs.runtime.interpret
LIMIT = 4096  # signatures kept
CONSTANTS = {int, float, bool, str, type(None)}  # what a kernel may be compiled for here
DESCRIPTORS = (TensorDescriptor, GluonDescriptor)

INT32, INT64 = range(-(2**31), 2**31), range(-(2**63), 2**63)


class Unknown(Exception):
    """An argument whose meaning to the binder is not known here."""


class Compiled:
    """A compiled kernel and what its launcher wants beside the arguments."""

    __slots__ = ("constants", "function", "kernel", "metadata", "run")

    def __init__(self, kernel: Any, compiled: Any, constants: tuple[Any, ...]) -> None:
        self.kernel = kernel  # alive as long as its id stands in a key
        self.run, self.function, self.metadata = compiled.run, compiled.function, compiled.packed_metadata
        self.constants = constants

    def __call__(self, grid: int, stream: int, args: tuple[Any, ...]) -> None:
        self.run(grid, 1, 1, stream, self.function, self.metadata, None, None, None, *args, *self.constants)


_compiled: dict[tuple[Any, ...], Compiled] = {}


def circumstances() -> tuple[Any, ...] | None:
    """What a launch depends on beside its kernel and arguments; None where it must not be told apart from others.

    Nothing is asked, and the tuple is empty, where Triton does every launch itself.
    """
    if not KNOWN:
        return ()
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or runtime.add_stages_inspection_hook:
        return None
    active = driver.active
    return active, active.get_current_device(), runtime.debug, knobs.compilation.instrumentation_mode


def stream(around: tuple[Any, ...]) -> int | None:
    """The current stream: it may be another at every launch."""
    return around[0].get_current_stream(around[1]) if around else None


def launch(kernel: Any, grid: int, args: tuple[Any, ...], options: dict[str, Any]) -> Compiled | None:
    """Launch, and the compiled kernel if the next launch of this signature may use it without asking."""
    around = circumstances()
    key = signature(kernel, args, options, around[1]) if around and isinstance(kernel, JITFunction) else None
    found = None if key is None else _compiled.get((around, *key))
    if found is not None:
        found(grid, stream(around), args)
        return found
    compiled = kernel[(grid,)](*args, **options)
    if key is None or type(compiled) is not CompiledKernel:
        return None
    if len(_compiled) >= LIMIT:
        _compiled.clear()
    constants = tuple(options[name] for name in kernel.arg_names[len(args) :])
    found = _compiled[(around, *key)] = Compiled(kernel, compiled, constants)
    return found


def signature(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], device: int) -> tuple[Any, ...] | None:
    """What the binder sees of a launch, hashable: launches of one signature are one to it. None: unknown to us."""
    kinds = tuple(map(type, options.values()))
    if (
        kernel.pre_run_hooks
        or not CONSTANTS.issuperset(kinds)
        or not options.keys() >= set(kernel.arg_names[len(args) :])
    ):
        return None
    hip = kernel.device_caches[device][2].backend == "hip"
    classes: list[Any] = []
    try:
        for x, param in zip(args, kernel.params, strict=False):
            if type(x) is int and param.do_not_specialize:
                classes.append(_width(x))
            else:
                _classify((x,), classes, hip)
    except Unknown:
        return None
    return id(kernel), *classes, *options.items(), kinds


def classify(x: Any, hip: bool = False) -> tuple[Any, ...]:
    """The class of one argument: what distinguishes it from others in the eyes of the binder."""
    classes: list[Any] = []
    _classify((x,), classes, hip)
    return tuple(classes)


def _width(x: int) -> str:
    """The type that holds an integer."""
    return "i32" if x in INT32 else "i64" if x in INT64 else "u64"


def _classify(items: tuple[Any, ...], classes: list[Any], hip: bool) -> None:
    """Append the classes of items, those of nested tuples in place: one list costs less than a tuple for each level."""
    for x in items:
        kind = type(x)
        if x is None or kind is float or kind is bool:
            classes.append(kind)
        elif kind is int:
            classes.append("1" if x == 1 else _width(x) if x % 16 else _width(x) + "x16")
        elif kind is constexpr:
            value = x.value
            if type(value) not in CONSTANTS:
                raise Unknown(kind)
            classes += kind, type(value), value
        elif kind is Tensor or kind is Parameter:
            classes += x.dtype, x.data_ptr() % 16 == 0
            if hip:  # where short buffers are addressed by 32-bit offsets
                classes.append(x.untyped_storage().nbytes() < 2**31)
        elif isinstance(x, tuple):
            classes += kind, len(x)
            _classify(x, classes, hip)
        elif kind in DESCRIPTORS:
            classes += kind, x.base.dtype, tuple(x.block_shape), getattr(x, "layout", None)
        else:
            raise Unknown(kind)
