"""Self-check: `python -m fused_attn [--json] [--device cpu]`.

Prints the device and the versions, which backends run and why others do not, a comparison of the output and every
gradient of each backend with float64, and the time of a call beside torch's. Exits with 1 if a backend is wrong.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.benchmark

import fused_attn
from fused_attn import testing

ROUNDS = 5  # of the timing


def machine(device: torch.device) -> dict[str, Any]:
    """The device, and the versions of Python, torch, triton and this package."""
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
    """For each backend, the reasons why it cannot run a plain float32 call on the device; empty if it can."""
    x = torch.zeros(1, 2, 16, 16, device=device)
    return {name: fused_attn.explain(x, x, x, backend=name).reasons.get(name, []) for name in fused_attn.BACKENDS}


def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """The dtypes to check. On a CPU half precision is slow, and wrong in Triton's interpreter (triton issue 11584)."""
    return (torch.float32, torch.float16, torch.bfloat16) if device.type == "cuda" else (torch.float32,)


def parity(backend: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Check the core cases that the backend supports; "share" is the largest error / tolerance."""
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
        except Exception as failure:  # a crash is a failed case; the other cases still run
            failures.append(f"{case.name}: {type(failure).__name__}: {failure}")
    name = str(dtype).removeprefix("torch.")
    return {
        "backend": backend, "dtype": name, "passed": checked, "refused": refused, "share": share, "failures": failures,
    }  # fmt: skip


def timing(device: torch.device) -> dict[str, Any]:
    """Milliseconds of a causal call, forward and forward with backward, by fused_attn and by torch."""
    shape, dtype = ((4, 16, 4096, 64), torch.bfloat16) if device.type == "cuda" else ((1, 8, 1024, 64), torch.float32)
    q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
    dout = torch.randn_like(q)

    def ours() -> torch.Tensor:
        return fused_attn.scaled_dot_product_attention(q, k, v, is_causal=True)

    def torchs() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    @torch.no_grad()
    def forward(call: Callable[[], torch.Tensor]) -> None:
        call()

    def backward(call: Callable[[], torch.Tensor]) -> None:
        torch.autograd.grad(call(), (q, k, v), dout)

    timers = {
        (name, label): torch.utils.benchmark.Timer("task(call)", globals={"task": task, "call": call})
        for name, call in (("fused_attn", ours), ("torch", torchs))
        for label, task in (("forward", forward), ("forward and backward", backward))
    }
    # In turns, so that other processes slow all of them alike.
    rounds = [{name: timer.blocked_autorange().median for name, timer in timers.items()} for _ in range(ROUNDS)]
    figures: dict[str, Any] = {"fused_attn": {}, "torch": {}}
    for name, label in timers:
        figures[name][label] = 1e3 * statistics.median(x[name, label] for x in rounds)
    chosen = fused_attn.explain(q, k, v, causal=True)
    return {
        "shape": shape, "dtype": str(dtype).removeprefix("torch."), "backend": chosen.backend, "milliseconds": figures,
    }  # fmt: skip


def _device(text: str) -> torch.device:
    """A device of this machine that holds values."""
    try:
        device = torch.device(text)
        torch.zeros(1, device=device).item()
    except (AssertionError, RuntimeError) as error:
        raise argparse.ArgumentTypeError(f"no such device here, {text!r}: {str(error).splitlines()[0]}") from None
    return device


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_attn", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=_device, default=default, help="default: %(default)s")
    options = parser.parse_args()
    device = options.device
    if os.environ.pop("FUSED_ATTN_BACKEND", None) is not None:
        print("FUSED_ATTN_BACKEND is ignored: every backend is checked.", file=sys.stderr)

    # The interpreter uses numpy, which warns about -inf - -inf even where the kernel discards the result.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")

    def show(*lines: str) -> None:
        if not options.json:
            print(*lines, sep="\n", flush=True)

    report: dict[str, Any] = {"machine": machine(device), "backends": backends(device), "parity": []}
    versions = ", ".join(f"{name} {version or 'absent'}" for name, version in report["machine"]["versions"].items())
    show(f"{report['machine']['device']}: {report['machine']['name']}", versions, "", "Backends, in the order tried:")
    for name, reasons in report["backends"].items():
        show(f"  {name:10} " + ("; ".join(reasons) if reasons else "runs here"))

    show("", "Comparison with float64, output and every gradient:")
    for name, reasons in report["backends"].items():
        for dtype in () if reasons else dtypes(device):
            row = parity(name, dtype, device)
            report["parity"].append(row)
            show(
                f"  {name:10} {row['dtype']:9} {row['passed']:3} passed, {row['refused']:2} not supported here, "
                f"{len(row['failures'])} failed; largest error {row['share']:.0%} of the tolerance",
                *(f"    {failure}" for failure in row["failures"]),
            )

    report["timing"] = figures = timing(device)
    show("", f"Milliseconds, causal, (B, H, S, D) = {figures['shape']}, {figures['dtype']}:")
    for name, row in figures["milliseconds"].items():
        label = f"{name} ({figures['backend']})" if name == "fused_attn" else f"{name} F.sdpa"
        show(f"  {label:20} " + ", ".join(f"{task} {ms:.3f}" for task, ms in row.items()))

    report["ok"] = not any(row["failures"] for row in report["parity"])
    show("", "Every backend that runs here is correct." if report["ok"] else "A BACKEND IS WRONG; see above.")
    if options.json:
        print(json.dumps(report, indent=1))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
