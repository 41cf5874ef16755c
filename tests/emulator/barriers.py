"""mbarriers, as PTX has them."""

from __future__ import annotations

from .machine import Machine
from .values import Fault


class Barrier:
    """An mbarrier: pending arrivals and bytes of the current phase, and what its completed phases made known."""

    __slots__ = ("bytes", "count", "fenced", "fenced_next", "initialised", "known", "known_next", "machine", "name",
                 "parity", "pending")  # fmt: skip

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine, self.name = machine, name
        self.initialised = self.count = self.pending = self.bytes = self.parity = 0
        self.known = self.fenced = self.known_next = self.fenced_next = 0

    def init(self, count: int) -> None:
        machine = self.machine
        if self.initialised:
            raise Fault(f"{self.name} is initialised twice")
        if count < 1:
            raise Fault(f"{self.name} is initialised with {count} arrivals")
        self.initialised = machine.bit("an initialisation")
        machine.running.known |= self.initialised
        self.count = self.pending = int(count)

    def _check(self) -> None:
        if not self.initialised or self.initialised & ~self.machine.running.known:
            raise Fault(f"{self.name} is used before it is initialised")

    def visible(self) -> None:
        """Whether a copy may signal it."""
        self._check()
        if self.initialised & ~self.machine.running.fenced:
            raise Fault(f"no fence between the initialisation of {self.name} and a copy that signals it")

    def arrive(self, count: int, expect: int = 0) -> None:
        machine = self.machine
        machine.switch()
        self._check()
        if not 0 < count <= self.pending:
            raise Fault(f"{count} arrivals at {self.name}, which waits for {self.pending} more in this phase")
        strand = machine.running
        self.known_next |= strand.known
        self.fenced_next |= strand.fenced
        self.bytes += expect
        self.pending -= int(count)
        self._turn()

    def landed(self, size: int, bit: int) -> None:
        """A copy has written its bytes."""
        self.bytes -= size
        self.known_next |= bit
        self._turn()

    def _turn(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.parity ^= 1
            self.pending = self.count
            self.known |= self.known_next
            self.fenced |= self.fenced_next
            self.known_next = self.fenced_next = 0

    def wait(self, phase: int) -> None:
        machine = self.machine
        self._check()
        phase = int(phase)
        if phase not in (0, 1):
            raise Fault(f"a wait for phase {phase} of {self.name}: a parity is 0 or 1")
        machine.switch(lambda: self.parity != phase, f"{self.name}, parity {phase}")
        strand = machine.running
        strand.known |= self.known
        strand.fenced |= self.fenced


class Barriers:
    """An allocation of mbarriers."""

    def __init__(self, all_: list[Barrier]) -> None:
        self.all = all_

    def index(self, index: int) -> Barriers:
        i = int(index)
        if not 0 <= i < len(self.all):
            raise Fault(f"index {i} of {len(self.all)} barriers")
        return Barriers([self.all[i]])

    @property
    def one(self) -> Barrier:
        if len(self.all) != 1:
            raise Fault(f"{len(self.all)} barriers where one is meant")
        return self.all[0]
