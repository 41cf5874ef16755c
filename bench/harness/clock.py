"""The time of a call, and a process that times calls of one revision of the package.

    python clock.py             reads JSON requests from standard input, with the fused_attn found on PYTHONPATH

This file imports only the public `attention` of the package, so that a copy of it can time any revision.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DIRECTIONS = ("forward", "backward", "forward+backward")


def milliseconds(call: Callable[[], Any], device: str, seconds: float = 0.0, least: int = 3) -> float:
    """The median of one round: device events with a cold L2 cache, or the wall clock on a CPU.

    On a CPU a round is at least `least` calls, and lasts at least `seconds`.
    """
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(call, warmup=5, rep=20, return_mode="median")
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def gradients(result: Any, leaves: Sequence[Tensor], cotangents: Sequence[Tensor], retain: bool) -> tuple[Tensor, ...]:
    """Gradients of the leaves; result is out or (out, lse)."""
    outputs = result if isinstance(result, tuple) else (result,)
    return torch.autograd.grad(outputs, leaves, cotangents, retain_graph=retain)


def directed(
    direction: str, call: Callable[[], Any], leaves: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> Callable[[], Any]:
    """The timed call: the forward without gradients, the backward of a retained graph, or both."""
    if direction == "forward":
        return torch.no_grad()(call)
    if direction == "backward":
        result = call()
        return lambda: gradients(result, leaves, cotangents, retain=True)
    return lambda: gradients(call(), leaves, cotangents, retain=False)


# ------------------------------------------------------------------------------------------------- as a process


class Side:
    """Times the public call of one problem at a time, which it loads from a file of the parent process."""

    def load(self, problem: str, results: str, words: dict[str, Any]) -> dict[str, Any]:
        """Load a problem, run it once forward and backward, and save the results for the parent to check."""
        import fused_attn

        self.found = torch.load(problem, weights_only=False)  # it may hold a score object
        qkv, kwargs = self.found["qkv"], self.found["kwargs"] | words
        self.call = lambda: fused_attn.attention(*qkv, **kwargs)
        result = self.call()
        out = result if isinstance(result, tuple) else (result,)
        grads = gradients(result, self.found["leaves"], self.found["cotangents"], retain=False)
        torch.save([x.detach() for x in (*out, *grads)], results)
        return {"package": str(fused_attn.__file__)}

    def time(self, direction: str, seconds: float) -> dict[str, Any]:
        """Time one round."""
        timed = directed(direction, self.call, self.found["leaves"], self.found["cotangents"])
        return {"ms": milliseconds(timed, self.found["qkv"][0].device.type, seconds, least=1)}


def serve() -> None:
    """Each line is a JSON object with a method of Side and its arguments; the answer is its result or an error."""
    side = Side()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(side, request.pop("do"))(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
