"""Peak memory of one attention call on the CPU, beyond its inputs, by a process of its own.

    python -m bench.memory tiled backward 4096        prints bytes

Linux counts a process's peak, and can be told to count anew; so the peak starts after the inputs are made and after a
small call has loaded the libraries, and what is reported is what the call itself added, outputs included.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
DIRECTIONS = ("forward", "backward")
BATCH, HEADS, DIM = 1, 2, 64
THREADS = 1  # the peak grows by a tile for each, and its growth with length is what is asked


def naive(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """Causal attention with ALiBi as it is first written, in whole matrices."""
    i = torch.arange(q.shape[2])
    distance = i[:, None] - i
    s = q @ k.mT * q.shape[3] ** -0.5 - slopes[:, None, None] * distance.abs()
    return torch.softmax(s.masked_fill(distance < 0, -torch.inf), -1) @ v


def ours(backend: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    import fused_attn

    def call(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        return fused_attn.attention(q, k, v, causal=True, alibi_slopes=slopes, backend=backend)

    return call


def _inputs(length: int, backward: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    shape = (BATCH, HEADS, length, DIM)
    q, k, v = (torch.randn(shape, generator=generator).requires_grad_(backward) for _ in range(3))
    return [q, k, v, torch.tensor([2.0**-4] * HEADS)]


def _run(call: Callable[..., Tensor], inputs: list[Tensor], backward: bool) -> None:
    out = call(*inputs)
    if backward:
        out.sum().backward()


def _status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}")


def measure(provider: str, direction: str, length: int) -> int:
    """Bytes that one call adds to this process at its peak."""
    call, backward = naive if provider == "naive" else ours(provider), direction == "backward"
    _run(call, _inputs(64, backward), backward)
    inputs = _inputs(length, backward)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    _run(call, inputs, backward)
    return _status("VmHWM") - before


def peak(provider: str, direction: str, length: int) -> int:
    """The same in a fresh process, whose allocator keeps nothing from other calls."""
    command = [sys.executable, "-m", "bench.memory", provider, direction, str(length)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(THREADS)}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    provider, direction, length = sys.argv[1:]
    if direction not in DIRECTIONS:
        raise SystemExit(f"direction: expected one of {DIRECTIONS}, got {direction!r}")
    print(measure(provider, direction, int(length)))
