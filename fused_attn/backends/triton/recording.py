"""Recordings of work on tensors of given metadata: what it allocates, which torch operators it calls, what it launches.

Work that never reads values does the same for tensors that differ only in content. `record` runs it once under a mode
that sees every torch operator, and writes it as a Python function whose arguments are the tensors. Work that writes to
tensors other than by launches, or whose results depend on values, cannot be recorded and runs again at every call.

The recording of a forward, with constants by value and most arguments of the launch left out:

    def work(stream, given_0, given_1, given_2):                  # q, k, v
        if kernel.pre_run_hooks: return None
        made_0 = empty_like(given_0)                              # out; faster than empty_strided
        made_1 = empty_strided((2, 8, 256), (2048, 256, 1), dtype=float32, device=cuda)
        made_2 = empty_like(made_1)
        if (made_0.data_ptr() | made_1.data_ptr() | made_2.data_ptr()) & 15: return None
        run(32, 1, 1, stream, function, metadata, None, None, None, (given_0, ...), ..., (made_0, ...), (made_1,), ...)
        return made_0, made_1, made_2,

A replay compares `launch_cache.launch_context` with that of the recording, each time, and refuses if they differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.language import constexpr

from ...tuning.config import overrides
from . import launch_cache, launcher

Work = Callable[..., tuple[Tensor | None, ...]]

aten = torch.ops.aten
ALLOCATIONS = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}


# Operators whose results, or their shapes, depend on more than the metadata of their arguments.
DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}


class NotRecordable(Exception):
    """The work does something that a replay could not repeat."""


class Line(NamedTuple):
    """A line of a recording, the tensors that it makes, and those that it uses."""

    text: str
    makes: tuple[str, ...]
    uses: frozenset[str]


class Recorder(TorchDispatchMode):
    """Names the tensors that a piece of work gets and makes, and records its operators and launches in order."""

    def __init__(self, given: tuple[Tensor | None, ...], context: tuple[Any, ...]) -> None:
        super().__init__()
        self.context = context
        self.given = [f"given_{i}" for i in range(len(given))]
        self.names = {id(x): name for x, name in zip(given, self.given, strict=True) if x is not None}
        # The tensor of which empty_like makes one with this metadata.
        self.templates = {
            _metadata(torch.empty_like(x, device="meta"), x.device): self.names[id(x)] for x in given if x is not None
        }
        self.bases: dict[str, str] = {}  # arguments of the work by the names of views at their addresses
        self.made: dict[str, Tensor] = {}
        self.alive: list[Tensor] = []  # no id may be reused
        self.constants: dict[str, Any] = {}
        self.kernels: list[str] = []
        self.lines: list[Line] = []
        self.uses: set[str] = set()  # of the line that is being written
        self.why: str | None = None  # why it cannot be recorded

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = self.names.get(id(args[0])) if args and isinstance(args[0], Tensor) else None
        if func in ALLOCATIONS:
            self.made[self._note(result)] = result
        elif func is aten.detach.default and name is not None:
            self._note(result, name)
        else:
            try:
                self._operator(func, args, kwargs or {}, result)
            except NotRecordable as error:
                self.why = str(error)
        return result

    def _note(self, x: Tensor, name: str | None = None) -> str:
        name = f"made_{len(self.alive)}" if name is None else name
        self.names[id(x)] = name
        self.alive.append(x)
        return name

    def _operator(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Record a torch operator that makes tensors from the metadata and the contents of others."""
        results = result if isinstance(result, tuple) else (result,)
        if not any(isinstance(x, Tensor) for x in (*args, *kwargs.values(), *results)):
            return  # such as the promotion of types
        if func._schema.is_mutable or DEPENDENT & set(func.tags) or not all(isinstance(x, Tensor) for x in results):
            raise NotRecordable(f"{func} writes to a tensor, or its result is not decided by metadata")
        arguments = [self._operand(x) for x in args] + [f"{n}={self._operand(x)}" for n, x in kwargs.items()]
        made = tuple(self._note(x) for x in results)
        targets = ", ".join(made) + ("," if isinstance(result, tuple) else "")
        self._line(f"{targets} = {self._constant(func)}({', '.join(arguments)})", made)
        source = self.names.get(id(args[0])) if args and isinstance(args[0], Tensor) else None
        if source is not None and self._base(source) in self.given:
            self.bases |= {n: self._base(source) for x, n in zip(results, made, strict=True) if _at(x, args[0])}

    def _operand(self, x: Any) -> str:
        """An operator's argument: a tensor of the recording, or anything that holds no tensor."""
        if isinstance(x, Tensor):
            return self._name(x)
        if isinstance(x, (list, tuple)) and any(isinstance(y, Tensor) for y in x):
            return f"[{', '.join(map(self._operand, x))}]"
        return self._constant(x)

    def _line(self, text: str, makes: tuple[str, ...] = ()) -> None:
        self.lines.append(Line(text, makes, frozenset(self.uses)))
        self.uses.clear()

    def _base(self, name: str) -> str:
        return self.bases.get(name, name)

    def launch(self, kernel: Any, grid: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Launch, and record it."""
        with _disable_current_modes():
            compiled = launch_cache.launch(kernel, grid, args, options)
        if launch_cache.launch_context() != self.context:
            self.why = "a launch on a device that was not the current one"
            return
        try:
            self.launched(compiled, kernel, grid, args, options)
        except NotRecordable as error:
            self.why = str(error)

    def launched(self, compiled: launch_cache.Compiled | None, kernel: Any, grid: int, args: Any, options: Any) -> None:
        """Record a launch as a line of Python: by its compiled kernel, or through Triton if that handles all
        launches."""
        if not launch_cache.CONSTANTS.issuperset(map(type, options.values())):
            raise NotRecordable("an option that is not a plain constant")
        if compiled is None:
            self._line(f"launch({self._constant(kernel)}, {grid}, {self._open(args)}, {self._constant(options)})")
            return
        self.kernels.append(self._constant(kernel))
        run, function, metadata = map(self._constant, (compiled.run, compiled.function, compiled.metadata))
        # A launcher flattens tuples of any type.
        arguments = ", ".join(self._open(x, flat=True) for x in (*args, *compiled.constants))
        self._line(f"{run}({grid}, 1, 1, stream, {function}, {metadata}, None, None, None, {arguments})")

    def _constant(self, x: Any) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants[name] = x
        return name

    def _open(self, x: Any, flat: bool = False) -> str:
        """An argument as an expression over the names of tensors. flat: for the launcher of a compiled
        kernel, which takes tuples of any type."""
        if isinstance(x, Tensor):
            return self._name(x, pointer=flat)
        if isinstance(x, tuple) and not _without_tensors(x):
            inside = ", ".join(self._open(y, flat) for y in x)
            return f"({inside},)" if flat or type(x) is tuple else f"{self._constant(type(x))}({inside})"
        if type(x) in launch_cache.DESCRIPTORS:
            rest = ", ".join(self._constant(getattr(x, field.name)) for field in fields(x) if field.name != "base")
            return f"{self._constant(type(x))}({self._name(x.base)}, {rest})"
        if not _without_tensors(x):
            raise NotRecordable(f"a {type(x).__name__}, which may hold a tensor")
        return self._constant(x)

    def _name(self, x: Tensor, pointer: bool = False) -> str:
        """pointer: any tensor with x's address will do, as for a compiled kernel."""
        if id(x) not in self.names:
            raise NotRecordable("a tensor that is neither given nor made by the work")
        name = self.names[id(x)]
        name = self._base(name) if pointer else name
        self.uses.add(name)
        return name

    def _needed(self, results: frozenset[str]) -> list[Line]:
        """Without the operators whose results nothing uses, such as views of which a kernel takes the address."""
        needed, lines = set(results), []
        for line in reversed(self.lines):
            if not line.makes or needed & set(line.makes):
                needed |= line.uses
                lines.append(line)
        self.made = {name: x for name, x in self.made.items() if name in needed}
        return lines[::-1]

    def written(self, results: tuple[Tensor | None, ...]) -> Callable[..., Any]:
        """The work as a function of the stream and the tensors. It returns None if Triton would now do something
        else."""
        if self.why is not None:
            raise NotRecordable(self.why)
        answers = [self._name(x) if x is not None else "None" for x in results]
        work = self._needed(frozenset(answers))
        lines = [f"def work(stream, {', '.join(self.given)}):"]
        lines += [f"    if {kernel}.pre_run_hooks: return None" for kernel in self.kernels]
        for name, x in self.made.items():
            if x.layout != torch.strided or not _dense(x):
                raise NotRecordable("an allocation that empty_strided does not make")
            template = self.templates.setdefault(_metadata(x, x.device), name)
            if template == name:
                shape, strides, dtype, device = map(self._constant, _metadata(x, x.device))
                lines.append(f"    {name} = empty_strided({shape}, {strides}, dtype={dtype}, device={device})")
            else:
                lines.append(f"    {name} = empty_like({template})")
        if self.made:
            lines.append(f"    if ({' | '.join(f'{name}.data_ptr()' for name in self.made)}) & 15: return None")
        lines += [f"    {line.text}" for line in work]
        lines.append(f"    return {', '.join(answers)},")
        space = {"launch": launch_cache.launch, **self.constants}
        space |= {"empty_like": torch.empty_like, "empty_strided": torch.empty_strided}
        exec("\n".join(lines), space)
        return space["work"]


def _without_tensors(x: Any) -> bool:
    if isinstance(x, tuple):
        return all(map(_without_tensors, x))
    return type(x) in launch_cache.CONSTANTS or type(x) is constexpr


def _at(x: Tensor, y: Tensor) -> bool:
    return x.data_ptr() == y.data_ptr()


def _metadata(x: Tensor, device: torch.device) -> tuple[Any, ...]:
    return tuple(x.shape), x.stride(), x.dtype, device


def _dense(x: Tensor) -> bool:
    return x.numel() * x.element_size() == x.untyped_storage().nbytes()


def _context() -> tuple[Any, ...] | None:
    """The launch context of a replay; None if launches must not be replayed."""
    if launcher.launch is not launcher.LAUNCH or overrides():
        return None
    return launch_cache.launch_context()


class Replay:
    """A recording, and the launch context that it is valid in."""

    __slots__ = ("context", "work")

    def __init__(self, context: tuple[Any, ...], work: Callable[..., Any] | None) -> None:
        self.context, self.work = context, work

    def __call__(self, given: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
        """The results for other tensors of the same metadata; None if it cannot be replayed now."""
        context = self.context
        if self.work is None or launcher.launch is not launcher.LAUNCH or overrides():
            return None
        if launch_cache.launch_context() != context:
            return None
        return self.work(context[0].get_current_stream(context[1]) if context else None, *given)


def record(work: Work, given: tuple[Tensor | None, ...]) -> tuple[tuple[Tensor | None, ...], Replay | None]:
    """The results of work(*given), and a Replay, which refuses if the work cannot be recorded; None: try again
    later."""
    context = _context()
    if context is None:
        return work(*given), None
    # New tensors, so that one that is given twice has two names.
    given = tuple(None if x is None else x.detach() for x in given)
    recorder = Recorder(given, context)
    token = launcher.RECORDER.set(recorder)
    try:
        with recorder:
            results = work(*given)
    finally:
        launcher.RECORDER.reset(token)
    try:
        return results, Replay(context, recorder.written(results))
    except NotRecordable:
        return results, Replay(context, None)
