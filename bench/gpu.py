"""Checks and measurements on a GPU: parity, configurations, determinism, experiments, timings, tuning.

    python -m bench.gpu                          all parts but tune, cheapest first, in under ten minutes
    python -m bench.gpu parity races             some parts
    python -m bench.gpu timing --only 'd128/*'   some cases, by comma-separated patterns; "core" selects a few per part
    python -m bench.gpu tune --write-tables      time neighbouring configurations and write the fastest ones
    python -m bench.gpu --tiny --device cpu      a dry run at tiny sizes in the interpreter

Needs a checkout and python3 with torch, triton and numpy. The result is one JSON file under --out ($OUT, else
bench/results), rewritten after every case. A case without time left is "not reached", a deselected one "not asked". The
exit code is 1 if a case failed or none passed. A case is checked before it is timed, and a wrong one is not timed.
Checks run in parallel processes, each with its own compilation; timings run alone on the GPU.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import fused_attn
from bench import ROOT
from bench.evidence.configs import GLUON
from bench.evidence.parts import PARTS
from bench.evidence.setting import STAGES, TINY, Refused, Setting
from bench.harness import argtypes
from bench.harness.rounds import DIRECTIONS
from bench.harness.table import source
from bench.harness.workers import Pool
from fused_attn import tuning

DEFAULT = [name for name in PARTS if name != "tune"]
SECONDS = 540.0
START_SECONDS = 120.0  # time limit for the first answer of a worker
WORTH = 1.02  # the least speedup for which a configuration is replaced

Entry = dict[str, Any]


def environment() -> dict[str, Any]:
    """Versions, device and commit; and a digest of the source, for trees without git."""
    import triton

    query = "name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "nvidia_smi": output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv"),
        "commit": output_of("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),
        "source_sha256": source(),
        "command": sys.argv,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def entries(setting: Setting, asked: list[str], only: str) -> list[Entry]:
    """Every case of every part, core cases first."""
    found = []
    for part, noun in PARTS.items():
        listed = sorted(noun.cases(setting), key=lambda case: not case[1])
        for name, core, args in listed:
            wanted = part in asked and any(fnmatch.fnmatch(name, x) or (core and x == "core") for x in only.split(","))
            status = "not reached" if wanted else "not asked"
            found.append({"part": part, "name": name, "status": status, "core": core, "args": args})
    return found


def run_all(
    setting: Setting, cases: list[Entry], parts: list[str], pool: Pool, width: int, end: float, save: Callable[[], None]
) -> None:
    """All checks in parallel, then all measurements one by one; each stage gets its share of the remaining time."""
    steps = [(part, stage, share) for stage in STAGES for part in parts if (share := PARTS[part].shares[stage])]
    for i, (part, stage, share) in enumerate(steps):
        now = time.monotonic()
        deadline = now + (end - now) * share / sum(x[2] for x in steps[i:])
        mine = [x for x in cases if x["part"] == part and x["status"] == "not reached"]
        if stage == "measure":
            mine = [x for x in mine if "check_passed" in x]
        common = {"setting": setting, "part": part, "stage": stage}
        requests = [common | {"args": x["args"], "checked": x} for x in mine]
        for index, answer in pool.run(requests, width if stage == "check" else 1, deadline):
            keep(mine[index], stage, answer)
            save()
        done = sum(f"{stage}_seconds" in x for x in mine)
        print(f"{stage} {part}: {done} of {len(mine)} cases in {time.monotonic() - now:.0f} s", flush=True)


def keep(entry: Entry, stage: str, answer: dict[str, Any]) -> None:
    """Store an answer in the record. A checked case that is still to be measured stays "not reached"."""
    if stage == "check" and PARTS[entry["part"]].shares["measure"] and answer["status"] == "passed":
        answer |= {"status": "not reached", "check_passed": True}
    entry |= answer
    if answer["status"] == "failed":
        print(f"FAILED {entry['part']}/{entry['name']}: {answer['error'][:300]}", flush=True)


# ----------------------------------------------------------------------------------------------- in a worker process


def probe(device: str) -> dict[str, Any]:
    """The device's properties."""
    arch = tuning.architecture(torch.device(device))
    if device != "cuda":
        return {"arch": arch, "device": "cpu", "cores": os.cpu_count()}
    x = torch.cuda.get_device_properties(0)
    names = {"device": x.name, "capability": f"{x.major}.{x.minor}", "multiprocessors": x.multi_processor_count}
    return names | {"arch": arch, "memory_bytes": x.total_memory, "cudnn": torch.backends.cudnn.version()}


