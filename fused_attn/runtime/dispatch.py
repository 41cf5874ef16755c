"""Selection of a backend: the first of `BACKENDS` that can run a problem. An explicit choice never falls back."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..backends import reference, sdpa
from ..backends.tiled import attention as tiled
from ..spec.checks import check_choice
from ..spec.problem import HALF, BackendError, Problem, TransformError
from ..spec.torch_internals import dispatch_mode_count, jit_tracing
from ..spec.transforms import transform_of, transforming
from . import autograd, environment, ops

BACKENDS = ("hopper", "triton", "sdpa", "tiled", "reference")
ON_CPU = ("sdpa", "tiled", "reference")
# Tasks other than computing out: the reason against backends without them, and the backends that have them.
TASKS = {"statistics": "computes no statistics and no map", "decoding": "does not decode from a cache"}
WITH_TASKS = ("triton", "tiled", "reference")
TORCH_BACKENDS = {"sdpa": sdpa, "tiled": tiled, "reference": reference}  # made of torch's differentiable operators
for _name in ops.BACKEND_MODULES:
    ops.backend_module(_name)  # imported here, because a compiler that traces a call cannot import


@dataclass(frozen=True)
class Explanation:
    """The backend that runs a call (None: none can), and every reason against the other ones."""

    backend: str | None
    reasons: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"backend: {self.backend}"]
        for name, reasons in self.reasons.items():
            lines += [f"  {name}: {reason}" for reason in reasons]
        return "\n".join(lines)


def transformed(p: Problem) -> str | None:
    """The name of the torch transform that p's tensors are under, if any."""
    return transform_of(p.tensors().values()) if transforming() else None


def why_not(name: str, p: Problem, by_name: bool, transform: str | None, task: str = "") -> list[str]:
    """Every reason why a backend cannot run p. by_name: the choice is explicit. task: one of TASKS, or "" for out."""
    if task and name not in WITH_TASKS:
        return [f"it {TASKS[task]}"]
    if transform and (task or name not in ("tiled", "reference")):
        # The only reason, because the other checks may read tensors, and transformed tensors cannot be read.
        return [f"it does not support {transform}{f' of {task}' if task else ''}"]
    reasons = TORCH_BACKENDS[name].why_not(p) if name in TORCH_BACKENDS else ops.backend_module(name).why_not(p)
    if name == "hopper" and not by_name and not reasons:
        reasons = ops.backend_module(name).unproven(p)
    if name == "triton" and not by_name and p.q.device.type == "cpu":
        reasons = [*reasons, "on the CPU it is an interpreter, used only if named"]
    return reasons


def _tracing() -> bool:
    return torch.compiler.is_compiling() or dispatch_mode_count() > 0 or jit_tracing()


def explain(p: Problem, backend: str | None = None) -> Explanation:
    """The backend that runs p, and the reasons against those tried before it."""
    return _explain(p, p.lower(), backend)


def taken(name: str, p: Problem, lowered: Problem) -> Problem:
    """The form of a problem that a backend takes."""
    if name == "tiled" and _rounded(p):
        return p.lower(wide=True)
    return p if name == "reference" else lowered


def _rounded(p: Problem) -> bool:
    """True if lowering rounds rewritten q and k to half precision; `tiled`, which computes in float32, avoids that."""
    return p.score is not None and p.score.rewrites and p.q.dtype in HALF


def _explain(
    p: Problem, lowered: Problem, backend: str | None, task: str = "", names: tuple[str, ...] = BACKENDS
) -> Explanation:
    explicit = environment.backend if backend is None else backend
    if backend is not None:
        check_choice("backend", backend, BACKENDS, "None or one of")
    elif explicit is not None:
        check_choice("FUSED_ATTN_BACKEND", explicit, BACKENDS)
    transform = transformed(p)
    refused: dict[str, list[str]] = {}
    for name in names if explicit is None else (explicit,):
        reasons = why_not(name, p if name == "reference" else lowered, explicit is not None, transform, task)
        if name == "sdpa" and explicit is None and p.q.device.type == "cpu" and _rounded(p):
            reasons = [*reasons, f"the score's rewritten q would be rounded to {p.q.dtype}; it runs if named"]
        if not reasons:
            return Explanation(name, refused)
        refused[name] = reasons
    return Explanation(None, refused)


def choose(p: Problem, backend: str | None = None, task: str = "") -> tuple[str, Problem]:
    """The backend for p, the first that can run it or the explicit choice, and the form of p that it takes.

    task: one of TASKS, or "" for out.
    """
    lowered = p.lower()
    # On the CPU kernels run only if named, and collecting the reasons costs more than the rest of a call.
    choice = _explain(p, lowered, backend, task, BACKENDS if p.q.device.type != "cpu" else ON_CPU)
    if choice.backend is None:
        name, reasons = next(reversed(choice.reasons.items()))
        error = TransformError if transformed(p) else BackendError
        chosen = "" if backend is not None or environment.backend is None else ", which FUSED_ATTN_BACKEND chose,"
        raise error(f"backend {name!r}{chosen} cannot run this call: " + "; ".join(reasons))
    return choice.backend, taken(choice.backend, p, lowered)


def run(p: Problem, name: str, untraced: bool = False) -> tuple[Tensor, Tensor | None]:
    """(out, lse) by a backend. untraced: see `autograd.attend`."""
    if name == "reference" or (name == "sdpa" and not (p.q.device.type == "cpu" and _tracing())):
        out, lse = TORCH_BACKENDS[name].attention(p)
        return autograd.attend(p, "tiled", untraced) if out is None else (out, lse)
    if name == "tiled" and transformed(p):
        return tiled.attention(p)
    return autograd.attend(p, name, untraced)
