"""What this machine can run: `python -m fused_attn [--json] [--device cpu]`.

Names the device and the versions; says of each backend whether it runs here, and if not, why; holds every backend that
runs to the tolerance rule, forward and through every gradient; times a call against torch's. Exits with 1 if a backend
gave a wrong answer.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.benchmark

import fused_attn
from fused_attn import testing


def machine(device: torch.device) -> dict[str, Any]:
    """The device, and the versions of what stands beneath."""
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "fused_attn": fused_attn.__version__,
        "torch": torch.__version__,
    }
    try:
        versions["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        versions["triton"] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability {capability}"
    else:
        name = f"{platform.machine()} {platform.system()}, {torch.get_num_threads()} threads"
    return {"device": str(device), "name": name, "versions": versions}


def backends(device: torch.device) -> dict[str, list[str]]:
    """Why each backend cannot run a plain call in single precision here, when asked by name; empty where it can."""
    x = torch.zeros(1, 2, 16, 16, device=device)
    return {name: fused_attn.explain(x, x, x, backend=name).reasons.get(name, []) for name in fused_attn.BACKENDS}


def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """What parity is checked in. Half precision is slow on a CPU, and wrong in Triton's interpreter (triton 11584)."""
    return (torch.float32, torch.float16, torch.bfloat16) if device.type == "cuda" else (torch.float32,)


def parity(backend: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Every core case that the backend takes, forward and gradients; share is the largest part of a budget used."""
    checked, refused, failures, share = 0, 0, [], 0.0
    for case in testing.CASES.values():
        if "core" not in case.tags or dtype not in case.dtypes:
            continue
        if testing.why_not(case, backend, dtype, device):
            refused += 1
            continue
        try:
            result = testing.check_parity(case, backend, dtype, device)
            share = max([share, *(row.share for row in result.rows.values())])
            checked += 1
        except Exception as failure:  # a crash is a failed case, and the others are still worth knowing
            failures.append(f"{case.name}: {type(failure).__name__}: {failure}")
    name = str(dtype).removeprefix("torch.")
    return {
        "backend": backend, "dtype": name, "passed": checked, "refused": refused, "share": share, "failures": failures,
    }  # fmt: skip


def timing(device: torch.device) -> dict[str, Any]:
    """Milliseconds of a causal call, forward and with its backward, by ours and by torch's."""
    shape, dtype = ((4, 16, 4096, 64), torch.bfloat16) if device.type == "cuda" else ((1, 8, 1024, 64), torch.float32)
    q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
    dout = torch.randn_like(q)

    def milliseconds(call: Callable[[], Any]) -> float:
        return 1e3 * torch.utils.benchmark.Timer("call()", globals={"call": call}).blocked_autorange().median

    def ours() -> torch.Tensor:
        return fused_attn.scaled_dot_product_attention(q, k, v, is_causal=True)

    def torchs() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def backward(call: Callable[[], torch.Tensor]) -> None:
        torch.autograd.grad(call(), (q, k, v), dout)

    figures: dict[str, Any] = {}
    for name, call in (("fused_attn", ours), ("torch", torchs)):
        with torch.no_grad():
            figures[name] = {"forward": milliseconds(call)}
        figures[name]["forward and backward"] = milliseconds(functools.partial(backward, call))
    chosen = fused_attn.explain(q, k, v, causal=True)
    return {
        "shape": shape, "dtype": str(dtype).removeprefix("torch."), "backend": chosen.backend, "milliseconds": figures,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_attn", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    options = parser.parse_args()
    device = torch.device(options.device)
    if os.environ.pop("FUSED_ATTN_BACKEND", None) is not None:
        print("FUSED_ATTN_BACKEND is left aside here: every backend is asked by name.", file=sys.stderr)

    # The interpreter computes with numpy, which warns of what a kernel then selects away, as -inf minus -inf.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")

    def say(*lines: str) -> None:
        if not options.json:
            print(*lines, sep="\n", flush=True)

    report: dict[str, Any] = {"machine": machine(device), "backends": backends(device), "parity": []}
    versions = ", ".join(f"{name} {version or 'absent'}" for name, version in report["machine"]["versions"].items())
    say(f"{report['machine']['device']}: {report['machine']['name']}", versions, "", "Backends, in the order tried:")
    for name, reasons in report["backends"].items():
        say(f"  {name:10} " + ("; ".join(reasons) if reasons else "runs here"))

    say("", "Parity with float64, forward and every gradient:")
    for name, reasons in report["backends"].items():
        for dtype in () if reasons else dtypes(device):
            row = parity(name, dtype, device)
            report["parity"].append(row)
            say(
                f"  {name:10} {row['dtype']:9} {row['passed']:3} passed, {row['refused']:2} not supported here, "
                f"{len(row['failures'])} failed; largest error {row['share']:.0%} of the tolerance",
                *(f"    {failure}" for failure in row["failures"]),
            )

    report["timing"] = figures = timing(device)
    say("", f"Milliseconds, causal, (B, H, S, D) = {figures['shape']}, {figures['dtype']}:")
    for name, row in figures["milliseconds"].items():
        label = f"{name} ({figures['backend']})" if name == "fused_attn" else f"{name} F.sdpa"
        say(f"  {label:20} " + ", ".join(f"{what} {figure:.3f}" for what, figure in row.items()))

    report["ok"] = not any(row["failures"] for row in report["parity"])
    say("", "Every backend that runs here is right." if report["ok"] else "A BACKEND IS WRONG; see above.")
    if options.json:
        print(json.dumps(report, indent=1))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
