"""The scheduler: strands of execution interleaved by a seed, and the happens-before order between them.

Every access to memory is an event with a bit of its own. A strand carries the set of events that happened before its
next step, as an integer: its own, those of whoever arrived at a barrier it waited for, and those of asynchronous
operations that it has waited for. Two accesses of which neither happened before the other are a race, whichever came
first this time.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .values import Fault


class Step(NamedTuple):
    """What a strand did, and in which functions of the kernel, the innermost first."""

    program: int
    strand: str
    what: str
    within: tuple[str, ...]


class Killed(BaseException):
    """Unwinds the strands of a launch that has failed."""


class Event:
    """Something asynchronous that has been issued and not happened."""

    __slots__ = ("run",)

    def __init__(self, run: Callable[[], None]) -> None:
        self.run = run


class Strand:
    """A partition of a program, or the program itself. known: events before its next step. fenced: those of them that
    are visible to the asynchronous proxy. products, bulk: its operations in flight, oldest first."""

    def __init__(
        self, machine: Machine, program: Program, name: str, body: Callable[[], None], parent: Strand | None = None
    ) -> None:
        self.program, self.name, self.parent = program, name, parent
        self.children = 0
        self.known = self.fenced = 0
        self.products: list[Any] = []
        self.unrun: list[Any] = []
        self.bulk: list[Any] = []
        self.condition: Callable[[], bool] | None = None
        self.why = "start"
        self.priority = machine.rng.random()
        self.turn = threading.Lock()
        self.turn.acquire()
        self.thread = threading.Thread(target=machine._live, args=(self, body), daemon=True)
        self.started = self.ended = False

    def can_go_on(self) -> bool:
        return self.condition is None or self.condition()

    def __str__(self) -> str:
        return f"program {self.program.index}, {self.name}"


class Program:
    """One instance of a kernel. landing: the events of copies that must have landed before it ends. shared: bytes."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.landing = 0
        self.allocations = self.shared = 0


