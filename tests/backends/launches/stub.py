"""A stub driver, and the launches that it was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.language import constexpr
from triton.runtime import driver

import fused_attn
from fused_attn.backends.triton import launch_cache, recording

LAUNCHES: list[Launch] = []


class Launch:
    """One launch as the driver sees it."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], stream: int, args: tuple[Any, ...]) -> None:
        self.kernel, self.grid, self.stream, self.args = kernel, grid, stream, args

    def described(self, names: dict[int, str]) -> Any:
        """Kernel, grid, stream and arguments. A pointer is shown by its name in `names`, or else by its metadata."""

        def shown(x: Any) -> Any:
            if isinstance(x, Tensor):
                name, aligned = names.get(x.data_ptr()), x.data_ptr() % 16 == 0
                return (name, x.dtype, aligned) if name else ("allocated", x.dtype, x.shape, x.stride(), aligned)
            if isinstance(x, tuple):
                return tuple(map(shown, x))
            if isinstance(x, launch_cache.DESCRIPTORS):
                return shown(x.base), x.shape, x.strides, x.block_shape, x.padding
            return x.value if isinstance(x, constexpr) else x

        return self.kernel, self.grid, self.stream, shown(self.args)


def compile_nothing(source: Any, target: Any = None, options: Any = None, **_: Any) -> CompiledKernel:
    """In place of `triton.compile`: an empty object, whose launches are recorded."""
    if knobs.compilation.listener is not None:
        knobs.compilation.listener(src=source)
    kernel = object.__new__(CompiledKernel)
    kernel.src, kernel.module, kernel.function, kernel.packed_metadata = source, object(), object(), (4, 1, 0)
    kernel.name = source.fn.fn.__name__
    kernel.metadata, kernel.hash = None, ""

    def run(x: int, y: int, z: int, stream: int, function: Any, metadata: Any, *rest: Any) -> None:
        if not isinstance(driver.active, Machine):  # bench.host has a driver of its own
            return
        launched, enter, _, *args = rest
        assert (function, metadata) == (kernel.function, kernel.packed_metadata)
        if enter is not None:
            enter(launched)
        LAUNCHES.append(Launch(kernel, (x, y, z), stream, tuple(args)))

    kernel._run = run
    return kernel


class Machine:
    """A driver of one device."""

    def __init__(self) -> None:
        self.device = self.stream = 0

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream + 100 * device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def tensors(b: int = 2, h: int = 4, g: int = 2, m: int = 48, n: int = 48, d: int = 32, **how: Any) -> list[Tensor]:
    shapes = ((b, h, m, d), (b, g, n, d), (b, g, n, d))
    return [
        torch.zeros(x, dtype=how.get("dtype", torch.bfloat16), requires_grad=how.get("grad", False)) for x in shapes
    ]


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return fused_attn.attention(q, k, v, **({"backend": "triton"} | options))


def launched(work: Callable[[], Any], *tensors: Tensor | None) -> list[Any]:
    """What work launches, as `Launch.described`. tensors: those whose pointers are shown by number."""
    LAUNCHES.clear()
    kept = work()
    own = {x.data_ptr(): f"tensor {i}" for i, x in enumerate(tensors) if x is not None}
    described = [x.described(own) for x in LAUNCHES]
    LAUNCHES.clear()
    del kept
    return described


def replays(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each attempt to replay from now on: True if it was not refused."""
    replayed: list[bool] = []
    real = recording.Replay.__call__

    def call(self: Any, given: Any) -> Any:
        found = real(self, given)
        replayed.append(found is not None)
        return found

    monkeypatch.setattr(recording.Replay, "__call__", call)
    return replayed


def warm(**options: Any) -> list[Tensor]:
    """Tensors of a call that has been repeated until it is replayed."""
    found = tensors(grad=options.pop("grad", False))
    for _ in range(4):
        attention(*found, **options)
    return found


def block_of(kernel: str) -> int:
    """BLOCK_M of the last launch of a kernel."""
    last = [x for x in LAUNCHES if x.kernel.name == kernel][-1]
    return last.args[last.kernel.src.fn.arg_names.index("BLOCK_M")]
