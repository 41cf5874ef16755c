"""Choose tuning-table rows without a GPU: compile candidates, and take the one with the fewest modelled clocks.

    python -m bench.tune                          every architecture, kernel and head dim
    python -m bench.tune --only sm_90/forward     rows whose name contains this, such as sm_90/forward/half/64
    python -m bench.tune --show                   print the candidates of each row, best first

Candidates that exceed a limit of bench.static are dropped. The clocks are modelled (bench/compiler/device_model.py), so
a row has "validated": false and "result": null until a GPU has timed it; validated rows are kept. Candidates are
published tiles (FlashAttention 2 and 3, FlexAttention) and smaller ones. A row with_modifiers takes the tile of the row
without them if that keeps the limits with a dense bias, else the best smaller one.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from bench import ROOT, static
from bench.compiler.aot import Pool, triton_version
from bench.compiler.cases import DIMS, Case
from bench.compiler.device_model import DEVICES, Clocks
from bench.harness import argtypes
from fused_attn.tuning import Config, key

TABLES = ROOT / "fused_attn" / "tuning" / "tables"
CLASSES = {"half": ("bf16", torch.bfloat16), "single": ("fp32", torch.float32)}
KERNELS = ("forward", "dkdv", "dq", "dbias")
# BLOCK_M, BLOCK_N, warps by head dim. A forward or dq program owns BLOCK_M rows and sweeps over keys; dkdv the reverse.
# If rows have at most 64 bytes, the swept tile needs many rows for loads of 16 bytes per thread.
FORWARD = {
    32: ((128, 128, 8), (128, 128, 4), (128, 64, 8), (128, 64, 4), (64, 64, 4)),
    64: ((128, 128, 8), (128, 64, 8), (128, 64, 4), (64, 64, 4)),
    128: ((128, 128, 8), (128, 64, 8), (128, 32, 8), (64, 64, 4), (64, 32, 4)),
    256: ((128, 64, 8), (128, 32, 8), (64, 64, 8), (64, 32, 8), (64, 32, 4)),
    512: ((64, 32, 8), (32, 32, 8), (32, 16, 8), (16, 16, 8)),
}
DKDV = {
    32: ((64, 128, 8), (64, 128, 4), (128, 64, 4), (64, 64, 4), (32, 64, 4)),
    64: ((64, 128, 8), (32, 128, 8), (64, 64, 4), (32, 64, 4)),
    128: ((64, 128, 8), (32, 128, 8), (16, 128, 8), (64, 64, 8), (32, 64, 8), (32, 64, 4), (16, 64, 4)),
    256: ((32, 128, 8), (32, 64, 8), (16, 64, 8), (32, 32, 8), (16, 32, 8)),
    512: ((16, 32, 8), (16, 16, 8)),
}
DQ = {
    32: ((128, 64, 8), (128, 64, 4), (64, 128, 4), (64, 64, 4), (64, 32, 4)),
    64: ((128, 64, 8), (64, 64, 4), (64, 32, 4)),
    128: ((128, 64, 8), (128, 32, 8), (64, 64, 8), (64, 64, 4), (64, 32, 4)),
    256: ((64, 64, 8), (64, 32, 8), (32, 32, 8), (32, 16, 8), (32, 32, 4)),
    512: ((32, 16, 8), (16, 16, 8)),
}
DBIAS = {
    32: ((128, 128, 4), (64, 64, 4), (64, 32, 4)),
    128: ((64, 64, 4), (64, 32, 4)),
    512: ((64, 32, 8), (32, 32, 8), (32, 16, 8), (16, 16, 8)),
}
# In float32 a product takes BLOCK_M * BLOCK_N * D / threads instructions per thread.
SINGLE = {64: ((64, 32, 4), (32, 32, 4)), 128: ((32, 32, 4),), 256: ((32, 16, 4),), 512: ((16, 16, 4),)}
SWEPT = (16, 32, 64, 128, 256)  # half-precision head dims with several candidates
UNPROVEN = {"validated": False, "result": None}  # not timed on a GPU yet
OTHER_WARPS = 0.5  # share of a single program's softmax that overlaps mma.sync products of other warps
L2_BYTES_PER_CLOCK = 32  # per multiprocessor, if all of them load


@dataclass
class Choice:
    """One row of a table, with its candidates and their figures."""

    arch: str
    kernel: str
    kind: str
    d: int
    with_modifiers: bool
    tried: list[tuple[Config, dict[str, Any]]] = field(default_factory=list)

    @property
    def key(self) -> str:
        return key(self.kernel, CLASSES[self.kind][1], self.d, self.d, self.with_modifiers)

    @property
    def name(self) -> str:
        return f"{self.arch}/{self.key}"

    def case(self) -> Case:
        feature = "bias_batch" if self.kernel == "dbias" else "bias" if self.with_modifiers else "plain"
        return Case("forward" if self.kernel == "forward" else "backward", CLASSES[self.kind][0], self.d, feature)

    def candidates(self) -> list[Config]:
        """Configurations to compile, the largest tile first."""
        half = {"forward": FORWARD, "dkdv": DKDV, "dq": DQ, "dbias": DBIAS}[self.kernel]
        sizes = SINGLE if self.kind == "single" else half
        # Only wgmma is asynchronous; reordering gains nothing for mma.sync.
        ahead = self.arch == "sm_90" and self.kind == "half" and self.kernel == "forward"
        found = []
        for m, n, warps in sizes[min(x for x in sizes if x >= self.d)]:
            most = self._stages(m, n, DEVICES[self.arch].shared_per_program)
            found += [Config(m, n, warps, x) for x in sorted({most, 1 if self.d <= 32 else most})]
            if self.kernel == "dkdv" and self.d == 256:
                found.append(replace(found[-1], split=True))
            # The assembler decides what overlaps a product, and small changes can alter it: try all stages.
            for stages in range(min(2, most), most + 1) if ahead else ():
                found += [Config(m, n, warps, stages, overlap=True, descriptors=x) for x in (False, True)]
        return sorted(found, key=lambda x: -x.BLOCK_M * x.BLOCK_N)

    def _stages(self, m: int, n: int, shared: int) -> int:
        """The most stages that fit in shared memory, at most 3; at most 2 on AMD, which keeps one in registers."""
        size = 2 if self.kind == "half" else 4
        own, swept = (m, n) if self.kernel in ("forward", "dq") else (n, m)
        tensors = 2 if self.kernel != "forward" else 1
        owned = tensors * own * self.d * size
        stage = 2 * swept * self.d * size
        scores = own * swept * size if self.kernel in ("dkdv", "dbias") else 0
        if self.kernel == "dbias" and self.d > 64:
            return 1  # it loads four tiles per iteration
        most = 3 if self.kernel == "forward" and not self.arch.startswith("gfx") else 2
        for stages in range(most, 0, -1):
            kept = stages - 1 if self.arch.startswith("gfx") else stages
            if owned * (0 if self.arch.startswith("gfx") else 1) + max(kept, 1) * stage + scores <= shared:
                return stages
        return 1


def modelled(choice: Choice, config: Config, figures: dict[str, Any]) -> float:
    """Modelled clocks per score; infinite if the configuration spills in loops or cannot run."""
    if not figures.get("programs") or figures.get("tensor_clocks") is None:
        return float("inf")
    device = DEVICES[choice.arch]
    if figures["local_in_loops"] and not device.amd:
        return float("inf") if choice.kind == "half" and choice.d <= 256 else 1e6 * figures["local_in_loops"]
    products = {"forward": 2, "dkdv": 4 + config.split, "dq": 3, "dbias": 2}[choice.kernel]
    area = config.BLOCK_M * config.BLOCK_N
    rate = device.fma_per_clock if choice.kind == "half" else 128
    tensor = products * area * choice.d / rate
    if choice.arch == "sm_90" and choice.kind == "half":
        tensor = max(tensor, figures["tensor_clocks"])
    trip = Clocks(tensor, figures["mufu_clocks"], figures["issue_clocks"]).trip(
        figures["hidden"] if choice.arch == "sm_90" else OTHER_WARPS, figures["programs"]
    )
    swept = config.BLOCK_N if choice.kernel in ("forward", "dq") else config.BLOCK_M
    fetch = 2 * swept * choice.d * (2 if choice.kind == "half" else 4) / L2_BYTES_PER_CLOCK
    spilled = 8.0 * figures["local_in_loops"] * figures["warps"]
    # Fewer than eight warps do not hide the latency of memory and mma.sync.
    lonely = 1.0 if figures["programs"] * figures["warps"] >= 8 else 1.3
    return (max(trip, fetch) * lonely + spilled) / area


def broken(choice: Choice, config: Config, figures: dict[str, Any]) -> list[str]:
    identity = {
        "target": choice.arch,
        "dtype": CLASSES[choice.kind][0],
        "d": choice.d,
        "config": str(config),
    }
    return static.gates(identity | figures)


def request(choice: Choice, config: Config) -> dict[str, Any]:
    return {
        "target": choice.arch,
        "case": asdict(choice.case()),
        "kernels": [choice.kernel],
        "configs": {choice.kernel: config.to_row()},
    }


def compile_all(work: list[tuple[Choice, Config]], pool: Pool, advance: Callable[[], None]) -> None:
    for index, answer in pool.map([request(*x) for x in work]):
        choice, config = work[index]
        found = answer.get("kernels") or [{"error": answer.get("error", "not launched")}]
        figures = functools.reduce(static.worst, found)
        choice.tried.append((config, figures))
        advance()


def rank(choice: Choice, config: Config, figures: dict[str, Any]) -> tuple[Any, ...]:
    """Sort key: the number of exceeded limits, then clocks in steps of 2 %, then the larger tile."""
    if "error" in figures:
        return (99, 0.0, 0)
    clocks = modelled(choice, config, figures)
    step = math.floor(math.log(clocks) / 0.02) if math.isfinite(clocks) else clocks
    return (len(broken(choice, config, figures)), step, -config.BLOCK_M * config.BLOCK_N)


def choose_plain(choices: list[Choice], pool: Pool, advance: Callable[[], None]) -> None:
    """Compile every candidate of the plain rows."""
    compile_all([(x, config) for x in choices for config in x.candidates()], pool, advance)


def choose_with_modifiers(
    choices: list[Choice], plain: dict[str, Config], pool: Pool, advance: Callable[[], None]
) -> None:
    """Try the plain row's tile and smaller ones, until one keeps the limits."""
    waiting = {}
    for choice in choices:
        first = plain.get(choice.name.removesuffix("/with_modifiers"))
        all_of_them = [x for x in choice.candidates() if not x.overlap]
        if first is None:
            waiting[choice.name] = all_of_them
            continue
        quiet = replace(first, overlap=False)
        most = first.BLOCK_M * first.BLOCK_N
        smaller = [x for x in all_of_them if most >= x.BLOCK_M * x.BLOCK_N and x != quiet]
        waiting[choice.name] = list(dict.fromkeys([first, quiet, *smaller]))
    while choices := [
        x for x in choices if waiting[x.name] and not (x.tried and any(rank(x, *y)[0] == 0 for y in x.tried))
    ]:
        compile_all([(x, waiting[x.name].pop(0)) for x in choices], pool, advance)


