"""What a call costs on the host, and what it compiles: with a driver that knows its target and never launches.

    python -m bench.host overhead 2000      microseconds per call against an empty operator, as JSON
    python -m bench.host compilations 100   kernels compiled over that many unseen lengths, as JSON
    python -m bench.host first 3            seconds of a process's first call, cold and warm, as JSON: best of 3

CPU tensors stand in for the device's. Everything before the driver's own launch is the real thing: the public call,
dispatch, the operator, autograd, views, the binding of arguments, cache keys, and the lookups of launcher and stream.
Interpreted and compiled kernels cannot share a process, so this one sets TRITON_INTERPRET=0.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import fused_attn
from bench import ROOT
from fused_attn.launch import hopper, portable

ARCH = "sm_90"
SHAPE = (2, 8, 1024, 64)  # B, H, S, D


class Utilities:
    """What Triton asks of a driver when it loads a kernel."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
        return object(), 0, 0, 0, 1024  # module, function, registers, spills, threads


class Driver:
    """A machine that has one device of the target and drops every launch."""

    utils = Utilities()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(ARCH.removeprefix("sm_")), 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def dropped(*args: Any) -> None:
            return None

        return dropped


def pretend() -> None:
    """From here on a CPU tensor is a tensor on the target, for the backends that launch kernels."""
    driver.set_active(Driver())
    portable.architecture = lambda device: ARCH
    portable.interpreted = lambda: True  # the one reason against CPU tensors
    hopper._machine = lambda device: []
    hopper._multiprocessors = lambda device: 132


