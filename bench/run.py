"""Benchmark fused_attn against its peers on named cases, into one CSV table.

    python -m bench.run                                every case, on a GPU if there is one, else on the CPU
    python -m bench.run --only 'causal,bias_*' --providers 'fused_attn,naive' --lengths 1024,4096 --out some.csv
    python -m bench.run --base HEAD~3                  against another revision, in interleaved rounds
    python -m bench.run --tiny --device cpu            a dry run in seconds

The cases are those of `fused_attn.testing.CASES`, at the sizes below. On a CPU, `bench.harness.samples.EVERYDAY` adds
cases that torch's SDPA also computes, compared with SDPA alone, for each number of threads. Every result is checked
against the tolerance rule on the timed tensors first. A wrong result is not timed: its row is marked as refused, and
the exit code is 1. A provider that cannot run is listed with its reason. The others run in turns in one process, round
by round; each figure is the median over rounds, with the 10th and the 90th percentile.

The forward is timed without gradients, the backward on a retained graph. `speedup` is the median over rounds of the
time of `against` divided by the provider's own. With --base the working tree is timed twice beside the other revision,
and a difference no larger than the difference of these two is reported as noise.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import fused_attn
from bench.harness import argtypes, memory, peers, providers, revisions, rounds, table
from bench.harness.clock import DIRECTIONS, milliseconds
from bench.harness.providers import Provider
from bench.harness.rounds import Turns
from bench.harness.samples import ADDITIVE, EVERYDAY, GRID, MODIFIED, Sample, everyday, sized
from bench.harness.table import Row, figure
from fused_attn.testing import Case


@dataclass(frozen=True)
class Size:
    """Sizes of the cases, and how they are timed."""

    device: str
    dtype: str
    dims: tuple[int, ...]
    lengths: tuple[int, ...]  # of the grid
    tokens: int  # batch times length there
    width: int  # heads times head dim
    modified: int  # the length of the modified cases
    modified_tokens: int
    turns: Turns
    copied: int  # bytes of the copy that measures bandwidth
    additive: tuple[int, int, int, int] = (1, 4, 1024, 64)  # batch, heads, length and head dim of additive scores
    memory: tuple[int, ...] = ()  # lengths for peak memory on a CPU, in a separate process
    memory_naive: int = 0  # the longest of them for naive
    everyday: int = 0  # rounds of everyday cases; 0 for none
    shrink: int = 1  # divisor of their lengths


CUDA = Size(
    "cuda", "bfloat16", (128, 64, 256), (512, 1024, 2048, 4096, 8192, 16384), 16384, 2048, 4096, 16384,
    Turns("cuda", 5, DIRECTIONS), 2**30, (1, 32, 1024, 64),
)  # fmt: skip
CPU = Size(
    "cpu", "float32", (64,), (512, 1024, 2048, 4096), 4096, 512, 2048, 2048,
    Turns("cpu", 5, ("forward", "forward+backward"), matmul=1024, seconds=0.1, least=1), 2**28,
    memory=(1024, 2048, 4096, 8192, 16384), memory_naive=4096, everyday=9,
)  # fmt: skip
TINY = {
    "dims": (16,), "lengths": (32, 48), "tokens": 48, "width": 128, "modified": 48, "modified_tokens": 48,
    "copied": 2**20, "additive": (1, 2, 40, 16), "shrink": 16,
}  # fmt: skip

ALL = (
    providers.ours(None), *providers.PROVIDERS[: len(providers.OURS)],
    *(providers.ours(name) for name in ("sdpa", "tiled", "reference")),
    providers.TORCH, *providers.PROVIDERS[len(providers.OURS) :], *peers.PEERS,
)  # fmt: skip
CEILINGS = ("copy", "matmul")
# Not run by default: a faster provider computes the same.
UNASKED = {
    "cpu": ("sdpa", "tiled", "reference", "flash", "math"),
    "cuda": ("fused_attn", "sdpa", "tiled", "reference", "torch"),
}


# ----------------------------------------------------------------------------------------------------------- cases


def matches(name: str, patterns: str) -> bool:
    return any(fnmatch.fnmatch(name, x) for x in patterns.split(","))


def planned(size: Size, only: str, lengths: tuple[int, ...]) -> list[Case]:
    """The selected cases at their sizes."""
    found = []
    for name in (*GRID, *MODIFIED):
        if not matches(name, only):
            continue
        chosen, tokens = (size.lengths, size.tokens) if name in GRID else ((size.modified,), size.modified_tokens)
        for dim in size.dims if name in GRID else size.dims[:1]:
            for length in lengths or chosen:
                found.append(sized(name, max(1, tokens // length), max(1, size.width // dim), length, dim))
    batch, heads, own, dim = size.additive
    return found + [sized(x, batch, heads, n, dim) for x in ADDITIVE if matches(x, only) for n in lengths or (own,)]


def planned_everyday(size: Size, only: str) -> list[tuple[Case, Size]]:
    """The selected everyday cases, each with its dtype and rounds."""
    turns = replace(size.turns, rounds=min(size.everyday, 2) if size.shrink > 1 else size.everyday, matmul=256)
    return [
        (everyday(name, size.shrink), replace(size, dtype=dtype, turns=turns))
        for name, (_, dtype) in EVERYDAY.items()
        if size.everyday and matches(name, only)
    ]


def described(case: Case, dtype: str) -> Row:
    """The columns that describe a case."""
    options = {x: getattr(case, x) for x in ("window", "softcap", "scale", "dropout_p")}
    return {
        "case": case.name, "length": case.m, "batch": case.b, "heads": case.hq, "kv_heads": case.hkv, "dim": case.d,
        "dtype": dtype, "options": " ".join(f"{name}={x}" for name, x in options.items() if x),
    }  # fmt: skip


def measured(case: Case, what: Row, chosen: list[Provider], size: Size, tick: Callable[[], Any]) -> list[Row]:
    """Rows of one case: check every provider, then time them in interleaved rounds."""
    x = Sample.draw(case, getattr(torch, size.dtype), size.device)
    rows: list[Row] = []
    calls, found, notes = {}, {}, {}
    for provider in chosen:
        started = rounds.run_once(provider, x, size.device)
        note = judged(provider, x, started)
        where = what | {"provider": provider.name}
        if note.get("status"):
            rows.append(where | note)
        else:
            assert started.call is not None
            calls[provider], found[provider.name] = started.call, started.found
            notes[provider.name] = note | {"config": provider.config(x)}
        del started
        rounds.release(size.device)
    timed = rounds.interleave(calls, found, x, size.turns, tick)
    for name, entries in timed["providers"].items():
        for direction, entry in entries.items():
            where = what | {"provider": name, "direction": direction} | notes[name]
            if "refused" in entry:
                rows.append(where | {"status": "unavailable", "reason": entry["refused"]})
            else:
                rows += [where | {"status": "timed"} | row for row in figures(x, direction, entry)]
    rows += [what | row for row in speedups(timed["providers"])]
    top = [2e-9 * size.turns.matmul**3 / ms for ms in timed["matmul_samples_ms"]]
    return [*rows, ceiling("matmul", size, "tflops", top, length=size.turns.matmul)]


def judged(provider: Provider, x: Sample, started: rounds.Started) -> Row:
    """The result of the check; it has a status if the provider is not to be timed."""
    error = started.error
    if started.call is None or (provider.ours and error is not None):
        cannot = (NotImplementedError, fused_attn.BackendError) if provider.ours else Exception
        status = "unavailable" if isinstance(error, cannot) else "refused"
        return {"status": status, "reason": started.found["backward"]["refused"]}
    if x.case.dropout_p and not provider.ours:
        return {"reason": "not judged: its dropout mask is its own"}
    if provider.inexact:
        return {"error": x.error(started.result), "reason": "not judged: inexact by design"}
    try:
        used = x.judge(started.result, started.grads)
    except AssertionError as failure:
        return {"status": "refused", "reason": str(failure)[: rounds.REASON_LENGTH]}
    return {"share": max(row["share"] for row in used.values()), "error": used["out"]["error"]}


def figures(x: Sample, direction: str, entry: dict[str, Any]) -> Iterator[Row]:
    """Metrics of one provider and direction."""
    took, work = figure("ms", entry["samples_ms"]), 1e-9 * x.flops(direction)
    yield took
    ends = {"value": work / took["value"], "low": work / took["high"], "high": work / took["low"]}
    yield took | {"metric": "tflops"} | ends
    yield {"metric": "intensity", "value": x.flops(direction) / x.bytes(direction)}
    if entry.get("peak_bytes") is not None:
        yield {"metric": "peak_bytes", "value": float(entry["peak_bytes"]), "samples": 1}


def speedups(found: dict[str, Any]) -> Iterator[Row]:
    """Speedups of fused_attn over every peer, and of every provider over naive."""
    own = {x.name for x in ALL if x.ours}
    for name, entries in found.items():
        for other in found:
            if other in own or other == name or (name not in own and other != "naive"):
                continue
            for direction, entry in entries.items():
                mine, theirs = (e.get("samples_ms", []) for e in (entry, found[other][direction]))
                if mine and len(mine) == len(theirs):
                    ratios = [b / a for a, b in zip(mine, theirs, strict=True)]
                    where = {"provider": name, "direction": direction, "status": "timed"}
                    yield where | figure("speedup", ratios, against=other)


def ceiling(case: str, size: Size, metric: str, samples: list[float], **more: Any) -> Row:
    where = {"case": case, "provider": "torch", "direction": "forward", "dtype": size.dtype, "status": "timed"}
    return where | more | figure(metric, samples)


def bandwidth(size: Size) -> Row:
    """Bandwidth of a copy in GB/s, reads and writes."""
    source = torch.zeros(size.copied, dtype=torch.uint8, device=size.device)
    target = torch.ones_like(source)
    took = [milliseconds(lambda: target.copy_(source), size.device) for _ in range(size.turns.rounds)]
    return ceiling("copy", size, "gbytes_per_second", [2e-6 * size.copied / ms for ms in took], length=size.copied)


def remembered(size: Size) -> Iterator[tuple[str, str, str, int]]:
    """(case, provider, direction, length) of each memory measurement."""
    for name, longest in (("tiled", max(size.memory, default=0)), ("naive", size.memory_naive)):
        for direction in memory.DIRECTIONS:
            yield from ((memory.CASE, name, direction, length) for length in size.memory if length <= longest)
            yield from ((x, name, direction, size.additive[2]) for x in ADDITIVE if size.memory)


def memorised(case: str, provider: str, direction: str, length: int) -> Row:
    """Peak memory of one call, measured in a separate process."""
    where = {"provider": provider, "direction": direction, "status": "timed", "threads": memory.THREADS}
    found = {"metric": "peak_bytes", "value": float(memory.peak(provider, direction, length, case)), "samples": 1}
    return described(memory.problem(case, length), "float32") | where | found


def answers(device: str) -> bool:
    """True if the device still works: a GPU fault invalidates the context of this process."""
    try:
        torch.ones(1, device=device).item()
    except Exception:
        return False
    return True


# ----------------------------------------------------------------------------------------------------------- output


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[..., Any]]:
    """A progress bar, or printed lines if rich is not installed."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield lambda name="", steps=0: print(name, flush=True) if name else None
        return
    columns = (TextColumn("{task.description:>22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as bars:
        bar = bars.add_task("", total=total)

        def step(name: str = "", steps: int = 0) -> None:
            bars.update(bar, advance=steps, **({"description": name} if name else {}))

        yield step


def summary(rows: list[Row]) -> Iterator[str]:
    """Milliseconds by case and provider, speedups over a base revision, and providers that did not run."""
    times = [x for x in rows if x.get("metric") == "ms"]
    names = list(dict.fromkeys(x["provider"] for x in times))
    if times:
        yield f"{'milliseconds':>38} " + "".join(f"{name[:12]:>13}" for name in names)
    lines: dict[tuple, dict[str, float]] = {}
    for x in times:
        key = (x["case"], x["dim"], x["length"], x["direction"])
        lines.setdefault(key, {})[x["provider"]] = x["value"]
    for (case, dim, length, direction), found in lines.items():
        cells = "".join(f"{found[name]:13.3f}" if name in found else f"{'-':>13}" for name in names)
        yield f"{case:>16} D{dim:<3} {length:>5} {direction[:17]:<17}"[:39] + cells
    for x in rows:
        if x.get("metric") == "speedup" and "reason" in x:
            what = f"{x['case']} D{x['dim']} {x['length']} {x['direction']}, {x['provider']}"
            spread = f"{x['value']:.3f} ({x['low']:.3f} to {x['high']:.3f})"
            yield f"{what}: {spread} times the speed of {x['against']}; {x['reason']}"
    unavailable = {(x["provider"], x["reason"]) for x in rows if x["status"] == "unavailable"}
    yield from (f"unavailable: {name}: {reason[:200]}" for name, reason in sorted(unavailable))
    for x in rows:
        if x["status"] in ("refused", "not reached"):
            who = f"{x['case']} D{x['dim']} {x['length']} {x.get('provider', '')}"
            yield f"{x['status'].upper()} {who} {x.get('reason', '')[:300]}"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="*", metavar="PATTERNS", help="comma-separated shell patterns of case names")
    parser.add_argument(
        "--providers",
        metavar="PATTERNS",
        help="likewise of provider names; default: without the slower ones of equal results",
    )
    parser.add_argument(
        "--lengths", type=argtypes.counts, default=(), metavar="N,N", help="sequence lengths of every case"
    )
    parser.add_argument("--dims", type=argtypes.counts, metavar="D,D", help="head dims")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--directions", type=lambda x: tuple(x.split(",")), help=f"any of {', '.join(DIRECTIONS)}")
    parser.add_argument(
        "--device", type=argtypes.device, default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"
    )
    parser.add_argument(
        "--threads",
        type=argtypes.counts,
        default=(1, 2),
        metavar="N,N",
        help="numbers of threads for everyday cases on a CPU; others use the first",
    )
    parser.add_argument("--rounds", type=argtypes.count, help="interleaved rounds of each case")
    parser.add_argument(
        "--seconds", type=argtypes.seconds, help="time limit of the whole command; later cases are not reached"
    )
    parser.add_argument("--base", metavar="REV", help="time against another revision of the package")
    parser.add_argument("--tiny", action="store_true", help="a dry run: small sizes, two rounds, no table unless --out")
    parser.add_argument(
        "--out",
        type=argtypes.output,
        metavar="FILE",
        help="default: <architecture>.csv in $OUT or bench/results; without --out and $OUT, a run with other options "
        "than --base and --device writes no table, nor does --tiny without --out",
    )
    args = parser.parse_args(argv)
    if unknown := set(args.directions or ()) - set(DIRECTIONS):
        parser.error(f"--directions: expected any of {', '.join(DIRECTIONS)}, got {', '.join(sorted(unknown))}")
    return args


def settled(args: argparse.Namespace) -> Size:
    """Sizes for the given arguments."""
    size = CUDA if args.device == "cuda" else CPU
    turns = size.turns
    if args.tiny:
        size = replace(size, **TINY, memory=(), turns=replace(turns, rounds=2, matmul=64, seconds=0.0))
    asked = {"rounds": args.rounds, "directions": args.directions}
    turns = replace(size.turns, **{name: x for name, x in asked.items() if x})
    return replace(size, turns=turns, dims=args.dims or size.dims, dtype=args.dtype or size.dtype)


def destination(args: argparse.Namespace, arch: str) -> Path | None:
    """Where the table goes; None: nowhere. Only a run with the defaults replaces the table in bench/results."""
    folder = os.environ.get("OUT")
    changed = vars(args).items() - vars(arguments([])).items()
    partial = not {name for name, _ in changed} <= {"base", "device"}
    if args.out or args.tiny or (partial and not folder):
        return args.out
    return Path(folder or table.RESULTS) / f"{arch}{'-base' if args.base else ''}.csv"


def chosen_providers(patterns: str | None, device: str) -> list[Provider]:
    if patterns is None:
        return [x for x in ALL if x.name not in UNASKED[device]]
    return [x for x in ALL if matches(x.name, patterns)]


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    size, end = settled(args), time.monotonic() + (args.seconds or float("inf"))
    chosen, cases = chosen_providers(args.providers, size.device), planned(size, args.only, args.lengths)
    daily = [] if args.base else planned_everyday(size, args.only)
    if not chosen or not (cases or daily or matches("memory", args.only)):
        names = ", ".join((*GRID, *MODIFIED, *ADDITIVE, *(EVERYDAY if size.everyday else ())))
        print(f"nothing matches --only or --providers. Cases: {names}. Providers: {', '.join(x.name for x in ALL)}.")
        return 2
    before = torch.get_num_threads()
    if size.device == "cpu":
        torch.set_num_threads(args.threads[0])
    where = table.environment(size.device, args.threads[0] if size.device == "cpu" else None)
    path = destination(args, where["arch"])
    rows: list[Row] = []

    def keep(more: list[Row], where: Row = where) -> None:
        rows.extend({**where, "load": os.getloadavg()[0], **x} for x in more)
        if path:
            table.write(path, rows)

    own = [x for x in chosen if x.ours]
    peaks = [] if args.base or not matches("memory", args.only) else list(remembered(size))
    steps = size.turns.rounds * len(size.turns.directions) * (len(own) if args.base else 1)
    with contextlib.ExitStack() as stack:
        step = stack.enter_context(progress(len(cases) * steps + len(daily) * len(args.threads) + len(peaks)))
        sides = stack.enter_context(revisions.sides(args.base)) if args.base else None
        if cases and sides is None:
            keep([bandwidth(size)])
        for case in cases:
            step(f"{case.name} {case.m}")
            what = described(case, size.dtype)
            if time.monotonic() > end:
                keep([what | {"status": "not reached"}])
                continue
            try:
                if sides is None:
                    keep(measured(case, what, chosen, size, lambda: step(steps=1)))
                else:
                    keep(revisions.measured(case, what, own, size.dtype, size.turns, sides, lambda: step(steps=1)))
            except Exception as error:
                keep([what | {"status": "refused", "reason": f"error: {rounds.reason(error, [])}"}])
                end = end if answers(size.device) else 0.0
        for threads in args.threads if daily else ():
            torch.set_num_threads(threads)
            own_place = table.environment(size.device, threads)
            pair = [x for x in chosen if x.name in ("fused_attn", "torch")]
            for case, own_size in daily:
                step(f"{case.name}, {threads}", steps=1)
                what = described(case, own_size.dtype)
                keep(measured(case, what, pair, own_size, lambda: None), own_place)
        torch.set_num_threads(before)
        for peak in peaks if time.monotonic() < end else ():
            step(f"memory {peak[-1]}")
            keep([memorised(*peak)])
            step(steps=1)
    print("\n".join(summary(rows)))
    if path:
        print(path)
    statuses = {x["status"] for x in rows if x["case"] not in CEILINGS}
    return int("refused" in statuses or "timed" not in statuses)


if __name__ == "__main__":
    sys.exit(main())
