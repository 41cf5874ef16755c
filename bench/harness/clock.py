"""What a call takes, and a process that times the calls of one revision.

    python clock.py             obeys JSON lines on standard input, with the fused_attn that PYTHONPATH leads to

This file imports nothing of ours but the package itself, and of that only `attention`: a copy of it runs beside any
revision, whatever that revision's own benchmarks were.
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
    """The median of one round: by device events with a cold L2 cache, or by the wall clock on the CPU.

    On the CPU a round is `least` calls, and more until `seconds` have passed.
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
    """What flows to the leaves. result is out, or (out, lse)."""
    outputs = result if isinstance(result, tuple) else (result,)
    return torch.autograd.grad(outputs, leaves, cotangents, retain_graph=retain)


def directed(
    direction: str, call: Callable[[], Any], leaves: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> Callable[[], Any]:
    """What is timed: the forward as inference runs it, the backward of a graph that is kept, or both in turn."""
    if direction == "forward":
        return torch.no_grad()(call)
    if direction == "backward":
        result = call()
        return lambda: gradients(result, leaves, cotangents, retain=True)
    return lambda: gradients(call(), leaves, cotangents, retain=False)


# ------------------------------------------------------------------------------------------------- as a process


class Side:
    """One problem at a time, loaded from a file that the parent wrote, and the public call of it."""

    def load(self, problem: str, results: str, words: dict[str, Any]) -> dict[str, Any]:
        """Read a problem, run it once forward and backward, and leave what came out for the parent to judge."""
        import fused_attn

        self.found = torch.load(problem, weights_only=False)  # a score is an object of the package
        qkv, kwargs = self.found["qkv"], self.found["kwargs"] | words
        self.call = lambda: fused_attn.attention(*qkv, **kwargs)
        result = self.call()
        out = result if isinstance(result, tuple) else (result,)
        grads = gradients(result, self.found["leaves"], self.found["cotangents"], retain=False)
        torch.save([x.detach() for x in (*out, *grads)], results)
        return {"package": str(fused_attn.__file__)}

    def time(self, direction: str, seconds: float) -> dict[str, Any]:
        """One round."""
        timed = directed(direction, self.call, self.found["leaves"], self.found["cotangents"])
        return {"ms": milliseconds(timed, self.found["qkv"][0].device.type, seconds, least=1)}


def serve() -> None:
    """One JSON object a line: a method of Side with its arguments, answered by what it returns or by an error."""
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
