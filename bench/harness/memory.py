"""Peak memory of one attention call on a CPU beyond its inputs, measured in a separate process.

    python -m bench.harness.memory tiled forward+backward 4096            prints bytes
    python -m bench.harness.memory naive forward 1024 additive

Linux counts the peak of a process and can reset it. The peak is reset after the inputs exist and a small call has
loaded the libraries; the result is the memory that the call itself added, including its outputs.
"""

from __future__ import annotations

import argparse
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
SEEN = ("statistics", "map")  # instead of a direction: attention_stats, or attention_map of some rows
CASE, BATCH, DIM = "alibi_bh", 1, 64  # causal with ALiBi, which SDPA does not compute
HEADS = {CASE: 2, "additive": 4}
THREADS = 1  # each thread adds a tile; only the growth with length is of interest


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
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}")


def measure(name: str, direction: str, length: int, case: str = CASE) -> int:
    """Bytes that one call adds to the peak memory of this process."""
    provider = NAIVE if name == "naive" else ours(name)
    _run(provider, _sample(case, 64), direction)
    x = _sample(case, length)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _status("VmRSS")
    _run(provider, x, direction)
    return _status("VmHWM") - before


def peak(name: str, direction: str, length: int, case: str = CASE) -> int:
    """The same in a fresh process, without memory cached from other calls."""
    command = [sys.executable, "-m", "bench.harness.memory", name, direction, str(length), case]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(THREADS)}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.harness.memory", description=__doc__.split("\n\n")[0])
    parser.add_argument("provider")
    parser.add_argument("direction", choices=DIRECTIONS + SEEN)
    parser.add_argument("length", type=int)
    parser.add_argument("case", choices=HEADS, default=CASE, nargs="?")
    print(measure(*vars(parser.parse_args()).values()))
