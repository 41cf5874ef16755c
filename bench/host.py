"""CPU overhead of Triton calls, with the kernel launch stubbed out, without a GPU. bench.run measures attention itself.

    python -m bench.host                      all parts, each in a process of its own, into bench/results/host.json
    python -m bench.host overhead             one part; the others stay as they are in the file
    python -m bench.host overhead 2000        one part with another number of calls: printed as JSON, not written

overhead      microseconds per call, and the ratio to an empty operator. Repeated shapes hit a cache; a new length takes
              the slow path
compilations  kernels compiled for that many new sequence lengths
first         seconds of a process's first call, with cold and warm caches: the best of that many processes

CPU tensors stand in for GPU tensors. Everything up to the driver's launch is real: the public call, dispatch, the
operator, autograd, views, argument binding, cache keys, and the lookup of launcher and stream. Interpreted and compiled
kernels cannot share a process, so this module sets TRITON_INTERPRET=0.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
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
from bench.harness import argtypes, first_call, table
from fused_attn.api import varlen
from fused_attn.backends.triton import hopper, settings
from fused_attn.spec import checks, decoding

ARCH = "sm_90"
SHAPE = (2, 8, 1024, 64)  # B, H, S, D


class Utilities:
    """The driver functions that Triton calls to load a kernel."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
        return object(), 0, 0, 0, 1024  # module, function, registers, spills, threads


class Driver:
    """A driver with one device of the target architecture; launches do nothing."""

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
    """Install the stub driver, and let the Triton and Hopper backends accept CPU tensors."""
    driver.set_active(Driver())
    settings.architecture = lambda device: ARCH
    settings.interpreted = lambda: True  # else the backend refuses CPU tensors
    hopper._machine = lambda device: []
    checks.readable = varlen.readable = decoding.readable = lambda x: False  # as on a GPU, index tensors are not read
    hopper._multiprocessors = lambda device: 132


