"""Peak memory of one attention call on the CPU, beyond its inputs, by a process of its own.

    python -m bench.harness.memory tiled forward+backward 4096            prints bytes
    python -m bench.harness.memory naive forward 1024 additive

Linux counts a process's peak, and can be told to count anew; so the peak starts after the inputs are made and after a
small call has loaded the libraries, and what is reported is what the call itself added, outputs included.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

import fused_attn
from bench import ROOT
from bench.harness.clock import directed
from bench.harness.providers import NAIVE, Provider, ours
from bench.harness.samples import Sample, sized
from fused_attn.testing import Case

DIRECTIONS = ("forward", "forward+backward")
SEEN = ("statistics", "map")  # of the weights, instead of a direction: all of the first, some rows of the other
CASE, BATCH, DIM = "alibi_bh", 1, 64  # causal, with ALiBi: torch's own op has no part in it
HEADS = {CASE: 2, "additive": 4}
THREADS = 1  # the peak grows by a tile for each, and its growth with length is what is asked


def _run(provider: Provider, x: Sample, direction: str) -> None:
    if direction not in SEEN:
        directed(direction, provider.bind(x), x.leaves, x.cotangents)()
        return
    q, k, _ = x.inputs.qkv
    words = {name: x.inputs.kwargs[name] for name in ("causal", "alibi_slopes")} | {"backend": provider.name}
    with torch.no_grad():
        if direction == "statistics":
            fused_attn.attention_stats(q, k, key_mass=True, entropy=True, max_logit=True, top_k=8, **words)
        else:
            rows = range(0, q.shape[2], max(1, q.shape[2] // 64))
            fused_attn.attention_map(q, k, rows=rows, heads=[-1], **words)


def problem(case: str, length: int) -> Case:
    return sized(case, BATCH, HEADS[case], length, DIM)


def _sample(case: str, length: int) -> Sample:
    return Sample.draw(problem(case, length), torch.float32, "cpu")


def _status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}")


def measure(name: str, direction: str, length: int, case: str = CASE) -> int:
    """Bytes that one call adds to this process at its peak."""
    provider = NAIVE if name == "naive" else ours(name)
    _run(provider, _sample(case, 64), direction)
    x = _sample(case, length)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    _run(provider, x, direction)
    return _status("VmHWM") - before


def peak(name: str, direction: str, length: int, case: str = CASE) -> int:
    """The same in a fresh process, whose allocator keeps nothing from other calls."""
    command = [sys.executable, "-m", "bench.harness.memory", name, direction, str(length), case]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(THREADS)}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    name, direction, length, case = (*sys.argv[1:], CASE)[:4]
    if direction not in DIRECTIONS + SEEN:
        raise SystemExit(f"direction: expected one of {DIRECTIONS + SEEN}, got {direction!r}")
    print(measure(name, direction, int(length), case))