class Machine:
    """One launch. The seed decides who runs, when what is asynchronous happens, and which programs are resident."""

    def __init__(self, seed: Any, grid: int, deadline: int, ordered: bool, kernel: str) -> None:
        self.kernel = kernel
        self.rng = rng = random.Random(seed)
        self.grid, self.deadline, self.ordered = grid, deadline, ordered
        self.strands: list[Strand] = []
        self.events: list[Event] = []
        self.labels: list[tuple[str, Strand, Any, int]] = []
        self.trace: list[Step] = []
        self.memories: dict[int, Any] = {}
        self.flags: dict[Any, list[int]] = {}
        self.steps = 0
        self.failure: BaseException | None = None
        self.done = threading.Lock()
        self.running: Strand | None = None
        # How one run differs from another: how soon what is pending happens, how often a strand that could go on is
        # interrupted, and whether the next one is drawn anew or the same one is favoured for long.
        self.haste = rng.choice((0.0, 0.05, 0.3, 1.0))
        self.interrupt = rng.choice((0.02, 0.1, 0.4))
        self.favour = rng.random() < 0.5
        self.resident = rng.choice((1, 2, 3))
        self.order = list(range(grid))
        if rng.random() < 0.5:
            rng.shuffle(self.order)

    # ------------------------------------------------------------------------------------------------------- running

    def run(self, body: Callable[[Program], None]) -> None:
        """body once for each program; raises the first fault of any strand."""
        self.body = body
        self.waiting = list(reversed(self.order))
        self.all: list[Strand] = []
        self.done.acquire()
        for _ in range(min(self.resident, self.grid)):
            self._admit()
        self._hand_over(None)
        self.done.acquire()
        for strand in self.all:
            if strand.started:
                strand.thread.join()
        for event in list(self.events):
            if self.failure is None:
                self.fire(event)
        if self.failure is not None:
            raise self.failure

    def _admit(self) -> None:
        program = Program(self.waiting.pop())
        strand = Strand(self, program, "whole", lambda: self.body(program))
        self._join(strand)

    def _join(self, strand: Strand) -> None:
        self.strands.append(strand)
        self.all.append(strand)

    def _live(self, strand: Strand, body: Callable[[], None]) -> None:
        strand.turn.acquire()
        try:
            if self.failure is None:
                with np.errstate(all="ignore"):
                    body()
        except Killed:
            pass
        except BaseException as error:
            self._fail(strand, error)
        strand.ended = True
        if self.failure is None:
            self.strands.remove(strand)
            if strand.parent is not None:
                strand.parent.children -= 1
                if strand.parent.children == 0:
                    self.strands.append(strand.parent)
            if strand.name == "whole" and self.waiting:
                self._admit()
            try:
                self._hand_over(None)
            except BaseException as error:
                self._fail(strand, error)

    def _fail(self, strand: Strand, error: BaseException) -> None:
        if self.failure is None:
            error.args = (f"{strand}: {error}", *error.args[1:]) if isinstance(error, Fault) else error.args
            self.failure = error
            for other in self.all:
                if other is not strand and other.started and not other.ended:
                    other.turn.release()
            self.done.release()

    def fork(self, bodies: list[tuple[str, Callable[[], None]]]) -> None:
        """Run partitions beside each other and wait for all of them."""
        me = self.running
        assert me is not None
        children = [Strand(self, me.program, name, body, me) for name, body in bodies]
        for child in children:
            child.known, child.fenced = me.known, me.fenced
            self._join(child)
        me.children = len(children)
        self.strands.remove(me)  # until the last of them ends
        self._hand_over(me)
        for child in children:
            me.known |= child.known
            me.fenced |= child.fenced
            me.bulk += child.bulk
            self._at_end(child)

    @staticmethod
    def _at_end(strand: Strand) -> None:
        if strand.products:
            raise Fault(f"{strand.name} ended with a product in flight: {strand.products[0].label}")
        for op in strand.bulk:
            if op.reading:
                raise Fault(f"{strand.name} ended before its store had read shared memory: {op.label}")

    def end(self, strand: Strand) -> None:
        """What a program must not leave behind."""
        self._at_end(strand)
        missing = strand.program.landing & ~strand.known
        if missing:
            raise Fault(f"ended while a copy that nobody waited for may land: {self.label(missing)}")

    # ---------------------------------------------------------------------------------------------------- scheduling

    def switch(self, condition: Callable[[], bool] | None = None, why: str = "") -> None:
        """A point at which others may run; with a condition, until it holds."""
        me = self.running
        rng = self.rng
        assert me is not None
        while self.events and rng.random() < self.haste:
            self.fire(rng.choice(self.events))
        free = condition is None or condition()
        self.steps += 1
        if free and self.steps < self.deadline and (len(self.strands) == 1 or rng.random() > self.interrupt):
            return
        me.condition, me.why = condition, why
        self._hand_over(me)
        me.condition = None

    def _hand_over(self, me: Strand | None) -> None:
        """Choose who runs next: an event, or a strand that can."""
        while True:
            if self.steps >= self.deadline:
                raise Fault(f"still running after {self.steps} steps; {self._who_waits()}")
            if self.events and self.rng.random() < self.haste:
                self.fire(self.rng.choice(self.events))
                continue
            if me is not None and self.rng.random() < 0.1:
                me.priority = self.rng.random()
            chosen = self._ready()
            if chosen is None:
                if self.events:
                    self.fire(self.rng.choice(self.events))
                    continue
                if self.strands:
                    raise Fault(f"deadlock; {self._who_waits()}")
                self.running = None
                self.done.release()
                return
            self.steps += 1
            self.running = chosen
            if chosen is me:
                return
            if chosen.started:
                chosen.turn.release()
            else:
                chosen.started = True
                chosen.thread.start()
                chosen.turn.release()
            if me is not None:
                me.turn.acquire()
                if self.failure is not None:
                    raise Killed
            return

    def _ready(self) -> Strand | None:
        """One that can go on: of the highest priority, or any."""
        best = None
        if self.favour:
            for strand in self.strands:
                if (best is None or strand.priority > best.priority) and strand.can_go_on():
                    best = strand
            return best
        n = len(self.strands)
        first = self.rng.randrange(n) if n else 0
        for i in range(first, first + n):
            if self.strands[i % n].can_go_on():
                return self.strands[i % n]
        return None

    def _who_waits(self) -> str:
        return "; ".join(f"{s} waits for {s.why}" for s in self.strands if s.condition is not None) or "nobody waits"

    def issue(self, run: Callable[[], None]) -> Event:
        event = Event(run)
        self.events.append(event)
        return event

    def fire(self, event: Event) -> None:
        self.events.remove(event)
        event.run()

    # -------------------------------------------------------------------------------------------------------- events

    def bit(self, what: str) -> int:
        """A new event of the running strand, and where in the kernel it is."""
        frame = _kernel_frame()
        self.labels.append((what, self.running, frame.f_code, frame.f_lineno))
        return 1 << (len(self.labels) - 1)

    def record(self, what: str) -> None:
        """Into the trace."""
        frame, within = _kernel_frame(), []
        while frame.f_code.co_filename not in OWN:
            within.append(frame.f_code.co_name)
            frame = frame.f_back
        self.trace.append(Step(self.running.program.index, self.running.name, what, tuple(within)))

    def label(self, bits: int) -> str:
        """The last of some events, in words."""
        what, strand, code, line = self.labels[bits.bit_length() - 1]
        return f"{what} by {strand} in {code.co_name}, {code.co_filename.rpartition('/')[2]}:{line}"


OWN = {str(path) for path in Path(__file__).parent.glob("*.py")}


def _kernel_frame() -> Any:
    """The innermost frame that is not of the emulator."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename in OWN and frame.f_back is not None:
        frame = frame.f_back
    return frame
