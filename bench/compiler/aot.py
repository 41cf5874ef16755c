"""Ahead-of-time compilation without a GPU, through the package's own launch path.

A stub driver names the target, CPU tensors stand in for GPU tensors, and a launch compiles the kernel instead of
running it. Argument binding, specialisation and options are therefore those of a real call. Interpreted and compiled
kernels cannot share a process: `python -m bench.compiler.aot` is a worker that reads one request per line from stdin
and answers with one line; `Pool` runs several of them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from bench import ROOT
from bench.compiler.device_model import DEVICES, Device, clocks
from bench.compiler.machine_code import Listing


def triton_version(path: Path | None = None) -> str:
    """The version of the triton in `path`; by default of the one that this process would import."""
    if path is None:
        spec = importlib.util.find_spec("triton")
        if spec is None or spec.origin is None:
            raise RuntimeError("triton is not installed")
        path = Path(spec.origin).parent.parent
    text = (path / "triton" / "__init__.py").read_text()
    return re.search(r"__version__ = ['\"]([^'\"]+)['\"]", text)[1]


class Compiler:
    """Runs in a worker: triton with a stub driver for any target, whose launches only compile."""

    def __init__(self) -> None:
        import torch
        from triton import knobs
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver

        from fused_attn.backends.triton import hopper, launcher, settings

        knobs.nvidia.dump_ptxas_log = True
        compiler = self
        numbers = {arch: i for i, arch in enumerate(DEVICES)}

        class Driver:
            """One device number per target: a JITFunction caches one binder per device."""

            def get_current_device(self) -> int:
                return numbers[compiler.arch]

            def get_current_stream(self, device: int) -> int:
                return 0

            def get_current_target(self) -> GPUTarget:
                arch = compiler.arch
                return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)

            def get_active_torch_device(self) -> torch.device:
                return torch.device("cpu")

        driver.set_active(Driver())
        launcher.launch = self._warmup
        settings.architecture = lambda device: self.arch
        hopper._multiprocessors = lambda device: 132
        self.arch = "sm_90"
        self.wanted: frozenset[str] | None = None
        self.consumers: dict[str, int] = {}
        self.compiled: list[dict[str, Any]] = []

    def _warmup(self, kernel: Any, grid: int, *args: Any, **options: Any) -> None:
        name = kernel_name(kernel.fn)
        if self.wanted is not None and name not in self.wanted:
            return
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            compiled = kernel.warmup(*args, grid=(grid,), **options)
        # For a kernel from the process's cache ptxas does not run, so the first log is kept.
        compiled.log = log.getvalue() or getattr(compiled, "log", "")
        consumers = self.consumers.get(name, 1)
        multiplying, paired = consumers * options["num_warps"], any(_pairs(x) for x in args)
        self.compiled.append(figures(name, compiled, DEVICES[self.arch], consumers, multiplying, paired))

    def compile(
        self,
        arch: str,
        launch: Callable[[], Any],
        wanted: Iterable[str] | None = None,
        consumers: dict[str, int] | None = None,
    ) -> list[dict[str, Any]]:
        """Compile every kernel that `launch` launches for a target, and return the figures of each.

        wanted: names of the kernels to compile, default all. consumers: by kernel, the number of consumer warp groups.
        """
        self.arch, self.wanted, self.compiled = arch, None if wanted is None else frozenset(wanted), []
        self.consumers = consumers or {}
        launch()
        return self.compiled


def _pairs(x: Any) -> bool:
    """True for the parameters of an additive score that shares one reciprocal between two features."""
    additive = getattr(x, "additive", None)
    return additive is not None and bool(additive.pairs.value)


def kernel_name(function: Any) -> str:
    return function.__name__.removesuffix("_kernel")


def figures(
    name: str, kernel: Any, device: Device, consumers: int, multiplying: int, paired: bool = False
) -> dict[str, Any]:
    """Resources and loop figures of one compiled kernel.

    consumers: warp-specialised partitions, each with its own sweep. multiplying: the number of warps in all of them.
    paired: an additive score shares one reciprocal between two features.
    """
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    columns = getattr(kernel.metadata, "tmem_size", None) or 0
    if device.amd:
        text = kernel.asm["amdgcn"]

        def note(key: str) -> int:
            return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])

        listing = Listing.gcn(text)
        registers, stack = note("vgpr_count"), note("private_segment_fixed_size")
        spills = 4 * note("vgpr_spill_count")
    else:
        listing = Listing.sass(disassemble(kernel.asm["cubin"]))
        registers = int(re.search(r"Used (\d+) registers", kernel.log)[1])
        stack = int(re.search(r"(\d+) bytes stack frame", kernel.log)[1])
        spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", kernel.log)))
    loads = [x.load_bytes for loop in listing.product_loops for x in loop.body if x.load_bytes]
    full = listing.full_sweeps(consumers)
    found = {
        "kernel": name,
        "warps": warps,
        "registers": registers,
        "shared": shared,
        "spills": spills,
        "stack": stack,
        "local": listing.local,
        "local_in_loops": listing.local_in_loops,
        "loads": len(loads),
        "wide_loads": sum(x == 16 for x in loads),
        "bulk_loads": sum(x.op.startswith("UTMALDG") for x in listing.instructions),
        "load_bytes": round(sum(loads) / len(loads), 1) if loads else None,
        "programs": device.occupancy(registers, shared, warps, columns),
        "wgmma": sum(x.op.startswith("HGMMA") for loop in listing.product_loops for x in loop.body),
        "serialised": ",".join(sorted(set(re.findall(r"\((C75\d\d)\)", kernel.log)))) if not device.amd else "",
    }
    if full:
        sweep = full[-1]
        hidden = min(x.hidden for x in full)
        trip = clocks(sweep, device, multiplying)
        found |= {
            "sweeps": len(listing.product_loops),
            "instructions": len(sweep.body),
            "hidden": round(hidden, 3),
            "tensor_clocks": round(trip.tensor, 1),
            "mufu_clocks": round(trip.mufu, 1),
            "issue_clocks": round(trip.issue, 1),
            "bytes_per_instruction": round(device.lanes * sum(x.load_bytes for x in sweep.body) / len(sweep.body), 1),
            "tensor_share": round(trip.tensor / trip.trip(hidden, found["programs"]), 3),
        }
    if not device.amd and (features := feature_figures(listing, device, warps, paired)):
        found |= features
    return found


def feature_figures(listing: Listing, device: Device, warps: int, paired: bool) -> dict[str, Any]:
    """Cost of one feature of one additive score, summed over the feature loops: special-function and issue slots, and
    the share of the modelled time in which the special function unit is the limit."""
    loops = listing.feature_loops(paired)
    if not loops:
        return {}
    special, issue, held, total = 0.0, 0.0, 0.0, 0.0
    for loop in loops:
        functions = sum(x.op.startswith("MUFU") for x in loop.body)
        tanhs = 2 * functions if paired else functions / 2
        trip = clocks(loop, device, warps)
        special, issue = special + functions / tanhs, issue + len(loop.body) / tanhs
        held, total = held + trip.mufu / tanhs, total + max(trip.mufu, trip.issue) / tanhs
    return {
        "feature_special": round(special, 2), "feature_issue": round(issue, 2), "feature_share": round(held / total, 3),
    }  # fmt: skip


def disassemble(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def serve() -> None:
    """Answer requests {"target", "case", "kernels", "configs"} until stdin ends."""
    # Compilers print to stdout too: it becomes stderr, and answers use a copy of the original.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from bench.compiler.cases import Case

    compiler = Compiler()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            case, configs = Case(**request["case"]), request.get("configs", {})
            found = compiler.compile(
                request["target"],
                case.launcher(configs),
                request.get("kernels"),
                case.consumers(request["target"], configs),
            )
            answer: dict[str, Any] = {"kernels": found}
        except Exception as error:
            # The outermost error only names the call; its cause names the fault.
            chain = [error]
            while chain[-1].__cause__ is not None:
                chain.append(chain[-1].__cause__)
            answer = {"error": " <- ".join(f"{type(x).__name__}: {str(x)[-300:]}" for x in reversed(chain))}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class Pool:
    """Worker processes. path: a directory with another triton, put first on their PYTHONPATH."""

    def __init__(self, workers: int = 2, path: Path | None = None):
        self.workers, self.path = workers, path
        self._scratch = tempfile.TemporaryDirectory(prefix="fused_attn_aot_")

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: Any) -> None:
        self._scratch.cleanup()

    def _start(self, i: int) -> subprocess.Popen:
        paths = [str(x) for x in (self.path, ROOT, os.environ.get("PYTHONPATH")) if x]
        environ = os.environ | {
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": os.path.join(self._scratch.name, str(i)),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(paths),
        }
        # A fresh cache, because a kernel read from a cache has no assembler log.
        with open(os.path.join(self._scratch.name, f"{i}.log"), "a") as errors:
            return subprocess.Popen(
                [sys.executable, "-m", "bench.compiler.aot"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env=environ,
            )  # fmt: skip

    @staticmethod
    def _stop(process: subprocess.Popen) -> int:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        return process.wait()

    def map(self, requests: Iterable[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (index, answer) as workers finish. If a request kills its worker, the answer holds the end of its
        log."""
        waiting: queue.Queue = queue.Queue()
        for item in enumerate(requests):
            waiting.put(item)
        total, done = waiting.qsize(), queue.Queue()

        def work(i: int) -> None:
            process = None
            while True:
                try:
                    index, request = waiting.get_nowait()
                except queue.Empty:
                    break
                try:
                    process = process or self._start(i)
                    process.stdin.write(json.dumps(request) + "\n")
                    process.stdin.flush()
                    answer = json.loads(process.stdout.readline())
                except (OSError, ValueError):
                    code = self._stop(process) if process else None
                    log = Path(self._scratch.name, f"{i}.log").read_text().strip().splitlines()
                    answer, process = {"error": f"the worker ended with {code}: " + " | ".join(log[-3:])}, None
                done.put((index, answer))
            if process:
                self._stop(process)

        threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(min(self.workers, total))]
        for thread in threads:
            thread.start()
        for _ in range(total):
            yield done.get()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    serve()
