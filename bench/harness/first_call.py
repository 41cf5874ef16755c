"""The first attention call of a fresh process that has imported torch: seconds, without and with Triton's cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

from bench import ROOT

FIGURES = ("clock", "processor", "imports")
DIRECTIONS = ("forward", "forward+backward")
STATES = ("cold", "warm")
SCRIPT = """
import json, os, sys, time, torch
setup, device, dtype, d = sys.argv[1:]

def taken():
    if device == "cuda":
        torch.cuda.synchronize()
    return {"clock": time.perf_counter() - began, "processor": sum(os.times()[:4]) - spent}

q, k, v = (torch.randn(1, 2, 64, int(d), dtype=getattr(torch, dtype), device=device, requires_grad=True)
           for _ in range(3))
(q @ k.mT).sum().item()
began, spent = time.perf_counter(), sum(os.times()[:4])
exec(setup)
import fused_attn
imports = {"imports": taken()["processor"]}
out = fused_attn.attention(q, k, v, causal=True, backend="triton")
forward = taken() | imports
torch.autograd.grad(out.sum(), (q, k, v))
print(json.dumps({"forward": forward, "forward+backward": taken() | imports}))
"""


def measured(setup: str = "", device: str = "cpu", dtype: str = "bfloat16", d: int = 64) -> dict:
    """{state: {direction: {figure: seconds}}}; setup is a statement that runs, timed, before fused_attn is imported.

    cold: Triton's cache is empty. warm: the cold process filled it. clock is elapsed time, processor is CPU time with
    child processes (the assembler), imports the part of it for importing fused_attn and for the setup.
    """
    found = {}
    with tempfile.TemporaryDirectory(prefix="fused_attn_first_") as cache:
        environ = os.environ | {"TRITON_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", SCRIPT, setup, device, dtype, str(d)]
        for state in STATES:
            done = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                raise RuntimeError(f"{state}: {done.stderr[-2000:]}")
            found[state] = json.loads(done.stdout.splitlines()[-1])
    return found
