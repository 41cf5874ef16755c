"""The part of the device language that the kernels use: `gl`, `tl`, `mbarrier`, `tma` and others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl

from . import products
from .barriers import Barrier, Barriers
from .copies import Descriptor
from .machine import Machine
from .memory import Block, Shared
from .values import (
    HALF,
    LAYOUT,
    NUMPY,
    Bool,
    Fault,
    Layout,
    Pointer,
    Scalar,
    Tensor,
    binary,
    floats,
    integer,
    operand,
    promoted,
    rounded,
    tensor,
)

SHARED = 227 * 1024  # bytes that one program may use


class Current:
    """The launch that is being emulated."""

    machine: Machine


def machine() -> Machine:
    return Current.machine


# ------------------------------------------------------------------------------------------------ control and shape


def counted(*bounds: Any) -> Iterator[Scalar]:
    """range: its counter is a value of a register."""
    return (integer(i) for i in range(*(int(b) for b in bounds)))


def tl_range(*bounds: Any, **options: Any) -> Iterator[Scalar]:
    return counted(*bounds)


def program_id(axis: int) -> Scalar:
    return integer(machine().running.program.index if axis == 0 else 0)


def num_programs(axis: int) -> Scalar:
    return integer(machine().grid if axis == 0 else 1)


def cdiv(x: Any, y: Any) -> Any:
    return (x + (y - 1)) // y


def static_assert(condition: Any, message: str = "") -> None:
    if not condition:
        raise Fault(f"static assertion: {message}")


def warp_specialize(functions_and_args: Any, worker_num_warps: Any, worker_num_regs: Any = None) -> Any:
    if machine().running.name != "whole":
        raise Fault("a partition starts partitions")
    if len(worker_num_warps) != len(functions_and_args) - 1:
        raise Fault(f"warps for {len(worker_num_warps)} workers, of which there are {len(functions_and_args) - 1}")
    if worker_num_regs is not None and len(worker_num_regs) != len(worker_num_warps):
        raise Fault("registers for another number of workers than warps")
    for _, args in functions_and_args[1:]:
        if _holds_tensor(args):
            raise Fault("only the first partition takes tensors")
    results: list[Any] = []

    def body(f: Any, args: Any, first: bool) -> Any:
        def run() -> None:
            found = f(*args)
            if first:
                results.append(found)

        return run

    bodies = [
        (f"partition {n} ({f.__name__})", body(f, args, n == 0)) for n, (f, args) in enumerate(functions_and_args)
    ]
    machine().fork(bodies)
    return results[0]


def _holds_tensor(x: Any) -> bool:
    if isinstance(x, tuple):
        return any(map(_holds_tensor, x))
    return isinstance(x, products.Token) or (isinstance(x, Tensor) and x.shape != [])


# ---------------------------------------------------------------------------------------------------------- values


def _shape(given: Any) -> list[int]:
    return [int(n) for n in given]


def full(shape: Any, value: Any, dtype: Any, layout: Any = None) -> Any:
    value = value.x if isinstance(value, Tensor) else value
    x = np.full(_shape(shape), value, NUMPY[dtype])
    return tensor(rounded(x, dtype) if id(dtype) in HALF else x, dtype)


def zeros(shape: Any, dtype: Any, layout: Any = None) -> Any:
    return full(shape, 0, dtype)


def arange(start: int, end: int, layout: Any = None) -> Tensor:
    if (end - start) & (end - start - 1):
        raise Fault(f"arange of {end - start}, which is no power of two")
    return Tensor(np.arange(start, end, dtype=np.int32), tl.int32)


def convert_layout(value: Any, layout: Any, assert_trivial: bool = False) -> Tensor:
    return Tensor(value.x, value.dtype)


def where(condition: Any, x: Any, y: Any) -> Any:
    if not isinstance(condition, Tensor) and not isinstance(x, Tensor) and not isinstance(y, Tensor):
        return x if condition else y
    if isinstance(x, Tensor) or not isinstance(y, Tensor):
        a, left = operand(x)
        b, right = operand(y, left)
    else:
        b, right = operand(y)
        a, left = operand(x, right)
    dtype = promoted(left, right)
    c = condition.x if isinstance(condition, Tensor) else bool(condition)
    return tensor(np.where(c, a, b).astype(NUMPY[dtype], copy=False), dtype)


def _extreme(choose: Any, of_floats: Any, of_integers: Any) -> Any:
    def apply(x: Any, y: Any) -> Any:
        if isinstance(x, int) and isinstance(y, int):
            wide = any(isinstance(v, Scalar) and v.dtype is tl.int64 for v in (x, y))
            return integer(choose(int(x), int(y)), wide)
        if not isinstance(x, Tensor) and not isinstance(y, Tensor):
            return choose(float(x), float(y))
        real = any(isinstance(v, float) or (isinstance(v, Tensor) and v.dtype.is_floating()) for v in (x, y))
        return binary(of_floats if real else of_integers, x, y)

    return apply


def _reduction(of_floats: Any, of_integers: Any, widen: bool = False) -> Any:
    def apply(x: Tensor, axis: Any = None, keep_dims: bool = False, **options: Any) -> Any:
        f, dtype = (of_floats if x.dtype.is_floating() else of_integers), x.dtype
        value = x.x
        if widen and dtype in (tl.int1, tl.int8, tl.int16):
            value, dtype = value.astype(np.int32), tl.int32
        found = f.reduce(value, axis=None if axis is None else int(axis), keepdims=keep_dims)
        return tensor(rounded(found, dtype) if id(dtype) in HALF else found, dtype)

    return apply


def _elementary(f: Any) -> Any:
    def apply(x: Any) -> Any:
        x = floats(x)
        if not isinstance(x, Tensor):
            x = Tensor(np.float32(x), tl.float32)
        found = f(x.x)
        return Tensor(rounded(found, x.dtype) if id(x.dtype) in HALF else found, x.dtype)

    return apply


def absolute(x: Any) -> Any:
    return Tensor(np.abs(x.x), x.dtype) if isinstance(x, Tensor) else integer(abs(x))


def join(x: Tensor, y: Tensor) -> Tensor:
    return Tensor(np.stack([x.x, y.x], -1), x.dtype)


# ---------------------------------------------------------------------------------------------------------- memory


def _pointer(x: Any) -> Pointer:
    if not isinstance(x, Pointer):
        raise Fault(f"{type(x).__name__} is no pointer")
    return x


def _numbers(x: Any) -> Any:
    return x.x if isinstance(x, Tensor) else x


def load(pointer: Any, mask: Any = None, other: Any = None, **options: Any) -> Any:
    p = _pointer(pointer)
    return p.home.load(p.offset, _numbers(mask), _numbers(other))


def store(pointer: Any, value: Any, mask: Any = None, **options: Any) -> None:
    p = _pointer(pointer)
    if isinstance(value, Tensor):
        value = value.to(p.home.dtype).x if value.dtype != p.home.dtype else value.x
    p.home.store(p.offset, np.asarray(value), _numbers(mask))


def atomic_add(pointer: Any, value: Any, mask: Any = None, sem: str | None = None, scope: str | None = None) -> Any:
    """Acquires and releases unless sem says otherwise."""
    p = _pointer(pointer)
    machine().switch()
    if sem in (None, "acq_rel", "acquire"):
        acquire(p)
    found = p.home.add(p.offset, np.asarray(_numbers(value)), _numbers(mask))
    if sem in (None, "acq_rel", "release"):
        release(p)
    return found


def _flag(p: Pointer) -> list[int]:
    if np.ndim(p.offset):
        raise Fault("a flag is one element")
    return machine().flags.setdefault((id(p.home), int(p.offset)), [0, 0])


def acquire(p: Pointer) -> None:
    """The running strand learns what was released here."""
    known, fenced = _flag(p)
    machine().running.known |= known
    machine().running.fenced |= fenced


def release(p: Pointer) -> None:
    """Who acquires here learns what the running strand knows."""
    flag, strand = _flag(p), machine().running
    flag[0] |= strand.known
    flag[1] |= strand.fenced


def store_release(pointer: Any, value: Any) -> None:
    """st.release.gpu of one element."""
    p = _pointer(pointer)
    machine().switch()
    release(p)
    p.home.raw[p.offset] = value


def load_acquire(pointer: Any) -> Any:
    """ld.acquire.gpu of one element."""
    p = _pointer(pointer)
    machine().switch()
    acquire(p)
    return tensor(p.home.raw[p.offset], p.home.dtype)


def wait_for(pointer: Any, value: Any) -> None:
    """Spins with load_acquire until one element has a value."""
    p = _pointer(pointer)
    value = int(value)
    machine().switch(lambda: int(p.home.raw[p.offset]) == value, f"element {int(p.offset)} to be {value}")
    acquire(p)


def allocate_shared_memory(dtype: Any, shape: Any, layout: Any = None, value: Any = None) -> Any:
    shape = _shape(shape)
    program = machine().running.program
    program.allocations += 1
    program.shared += math.prod(shape) * dtype.primitive_bitwidth // 8
    if program.shared > SHARED:
        raise Fault(f"{program.shared} bytes of shared memory; a program has {SHARED}")
    if isinstance(layout, MBarrierLayout):
        name = f"barriers {program.allocations}"
        return Barriers([Barrier(machine(), f"{name}[{i}]") for i in range(math.prod(shape))])
    block = Block(machine(), dtype, shape)
    found = Shared(block, block.data, block.numbers)
    if value is not None:
        found.store(value)
    return found


def fence_async_shared(cluster: bool = False) -> None:
    """What the strand knows of generic accesses becomes visible to the asynchronous proxy."""
    machine().switch()
    strand = machine().running
    strand.fenced |= strand.known


class MBarrierLayout(Layout):
    pass


def _one(barrier: Any) -> Barrier:
    if not isinstance(barrier, Barriers):
        raise Fault(f"{type(barrier).__name__} is no barrier")
    return barrier.one


def init(barrier: Any, count: int) -> None:
    _one(barrier).init(count)


def expect(barrier: Any, bytes_per_cta: Any = None, pred: Any = True, **named: Any) -> None:
    size = named.pop("bytes", bytes_per_cta)
    if pred:
        _one(barrier).arrive(1, int(size))


def arrive(barrier: Any, *, count: int = 1, pred: Any = True) -> None:
    if pred:
        _one(barrier).arrive(int(count))


def wait(barrier: Any, phase: Any, pred: Any = True, deps: Any = ()) -> None:
    if pred:
        _one(barrier).wait(phase)


def _descriptor(x: Any) -> Descriptor:
    if not isinstance(x, Descriptor):
        raise Fault(f"{type(x).__name__} is no descriptor")
    return x


def copy_in(descriptor: Any, coord: Any, barrier: Any, result: Any, pred: Any = True, multicast: bool = False) -> None:
    if pred:
        _descriptor(descriptor).load(coord, _one(barrier), result)


def copy_out(descriptor: Any, coord: Any, source: Any) -> None:
    _descriptor(descriptor).store(coord, source)


def reduce_add(descriptor: Any, coord: Any, source: Any) -> None:
    """Asynchronously add shared memory to global memory."""
    _descriptor(descriptor).store(coord, source, add=True)


def store_wait(pendings: int) -> None:
    """All but the last copies to global memory have read their source."""
    machine().switch()
    strand = machine().running
    for op in strand.bulk[: max(len(strand.bulk) - int(pendings), 0)]:
        if op.reading:
            strand.known |= op.finish_reading()


def bulk_wait() -> None:
    """All copies to global memory have been written and can be seen."""
    machine().switch()
    strand = machine().running
    for op in strand.bulk:
        strand.known |= op.finish_writing()
    strand.bulk = []


def same(x: Any) -> Any:
    """An assembly barrier to the compiler, which changes nothing; it does read x."""
    return Tensor(x.x, x.dtype)


def warpgroup_mma(
    a: Any, b: Any, acc: Any, *, use_acc: Any = True, precision: Any = None, max_num_imprecise_acc: Any = None,
    is_async: bool = False,
) -> Any:  # fmt: skip
    return products.multiply(machine(), a, b, acc, bool(use_acc), is_async)


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Any = None) -> Any:
    if not deps:
        raise Fault("a wait for products names none")
    return products.wait(machine(), int(num_outstanding), deps)


# ------------------------------------------------------------------------------------------------------ namespaces

_DTYPES = (
    "int1", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "bfloat16", "float32",
    "float64",
)  # fmt: skip
_LAYOUTS = (
    "NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout", "AutoLayout", "NVMMASharedLayout",
    "SwizzledSharedLayout", "PaddedSharedLayout", "DistributedLinearLayout",
)  # fmt: skip

GL = SimpleNamespace(
    **{name: getattr(tl, name) for name in _DTYPES},
    **dict.fromkeys(_LAYOUTS, Layout),
    constexpr=lambda x: x,
    static_range=range,
    range=tl_range,
    static_assert=static_assert,
    static_print=lambda *x: None,
    device_assert=static_assert,
    assume=lambda x: None,
    multiple_of=lambda x, y: x,
    max_contiguous=lambda x, y: x,
    program_id=program_id,
    num_programs=num_programs,
    cdiv=cdiv,
    warp_specialize=warp_specialize,
    full=full,
    zeros=zeros,
    arange=arange,
    convert_layout=convert_layout,
    set_auto_layout=convert_layout,
    where=where,
    maximum=_extreme(max, np.fmax, np.maximum),
    minimum=_extreme(min, np.fmin, np.minimum),
    max=_reduction(np.fmax, np.maximum),
    min=_reduction(np.fmin, np.minimum),
    sum=_reduction(np.add, np.add, True),
    exp2=_elementary(np.exp2),
    exp=_elementary(np.exp),
    log2=_elementary(np.log2),
    log=_elementary(np.log),
    sqrt=_elementary(np.sqrt),
    rsqrt=_elementary(lambda x: 1 / np.sqrt(x)),
    abs=absolute,
    fma=lambda x, y, z: x * y + z,
    join=join,
    split=lambda x: x.split(),
    reshape=lambda x, *shape: x.reshape(*shape),
    permute=lambda x, *dims: x.permute(*dims),
    trans=lambda x, *dims: x.permute(*(dims or (1, 0))),
    expand_dims=lambda x, axis: x.expand_dims(axis),
    broadcast_to=lambda x, *shape: x.broadcast_to(*shape),
    cast=lambda x, dtype, bitcast=False: x.to(dtype, bitcast),
    load=load,
    store=store,
    atomic_add=atomic_add,
    allocate_shared_memory=allocate_shared_memory,
)
MBARRIER = SimpleNamespace(
    MBarrierLayout=MBarrierLayout, init=init, expect=expect, arrive=arrive, wait=wait, invalidate=lambda barrier: None
)
TMA = SimpleNamespace(
    async_copy_global_to_shared=copy_in, async_load=copy_in, async_copy_shared_to_global=copy_out, async_store=copy_out,
    store_wait=store_wait,
)  # fmt: skip
HOPPER = SimpleNamespace(
    mbarrier=MBARRIER, tma=TMA, fence_async_shared=fence_async_shared, warpgroup_mma=warpgroup_mma,
    warpgroup_mma_wait=warpgroup_mma_wait,
)  # fmt: skip

# Functions of kernels/hopper*.py that hold inline assembly or a builder call, by name.
HELPERS: dict[str, Any] = {
    "pin": same,
    "pin_all": same,
    "reduce_add": reduce_add,
    "bulk_wait": bulk_wait,
    "wait_for": wait_for,
    "store_release": store_release,
}

__all__ = ["GL", "HELPERS", "HOPPER", "LAYOUT", "MBARRIER", "TMA", "Bool", "Current"]
