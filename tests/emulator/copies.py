"""TMA: asynchronous copies between boxes of a tensor and shared memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl

from .barriers import Barrier
from .machine import Machine
from .memory import Global, Place, Shared
from .values import LAYOUT, Fault, integer

BOX = 256  # the longest side


class Descriptor:
    """A TMA descriptor."""

    def __init__(self, home: Global, d: Any) -> None:
        self.home = home
        self.bounds = [int(n) for n in d.shape]
        self.block_shape = [int(n) for n in d.block_shape]
        self.shape = tuple(integer(n) for n in self.bounds)
        self.strides = tuple(integer(int(n), True) for n in d.strides)
        strides, start = [int(s) for s in d.strides], d.base.storage_offset()
        size = d.base.element_size()
        if max(self.block_shape) > BOX:
            raise Fault(f"a box of {self.block_shape}; TMA boxes have at most {BOX} a side")
        if self.block_shape[-1] * size < 16:
            raise Fault(f"a box of {self.block_shape} has rows of less than 16 bytes")
        if d.base.data_ptr() % 16 or any(s * size % 16 for s in strides[:-1]) or strides[-1] != 1:
            raise Fault(f"base or strides {strides} of a descriptor are not multiples of 16 bytes")
        if any(s < 0 or s * size >= 2**40 for s in strides) or any(not 0 < n <= 2**32 for n in self.bounds):
            raise Fault(f"shape {self.bounds} or strides {strides} of a descriptor are out of range")
        if start + sum((n - 1) * s for n, s in zip(self.bounds, strides, strict=True)) >= home.size:
            raise Fault(f"a descriptor of shape {self.bounds} and strides {strides} reaches past its tensor")
        self._view = (start, self.bounds, strides)
        self._strided: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.data = self.strided(home.raw)
        self.nbytes = math.prod(self.block_shape) * size
        self.nbytes_per_cta = self.nbytes
        self.dtype, self.layout = home.dtype, LAYOUT
        self.block_type = SimpleNamespace(shape=self.block_shape, nbytes=self.nbytes, element_ty=self.dtype)
        self.type = SimpleNamespace(block_type=self.block_type, layout=LAYOUT, nbytes_per_cta=self.nbytes)

    def strided(self, flat: np.ndarray) -> np.ndarray:
        found = self._strided.get(id(flat))
        if found is None or found[0] is not flat:
            start, bounds, strides = self._view
            steps = [s * flat.itemsize for s in strides]
            found = flat, np.lib.stride_tricks.as_strided(flat[start:], bounds, steps)
            self._strided[id(flat)] = found
        return found[1]

    def box(self, coord: Any) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Where the part of a box that is inside of the tensor lies in the tensor and in the box."""
        if len(coord) != len(self.bounds):
            raise Fault(f"{len(coord)} coordinates for a descriptor of {len(self.bounds)} dims")
        inside, within = [], []
        for c, n, size in zip(coord, self.bounds, self.block_shape, strict=True):
            c = int(c)
            first, last = max(c, 0), max(min(c + size, n), 0)
            last = max(first, last)
            inside.append(slice(first, last))
            within.append(slice(first - c, last - c))
        return tuple(inside), tuple(within)

    def _fits(self, shared: Shared) -> None:
        if shared.dtype is not self.dtype:
            raise Fault(f"a copy between shared memory of {shared.dtype} and a tensor of {self.dtype}")
        if shared.shape != self.block_shape:
            raise Fault(f"a copy between shared memory of shape {shared.shape} and a box of {self.block_shape}")

    def load(self, coord: Any, barrier: Barrier, shared: Shared) -> None:
        """Shared memory gets the box at some later point, and the barrier its bytes."""
        self._fits(shared)
        machine = self.home.machine
        inside, within = self.box(coord)
        machine.switch()
        barrier.visible()
        block, cells = shared.block, shared.cells
        bit = block.access(cells, True, False, "a copy from global memory")
        self.home.read(Box(self, inside), bit, False)
        machine.running.program.landing |= bit
        shared.data.fill(np.nan if self.dtype.is_floating() else 0)

        def land() -> None:
            shared.data.fill(0)
            shared.data[within] = self.home.widened(self.data[inside])
            block.written |= cells
            barrier.landed(self.nbytes, bit)

        machine.issue(land)

    def store(self, coord: Any, shared: Shared, add: bool = False) -> None:
        """The tensor gets the part of the box that is inside of it at some later point."""
        self._fits(shared)
        if add and self.dtype is not tl.float32:
            raise Fault(f"a reduction of {self.dtype}")
        machine = self.home.machine
        inside, within = self.box(coord)
        machine.switch()
        what = "an asynchronous addition to global memory" if add else "a copy to global memory"
        reading = shared.block.access(shared.cells, False, False, what)
        writing = machine.bit(what)
        home = self.home
        home.write(Box(self, inside), writing, False, add)
        op = Bulk(machine, machine.label(writing), reading, writing)

        def read() -> None:
            box = shared.data[within].copy()

            def write() -> None:
                place = self.data[inside]
                place[...] = place + box if add else home.narrowed(box)

            op.event, op.run = machine.issue(write), write

        op.event = machine.issue(read)
        machine.running.bulk.append(op)


class Box(Place):
    """What of a box is inside of its tensor."""

    def __init__(self, descriptor: Descriptor, inside: Any) -> None:
        self.descriptor, self.inside = descriptor, inside

    def of(self, flat: np.ndarray) -> np.ndarray:
        return self.descriptor.strided(flat)[self.inside]

    def put(self, flat: np.ndarray, value: Any) -> None:
        self.descriptor.strided(flat)[self.inside] = value


class Bulk:
    """A copy or reduction from shared to global memory. event: what of it is pending; run: its write, once read."""

    def __init__(self, machine: Machine, label: str, reading: int, writing: int) -> None:
        self.machine, self.label, self.reading, self.writing = machine, label, reading, writing
        self.event: Any = None
        self.run: Callable[[], None] | None = None

    def finish_reading(self) -> int:
        """The event of the read, which has now happened."""
        if self.run is None:
            self.machine.fire(self.event)
        bit, self.reading = self.reading, 0
        return bit

    def finish_writing(self) -> int:
        bit = self.finish_reading()
        if self.event in self.machine.events:
            self.machine.fire(self.event)
        return bit | self.writing
