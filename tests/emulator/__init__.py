"""Gluon kernels for sm_90 on the CPU: their numbers, and their protocol.

    with emulated(seed=3):
        out, lse, peak, log_sum = fused_attn.backends.triton.hopper.forward(problem)

takes the place of the launch. The source of a kernel runs as it stands, in namespaces in which the device language
means what `language.py` says. Partitions and programs interleave at random, and what is asynchronous happens late, all
drawn from the seed; whatever is not ordered by a barrier, a wait or a fence raises `Fault`, whether or not it went
wrong this time (`machine.py`, `memory.py`, `products.py`).

What it cannot see: layouts, registers and their spills, alignment inside shared memory, what the compiler moves or
serialises, time, whether the threads of one partition agree with each other, and anything inside of inline assembly.
"""

from __future__ import annotations

import builtins
import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.experimental.gluon import language as gluon_language
from triton.experimental.gluon.language.nvidia import hopper
from triton.runtime.jit import KernelInterface

from fused_attn.backends.triton import launcher

from . import language
from .copies import Descriptor
from .machine import Machine, Program
from .memory import Global
from .values import Fault, Int32, Int64, Pointer, Tensor

__all__ = ["Emulation", "Fault", "emulated"]

# (file, name, first line) of a function's code
Place = tuple[str, str, int]

_MODULES = {
    id(gluon_language): language.GL,
    id(tl): language.GL,
    id(hopper): language.HOPPER,
    id(hopper.mbarrier): language.MBARRIER,
    id(hopper.tma): language.TMA,
}
_SPACES = (language.HOPPER, language.MBARRIER, language.TMA, language.GL)


@dataclass
class Emulation:
    """What a block of launches runs with; see `emulated`. machines: the launches so far."""

    seed: int
    deadline: int
    ordered: bool
    codes: Mapping[Place, CodeType]
    machines: list[Machine] = field(default_factory=list)
    modules: dict[int, dict[str, Any]] = field(default_factory=dict)
    functions: dict[int, FunctionType] = field(default_factory=dict)

    def launch(self, kernel: Any, grid: int, *args: Any, **options: Any) -> None:
        name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.__name__}"
        machine = Machine(f"{self.seed} {len(self.machines)}", int(grid), self.deadline, self.ordered, name)
        self.machines.append(machine)
        language.Current.machine = machine
        signature = inspect.signature(kernel.fn)
        bound = signature.bind(*args, **{name: x for name, x in options.items() if name in signature.parameters})
        constants = {name for name, p in signature.parameters.items() if "constexpr" in str(p.annotation)}
        values = {
            name: self.constant(x) if name in constants else self._argument(machine, x)
            for name, x in bound.arguments.items()
        }
        f = self.function(kernel)

        def body(program: Program) -> None:
            f(**values)
            machine.end(machine.running)

        machine.run(body)

    def _argument(self, machine: Machine, x: Any) -> Any:
        """As the kernel gets it."""
        if isinstance(x, torch.Tensor):
            return Pointer(_home(machine, x), x.storage_offset())
        if hasattr(x, "block_shape"):
            return Descriptor(_home(machine, x.base), x)
        if isinstance(x, bool):
            return language.Bool(x)
        if isinstance(x, int):
            return Int32(x) if -(2**31) <= x < 2**31 else Int64(x)
        if isinstance(x, float):
            return Tensor(np.float32(x), tl.float32)
        if isinstance(x, tuple):
            values = [self._argument(machine, part) for part in x]
            return type(x)(*values) if hasattr(x, "_fields") else tuple(values)
        return self.constant(x)

    def constant(self, x: Any) -> Any:
        if isinstance(x, tl.constexpr):
            return self.constant(x.value)
        if isinstance(x, KernelInterface):
            return self.function(x)
        if isinstance(x, tuple):
            values = [self.constant(part) for part in x]
            return type(x)(*values) if hasattr(x, "_fields") else tuple(values)
        return x

    def function(self, kernel: Any) -> FunctionType:
        """The source of a device function, in a namespace in which it runs here."""
        f = kernel.fn
        found = self.functions.get(id(f))
        if found is None:
            code = f.__code__
            code = self.codes.get((code.co_filename, code.co_name, code.co_firstlineno), code)
            defaults = tuple(map(self.constant, f.__defaults__ or ()))
            found = FunctionType(code, self._module(f.__globals__), f.__name__, defaults)
            found.__kwdefaults__ = {name: self.constant(x) for name, x in (f.__kwdefaults__ or {}).items()}
            self.functions[id(f)] = found
        return found

    def _module(self, own: dict[str, Any]) -> dict[str, Any]:
        """The globals of a module of device code."""
        found = self.modules.get(id(own))
        if found is None:
            found = self.modules[id(own)] = {"__name__": own["__name__"], "__builtins__": builtins}
            helpers = own["__name__"].rpartition(".")[2].startswith("hopper")
            for name, x in own.items():
                if not name.startswith("__"):
                    found[name] = language.HELPERS[name] if helpers and name in language.HELPERS else self._global(x)
            found["range"] = language.counted
        return found

    def _global(self, x: Any) -> Any:
        if id(x) in _MODULES:
            return _MODULES[id(x)]
        if isinstance(x, KernelInterface):
            return self.function(x)
        # A function of the device language, imported by its name.
        home = getattr(x, "__module__", None) or ""
        if home.startswith("triton.") and not isinstance(x, (ModuleType, tl.constexpr, tl.dtype)) and callable(x):
            for space in _SPACES:
                if hasattr(space, x.__name__):
                    return getattr(space, x.__name__)
            return _unknown(x.__name__)
        return self.constant(x)


def _unknown(name: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"the emulator does not know {name}")

    return refuse


def _home(machine: Machine, x: torch.Tensor) -> Global:
    key = (x.untyped_storage().data_ptr(), x.dtype)
    found = machine.memories.get(key)
    if found is None:
        found = machine.memories[key] = Global(machine, x)
    return found


def _runs_here(kernel: Any) -> bool:
    """Gluon kernels, and the Triton kernels beside them, which the interpreter would take longer for."""
    gluon = getattr(kernel, "is_gluon", None)
    return (gluon is not None and gluon()) or kernel.fn.__module__.rpartition(".")[2].startswith("hopper")


@contextlib.contextmanager
def emulated(
    seed: int = 0, *, ordered: bool = False, deadline: int = 1_000_000, codes: Mapping[Place, CodeType] | None = None
) -> Iterator[Emulation]:
    """Inside, launches of the kernels for sm_90 on CPU tensors run here; others go where they would have gone.

    ordered: additions to global memory in floating point must be ordered like any other write, for then their sums
    have the same bits on every run. deadline: of scheduling steps, after which a launch is given up. codes: other code
    for some functions, see `mutations.py`.
    """
    emulation = Emulation(seed, deadline, ordered, codes or {})
    launch = launcher.launch

    def instead(kernel: Any, grid: int, *args: Any, **options: Any) -> None:
        (emulation.launch if _runs_here(kernel) else launch)(kernel, grid, *args, **options)

    launcher.launch = instead
    try:
        yield emulation
    finally:
        launcher.launch = launch