def handle(request: dict[str, Any]) -> dict[str, Any]:
    """Run one stage of one case; an exception becomes its status."""
    began = time.perf_counter()
    s, stage = request["setting"], request["stage"]
    try:
        if stage == "probe":
            answer = probe(s.device)
        else:
            told = {"checked": request["checked"]} if stage == "measure" else {}
            answer = getattr(PARTS[request["part"]], stage)(s, **told, **request["args"])
        answer = {"status": "passed"} | answer
    except (Refused, fused_attn.BackendError) as error:
        answer = {"status": "refused", "error": str(error)[:1000]}
    except Exception as error:
        answer = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
        answer["traceback"] = traceback.format_exc()[-4000:]
    if s.device == "cuda":
        try:
            torch.cuda.synchronize()
            gc.collect()
            torch.cuda.empty_cache()
        except Exception as error:
            # An asynchronous fault of this case is raised here.
            if answer["status"] != "failed":
                answer = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
            answer["context_lost"] = True
    return answer | {f"{stage}_seconds": round(time.perf_counter() - began, 3)}


# --------------------------------------------------------------------------------------------------------- reporting


def summary(record: dict[str, Any]) -> str:
    """The results as text."""
    cases = record["cases"]
    lines = [
        "",
        f"{record['machine']['device']}  {record['machine']['arch']}  commit {record['environment']['commit']}",
    ]
    for part in PARTS:
        counts = Counter(x["status"] for x in cases if x["part"] == part)
        lines.append(f"  {part:8} " + ", ".join(f"{n} {status}" for status, n in counts.items()))
    shares = [(row["share"], f"{x['part']}/{x['name']} {name}") for x in cases for name, row in flat_rows(x)]
    if shares:
        share, where = max(shares)
        lines.append(f"  closest to its budget: {where}, {share:.2f} of it")
    for x in cases:
        if x["part"] in ("overlap", "tune") and "speedup" in x:
            lines.append(f"  {x['part']:8} {x['name']:32} {x['speedup']:.3f} times as fast as the chosen one")
        if x["part"] == "costs" and "cold" in x:
            lines.append(
                f"  {x['name']}: {x['cold']['forward']['clock']:.2f} s forward,"
                f" {x['cold']['forward+backward']['clock']:.2f} s with backward;"
                f" warm cache {x['warm']['forward+backward']['clock']:.2f} s"
            )
    lines += ratios(cases)
    lines += timing_table([x for x in cases if x["part"] == "timing" and "providers" in x])
    lines += [f"FAILED {x['part']}/{x['name']}: {x['error'][:200]}" for x in cases if x["status"] == "failed"][:20]
    return "\n".join(lines)


def ratios(cases: list[Entry]) -> list[str]:
    """Modifiers relative to plain attention, additive scores to their eager form and limit, packed sequences to dense
    ones, and the bandwidth of decoding."""
    lines = []
    for x in cases:
        measured = "measure_seconds" in x and x["status"] == "passed"
        if x["part"] == "modifiers" and measured:
            shown = ", ".join(f"{direction} {x[direction]['of_plain']:.3f}" for direction in ("forward", "backward"))
            lines.append(f"  {x['name']:24} of the plain product's throughput: {shown}")
        if x["part"] == "ragged" and measured:
            shown = ", ".join(f"{how} {x[how]['of_dense']:.3f} (goal {x[how]['goal']})" for how in DIRECTIONS)
            lines.append(f"  {x['name']:24} of the dense kernel's throughput: {shown}")
        if x["part"] == "decoding" and measured:
            lines += decoded(x)
        if x["part"] == "additive" and measured:
            for direction, found in x["providers"]["triton"].items():
                shown = [f"{found['over_eager']:.1f} times as fast as eager"] if found["over_eager"] else []
                if "of_limit" in found:
                    limits = (found[name] for name in ("of_limit", "of_paired_limit"))
                    shown.append("{:.3f} of one operation a tanh, {:.3f} of half".format(*limits))
                lines.append(f"  {x['name']:24} {direction}: {found['ms']:.3g} ms; {'; '.join(shown)}")
    return lines


def decoded(x: Entry) -> list[str]:
    """Decoding steps of many sequences and of one, the latter also by number of splits."""

    def shown(found: dict[str, Any]) -> str:
        goal = f" (goal {found['goal_ms']} ms)" if "goal_ms" in found else ""
        return goal + "; ".join(
            f" {how} {y['ms']:.4g} ms, {y['terabytes_per_second']:.3g} TB/s"
            + (f", {y['of_copy']:.2f} of a copy (goal {y['goal']})" if "goal" in y else "")
            for how, y in found.items()
            if how in ("call", "graph")
        )

    kinds = {"full": x["full"], "alone": x["alone"]} | {f"alone, {n} parts": y for n, y in x["splits"].items()}
    return [f"  {x['name']:24} {kind}{shown(found)}" for kind, found in kinds.items()]


def flat_rows(entry: Entry) -> list[tuple[str, dict[str, Any]]]:
    """The tolerance rows of an entry; a timing nests them by provider."""
    found = []
    for name, row in entry.get("rows", {}).items():
        found += [(name, row)] if "share" in row else list(row.items())
    return found


