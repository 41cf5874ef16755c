"""CPU overhead of Triton calls, measured by bench.host without a GPU, as JSON. bench.run measures attention itself.

    python -m bench.cpu                       all parts, into bench/results/cpu.json
    python -m bench.cpu overhead              one part; the others stay as they are in the file
    python -m bench.cpu --quick               few calls, to test the command

overhead      CPU time of a call with the kernel launch stubbed out, and its ratio to an empty operator
compilations  kernels compiled for new sequence lengths
first         seconds of the first call of a process, with cold and warm caches
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import ROOT
from bench.harness import table

RESULT = table.RESULTS / "cpu.json"
PARTS = {"overhead": 6000, "compilations": 100, "first": 3}  # number of calls, lengths and processes
QUICK = {"overhead": 150, "compilations": 3, "first": 1}

Entry = dict[str, Any]


def measured(part: str, count: int) -> Entry:
    """Run one part of bench.host in its own process."""
    command = [sys.executable, "-m", "bench.host", part, str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(result: Entry) -> Iterator[str]:
    """The figures as lines of text."""
    for name, ratio in result.get("overhead", {}).get("ratios", {}).items():
        yield f"{name:>17}: {result['overhead']['microseconds'][name]:.0f} us, {ratio:.1f} x an empty operator"
    for name, x in result.get("compilations", {}).get("kinds", {}).items():
        shown = f"{x['warm-up']} kernels at the first call, {x['unseen lengths']} more"
        yield f"{name:>17}: {shown} for {result['compilations']['lengths']} new lengths"
    for name, x in result.get("first", {}).get("seconds", {}).items():
        for state, seconds in x.items():
            shown = f"{seconds['clock']:.1f} s, {seconds['processor']:.1f} s CPU time"
            yield f"{name:>17}: {shown} at the first call, {state} caches"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"any of {', '.join(PARTS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="few calls: tests the command, the figures mean nothing")
    parser.add_argument("--out", type=Path, help="default: bench/results/cpu.json, no file with --quick")
    args = parser.parse_args()
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"part: expected any of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    path = args.out or (None if args.quick else RESULT)
    result: Entry = json.loads(path.read_text()) if path and path.exists() else {}
    for part in args.parts or PARTS:
        result[part] = measured(part, (QUICK if args.quick else PARTS)[part])
        result.setdefault("environment", {})[part] = table.environment()
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=1) + "\n")
        print("\n".join(report({part: result[part]})))


if __name__ == "__main__":
    main()