def _inputs(m: int, n: int, requires_grad: bool = False, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    b, h, _, d = SHAPE
    return [torch.zeros(b, h, x, d, dtype=dtype, requires_grad=requires_grad) for x in (m, n, n)]


# ---------------------------------------------------------------------------------------------------------- overhead


def _empty_operator() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Operators of three arguments that allocate forward's and backward's outputs and do nothing else."""
    library = torch.library.Library("fused_attn_empty", "DEF")
    library.define("forward(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)")
    library.define("backward(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor, Tensor)")
    library.impl(
        "forward",
        lambda q, k, v: (torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)),
        "CompositeExplicitAutograd",
    )
    library.impl("backward", lambda q, k, v: tuple(torch.empty_like(x) for x in (q, k, v)), "CompositeExplicitAutograd")
    _empty_operator.library = library  # operators live as long as their library
    return torch.ops.fused_attn_empty.forward, torch.ops.fused_attn_empty.backward


class _Empty(torch.autograd.Function):
    """What torch asks of any derivative: it saves what attention saves, and its backward allocates three gradients."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, (lse, *rows) = torch.empty_like(q), (q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(3))
        ctx.save_for_backward(q, k, v, out, *rows)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


NOTHING = "an empty Function through torch.autograd.grad"
THROUGH = "backward through torch.autograd.grad"
# Each subject, and the empty operator that it is measured by.
SUBJECTS = {
    "inference": "empty forward",
    "autograd forward": "empty forward",
    "backward": "empty backward",
    THROUGH: "empty backward",
    NOTHING: "empty backward",
    "inference, unseen length": "empty forward",
    "inference by hopper": "empty forward",
}


def overhead(calls: int, rounds: int = 300) -> dict[str, Any]:
    """Microseconds a call: the least of many interleaved rounds, because others on the machine only ever add.

    "backward" is what is ours of a pass through torch.autograd.grad: less an empty Function's, which allocates the same
    gradients, plus the operator that does. A call counts as it is in a loop, after others like it; an unseen length has
    none before it. Encoding TMA descriptors is the driver's launch and not counted.
    """
    from torch.utils.benchmark import Timer

    pretend()
    torch.set_num_threads(1)
    empty_forward, empty_backward = _empty_operator()
    plain, leaves = _inputs(SHAPE[2], SHAPE[2]), _inputs(SHAPE[2], SHAPE[2], requires_grad=True)
    cache, lengths = _inputs(4096, 4096), itertools.cycle(range(17, 4096))

    def ours(inputs: list[Tensor]) -> Tensor:
        return fused_attn.attention(*inputs, causal=True, backend="triton")

    def unseen() -> Tensor:
        n = next(lengths)
        return ours([x[:, :, :n] for x in cache])

    out, nothing = [ours(leaves) for _ in range(4)][-1], _Empty.apply(*leaves)[0]
    dout = torch.zeros_like(out)
    subjects = {
        "inference": lambda: ours(plain),
        "autograd forward": lambda: ours(leaves),
        THROUGH: lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True),
        "inference, unseen length": unseen,
        "inference by hopper": lambda: fused_attn.attention(*plain, causal=True, backend="hopper"),
        NOTHING: lambda: torch.autograd.grad(nothing, leaves, dout, retain_graph=True),
        "empty forward": lambda: empty_forward(*plain),
        "empty backward": lambda: empty_backward(*plain),
    }
    timers = {name: Timer("f()", globals={"f": f}) for name, f in subjects.items()}
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for timer in timers.values():
        timer.timeit(20)
    for _ in range(rounds):
        for name, timer in timers.items():
            samples[name].append(1e6 * timer.timeit(max(1, calls // rounds)).median)
    least = {name: min(x) for name, x in samples.items()}
    least["backward"] = least[THROUGH] - least[NOTHING] + least["empty backward"]
    ratios = {name: least[name] / least[base] for name, base in SUBJECTS.items()}
    quantiles = {name: statistics.quantiles(x, n=10) for name, x in samples.items()}
    return {"triton": triton.__version__, "microseconds": least, "ratios": ratios, "deciles": quantiles}


# ------------------------------------------------------------------------------------------------------ compilations


def _options(name: str, b: int, h: int, m: int, n: int) -> dict[str, Any]:
    """The arguments of one kind of call at one pair of lengths; their strides depend on the lengths."""
    made: dict[str, Callable[[], dict[str, Any]]] = {
        "plain": dict,
        "causal": lambda: {"causal": True, "alignment": "bottom_right"},
        "window": lambda: {"window": (m // 3 + 1, 5), "alignment": "top_left"},
        "lengths": lambda: {"mask": fused_attn.Mask.lengths(torch.full((b,), n))},
        "mask": lambda: {"mask": torch.ones(b, 1, m, n, dtype=torch.bool)},
        "bias": lambda: {"bias": torch.zeros(h, m, n, requires_grad=True)},
        "lse": lambda: {"return_lse": True},
    }
    return made[name]()


KINDS = ("plain", "causal", "window", "lengths", "mask", "bias", "lse")


def _unseen(count: int) -> Iterator[tuple[int, int]]:
    """Pairs of lengths: 1, multiples of 16 and anything between."""
    draw = random.Random(0)
    for i in range(count):
        m, n = (draw.choice((1, 16 * draw.randint(1, 64), draw.randint(2, 1024))) for _ in range(2))
        yield m, (m if i % 2 else n)


def compilations(count: int, kinds: tuple[str, ...] = KINDS) -> dict[str, Any]:
    """How many kernels warm-up calls of each kind compile, and how many `count` further lengths add.

    A length is called as often as it takes to be replayed, forward and backward.
    """
    pretend()
    made: list[str] = []

    # Triton itself reports every kernel that it compiles or reads from its cache, whoever asked for it.
    def reported(*, src: Any, **_: Any) -> None:
        made.append(src.name)

    knobs.compilation.listener = reported

    def compiled() -> int:
        return len(made)

    def call(kind: str, m: int, n: int) -> None:
        for _ in range(4):
            once(kind, m, n)

    def once(kind: str, m: int, n: int) -> None:
        b, h = SHAPE[:2]
        inputs = _inputs(m, n, requires_grad=True)
        out = fused_attn.attention(*inputs, **_options(kind, b, h, m, n), backend="triton")
        out, lse = out if isinstance(out, tuple) else (out, None)
        total = out.float().sum() if lse is None else out.float().sum() + lse.sum()
        total.backward()

    found: dict[str, dict[str, int]] = {}
    for kind in kinds:
        start = compiled()
        call(kind, 512, 512)
        warm = compiled()
        for m, n in _unseen(count):
            call(kind, m, n)
        found[kind] = {"warm-up": warm - start, "unseen lengths": compiled() - warm}
    return {"lengths": count, "kinds": found}


# -------------------------------------------------------------------------------------------------------- first call


# torch is there already; everything else that a first call imports belongs to it.
FIRST = """
import os, sys, time, torch
began, spent = time.perf_counter(), sum(os.times()[:4])
from bench import host
imported = sum(os.times()[:4])
host.first_call(sys.argv[1] == "forward+backward")
print(time.perf_counter() - began, sum(os.times()[:4]) - spent, imported - spent)
"""


def first_call(backward: bool) -> None:
    """What a process does first."""
    pretend()
    inputs = _inputs(SHAPE[2], SHAPE[2], requires_grad=backward)
    out = fused_attn.attention(*inputs, causal=True, backend="triton")
    if backward:
        out.sum().backward()


def first(count: int) -> dict[str, Any]:
    """Seconds of the first call in a process that has imported torch: imports, compilation to machine code, launches.

    Cold: nothing is cached. Warm: another process compiled the same kernels before. The least of `count` processes: on
    the clock; of processors, the assembler's included, to which others on the machine add little; and what of these
    went into importing triton and fused_attn.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in ("forward", "forward+backward"):
        seconds: dict[str, list[list[float]]] = {"cold": [], "warm": []}
        for _ in range(count):
            with tempfile.TemporaryDirectory(prefix="fused_attn_first_") as directory:
                for state in seconds.values():
                    environ = os.environ | {"TRITON_CACHE_DIR": directory}
                    done = subprocess.run(
                        [sys.executable, "-c", FIRST, name],
                        cwd=ROOT, env=environ, capture_output=True, text=True, check=True,
                    )  # fmt: skip
                    state.append([float(x) for x in done.stdout.split()])
        found[name] = {
            state: dict(zip(("clock", "processor", "imports"), map(min, zip(*rows, strict=True)), strict=True))
            for state, rows in seconds.items()
        }
    return {"triton": triton.__version__, "processes": count, "seconds": found}


if __name__ == "__main__":
    part, count = sys.argv[1], int(sys.argv[2])
    print(json.dumps({"overhead": overhead, "compilations": compilations, "first": first}[part](count)))