def timing_table(cases: list[Entry]) -> list[str]:
    """TFLOP/s of each provider, forward and backward, and triton's as a share of a matmul."""
    if not cases:
        return []
    names = list(cases[0]["providers"])
    lines = ["TFLOP/s".ljust(26) + "".join(f"{name[:8]:>9}" for name in names) + "   of matmul"]
    for x in sorted(cases, key=lambda x: (x["args"]["d"], x["args"]["causal"], x["args"]["length"])):
        for direction in ("forward", "backward"):
            found = {name: x["providers"].get(name, {}).get(direction, {}) for name in names}
            cells = "".join(f"{y['tflops']:9.4g}" if "tflops" in y else f"{'-':>9}" for y in found.values())
            best = found["triton"].get("of_matmul")
            lines.append(f"{x['name']:17}{direction:9}{cells}" + (f"{best:9.3f}" if best else ""))
    return lines


def doubts(record: dict[str, Any]) -> list[str]:
    """Why no row of a Hopper kernel may be marked as validated, which makes it the default: all of its cases count."""
    found = []
    for part in ("parity", "races"):
        cases = [x for x in record["cases"] if x["part"] == part and x["name"].startswith("hopper/")]
        counts = Counter(x["status"] for x in cases)
        found += [f"{n} {part} cases {status}" for status, n in counts.items() if status not in ("passed", "refused")]
        found += [] if counts["passed"] else [f"no {part} case passed"]
    return found


def write_tables(record: dict[str, Any], result: Path) -> list[str]:
    """Write the fastest configuration of each sweep into the tuning table of the architecture.

    Rows of the Hopper kernels for modified scores are not swept; parity alone validates them.
    """
    from bench import tune as tables

    setting = record["setting"]
    dtype = torch.bfloat16 if "bfloat16" in setting["dtypes"] else torch.float32
    swept: dict[tuple[str, int], list[Entry]] = {}
    for x in record["cases"]:
        if x["part"] == "tune" and x["status"] == "passed":
            swept.setdefault((x["args"]["kernel"], x["args"]["d"]), []).append(x)
    rows = tables.load(setting["arch"])["rows"]
    unproven = doubts(record)
    said = [f"  no row of the Hopper kernels: {x}" for x in unproven if any(kernel in GLUON for kernel, _ in swept)]
    for (kernel, d), tried in swept.items():
        if kernel in GLUON and unproven:
            continue
        best = max(tried, key=lambda x: x["speedup"])
        row = best["args"]["config"] if best["speedup"] > WORTH else best["chosen"]
        name = tuning.key(kernel, dtype, d, d)
        rows[name] = row | {"validated": True, "result": result.name}
        said.append(f"  {name}: {row}")
        with_modifiers = tuning.key(kernel, dtype, d, d, with_modifiers=True)
        if kernel in GLUON and with_modifiers in rows:
            rows[with_modifiers] |= {"validated": True, "result": result.name}
    tables.save(setting["arch"], rows)
    shutil.copy(tables.TABLES / f"{setting['arch']}.json", result.parent)
    return said


# -------------------------------------------------------------------------------------------------------------- main


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all but tune")
    parser.add_argument("--only", default="*", metavar="PATTERNS", help='shell patterns of case names, or "core"')
    parser.add_argument("--seconds", type=argtypes.seconds, default=SECONDS, help="time limit of the whole command")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "bench" / "results"))
    parser.add_argument(
        "--workers", type=argtypes.count, default=min(16, os.cpu_count() or 1), help="processes that run checks"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a dry run: the same parts at tiny sizes")
    parser.add_argument("--write-tables", action="store_true", help="write the result of tune into the tuning table")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"PART: expected any of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu runs the interpreter and needs --tiny")
    if args.write_tables and args.tiny:
        parser.error("--write-tables: not with --tiny, whose timings mean nothing")
    args.parts = [name for name in PARTS if name in (args.parts or DEFAULT)]
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    end = time.monotonic() + args.seconds
    # Workers inherit these. One thread each, because there are as many workers as cores.
    os.environ["TRITON_INTERPRET"] = "1" if args.device == "cpu" else "0"
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    setting = replace(TINY if args.tiny else Setting(), device=args.device)
    pool = Pool(handle)
    answers = pool.run([{"stage": "probe", "setting": setting}], 1, time.monotonic() + START_SECONDS)
    machine = next((answer for _, answer in answers), {"status": "failed", "error": "it does not answer"})
    if machine["status"] != "passed":
        pool.trim()
        print(f"no {args.device} device to use: {machine['error']}", file=sys.stderr)
        return 2

    setting = replace(setting, arch=machine["arch"])
    cases = entries(setting, args.parts, args.only)
    record = {"environment": environment(), "machine": machine, "setting": asdict(setting), "cases": cases}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"gpu-{machine['arch']}-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}.json"

    def save() -> None:
        record["seconds"] = round(args.seconds - (end - time.monotonic()), 1)
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(record, indent=1))
        draft.replace(path)

    save()
    run_all(setting, cases, args.parts, pool, args.workers, end, save)
    pool.trim()
    save()
    print(summary(record))
    if args.write_tables:
        print("\n".join(write_tables(record, path)))
    print(path)
    counts = Counter(x["status"] for x in cases)
    return int(counts["failed"] > 0 or counts["passed"] == 0)


if __name__ == "__main__":
    sys.exit(main())
