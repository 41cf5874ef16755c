"""Runs providers once for peak memory and results, then times them in interleaved rounds."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fused_attn
from bench.harness.clock import directed, milliseconds
from bench.harness.providers import Call, Provider
from bench.harness.samples import Sample

REASON_LENGTH = 400
DIRECTIONS = ("forward", "backward")


def peak_bytes(call: Callable[[], Any], device: str) -> tuple[Any, int | None]:
    """The result of a call, and its peak memory beyond inputs and results."""
    if device != "cuda":
        return call(), None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    results = result if isinstance(result, tuple) else (result,)
    held = sum(x.untyped_storage().nbytes() for x in results)
    return result, torch.cuda.max_memory_allocated() - before - held


def reason(error: Exception, noticed: list[warnings.WarningMessage]) -> str:
    """Why a provider cannot run, including warnings, where SDPA gives its reasons."""
    words = [str(error)]
    if not isinstance(error, (NotImplementedError, fused_attn.BackendError)):
        words = [f"{type(error).__name__}: {error}"]
        words += [str(w.message) for w in noticed if issubclass(w.category, UserWarning)]
    return " | ".join(dict.fromkeys(" ".join(x.split()) for x in words))[:REASON_LENGTH]


@dataclass
class Started:
    """A provider after its first run.

    call: its callable, None if the forward failed. found: by direction, peak memory or the reason of a refusal. error:
    the exception of the refusal.
    """

    call: Call | None
    found: dict[str, dict[str, Any]]
    result: Any = None
    grads: tuple[Tensor, ...] = ()
    error: Exception | None = None


def run_once(provider: Provider, x: Sample, device: str) -> Started:
    """Run the forward without gradients, then the forward and backward."""
    started = Started(None, {})
    found, direction = started.found, "forward"
    with warnings.catch_warnings(record=True) as noticed, provider.scope():
        warnings.simplefilter("always")
        try:
            call = provider.bind(x)
            started.result, peak = peak_bytes(torch.no_grad()(call), device)
            found["forward"] = {"peak_bytes": peak}
            started.call, direction = call, "backward"
            if why := provider.no_backward(x):
                raise NotImplementedError(why)
            started.result = call()
            run = directed("backward", lambda: started.result, x.leaves, x.cotangents)
            started.grads, peak = peak_bytes(run, device)
            found["backward"] = {"peak_bytes": peak}
            found["forward+backward"] = {}
        except Exception as error:
            started.error = error
            found[direction] = {"refused": reason(error, noticed)}
    for later in ("backward", "forward+backward"):
        found.setdefault(later, found.get("backward") or found["forward"])
    return started


def start(provider: Provider, x: Sample, device: str) -> tuple[Call | None, dict[str, Any]]:
    """Run a provider once; returns its callable or None, and by direction peak memory or a reason."""
    started = run_once(provider, x, device)
    return started.call, started.found


def compare(
    providers: list[Provider], x: Sample, device: str, rounds: int, directions: tuple[str, ...], matmul: int
) -> dict[str, Any]:
    """Milliseconds of every provider on one sample, and of a matmul, in interleaved rounds."""
    calls, found = {}, {}
    for provider in providers:
        calls[provider], found[provider.name] = start(provider, x, device)
        release(device)
    willing = {provider: call for provider, call in calls.items() if call is not None}
    return interleave(willing, found, x, Turns(device, rounds, directions, matmul))


@dataclass(frozen=True)
class Turns:
    """How providers are timed: rounds per direction; on a CPU a round has at least `least` calls and `seconds`."""

    device: str
    rounds: int
    directions: tuple[str, ...] = DIRECTIONS
    matmul: int = 8192
    seconds: float = 0.0
    least: int = 3


def interleave(
    calls: dict[Provider, Call], found: dict[str, Any], x: Sample, turns: Turns, tick: Callable[[], Any] = bool
) -> dict[str, Any]:
    """Add samples, medians and TFLOP/s to what `run_once` found. Each round runs every provider once."""
    device, size = turns.device, turns.matmul
    a, b = (torch.randn(size, size, dtype=x.problem.q.dtype, device=device) for _ in range(2))
    ceiling: list[float] = []
    for direction in turns.directions:
        for turn in range(turns.rounds):
            ceiling.append(milliseconds(lambda: a @ b, device, turns.seconds, turns.least))
            for provider in list(calls) if turn % 2 else reversed(calls):
                entry = found[provider.name][direction]
                if "refused" not in entry:
                    one_round(provider, calls[provider], x, direction, entry, turns)
                    release(device)
            tick()
    top = 2e-9 * size**3 / statistics.median(ceiling)
    for name in found:
        found[name] = {direction: found[name][direction] for direction in turns.directions}
        for direction, entry in found[name].items():
            if "samples_ms" in entry:
                entry["ms"] = statistics.median(entry["samples_ms"])
                entry["tflops"] = 1e-9 * x.flops(direction) / entry["ms"]
                entry["of_matmul"] = entry["tflops"] / top
    return {"providers": found, "matmul_tflops": top, "matmul_samples_ms": ceiling}


def one_round(provider: Provider, call: Call, x: Sample, direction: str, entry: dict[str, Any], turns: Turns) -> None:
    """Add one sample to an entry. The graph is not kept: it may hold the full score matrix."""
    try:
        with provider.scope():
            timed = directed(direction, call, x.leaves, x.cotangents)
            took = milliseconds(timed, turns.device, turns.seconds, turns.least)
        entry.setdefault("samples_ms", []).append(took)
    except torch.OutOfMemoryError as error:
        entry["refused"] = reason(error, [])


def release(device: str) -> None:
    """Free cached memory, so that no provider runs out of memory because of another."""
    if device == "cuda":
        torch.cuda.empty_cache()
