"""Ours and its peers as uniform callables, and what they cost: milliseconds, TFLOP/s, memory.

A provider binds one sample and is then called without arguments; autograd gives the backward of every one. By the
field's convention the forward of B, H, S, D takes 4 B H S S D floating-point operations, half of them when causal, and
the backward 2.5 times as many.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fused_attn
from fused_attn import tuning

OURS = ("triton", "hopper")
REASON_LENGTH = 400


@dataclass(frozen=True, eq=False)
class Sample:
    """One problem on the device: fresh random q, k, v (B, H, S, D) that want gradients, and a cotangent."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    causal: bool

    @classmethod
    def draw(cls, shape: tuple[int, int, int, int], causal: bool, dtype: torch.dtype, device: str) -> Sample:
        q, k, v, dout = (torch.randn(shape, dtype=dtype, device=device) for _ in range(4))
        return cls(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout, causal)

    def flops(self, direction: str) -> float:
        b, h, s, d = self.q.shape
        return 4.0 * b * h * s * s * d * (0.5 if self.causal else 1.0) * (2.5 if direction == "backward" else 1.0)

    def gradients(self, out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, (self.q, self.k, self.v), self.dout, retain_graph=True)


Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Provider:
    """bind makes the callable of one sample; scope is entered around every call of it and of its backward."""

    name: str
    bind: Callable[[Sample], Call]
    scope: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


@contextlib.contextmanager
def pinned(configs: dict[str, tuning.Config]) -> Iterator[None]:
    """Run kernels with these configurations, in the backward too.

    On a GPU autograd runs the backward in a thread of its own, which a scope of this thread does not reach.
    """
    with tuning.override(**configs), torch.autograd.set_multithreading_enabled(False):
        yield


def ours(backend: str = "triton", name: str = "", configs: dict[str, tuning.Config] | None = None) -> Provider:
    """The public call; configs pins kernels' configurations."""

    def bind(x: Sample) -> Call:
        return lambda: fused_attn.attention(x.q, x.k, x.v, causal=x.causal, backend=backend)  # type: ignore[return-value]

    return Provider(name or backend, bind, (lambda: pinned(configs)) if configs else contextlib.nullcontext)


def _sdpa(name: str, backend: SDPBackend) -> Provider:
    def bind(x: Sample) -> Call:
        return lambda: F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=x.causal)

    return Provider(name, bind, lambda: sdpa_kernel(backend))


def _naive(x: Sample) -> Call:
    s, scale = x.q.shape[2], x.q.shape[3] ** -0.5
    hidden = torch.ones(s, s, dtype=torch.bool, device=x.q.device).triu(1) if x.causal else None

    def call() -> Tensor:
        scores = x.q @ x.k.mT * scale
        return torch.softmax(scores if hidden is None else scores.masked_fill(hidden, -torch.inf), -1) @ x.v

    return call


def _flex(x: Sample) -> Call:
    if x.q.device.type == "cpu":
        raise NotImplementedError("compiled FlexAttention has no backward on the CPU")
    from torch._functorch import config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    config.donated_buffer = False  # donated buffers forbid the retain_graph with which the backward is timed
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    s = x.q.shape[2]
    block_mask = create_block_mask(_earlier, None, None, s, s, device=x.q.device) if x.causal else None
    return lambda: compiled(x.q, x.k, x.v, block_mask=block_mask)


def _earlier(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


PROVIDERS = (
    *(ours(name) for name in OURS),
    _sdpa("cudnn", SDPBackend.CUDNN_ATTENTION),
    _sdpa("flash", SDPBackend.FLASH_ATTENTION),
    _sdpa("efficient", SDPBackend.EFFICIENT_ATTENTION),
    _sdpa("math", SDPBackend.MATH),
    Provider("flex", _flex),
    Provider("naive", _naive),
)
COMPILED = tuple(x for x in PROVIDERS if x.name in (*OURS, "flex"))
DIRECTIONS = ("forward", "backward")


# ------------------------------------------------------------------------------------------------------- measuring


def milliseconds(call: Callable[[], Any], device: str) -> float:
    """The median of one round: by device events with a cold L2 cache, or by the wall clock on the CPU."""
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(call, warmup=5, rep=20, return_mode="median")
    times = []
    for _ in range(3):
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def peak_bytes(call: Callable[[], Any], device: str) -> tuple[Any, int | None]:
    """What a call returns, and the bytes it held at most beyond what stood before it and what it returns."""
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
    """Why a provider cannot run: torch tells half of it as warnings."""
    words = [f"{type(error).__name__}: {error}", *(str(w.message) for w in noticed)]
    return " | ".join(" ".join(x.split()) for x in words)[:REASON_LENGTH]


def start(provider: Provider, x: Sample, device: str) -> tuple[Call | None, dict[str, Any]]:
    """Run a provider's forward and backward once. (its callable or None, peak memory or a reason by direction)."""
    found: dict[str, Any] = {}
    call, direction = None, "forward"
    with warnings.catch_warnings(record=True) as noticed, provider.scope():
        warnings.simplefilter("always")
        try:
            call = provider.bind(x)
            out, peak = peak_bytes(call, device)
            found["forward"] = {"peak_bytes": peak}
            direction = "backward"
            found["backward"] = {"peak_bytes": peak_bytes(lambda: x.gradients(out), device)[1]}
        except Exception as error:
            found[direction] = {"refused": reason(error, noticed)}
            found.setdefault("backward", found[direction])
    return (call if "refused" not in found["forward"] else None), found


def compare(
    providers: list[Provider], x: Sample, device: str, rounds: int, directions: tuple[str, ...], matmul: int
) -> dict[str, Any]:
    """Every provider's milliseconds on one sample, all rounds interleaved, and the matmul beside them."""
    a, b = (torch.randn(matmul, matmul, dtype=x.q.dtype, device=device) for _ in range(2))
    ceiling: list[float] = []
    found, calls = {}, {}
    for provider in providers:
        call, found[provider.name] = start(provider, x, device)
        release(device)
        if call is not None:
            calls[provider] = call
    for direction in directions:
        for _ in range(rounds):
            ceiling.append(milliseconds(lambda: a @ b, device))
            for provider, call in calls.items():
                entry = found[provider.name][direction]
                if "refused" not in entry:
                    one_round(provider, call, x, device, direction, entry)
                    release(device)
    for entry in (found[name][direction] for name in found for direction in directions):
        if "samples_ms" in entry:
            entry["ms"] = statistics.median(entry["samples_ms"])
    top = 2e-9 * matmul**3 / statistics.median(ceiling)
    for name, direction in ((n, d) for n in found for d in directions if "ms" in found[n][d]):
        tflops = 1e-9 * x.flops(direction) / found[name][direction]["ms"]
        found[name][direction] |= {"tflops": tflops, "of_matmul": tflops / top}
    return {"providers": found, "matmul_tflops": top, "matmul_samples_ms": ceiling}


def one_round(provider: Provider, call: Call, x: Sample, device: str, direction: str, entry: dict[str, Any]) -> None:
    """One more sample for an entry. The graph of one provider may hold the whole score matrix, so it is not kept."""
    try:
        with provider.scope():
            if direction == "forward":
                took = milliseconds(call, device)
            else:
                out = call()
                took = milliseconds(lambda: x.gradients(out), device)
        entry.setdefault("samples_ms", []).append(took)
    except torch.OutOfMemoryError as error:
        entry["refused"] = reason(error, [])


def release(device: str) -> None:
    """Give cached memory back, so that no provider is refused for what another one held."""
    if device == "cuda":
        torch.cuda.empty_cache()