def rows_to_make(only: str = "") -> list[Choice]:
    """Rows of every table; modified scores have separate rows in half precision."""
    variants = [("half", False), ("half", True), ("single", False)]
    found = [
        Choice(arch, kernel, kind, d, with_modifiers)
        for arch in DEVICES for kernel in KERNELS for kind, with_modifiers in variants for d in DIMS
        if kernel != "dbias" or with_modifiers
    ]  # fmt: skip
    return [x for x in found if only in x.name]


def load(arch: str) -> dict[str, Any]:
    path = TABLES / f"{arch}.json"
    return json.loads(path.read_text()) if path.exists() else {"rows": {}}


def save(arch: str, rows: dict[str, dict[str, Any]]) -> None:
    """Write one row per line, ordered by kernel, class and head dim."""
    order = {x.key: i for i, x in enumerate(rows_to_make(f"{arch}/"))}
    lines = [
        f"  {json.dumps(name)}: {json.dumps(rows[name])}"
        for name in sorted(rows, key=lambda x: order.get(x, len(order)))
    ]
    head = f'{{"architecture": "{arch}", "chosen_by": "python -m bench.tune, triton {static.TRITON}", "rows": {{\n'
    (TABLES / f"{arch}.json").write_text(head + ",\n".join(lines) + "\n}}\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--only", default="", metavar="WORD", help="rows whose architecture/kernel/class/D contains WORD"
    )
    parser.add_argument("--show", action="store_true", help="print every candidate, best first")
    parser.add_argument("--workers", type=argtypes.count, default=2)
    args = parser.parse_args()
    if not rows_to_make(args.only):
        parser.error(f"--only: no row contains {args.only!r}")
    if (version := triton_version()) != static.TRITON:
        raise SystemExit(
            f"triton: expected version {static.TRITON}, got {version}. Put {static.TRITON} first on PYTHONPATH."
        )
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    tables = {arch: load(arch)["rows"] for arch in DEVICES}
    validated = {f"{arch}/{name}" for arch in tables for name, row in tables[arch].items() if row.get("validated")}
    choices = [x for x in rows_to_make(args.only) if x.name not in validated]
    swept = [x for x in choices if x.d in SWEPT and x.kind == "half"]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress, Pool(args.workers) as pool:
        plain = [x for x in swept if not x.with_modifiers]
        task = progress.add_task("plain rows", total=sum(len(x.candidates()) for x in plain))
        choose_plain(plain, pool, lambda: progress.advance(task))
        store(plain, tables)
        chosen = {f"{arch}/{name}": Config.from_row(row) for arch in tables for name, row in tables[arch].items()}
        task = progress.add_task("rows with modifiers", total=None)
        with_modifiers = [x for x in swept if x.with_modifiers]
        choose_with_modifiers(with_modifiers, chosen, pool, lambda: progress.advance(task))
        store(with_modifiers, tables)
    for choice in choices:
        if choice not in swept:
            tables[choice.arch][choice.key] = smallest(choice)
    for arch in {x.arch for x in choices}:
        save(arch, tables[arch])
    for choice in swept:
        problems = broken(choice, *choice.tried[0])
        if args.show or problems:
            print(choice.name, "; ".join(problems))
        for config, x in choice.tried if args.show else ():
            clocks = modelled(choice, config, x) if "error" not in x else float("nan")
            shown = x.get("error") or {k: x[k] for k in SHOWN if k in x}
            print(f"    {config!s:24s} {1e3 * clocks:8.2f} ", shown)
    return 0


def store(choices: list[Choice], tables: dict[str, dict[str, Any]]) -> None:
    """Put the best candidate of each row into its table."""
    for choice in choices:
        choice.tried.sort(key=lambda x: rank(choice, *x))
        config, figures = choice.tried[0]
        if "error" in figures:
            raise SystemExit(f"{choice.name}: no candidate compiles: {figures['error']}")
        tables[choice.arch][choice.key] = config.to_row() | UNPROVEN


def smallest(choice: Choice) -> dict[str, Any]:
    """The row for large head dims and float32, which have no limits."""
    return choice.candidates()[-1].to_row() | UNPROVEN


SHOWN = ("registers", "shared", "stack", "local_in_loops", "programs", "wgmma", "serialised", "hidden", "instructions")

if __name__ == "__main__":
    sys.exit(main())
