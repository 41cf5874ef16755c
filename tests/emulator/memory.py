"""Shared and global memory with access histories, which tell a race from an ordered access."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl

from .machine import Machine
from .values import LAYOUT, NUMPY, Fault, Tensor, rounded, tensor

DTYPES = {
    torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, torch.float64: tl.float64,
    torch.int32: tl.int32, torch.int64: tl.int64, torch.int8: tl.int8, torch.uint8: tl.uint8, torch.bool: tl.int1,
}  # fmt: skip


def garbage(shape: Any, dtype: Any) -> np.ndarray:
    """What memory holds before anybody writes it."""
    if dtype.is_floating():
        return np.full(shape, np.nan, NUMPY[dtype])
    return np.full(shape, True if dtype is tl.int1 else np.iinfo(NUMPY[dtype]).max // 3, NUMPY[dtype])


class Access:
    """Events on the same cells, by the same proxy."""

    __slots__ = ("bits", "cells", "generic", "writes")

    def __init__(self, cells: int, bits: int, writes: bool, generic: bool) -> None:
        self.cells, self.bits, self.writes, self.generic = cells, bits, writes, generic


class Block:
    """One allocation. Its cells are the bits of an integer, one for each element."""

    def __init__(self, machine: Machine, dtype: Any, shape: list[int]) -> None:
        self.machine, self.dtype = machine, dtype
        self.history: list[Access] = []
        self.written = 0
        self.size = math.prod(shape)
        self.cells: dict[Any, int] = {}
        self.data = garbage(shape, dtype)
        self.numbers = np.arange(self.size).reshape(shape)

    def cells_of(self, numbers: np.ndarray) -> int:
        """The cells of a view."""
        key = (int(numbers.flat[0]), numbers.shape, numbers.strides)
        found = self.cells.get(key)
        if found is None:
            flags = np.zeros(self.size, np.bool_)
            flags[numbers.reshape(-1)] = True
            found = int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")
            self.cells[key] = found
        return found

    def access(self, cells: int, writes: bool, generic: bool, what: str) -> int:
        """The event of an access by the running strand, after asking that it is ordered with every other one."""
        machine = self.machine
        strand = machine.running
        bit = machine.bit(what)
        known, fenced = strand.known, strand.fenced
        for past in self.history:
            if not ((past.writes or writes) and past.cells & cells):
                continue
            missing = past.bits & ~known
            if missing:
                raise Fault(f"race in shared memory: {machine.label(bit)} not ordered after {machine.label(missing)}")
            if past.generic and past.writes and not generic:
                missing = past.bits & ~fenced
                if missing:
                    raise Fault(f"no fence between {machine.label(missing)} and {machine.label(bit)}")
        if not writes and cells & ~self.written:
            raise Fault(f"read of shared memory that nobody has written: {machine.label(bit)}")
        if writes:
            self.history = [past for past in self.history if past.cells & ~cells]
        else:
            for past in self.history:
                if past.cells == cells and not past.writes and past.generic == generic:
                    past.bits |= bit
                    return bit
        self.history.append(Access(cells, bit, writes, generic))
        return bit


class Shared:
    """A view of a block: what Gluon calls a shared memory descriptor."""

    __slots__ = ("block", "data", "numbers")

    def __init__(self, block: Block, data: np.ndarray, numbers: np.ndarray) -> None:
        self.block, self.data, self.numbers = block, data, numbers

    dtype = property(lambda self: self.block.dtype)
    shape = property(lambda self: list(self.data.shape))
    rank = property(lambda self: self.data.ndim)
    numel = property(lambda self: self.data.size)
    layout = property(lambda self: LAYOUT)
    cells = property(lambda self: self.block.cells_of(self.numbers))

    @property
    def type(self) -> Any:
        return SimpleNamespace(layout=LAYOUT, shape=self.shape, element_ty=self.dtype, scalar=self.dtype)

    def index(self, index: int) -> Shared:
        i = int(index)
        if not 0 <= i < self.data.shape[0]:
            raise Fault(f"index {i} of shared memory of shape {self.shape}")
        return Shared(self.block, self.data[i], self.numbers[i])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        if start < 0 or start + length > self.data.shape[dim]:
            raise Fault(f"slice {start}, {length} of dim {dim} of shared memory of shape {self.shape}")
        key = (slice(None),) * dim + (slice(int(start), int(start) + int(length)),)
        return Shared(self.block, self.data[key], self.numbers[key])

    def permute(self, order: Any) -> Shared:
        return Shared(self.block, self.data.transpose(order), self.numbers.transpose(order))

    def reshape(self, shape: Any) -> Shared:
        shape = [int(n) for n in shape]
        data = self.data.reshape(shape)
        if not np.shares_memory(data, self.data):
            raise Fault(f"reshape of a shared memory view {self.shape} that is not contiguous")
        return Shared(self.block, data, self.numbers.reshape(shape))

    def store(self, value: Tensor) -> None:
        if self.shape != value.shape or self.dtype is not value.dtype:
            raise Fault(f"a store of {value.dtype} {value.shape} to shared memory of {self.dtype} {self.shape}")
        machine = self.block.machine
        machine.switch()
        cells = self.cells
        machine.running.known |= self.block.access(cells, True, True, "a store")
        self.data[...] = value.x
        self.block.written |= cells

    def load(self, layout: Any = None) -> Tensor:
        machine = self.block.machine
        machine.switch()
        machine.running.known |= self.block.access(self.cells, False, True, "a load")
        return Tensor(self.data.copy(), self.dtype)


class Place:
    """Some elements of a storage."""

    def __init__(self, numbers: Any) -> None:
        self.numbers = numbers

    def of(self, flat: np.ndarray) -> np.ndarray:
        return flat[self.numbers]

    def put(self, flat: np.ndarray, value: Any) -> None:
        flat[self.numbers] = value


class Global:
    """A storage that a kernel was given, as elements of one dtype.

    last: the event of each element's latest write, by number; owed: the events that whoever follows it must know.
    """

    def __init__(self, machine: Machine, x: torch.Tensor) -> None:
        self.machine, self.dtype = machine, DTYPES[x.dtype]
        self.size = x.untyped_storage().nbytes() // x.element_size()
        flat = x.detach().as_strided((self.size,), (1,), 0)
        half = x.dtype in (torch.bfloat16, torch.float16)
        self.raw = (flat.view(torch.int16) if half else flat).numpy()
        self.raw = self.raw.view(np.uint16) if half else self.raw
        self.last: np.ndarray | None = None
        self.owed: dict[int, int] = {}
        self.reads: list[tuple[int, Place]] = []
        self.atomic: set[int] = set()
        self.generic = 0

    def widened(self, raw: np.ndarray) -> np.ndarray:
        if self.dtype is tl.bfloat16:
            return (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.view(np.float16).astype(np.float32) if self.dtype is tl.float16 else raw

    def narrowed(self, x: np.ndarray) -> np.ndarray:
        if self.dtype is tl.bfloat16:
            return (rounded(x, tl.bfloat16).view(np.uint32) >> 16).astype(np.uint16)
        return x.astype(np.float16).view(np.uint16) if self.dtype is tl.float16 else x

    def read(self, place: Place, bit: int, generic: bool) -> None:
        """Enter a read by the running strand, which must be ordered after every write there."""
        self._after_writes(place, bit, generic, False)
        self.reads.append((bit, place))

    def write(self, place: Place, bit: int, generic: bool, atomic: bool = False) -> None:
        """Enter a write, which must be ordered after every other access there; atomics need no order among them."""
        loose = self._after_writes(place, bit, generic, atomic)
        known, label = self.machine.running.known, self.machine.label
        for past, other in self.reads:
            if past & ~known:
                flags = np.zeros(self.size, np.bool_)
                other.put(flags, True)
                if place.of(flags).any():
                    raise Fault(f"race in global memory: {label(bit)} not ordered after {label(past)}")
        if self.last is None:
            self.last = np.zeros(self.size, np.int32)
        event = bit.bit_length()
        place.put(self.last, event)
        self.owed[event] = bit | loose
        if atomic:
            self.atomic.add(event)
        if generic:
            self.generic |= 1 << event

    def _after_writes(self, place: Place, bit: int, generic: bool, atomic: bool) -> int:
        """The writes there that are not ordered before the running strand, which only atomics may have."""
        found = None if self.last is None else place.of(self.last)
        if found is None or not found.any():
            return 0
        known, label = self.machine.running.known, self.machine.label
        loose = 0
        for event in np.unique(found[found != 0]).tolist():
            missing = self.owed[event] & ~known
            ordered = self.machine.ordered and self.dtype.is_floating()
            if missing and (ordered or not (atomic and event in self.atomic)):
                raise Fault(f"race in global memory: {label(bit)} not ordered after {label(missing)}")
            loose |= missing
            if not generic and self.generic >> event & 1:
                raise Fault(
                    f"{label(bit)}, by the asynchronous proxy, follows {label(1 << event - 1)} by the generic one"
                )
        return loose

    def places(self, offset: Any, mask: Any, what: str) -> tuple[Any, Any]:
        """(places that are touched, where they are in the result); both of one shape."""
        offset, mask = np.asarray(offset, np.int64), np.asarray(True if mask is None else mask)
        offset, mask = np.broadcast_arrays(offset, mask)
        chosen = offset[mask]
        if chosen.size and (chosen.min() < 0 or chosen.max() >= self.size):
            raise Fault(f"{what} outside of its tensor: {self.machine.label(self.machine.bit(what))}")
        return chosen, mask

    def load(self, offset: Any, mask: Any, other: Any) -> Any:
        chosen, mask = self.places(offset, mask, "a load")
        machine = self.machine
        bit = machine.bit("a load")
        self.read(Place(chosen), bit, True)
        machine.running.known |= bit
        result = garbage(mask.shape, self.dtype)
        if other is not None:
            result[...] = other
        result[mask] = self.widened(self.raw[chosen])
        return tensor(result if result.ndim else result[()], self.dtype)

    def store(self, offset: Any, value: np.ndarray, mask: Any) -> None:
        chosen, mask = self.places(offset, mask, "a store")
        bit = self.machine.bit("a store")
        self.write(Place(chosen), bit, True)
        self.raw[chosen] = self.narrowed(np.broadcast_to(value, mask.shape)[mask])
        self.machine.running.known |= bit

    def add(self, offset: Any, value: np.ndarray, mask: Any) -> Any:
        """Atomically; what was there before."""
        chosen, mask = self.places(offset, mask, "an atomic add")
        bit = self.machine.bit("an atomic add")
        self.write(Place(chosen), bit, True, True)
        result = garbage(mask.shape, self.dtype)
        result[mask] = self.raw[chosen]
        np.add.at(self.raw, chosen, np.broadcast_to(value, mask.shape)[mask].astype(self.raw.dtype))
        self.machine.running.known |= bit
        return tensor(result if result.ndim else result[()], self.dtype)
