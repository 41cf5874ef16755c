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
from typing import Any

from bench import ROOT, support
from bench.harness import memory as meter
from bench.harness import table
from bench.harness.samples import ADDITIVE, EVERYDAY, GRID, MODIFIED

README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
DIRECTIONS = ("forward", "forward+backward")
STEPS = ("decode", "decode_paged")
PEERS = {"naive": "whole matrices", "flex": "FlexAttention", "torch": "torch's own"}


def markdown(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    headings = list(headings)
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cpu() -> dict[str, Any]:
    return json.loads((RESULTS / "cpu.json").read_text())


def _machine(result: dict[str, Any], part: str) -> str:
    where = result["environment"][part]
    return f"{where['device']}, {where['threads']} threads, torch {where['torch']}, commit {where['commit'][:10]}"


def _ran(rows: list[table.Row]) -> str:
    """Where rows of the benchmark's table are from."""
    places = {f"{table.processors(x)}, torch {x['torch']}, commit {x['commit'][:10]}" for x in rows}
    return "; ".join(sorted(places))


def _spread(x: table.Row | None) -> str:
    return "" if x is None else f"{x['value']:.2f} ({x['low']:.2f} to {x['high']:.2f})"


def _speedups() -> list[table.Row]:
    rows = table.read(RESULTS / "cpu.csv")
    return [x for x in rows if x.get("metric") == "speedup" and x["provider"] == "fused_attn"]


def plain() -> str:
    """Plain calls against torch's own function."""
    rows = [x for x in _speedups() if x["case"] in GRID and x["against"] == "torch"]
    found = {(x["length"], x["case"], x["direction"]): x for x in rows}
    columns = [(name, direction) for name in GRID for direction in DIRECTIONS]
    body = [[str(n), *(_spread(found[(n, *c)]) for c in columns)] for n in sorted({x["length"] for x in rows})]
    return f"{markdown(['length', *map(', '.join, columns)], body)}\n\n{_ran(rows)}."


def everyday() -> str:
    """Everyday calls that torch's own function computes too, against it."""
    rows = [x for x in _speedups() if x["case"] in EVERYDAY and x["against"] == "torch"]
    found = {(x["case"], x["threads"], x["direction"]): x for x in rows}
    columns = [(n, d) for n in sorted({x["threads"] for x in rows}) for d in DIRECTIONS]
    if not rows:
        return "Not measured yet."
    body = [[f"`{name}`", *(_spread(found.get((name, *c))) for c in columns)] for name in EVERYDAY]
    headings = [f"{d}, {n} thread{'s' * (n > 1)}" for n, d in columns]
    return f"{markdown(['', *headings], body)}\n\n{_ran(rows)}."


def modifiers() -> str:
    """Each modifier against whole matrices, and against the peers that have it."""
    rows = [x for x in _speedups() if x["case"] in MODIFIED]
    found = {(x["case"], x["against"], x["direction"]): x for x in rows}
    columns = [c for c in ((p, d) for p in PEERS for d in DIRECTIONS) if any(c == key[1:] for key in found)]
    names = dict.fromkeys(x["case"] for x in rows)
    body = [[f"`{name}`", *(_spread(found.get((name, *c))) for c in columns)] for name in names]
    headings = [f"÷ {PEERS[p]}, {direction}" for p, direction in columns]
    return f"{markdown(['', *headings], body)}\n\n{_ran(rows)}."


def additive() -> str:
    """Additive scores against their eager form: its time, and its memory at the peak."""
    fast = [x for x in _speedups() if x["case"] in ADDITIVE and x["against"] == "naive"]
    peaks = [x for x in _peaks() if x["case"] in ADDITIVE]
    if not fast:
        return "Not measured yet."
    speed = {x["direction"]: _spread(x) for x in fast}
    held = {(x["provider"], x["direction"]): x["value"] / 2**20 for x in peaks}
    rows = []
    for direction in speed:
        own, eager = (held.get((name, direction)) for name in ("tiled", "naive"))
        shown = [f"{own:.1f}", f"{eager:.0f}", f"{100 * own / eager:.1f}%"] if own and eager else ["", "", ""]
        rows.append([direction, speed[direction], *shown])
    headings = ["", "speed ÷ eager", "MiB, `tiled`", "MiB, eager", "of eager"]
    x = fast[0]
    sizes = f"length {x['length']}, {x['heads']} heads of {x['dim']}"
    return f"{markdown(headings, rows)}\n\n{sizes[0].upper()}{sizes[1:]}. {_ran([*fast, *peaks])}."


def _peaks() -> list[table.Row]:
    return [x for x in table.read(RESULTS / "cpu.csv") if x.get("metric") == "peak_bytes"]


def memory() -> str:
    """Peak memory of a call by length."""
    rows = [x for x in _peaks() if x["case"] == meter.CASE]
    found = {(x["provider"], x["direction"], x["length"]): f"{x['value'] / 2**20:.1f}" for x in rows}
    lengths = sorted({x["length"] for x in rows})
    labels = {"tiled": "`tiled`", "naive": "whole matrices"}
    body = [
        [f"{label}, {direction}", *(found.get((name, direction, n), "") for n in lengths)]
        for name, label in labels.items()
        for direction in DIRECTIONS
    ]
    return f"{markdown(['MiB', *map(str, lengths)], body)}\n\n{_ran(rows)}."


def ragged() -> str:
    """A ragged batch, packed, against padded calls of torch's own function."""
    rows = [x for x in table.read(RESULTS / "ragged.csv") if x["case"] == "ragged" and x["metric"] == "speedup"]
    found = {(x["provider"], x["direction"], x["threads"], x["against"]): x for x in rows}
    labels = {"padded": "masked", "unmasked": "unmasked"}
    columns = [(n, name) for n in sorted({x["threads"] for x in rows}) for name in labels]
    body = [
        [f"`{name}`, {direction}", *(_spread(found[(name, direction, *c)]) for c in columns)]
        for name in dict.fromkeys(x["provider"] for x in rows)
        for direction in DIRECTIONS
    ]
    headings = [f"÷ {labels[name]}, {n} thread{'s' * (n > 1)}" for n, name in columns]
    x = rows[0]
    fill = f"{100 * float(table.options(x)['fill']):.0f}%"
    sizes = f"{x['batch']} sequences of at most {x['length']}, together {fill} of the padded batch, {x['heads']} heads"
    return f"{markdown(['', *headings], body)}\n\n{sizes} of {x['dim']}, {x['dtype']}. {_ran(rows)}."


def decoding() -> str:
    """A step of decoding by keys and by room."""
    rows = [x for x in table.read(RESULTS / "ragged.csv") if x["case"] in STEPS and x["metric"] == "ms"]
    most, held = max(x["length"] for x in rows), table.held(rows)
    blocks = []
    for title, of, size, chosen in (
        ("keys", f"room for {most}", lambda x: x["length"], [x for x in rows if table.room(x) == most]),
        ("room", f"{held} keys", table.room, [x for x in rows if x["length"] == held]),
    ):
        lines: dict[str, dict[int, str]] = {}
        for x in chosen:
            page = table.options(x).get("page")
            lines.setdefault(f"pages of {page}" if page else "dense", {})[size(x)] = f"{x['value']:.2f}"
        sizes = sorted({n for line in lines.values() for n in line})
        body = [[f"{label}, ms, {of}", *(line[n] for n in sizes)] for label, line in lines.items()]
        blocks.append(markdown([title, *map(str, sizes)], body))
    x = rows[0]
    what = f"{x['batch']} sequences, {x['heads']} query heads and {x['kv_heads']} of keys, of {x['dim']}"
    return "\n\n".join([*blocks, f"{what}, {x['dtype']}. {_ran(rows)}."])


def host() -> str:
    """Host time of a call, compilations over lengths that no call has seen, and the first call of a process."""
    result = _cpu()
    overhead, compiled = result["overhead"], result["compilations"]
    rows = [[name, f"{overhead['microseconds'][name]:.0f}", f"{x:.1f}"] for name, x in overhead["ratios"].items()]
    counts = ", ".join(f"{name} {x['unseen lengths']}" for name, x in compiled["kinds"].items())
    first = [
        [f"{name}, {state} caches", *(f"{x[column]:.1f}" for column in ("clock", "processor", "imports"))]
        for name, states in result["first"]["seconds"].items()
        for state, x in states.items()
    ]
    return (
        f"{markdown(['host time of a call', 'µs', '÷ an empty operator'], rows)}\n\n{_machine(result, 'overhead')}.\n\n"
        f"Kernels compiled over {compiled['lengths']} unseen lengths: {counts}. {_machine(result, 'compilations')}.\n\n"
        f"{markdown(['first call of a process', 's', 's of processors', 'of them imports'], first)}\n\n"
        f"{_machine(result, 'first')}."
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
    return f"{markdown(headings, rows)}\n\n{len(entries)} rows for six targets in `bench/results/static.csv`."


def features() -> str:
    """Which features each backend takes, and which it refuses only together."""
    answers = support.read()
    alone = {name: _alone(answers, name) for name in support.BACKENDS}
    rows = []
    for factor, values in support.FACTORS.items():
        found = [[x for x in values if (factor, x) in alone[name]] for name in support.BACKENDS]
        cells = ("all" if len(taken) == len(values) else ", ".join(taken) for taken in found)
        rows.append([factor, ", ".join(values), *cells])
    nowhere = [pair for pair, said in answers.items() if support.YES not in said.values()]
    lines = [markdown(["", "can be", *(f"`{name}`" for name in support.BACKENDS)], rows), ""]
    lines.append(f"Refused together by every backend: {_listed(nowhere)}.")
    for name, own in alone.items():
        refused = [pair for pair, said in answers.items() if said[name] != support.YES and set(pair) <= own]
        if more := [pair for pair in refused if pair not in nowhere]:
            lines.append(f"By `{name}` also: {_listed(more)}.")
    counts = (f"`{name}` {sum(x[name] == support.YES for x in answers.values())}" for name in support.BACKENDS)
    lines.append(f"Taken of {len(answers)} pairs: {', '.join(counts)}.")
    return "\n".join(lines)


def _alone(answers: dict[support.Pair, dict[str, str]], backend: str) -> set[support.Feature]:
    """What a backend takes beside something."""
    return {x for pair, said in answers.items() if said[backend] == support.YES for x in pair}


def _listed(pairs: Iterable[support.Pair]) -> str:
    return ", ".join(" with ".join(f"`{factor}={value}`" for factor, value in pair) for pair in pairs)


PARTS: dict[str, Callable[[], str]] = {
    x.__name__: x for x in (features, plain, everyday, modifiers, additive, memory, ragged, decoding, host, static)
}


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
