"""Writes the README's figures from the raw results, and nothing else does: no number there is typed by hand.

python -m bench.report             rewrite the parts of README.md between <!-- name --> and <!-- /name -->
python -m bench.report --check     exit with an error where README.md is not what the results say
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
DIRECTIONS = ("forward", "forward+backward")


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    headings = list(headings)
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cpu() -> dict[str, Any]:
    return json.loads((RESULTS / "cpu.json").read_text())


def _machine(result: dict[str, Any], part: str) -> str:
    where = result["environment"][part]
    return f"{where['device']}, {where['threads']} threads, torch {where['torch']}, commit {where['commit'][:10]}"


def _ratio(x: dict[str, Any]) -> str:
    low, high = x["ratio_quantiles"]
    return f"{x['ratio']:.2f} ({low:.2f} to {high:.2f})"


def plain() -> str:
    """Plain calls against torch's own function."""
    result = _cpu()
    found = {(x["length"], x["name"], x["direction"]): x for x in result["plain"]}
    columns = [(name, direction) for name in ("full", "causal") for direction in DIRECTIONS]
    lengths = sorted({x["length"] for x in result["plain"]})
    rows = [[str(n), *(_ratio(found[(n, *c)]) for c in columns)] for n in lengths]
    return f"{table(['length', *map(', '.join, columns)], rows)}\n\n{_machine(result, 'plain')}."


def modifiers() -> str:
    """Each modifier against whole matrices."""
    result = _cpu()
    found = {(x["name"], x["direction"]): x for x in result["modifiers"]}
    names = dict.fromkeys(x["name"] for x in result["modifiers"])
    rows = [[name, *(_ratio(found[name, d]) for d in DIRECTIONS)] for name in names]
    return f"{table(['', *DIRECTIONS], rows)}\n\n{_machine(result, 'modifiers')}."


def memory() -> str:
    """Peak memory of a call by length."""
    result = _cpu()
    found = {(x["name"], x["direction"], x["length"]): f"{x['bytes'] / 2**20:.1f}" for x in result["memory"]}
    lengths = sorted({x["length"] for x in result["memory"]})
    labels = {"tiled": "`tiled`", "naive": "whole matrices"}
    rows = [
        [f"{label}, {direction}", *(found.get((name, direction, n), "") for n in lengths)]
        for name, label in labels.items()
        for direction in ("forward", "backward")
    ]
    return f"{table(['MiB', *map(str, lengths)], rows)}\n\n{_machine(result, 'memory')}."


def host() -> str:
    """Host time of a call, and compilations over lengths that no call has seen."""
    result = _cpu()
    overhead, compiled = result["overhead"], result["compilations"]
    rows = [[name, f"{overhead['microseconds'][name]:.0f}", f"{x:.1f}"] for name, x in overhead["ratios"].items()]
    counts = ", ".join(f"{name} {x['unseen lengths']}" for name, x in compiled["kinds"].items())
    return (
        f"{table(['host time of a call', 'µs', '÷ an empty operator'], rows)}\n\n{_machine(result, 'overhead')}.\n\n"
        f"Kernels compiled over {compiled['lengths']} unseen lengths: {counts}. {_machine(result, 'compilations')}."
    )


def static() -> str:
    """What the compiler made of the kernels for the reference GPU."""
    with (RESULTS / "static.csv").open() as file:
        entries = list(csv.DictReader(file))
    rows = []
    for x in entries:
        wanted = x["target"] == "sm_90" and x["dtype"] == "bf16" and x["d"] in ("64", "128", "256")
        if wanted and x["feature"] == "plain" and x["hidden"] and x["kernel"] != "dbias":
            shares = [f"{100 * float(x[name]):.0f}%" if x[name] else "" for name in ("hidden", "tensor_share")]
            rows.append([x["kernel"], x["d"], x["config"], x["registers"], x["programs"], *shares])
    headings = ["sm_90, bf16", "D", "tile", "registers", "programs", "exponentials hidden", "tensor share (model)"]
    return f"{table(headings, rows)}\n\n{len(entries)} rows for six targets in `bench/results/static.csv`."


PARTS: dict[str, Callable[[], str]] = {x.__name__: x for x in (plain, modifiers, memory, host, static)}


def rewritten(text: str) -> str:
    """The README with every part replaced."""
    for name, part in PARTS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
        body = part()
        text, count = pattern.subn(lambda m, body=body: m[1] + body + m[2], text)
        if count != 1:
            raise SystemExit(f"README.md: <!-- {name} --> stands there {count} times, and once is needed")
    return text


def main() -> int:
    before = README.read_text()
    after = rewritten(before)
    if "--check" in sys.argv:
        return int(before != after)
    README.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