def _inputs(m: int, n: int, requires_grad: bool = False, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    b, h, _, d = SHAPE
    return [torch.zeros(b, h, x, d, dtype=dtype, requires_grad=requires_grad) for x in (m, n, n)]


# ---------------------------------------------------------------------------------------------------------- overhead


@functools.cache
def _empty_operator() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Operators that allocate the outputs of the forward and of the backward, and do nothing else."""
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
    """The autograd cost of any Function: it saves the tensors that attention saves and allocates three gradients."""

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
# Each measured call, and the empty operator that it is divided by.
SUBJECTS = {
    "inference": "empty forward",
    "autograd forward": "empty forward",
    "backward": "empty backward",
    THROUGH: "empty backward",
    NOTHING: "empty backward",
    "inference, unseen length": "empty forward",
    "inference by hopper": "empty forward",
    "varlen": "empty forward",
    "varlen, unseen length": "empty forward",
    "decode": "empty forward",
    "decode, unseen capacity": "empty forward",
    "decode of pages": "empty forward",
}


def overhead(calls: int, rounds: int = 300) -> dict[str, Any]:
    """Microseconds per call: the minimum over interleaved rounds, because other processes only ever add time.

    "backward" is torch.autograd.grad, minus the same for an empty Function with the same gradients, plus the operator
    that allocates them. Calls are repeated, so all but "unseen length" hit the cache. Encoding TMA descriptors belongs
    to the launch and is not counted.
    """
    from torch.utils.benchmark import Timer

    pretend()
    torch.set_num_threads(1)
    empty_forward, empty_backward = _empty_operator()
    plain, leaves = _inputs(SHAPE[2], SHAPE[2]), _inputs(SHAPE[2], SHAPE[2], requires_grad=True)
    cache = _inputs(4096, 4096)
    views = itertools.cycle([[x[:, :, :n] for x in cache] for n in range(17, 4096)])

    def ours(inputs: list[Tensor]) -> Tensor:
        return fused_attn.attention(*inputs, causal=True, backend="triton")

    def unseen() -> Tensor:
        return ours(next(views))

    starts = torch.arange(0, 1025, 128, dtype=torch.int32)
    packed = [torch.zeros(1024, SHAPE[1], SHAPE[3], dtype=torch.bfloat16) for _ in range(3)]
    longer = [torch.zeros(4096, SHAPE[1], SHAPE[3], dtype=torch.bfloat16) for _ in range(3)]
    prefixes = itertools.cycle([[x[:n] for x in longer] for n in range(64, 4096)])

    def ours_packed(inputs: list[Tensor]) -> Tensor:
        return fused_attn.attention_varlen(
            *inputs, starts, starts, max_seqlen_q=128, max_seqlen_k=128, causal=True, backend="triton"
        )

    b, h, n, d = SHAPE
    query, new = torch.zeros(b, 1, h, d, dtype=torch.bfloat16), torch.zeros(b, 1, h, d, dtype=torch.bfloat16)
    keys, values = (torch.zeros(b, n, h, d, dtype=torch.bfloat16) for _ in range(2))
    roomy = [torch.zeros(b, 4096, h, d, dtype=torch.bfloat16) for _ in range(2)]
    capacities = itertools.cycle([[x[:, :c] for x in roomy] for c in range(64, 4096)])
    pages = [torch.zeros(b * n // 64, 64, h, d, dtype=torch.bfloat16) for _ in range(2)]
    table = torch.arange(b * n // 64, dtype=torch.int32).view(b, -1)
    counts = torch.full((b,), 17, dtype=torch.int32)

    def ours_decoded(k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return fused_attn.attention_decode(
            query, k, v, cache_seqlens=counts, k_new=new, v_new=new, causal=True, backend="triton", **options
        )

    out, nothing = [ours(leaves) for _ in range(4)][-1], _Empty.apply(*leaves)[0]
    dout = torch.zeros_like(out)
    subjects = {
        "inference": lambda: ours(plain),
        "autograd forward": lambda: ours(leaves),
        THROUGH: lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True),
        "inference, unseen length": unseen,
        "inference by hopper": lambda: fused_attn.attention(*plain, causal=True, backend="hopper"),
        "varlen": lambda: ours_packed(packed),
        "varlen, unseen length": lambda: ours_packed(next(prefixes)),
        "decode": lambda: ours_decoded(keys, values),
        "decode, unseen capacity": lambda: ours_decoded(*next(capacities)),
        "decode of pages": lambda: ours_decoded(*pages, page_table=table),
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
    """Arguments of one kind of call for lengths m and n; tensor strides depend on the lengths."""
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
    """Pairs of lengths: 1, multiples of 16, and others."""
    draw = random.Random(0)
    for i in range(count):
        m, n = (draw.choice((1, 16 * draw.randint(1, 64), draw.randint(2, 1024))) for _ in range(2))
        yield m, (m if i % 2 else n)


def compilations(count: int, kinds: tuple[str, ...] = KINDS) -> dict[str, Any]:
    """Kernels compiled by the warm-up calls of each kind, and by calls with `count` new lengths.

    Each length is called often enough to be served from the launch cache, forward and backward.
    """
    pretend()
    made: list[str] = []

    # Triton calls the listener for every kernel that it compiles or reads from its cache.
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


SETUP = "from bench import host; host.pretend()"


def first(count: int) -> dict[str, Any]:
    """Seconds of the first call of a process, imports and compilation to machine code included; the best of `count`."""
    runs = [first_call.measured(SETUP) for _ in range(count)]
    seconds = {
        direction: {
            state: {x: min(run[state][direction][x] for run in runs) for x in first_call.FIGURES}
            for state in first_call.STATES
        }
        for direction in first_call.DIRECTIONS
    }
    return {"triton": triton.__version__, "processes": count, "seconds": seconds}


# Of each part: the function, and the number of calls, lengths or processes.
PARTS = {"overhead": (overhead, 6000), "compilations": (compilations, 100), "first": (first, 3)}
RESULT = table.RESULTS / "host.json"


def _apart(part: str) -> dict[str, Any]:
    """The result of a part in a process of its own."""
    command = [sys.executable, "-m", "bench.host", part, str(PARTS[part][1])]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def _lines(part: str, result: dict[str, Any]) -> Iterator[str]:
    """The figures of a part, for a reader."""
    if part == "overhead":
        for name, ratio in result["ratios"].items():
            yield f"{name:>34}: {result['microseconds'][name]:.0f} us, {ratio:.1f} x an empty operator"
    elif part == "compilations":
        for name, x in result["kinds"].items():
            shown = f"{x['warm-up']} kernels at the first call, {x['unseen lengths']} more"
            yield f"{name:>34}: {shown} for {result['lengths']} new lengths"
    else:
        for name, states in result["seconds"].items():
            for state, seconds in states.items():
                shown = f"{seconds['clock']:.1f} s, {seconds['processor']:.1f} s CPU time"
                yield f"{name:>34}: {shown} at the first call, {state} caches"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=PARTS)
    parser.add_argument("count", nargs="?", type=argtypes.count, help="calls of each kind, lengths, or processes")
    args = parser.parse_args()
    if args.count is not None:
        print(json.dumps(PARTS[args.part][0](args.count)))
        return
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {"environment": {}}
    for part in [args.part] if args.part else PARTS:
        found[part] = _apart(part)
        found["environment"][part] = table.environment()
        RESULT.write_text(json.dumps(found, indent=1) + "\n")
        print("\n".join(_lines(part, found[part])), flush=True)


if __name__ == "__main__":
    main()
