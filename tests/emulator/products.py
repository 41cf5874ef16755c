"""Warpgroup matrix products, which read their operands at any time between issue and wait."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import triton.language as tl

from .machine import Machine
from .memory import Shared
from .values import HALF, LAYOUT, Fault, Tensor


class Product:
    """One asynchronous product. events: its reads of shared memory."""

    __slots__ = ("a", "acc", "b", "event", "events", "label", "machine", "result", "retired", "shape", "strand")

    def __init__(self, machine: Machine, a: Any, b: Shared, acc: Any, events: int, label: str) -> None:
        """a: shared memory or the numbers in registers. acc: numbers, an earlier product, or None."""
        self.machine, self.strand = machine, machine.running
        self.a, self.b, self.acc = a, b, acc
        self.events, self.label = events, label
        self.shape = (a.shape[0], b.shape[1])
        self.retired = False
        self.event: Any = None
        self.result: Any = None

    def issue(self) -> None:
        """Products of one strand run in order, so only the oldest of them can be next."""
        self.strand.products.append(self)
        self.strand.unrun.append(self)
        if len(self.strand.unrun) == 1:
            self.event = self.machine.issue(self._run)

    def _run(self) -> None:
        found = (self.a.data if isinstance(self.a, Shared) else self.a) @ self.b.data
        if self.acc is not None:
            found += self.acc.result if isinstance(self.acc, Product) else self.acc
        self.result, self.event = found, None
        unrun = self.strand.unrun
        unrun.pop(0)
        if unrun:
            unrun[0].event = self.machine.issue(unrun[0]._run)

    def retire(self) -> None:
        """By a wait of its strand, which retires them oldest first."""
        if self.event is not None:
            self.machine.fire(self.event)
        self.retired = True
        self.strand.known |= self.events


class Running:
    """What a register tensor is while products own its registers."""

    __slots__ = ("products",)

    def __init__(self, products: list[Product]) -> None:
        self.products = products

    def check(self) -> None:
        for product in self.products:
            if not product.retired:
                raise Fault(f"registers of a product are read before a wait retires it: {product.label}")

    def value(self, x: Any) -> Any:
        return x


class Operand(Running):
    """The registers that products read."""

    __slots__ = ()


class Result(Running):
    """The registers that a product writes."""

    __slots__ = ()

    @property
    def shape(self) -> tuple[int, int]:
        return self.products[0].shape

    def value(self, x: Any) -> Any:
        return self.products[0].result


class Token:
    """What an asynchronous product returns: an accumulator for the next product, and to nobody else a value."""

    __slots__ = ("product",)

    def __init__(self, product: Product) -> None:
        self.product = product

    @property
    def type(self) -> Any:
        own = SimpleNamespace(layout=LAYOUT, shape=list(self.product.shape), element_ty=tl.float32)
        return SimpleNamespace(tensor_type=own)


def multiply(machine: Machine, a: Any, b: Any, acc: Any, use_acc: bool, is_async: bool) -> Any:
    """a @ b, plus acc where use_acc, in float32."""
    machine.switch()
    if not isinstance(b, Shared) or not isinstance(a, (Shared, Tensor)) or not isinstance(acc, (Tensor, Token)):
        raise Fault(f"a product of {type(a).__name__} and {type(b).__name__} onto {type(acc).__name__}")
    if a.dtype is not b.dtype or id(a.dtype) not in HALF:
        raise Fault(f"a product of {a.dtype} and {b.dtype}")
    have = list(acc.product.shape) if isinstance(acc, Token) else acc.shape
    if a.shape[1] != b.shape[0] or have != [a.shape[0], b.shape[1]]:
        raise Fault(f"a product of {a.shape} and {b.shape} onto {have}")
    events = b.block.access(b.cells, False, False, "a product")
    if isinstance(a, Shared):
        events |= a.block.access(a.cells, False, False, "a product")
    left, sharing = a, []
    if isinstance(a, Tensor):
        # Products may read the same registers at once.
        sharing = a.held.products if type(a.held) is Operand else []
        left = a._x if sharing else a.x
    base = None
    if use_acc:
        base = acc.product if isinstance(acc, Token) else acc.x
    product = Product(machine, left, b, base, events, machine.label(events))
    product.issue()
    if isinstance(a, Tensor):
        a.held = Operand([*sharing, product])
    if use_acc and isinstance(acc, Tensor):
        acc.held = Running([product])
    machine.record("product")
    if is_async:
        return Token(product)
    return wait(machine, 0, (Token(product),))


def wait(machine: Machine, outstanding: int, deps: Any) -> Any:
    """Retire all but the last products; what deps are from here on."""
    machine.switch()
    flight = machine.running.products
    while len(flight) > outstanding:
        flight.pop(0).retire()
    found = tuple(Tensor(None, tl.float32, Result([x.product])) if isinstance(x, Token) else x for x in deps)
    return found[0] if len(found) == 1 else found
