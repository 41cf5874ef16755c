"""Tuning tables without a GPU: compile candidate tiles, keep what passes the gates, take the fewest modelled clocks.

    python -m bench.tune                          every architecture, kernel and head dim
    python -m bench.tune --only sm_90/forward     those whose name, architecture/kernel/class/D[/rich], holds the word
    python -m bench.tune --show                   print the candidates of each row, best first

The choice is a model's (bench/device_model.py), so each row says "validated": false and "result": null until a GPU
has timed it; a row that a GPU has validated is left alone. Candidates start from published tiles (FlashAttention 2
and 3, FlexAttention) and their smaller neighbours. A rich row, where modifiers share the registers, takes the plain
row's tile where that passes the gates with a dense bias, and the best smaller one where it does not.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from bench import static
from bench.aot import ROOT, Pool, triton_version
from bench.cases import Case
from bench.device_model import DEVICES, Clocks
from fused_attn.tuning import Config, key

TABLES = ROOT / "fused_attn" / "tuning" / "tables"
CLASSES = {"half": ("bf16", torch.bfloat16), "single": ("fp32", torch.float32)}
KERNELS = ("forward", "dkdv", "dq", "dbias")
DIMS = (16, 32, 64, 128, 256, 512)
# BLOCK_M, BLOCK_N, warps. A forward or dq program owns BLOCK_M rows and sweeps over keys; dkdv and dbias the reverse.
FORWARD = {
    64: ((128, 128, 8), (128, 64, 8), (128, 64, 4), (64, 64, 4), (128, 32, 4)),
    128: ((128, 128, 8), (128, 64, 8), (128, 32, 8), (64, 64, 4), (64, 32, 4), (128, 32, 4)),
    256: ((128, 64, 8), (128, 32, 8), (64, 64, 8), (64, 32, 8), (64, 32, 4), (64, 16, 4)),
    512: ((64, 32, 8), (64, 16, 8), (32, 32, 8), (32, 16, 8), (16, 16, 8), (16, 16, 4)),
}
DKDV = {
    64: ((64, 128, 8), (64, 64, 4), (32, 128, 8), (32, 128, 4), (32, 64, 4), (32, 64, 8)),
    128: ((64, 128, 8), (32, 128, 8), (64, 64, 8), (32, 64, 8), (64, 64, 4), (32, 64, 4), (16, 64, 4), (32, 32, 4)),
    256: ((64, 64, 8), (32, 64, 8), (16, 64, 8), (32, 32, 8), (16, 32, 8), (16, 32, 4), (16, 16, 4)),
    512: ((16, 64, 8), (32, 32, 8), (16, 32, 8), (16, 16, 8), (16, 16, 4)),
}
DQ = {
    64: ((128, 64, 8), (128, 128, 8), (64, 64, 4), (128, 32, 4), (64, 32, 4)),
    128: ((128, 64, 8), (64, 64, 8), (64, 64, 4), (128, 32, 8), (64, 32, 4), (32, 32, 4)),
    256: ((64, 64, 8), (64, 32, 8), (64, 16, 8), (32, 32, 8), (32, 32, 4), (32, 16, 4)),
    512: ((32, 32, 8), (64, 16, 8), (32, 16, 8), (16, 16, 8), (16, 16, 4)),
}
DBIAS = {64: ((64, 64, 4), (64, 64, 8), (64, 32, 4), (32, 32, 4))}
SINGLE = (
    (64, 64, 8),
    (64, 32, 8),
    (64, 32, 4),
    (32, 64, 8),
    (32, 32, 8),
    (32, 32, 4),
    (32, 16, 4),
    (16, 32, 4),
    (16, 16, 4),
)
L2_BYTES_PER_CLOCK = 32  # that one multiprocessor draws from the L2 cache when all of them do


@dataclass
class Choice:
    """One row of a table: what is tried for it, and how each candidate came out."""

    arch: str
    kernel: str
    kind: str
    d: int
    rich: bool
    tried: list[tuple[Config, dict[str, Any]]] = field(default_factory=list)

    @property
    def key(self) -> str:
        return key(self.kernel, CLASSES[self.kind][1], self.d, self.d, self.rich)

    @property
    def name(self) -> str:
        return f"{self.arch}/{self.key}"

    def case(self) -> Case:
        feature = "bias_batch" if self.kernel == "dbias" else "bias" if self.rich else "plain"
        return Case("forward" if self.kernel == "forward" else "backward", CLASSES[self.kind][0], self.d, feature)

    def candidates(self, plain: dict[str, Any] | None) -> list[Config]:
        """Tiles to compile. plain: the row that was chosen without modifiers."""
        device = DEVICES[self.arch]
        if self.kind == "single":
            tiles: Any = SINGLE
        else:
            sizes = {"forward": FORWARD, "dkdv": DKDV, "dq": DQ, "dbias": DBIAS}[self.kernel]
            tiles = sizes[min((x for x in sizes if x >= self.d), default=max(sizes))]
        # Products of mma.sync wait where they are issued; only wgmma is worth ordering around.
        overlaps = (False, True) if self.arch == "sm_90" and self.kind == "half" else (False,)
        found = []
        for m, n, warps in tiles:
            for overlap in overlaps:
                most = self._stages(m, n, device.shared_per_program)
                # Where the assembler decides what to hide behind a product, its choice may turn on any detail.
                for stages in range(2 if overlap and most > 2 else most, most + 1):
                    found.append(Config(m, n, warps, stages, overlap))
        if plain is not None:
            first = Config.from_row(plain)
            most = first.BLOCK_M * first.BLOCK_N
            smaller = [x for x in found if most >= x.BLOCK_M * x.BLOCK_N and x != first]
            found = [first, *smaller]
        return found

    def _stages(self, m: int, n: int, shared: int) -> int:
        """As many as fit beside the tile that a program owns, at most 3, and 2 on AMD, which keeps one in registers."""
        size = 2 if self.kind == "half" else 4
        own, swept = (m, n) if self.kernel in ("forward", "dq") else (n, m)
        tensors = 2 if self.kernel != "forward" else 1
        owned = tensors * own * self.d * size
        stage = 2 * swept * self.d * size
        scores = own * swept * size if self.kernel in ("dkdv", "dbias") else 0
        most = 3 if self.kernel == "forward" and not self.arch.startswith("gfx") else 2
        for stages in range(most, 0, -1):
            kept = stages - 1 if self.arch.startswith("gfx") else stages
            if owned * (0 if self.arch.startswith("gfx") else 1) + max(kept, 1) * stage + scores <= shared:
                return stages
        return 1


def modelled(choice: Choice, config: Config, figures: dict[str, Any]) -> float:
    """Clocks of a multiprocessor per score of the tile; infinite for what breaks a gate or cannot run."""
    if not figures.get("programs") or figures.get("tensor_clocks") is None:
        return float("inf")
    device = DEVICES[choice.arch]
    if figures["local_in_loops"] and not device.amd:
        return float("inf") if choice.kind == "half" and choice.d <= 256 else 1e6 * figures["local_in_loops"]
    products = {"forward": 2, "dkdv": 4, "dq": 3, "dbias": 2}[choice.kernel]
    area = config.BLOCK_M * config.BLOCK_N
    rate = device.fma_per_clock if choice.kind == "half" else 128
    tensor = products * area * choice.d / rate
    if choice.arch == "sm_90" and choice.kind == "half":
        tensor = max(tensor, figures["tensor_clocks"])
    trip = Clocks(tensor, figures["mufu_clocks"], figures["issue_clocks"]).trip(
        figures["hidden"] if choice.arch == "sm_90" else 0.0, figures["programs"]
    )
    swept = config.BLOCK_N if choice.kernel in ("forward", "dq") else config.BLOCK_M
    fetch = 2 * swept * choice.d * (2 if choice.kind == "half" else 4) / L2_BYTES_PER_CLOCK
    spilled = 8.0 * figures["local_in_loops"] * figures["warps"]
    # Fewer than eight warps cannot hide the latency of memory and of mma.sync.
    lonely = 1.0 if figures["programs"] * figures["warps"] >= 8 else 1.3
    return (max(trip, fetch) * lonely + spilled) / area


def broken(choice: Choice, config: Config, figures: dict[str, Any]) -> list[str]:
    identity = {
        "target": choice.arch,
        "dtype": CLASSES[choice.kind][0],
        "d": choice.d,
        "config": static.spell(config),
    }
    return static.gates(identity | figures)


def choose(choices: list[Choice], pool: Pool, plain: dict[str, dict[str, Any]], progress: Any) -> None:
    """Compile the candidates of every choice."""
    sent = []
    for choice in choices:
        for config in choice.candidates(plain.get(choice.name.removesuffix("/rich")) if choice.rich else None):
            request = {"target": choice.arch, "case": asdict(choice.case()), "kernels": [choice.kernel]}
            sent.append((choice, config, request | {"configs": {choice.kernel: config.to_row()}}))
    task = progress.add_task("rich rows" if choices and choices[0].rich else "plain rows", total=len(sent))
    for index, answer in pool.map([x[2] for x in sent]):
        choice, config, _ = sent[index]
        figures = next(iter(answer.get("kernels", ())), {"error": answer.get("error", "not launched")})
        choice.tried.append((config, figures))
        progress.update(task, advance=1)


def best(choice: Choice) -> tuple[Config, dict[str, Any]]:
    """The candidate of fewest clocks among those that break the fewest gates."""

    def rank(item: tuple[Config, dict[str, Any]]) -> tuple[Any, ...]:
        config, figures = item
        if "error" in figures:
            return (99, 0.0, 0)
        return (
            len(broken(choice, config, figures)),
            modelled(choice, config, figures),
            config.BLOCK_M * config.BLOCK_N,
        )

    choice.tried.sort(key=rank)
    return choice.tried[0]


def rows_to_make(only: str) -> list[Choice]:
    found = []
    for arch in DEVICES:
        for kernel in KERNELS:
            for kind in CLASSES:
                for d in DIMS:
                    for rich in (False, True):
                        if (kernel == "dbias" and not rich) or (kind == "single" and rich):
                            continue
                        choice = Choice(arch, kernel, kind, d, rich)
                        if only in choice.name:
                            found.append(choice)
    return found


def load(arch: str) -> dict[str, Any]:
    path = TABLES / f"{arch}.json"
    return json.loads(path.read_text()) if path.exists() else {"rows": {}}


def save(arch: str, rows: dict[str, dict[str, Any]]) -> None:
    """One row a line, in the order of kernels, classes and head dims."""
    order = {x.key: i for i, x in enumerate(rows_to_make(f"{arch}/"))}
    lines = [
        f"  {json.dumps(name)}: {json.dumps(rows[name])}"
        for name in sorted(rows, key=lambda x: order.get(x, len(order)))
    ]
    head = f'{{"architecture": "{arch}", "chosen_by": "python -m bench.tune, triton {static.TRITON}", "rows": {{\n'
    (TABLES / f"{arch}.json").write_text(head + ",\n".join(lines) + "\n}}\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", metavar="WORD", help="rows whose architecture/kernel/class/D holds WORD")
    parser.add_argument("--show", action="store_true", help="print every candidate, best first")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    if (version := triton_version()) != static.TRITON:
        raise SystemExit(f"the tables are made with triton {static.TRITON}; this is {version}")
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    tables = {arch: load(arch)["rows"] for arch in DEVICES}
    validated = {f"{arch}/{name}" for arch in tables for name, row in tables[arch].items() if row.get("validated")}
    choices = [x for x in rows_to_make(args.only) if x.name not in validated]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress, Pool(args.workers) as pool:
        for rich in (False, True):
            plain = {f"{arch}/{name}": row for arch in tables for name, row in tables[arch].items()}
            some = [x for x in choices if x.rich is rich]
            choose(some, pool, plain, progress)
            for choice in some:
                config, figures = best(choice)
                if "error" in figures:
                    raise SystemExit(f"{choice.name}: no candidate compiles: {figures['error']}")
                tables[choice.arch][choice.key] = config.to_row() | {"validated": False, "result": None}
            for arch in {x.arch for x in some}:
                save(arch, tables[arch])
    for choice in choices:
        problems = broken(choice, *choice.tried[0])
        if args.show or problems:
            print(choice.name, "; ".join(problems))
        if args.show:
            for config, x in choice.tried:
                clocks = modelled(choice, config, x) if "error" not in x else float("nan")
                print(
                    f"    {static.spell(config):24s} {1e3 * clocks:8.2f} ",
                    {k: x[k] for k in SHOWN if k in x},
                    x.get("error", ""),
                )
    return 0


SHOWN = ("registers", "shared", "stack", "local_in_loops", "programs", "wgmma", "serialised", "hidden", "instructions")

if __name__ == "__main__":
    sys.exit(main())
