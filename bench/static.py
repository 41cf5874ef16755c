"""Compile every shipped kernel for every target without a GPU, into a table with limits that each row must keep.

    python -m bench.static                 compile stale rows and write bench/results/static.csv
    python -m bench.static --check         verify hashes and limits of the committed table
    python -m bench.static --only sm_90    restrict either to rows whose name contains the word

A row is one kernel of one case on one target, with its configuration from the tuning tables. Its hash covers the
kernel's source files without comments and docstrings, the configuration, the case and the compiler's version; only rows
with a changed hash are recompiled. Columns:

    registers, stack, spills      per thread; bytes; bytes stored and loaded by register spills
    local, local_in_loops         local memory instructions (spills), anywhere and inside loops
    loads, wide_loads             global loads inside the sweeps, and those of 16 bytes a lane; bulk_loads are TMA's
    programs                      resident programs per multiprocessor
    wgmma, serialised             sm_90: wgmma instructions in sweeps; messages C7511/C7512 of ptxas
    hidden                        sm_90: share of the unmasked sweep's exponentials issued while a product is in flight
    tensor/mufu/issue_clocks      clocks per iteration of the unmasked sweep (bench/compiler/device_model.py)
    tensor_share                  share of the modelled iteration in which the tensor cores are busy
    bytes_per_instruction         loaded by a warp per iteration of the unmasked sweep
    feature_special/issue         additive scores: special functions and instructions per feature of a score
    feature_share                 additive scores: share of the modelled time taken by special functions
"""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from bench import ROOT
from bench.compiler.aot import Pool, triton_version
from bench.compiler.cases import cases
from bench.compiler.device_model import DEVICES
from bench.harness import argtypes
from fused_attn.tuning.select import STATISTICS, padded

TABLE = ROOT / "bench" / "results" / "static.csv"
KERNELS = ROOT / "kernels"
TRITON = "3.6.0"  # version on the reference GPU machine
HIDDEN = ((64, 0.85), (128, 0.95))  # (largest head dim, required share) if one program is resident
HOPPER_HIDDEN = 0.95  # required of warp-specialised kernels
FEATURE_SHARE = {"forward": 0.8, "additive_backward": 0.3}  # required share of special functions in additive scores
COLUMNS = (
    "kernel", "target", "dtype", "d", "feature", "config", "warps", "registers", "shared", "stack", "spills", "local",
    "local_in_loops", "loads", "wide_loads", "bulk_loads", "load_bytes", "programs", "sweeps", "wgmma", "serialised",
    "instructions", "hidden", "tensor_clocks", "mufu_clocks", "issue_clocks", "tensor_share",
    "bytes_per_instruction",
    "feature_special", "feature_issue", "feature_share", "triton", "hash",
)  # fmt: skip


# Freshness


def _stripped(source: str) -> str:
    """The source without comments and docstrings, in one formatting."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                body[0].value = ast.Constant(None)
    return ast.unparse(tree)


def _imported(source: str) -> set[str]:
    """Kernel modules imported by a kernel file."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            inside = node.level > 0 or (node.module or "").startswith("fused_attn.kernels")
            module = (node.module or "").removeprefix("fused_attn.kernels").strip(".")
            if inside:
                found.update([module.split(".")[0]] if module else [x.name for x in node.names])
    return found


@cache
def kernel_files(kernel: str) -> tuple[str, ...]:
    """Stems of the files that define a kernel; several if it has variants by head dim."""
    found = []
    for path in sorted(KERNELS.glob("*.py")):
        names = [x.name for x in ast.parse(path.read_text()).body if isinstance(x, ast.FunctionDef)]
        found += [path.stem] if f"{kernel}_kernel" in names else []
    if not found:
        raise KeyError(f"no file of {KERNELS} defines {kernel!r}")
    return tuple(found)


@cache
def source_hash(stems: tuple[str, ...]) -> str:
    """Hash of kernel files and of all kernel files that they import, directly or not."""
    texts, waiting = {}, list(stems)
    while waiting:
        name = waiting.pop()
        path = KERNELS / f"{name}.py"
        if name not in texts and path.exists():
            source = path.read_text()
            texts[name] = _stripped(source)
            waiting.extend(_imported(source))
    return hashlib.sha256(json.dumps(sorted(texts.items())).encode()).hexdigest()


def row_hash(kernel: str, target: str, case: dict[str, Any], config: str, version: str) -> str:
    parts = [source_hash(kernel_files(kernel)), kernel, target, sorted(case.items()), config, version]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


# Gates


def gated(row: dict[str, Any]) -> bool:
    return row["dtype"] != "fp32" and int(row["d"]) <= 256


def needed_loads(row: dict[str, Any]) -> int:
    """The number of 16-byte loads per thread that the swept tiles need."""
    m, n, warps = map(int, re.match(r"(\d+)x(\d+) w(\d+)", row["config"]).groups())
    swept = {"forward": n, "dq": n, "decode": n, "dkdv": m, "row_statistics": n, "map": n, "key_mass": m}.get(
        row["kernel"], min(m, n)
    )
    tiles = 1 if row["kernel"] in STATISTICS else 2  # statistics read no values
    tile = swept * padded(int(row["d"])) * (4 if row["dtype"] == "fp32" else 2)
    return int(row["sweeps"]) * tiles * -(-tile // (16 * warps * DEVICES[row["target"]].lanes))


def gates(row: dict[str, Any]) -> list[str]:
    """The limits that a row exceeds. Rows of float32 and of head dims above 256 have no limits."""
    if not gated(row):
        return []
    device, found = DEVICES[row["target"]], []

    def number(column: str) -> float:
        return float(row[column] or 0)

    if number("shared") > device.shared_per_program:
        found.append(f"{row['shared']} bytes of shared memory, at most {device.shared_per_program} allowed")
    if not number("programs"):
        found.append("no program fits on a multiprocessor by registers and shared memory")
    # Sweeps of additive scores are bound by their feature loops and have only small products.
    additive = row["feature"].endswith("additive")
    if number("sweeps") and not additive and not number("bulk_loads") and number("wide_loads") < needed_loads(row):
        found.append(f"{row['wide_loads']} loads of 16 bytes in the sweeps, at least {needed_loads(row)} needed")
    if device.amd:
        return found
    # One access per iteration of 2,800 instructions lets a third program fit for ragged additive scores.
    if number("local_in_loops") > (row["feature"] == "ragged_additive"):
        found.append(f"{row['local_in_loops']} accesses to local memory inside loops")
    promised = additive and row["target"] == "sm_90" and int(row["d"]) <= 128
    needed = FEATURE_SHARE.get(row["kernel"], 0.0)
    if promised and number("feature_share") < needed:
        found.append(f"special functions are {number('feature_share'):.0%} of the features' time, {needed:.0%} needed")
    if row["target"] == "sm_90" and number("sweeps") and not additive:
        if not number("wgmma") and int(row["config"].split("x")[0]) >= 64:  # a wgmma takes 64 rows
            found.append("no wgmma in the sweeps")
        if row["serialised"]:
            found.append(f"ptxas serialises wgmma: {row['serialised']}")
        needed = next((share for d, share in HIDDEN if int(row["d"]) <= d), 0.0)
        if row["kernel"].startswith("hopper"):
            needed = HOPPER_HIDDEN
        if number("hidden") < needed and number("programs") < 2:
            found.append(
                f"{number('hidden'):.0%} of the exponentials are hidden, {needed:.0%} needed by a lone program"
            )
    return found


# Required rows


def requests(only: str = "") -> list[dict[str, Any]]:
    """One request per target and case, with its rows without figures by kernel."""
    version, found = TRITON, []
    for target in DEVICES:
        for case in cases(target):
            rows = {}
            for kernel in case.kernels:
                config = case.config(kernel, target)
                identity = {
                    "kernel": kernel, "target": target, "dtype": case.dtype, "d": case.d, "feature": case.feature,
                    "config": str(config),
                }  # fmt: skip
                if only in name(identity):
                    rows[kernel] = identity | {
                        "triton": version,
                        "hash": row_hash(kernel, target, asdict(case), identity["config"], version),
                    }
            if rows:
                found.append({"target": target, "case": asdict(case), "rows": rows})
    return found


def name(row: dict[str, Any]) -> str:
    return "/".join(str(row[x]) for x in ("target", "kernel", "dtype", "d", "feature"))


def read(path: Path = TABLE) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {name(row): row for row in csv.DictReader(file)}


def write(rows: Iterable[dict[str, Any]], path: Path = TABLE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    order = list(DEVICES)
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        out.writeheader()
        key = lambda x: (order.index(x["target"]), x["kernel"], x["dtype"], int(x["d"]), x["feature"])  # noqa: E731
        out.writerows(sorted(rows, key=key))


def compile_rows(
    wanted: list[dict[str, Any]], pool: Pool, progress: Callable[[], None] = lambda: None
) -> Iterator[dict[str, Any]]:
    """Yield every requested row with its figures, or with an "error"."""
    sent = [x | {"kernels": list(x["rows"])} for x in wanted]
    for index, answer in pool.map(sent):
        rows = wanted[index]["rows"]
        figures: dict[str, dict[str, Any]] = {}
        for x in answer.get("kernels", ()):
            figures[x["kernel"]] = worst(figures[x["kernel"]], x) if x["kernel"] in figures else x
        for kernel, row in rows.items():
            if kernel in figures:
                yield row | figures[kernel]
            else:
                yield row | {"error": answer.get("error", f"the launch did not reach {kernel!r}")}
        progress()


def worst(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Merge the figures of a kernel that is launched twice, for dk and for dv: the worse figure, and the sum of
    clocks."""

    def pick(column: str) -> Any:
        x, y = a.get(column), b.get(column)
        if x is None or y is None:
            return y if x is None else x
        if column.endswith("clocks") or column == "instructions":
            return x + y
        if column in ("programs", "wgmma", "hidden", "wide_loads", "load_bytes", "tensor_share",
                      "bytes_per_instruction"):  # fmt: skip
            return min(x, y)
        return max(x, y)

    return {column: pick(column) for column in a | b}


def stale(wanted: list[dict[str, Any]], table: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Requests for rows that the table lacks or has with another hash."""
    found = []
    for request in wanted:
        rows = {k: x for k, x in request["rows"].items() if table.get(name(x), {}).get("hash") != x["hash"]}
        if rows:
            found.append(request | {"rows": rows})
    return found


def check(only: str = "") -> list[str]:
    """Problems of the committed table."""
    table, wanted = read(), requests(only)
    names = {name(x) for request in wanted for x in request["rows"].values()}
    problems = [f"{name(x)}: stale or missing" for request in stale(wanted, table) for x in request["rows"].values()]
    problems += [f"{x}: row is no longer required" for x in table if only in x and x not in names]
    return problems + [f"{x}: {problem}" for x in table if x in names for problem in gates(table[x])]


def build(only: str = "", workers: int = 2, path: Path | None = None) -> list[str]:
    """Compile stale rows; the table is written after every 20 requests, so that a build can be resumed."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if (version := triton_version(path)) != TRITON:
        raise SystemExit(f"triton: expected version {TRITON}, got {version}. Put {TRITON} first on PYTHONPATH.")
    table, wanted = read(), requests(only)
    names = {name(x) for request in requests() for x in request["rows"].values()}
    table = {x: row for x, row in table.items() if x in names}
    todo, failures = stale(wanted, table), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress, Pool(workers, path) as pool:
        task = progress.add_task("compiling", total=len(todo))
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            progress.update(task, advance=1)
            if done % 20 == 0:
                write(table.values())

        for row in compile_rows(todo, pool, advance):
            if "error" in row:
                failures.append(f"{name(row)} ({row['config']}): {row['error']}")
                table.pop(name(row), None)
            else:
                table[name(row)] = row
    write(table.values())
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="verify the committed table; compile nothing")
    parser.add_argument(
        "--only", default="", metavar="WORD", help="rows whose target/kernel/dtype/d/feature contains WORD"
    )
    parser.add_argument("--workers", type=argtypes.count, default=2)
    args = parser.parse_args()
    if not requests(args.only):
        parser.error(f"--only: no row contains {args.only!r}")
    problems = [] if args.check else build(args.only, args.workers)
    problems += check(args.only)
    for problem in problems:
        print(problem)
    print(f"{len(read())} rows in {TABLE.relative_to(ROOT)}, {len(problems)} problems")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
