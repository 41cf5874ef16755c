"""Writes the documents' figures from the raw results, and nothing else does: no number there is typed by hand.

python -m bench.report             rewrite what stands between <!-- name --> and <!-- /name --> in README.md and docs/
python -m bench.report --check     exit with an error where a document is not what the results say
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

from bench import ROOT, labels, support
from bench.harness import memory as meter
from bench.harness import table
from bench.harness.samples import ADDITIVE, EVERYDAY, GRID, MODIFIED

RESULTS = ROOT / "bench" / "results"
DIRECTIONS = ("forward", "forward+backward")
STEPS = ("decode", "decode_paged")
SLOW = 0.97  # a case below it is listed
HEADLINE = ("causal", "window_causal", "bias_1hmn", "softcap", "padding_bool_b11n", "one_query_300")
PEERS = {"naive": "naive", "flex": "FlexAttention", "torch": "torch SDPA"}


def markdown(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    headings = list(headings)
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _machine(result: dict[str, Any], part: str) -> str:
    where = result["environment"][part]
    return f"{where['device']}, {where['threads']} threads, torch {where['torch']}, commit {where['commit'][:10]}"


def _ran(rows: list[table.Row]) -> str:
    """Where rows of the benchmark's table are from: the commits by machine."""
    places: dict[str, set[str]] = {}
    for x in rows:
        places.setdefault(f"{table.processors(x)}, torch {x['torch']}", set()).add(x["commit"][:10])
    return "; ".join(f"{name}, commit {' and '.join(sorted(places[name]))}" for name in sorted(places))


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
    body = [[labels.CASES[name], *(_spread(found.get((name, *c))) for c in columns)] for name in EVERYDAY]
    headings = [f"{d}, {n} thread{'s' * (n > 1)}" for n, d in columns]
    return f"{markdown(['', *headings], body)}\n\n{_ran(rows)}."


def modifiers() -> str:
    """Each modifier against whole matrices, and against the peers that have it."""
    rows = [x for x in _speedups() if x["case"] in MODIFIED]
    found = {(x["case"], x["against"], x["direction"]): x for x in rows}
    columns = [c for c in ((p, d) for p in PEERS for d in DIRECTIONS) if any(c == key[1:] for key in found)]
    names = dict.fromkeys(x["case"] for x in rows)
    body = [[labels.CASES[name], *(_spread(found.get((name, *c))) for c in columns)] for name in names]
    headings = [f"vs {PEERS[p]}, {direction}" for p, direction in columns]
    return f"{markdown(['', *headings], body)}\n\n{_ran(rows)}."


def additive() -> str:
    """Additive scores against their naive form: its time, and its memory at the peak."""
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
    headings = ["", "speed vs naive", "MiB, `tiled`", "MiB, naive", "share of naive's"]
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
    titles = {"tiled": "`tiled`", "naive": "naive"}
    body = [
        [f"{title}, {direction}", *(found.get((name, direction, n), "") for n in lengths)]
        for name, title in titles.items()
        for direction in DIRECTIONS
    ]
    return f"{markdown(['MiB', *map(str, lengths)], body)}\n\n{_ran(rows)}."


def ragged() -> str:
    """A ragged batch, packed, against padded calls of torch's own function."""
    rows = [x for x in table.read(RESULTS / "ragged.csv") if x["case"] == "ragged" and x["metric"] == "speedup"]
    found = {(x["provider"], x["direction"], x["threads"], x["against"]): x for x in rows}
    titles = {"padded": "masked", "unmasked": "unmasked"}
    columns = [(n, name) for n in sorted({x["threads"] for x in rows}) for name in titles]
    body = [
        [f"`{name}`, {direction}", *(_spread(found[(name, direction, *c)]) for c in columns)]
        for name in dict.fromkeys(x["provider"] for x in rows)
        for direction in DIRECTIONS
    ]
    headings = [f"vs {titles[name]}, {n} thread{'s' * (n > 1)}" for n, name in columns]
    x = rows[0]
    fill = f"{100 * float(table.options(x)['fill']):.0f}%"
    sizes = f"{x['batch']} sequences of at most {x['length']}, together {fill} of the padded batch, {x['heads']} heads"
    return f"{markdown(['', *headings], body)}\n\n{sizes} of {x['dim']}, {x['dtype']}. {_ran(rows)}."


def decoding() -> str:
    """A step of decoding by keys and by capacity."""
    rows = [x for x in table.read(RESULTS / "ragged.csv") if x["case"] in STEPS and x["metric"] == "ms"]
    most, held = max(x["length"] for x in rows), table.held(rows)
    blocks = []
    for title, of, size, chosen in (
        ("keys", f"capacity {most}", lambda x: x["length"], [x for x in rows if table.room(x) == most]),
        ("capacity", f"{held} keys", table.room, [x for x in rows if x["length"] == held]),
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
    result = json.loads((RESULTS / "host.json").read_text())
    overhead, compiled = result["overhead"], result["compilations"]
    rows = [[name, f"{overhead['microseconds'][name]:.0f}", f"{x:.1f}"] for name, x in overhead["ratios"].items()]
    counts = ", ".join(f"{name} {x['unseen lengths']}" for name, x in compiled["kinds"].items())
    first = [
        [f"{name}, {state} caches", *(f"{x[column]:.1f}" for column in ("clock", "processor", "imports"))]
        for name, states in result["first"]["seconds"].items()
        for state, x in states.items()
    ]
    return (
        f"{markdown(['host time of a call', 'µs', '× an empty operator'], rows)}\n\n{_machine(result, 'overhead')}.\n\n"
        f"Kernels compiled over {compiled['lengths']} unseen lengths: {counts}. {_machine(result, 'compilations')}.\n\n"
        f"{markdown(['first call of a process', 's', 'CPU s', 'of them imports'], first)}\n\n"
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
    for factor, names in support.FACTORS.items():
        present = {x: title for x in names if (title := labels.value(factor, x)) is not None}
        found = [[t for x, t in present.items() if (factor, x) in alone[name]] for name in support.BACKENDS]
        cells = ("all" if len(t) == len(present) else ", ".join(t) or "none" for t in found)
        rows.append([labels.FACTORS[factor], ", ".join(present.values()), *cells])
    nowhere = [pair for pair, said in answers.items() if support.YES not in said.values()]
    lines = [markdown(["", "values", *(f"`{name}`" for name in support.BACKENDS)], rows), ""]
    lines += ["Combinations that no backend takes:", *_listed(nowhere), ""]
    for name, own in alone.items():
        refused = [pair for pair, said in answers.items() if said[name] != support.YES and set(pair) <= own]
        if more := [pair for pair in refused if pair not in nowhere]:
            lines += [
                f"Combinations that `{name}` does not take, though it takes each feature by itself:",
                *_listed(more),
                "",
            ]
    return "\n".join(lines).rstrip()


def _alone(answers: dict[support.Pair, dict[str, str]], backend: str) -> set[support.Feature]:
    """What a backend takes beside something."""
    return {x for pair, said in answers.items() if said[backend] == support.YES for x in pair}


def _listed(pairs: Iterable[support.Pair]) -> list[str]:
    return [f"- {' with '.join(labels.feature(*x) for x in pair)}" for pair in pairs]


def headline() -> str:
    """Some speeds of one thread, for the README: each case at its longest, against torch where torch has it."""
    rows = [x for x in _speedups() if x["threads"] == 1 and x["case"] in HEADLINE]
    body, shown = [], []
    for case in HEADLINE:
        of = [x for x in rows if x["case"] == case]
        peer = "torch" if any(x["against"] == "torch" for x in of) else "naive"
        longest = max(x["length"] for x in of)
        chosen = {x["direction"]: x for x in of if x["against"] == peer and x["length"] == longest}
        shown += chosen.values()
        size = f", {longest} tokens" if longest > 1 else ""
        body.append([labels.CASES[case] + size, PEERS[peer], *(f"{chosen[d]['value']:.2f}" for d in DIRECTIONS)])
    return f"{markdown(['case', 'relative to', *DIRECTIONS], body)}\n\nMedians. {_ran(shown)}."


def slower() -> str:
    """Every case that is slower than a peer, the slowest first."""
    rows = sorted((x for x in _speedups() if x["value"] < SLOW), key=lambda x: x["value"])
    body = [
        [labels.CASES[x["case"]], x["direction"], str(x["length"]), str(x["threads"]), PEERS[x["against"]], _spread(x)]
        for x in rows
    ]
    headings = ["case", "direction", "queries", "threads", "relative to", "speed"]
    return f"{markdown(headings, body)}\n\n{_ran(rows)}."


# The parts of each document.
DOCUMENTS: dict[str, tuple[Callable[[], str], ...]] = {
    "README.md": (headline,),
    "docs/guide.md": (features,),
    "docs/benchmarks.md": (slower, everyday, plain, modifiers, additive, memory, ragged, decoding, host, static),
}


def rewritten(name: str) -> str:
    """A document with every part replaced."""
    text = (ROOT / name).read_text()
    for part in DOCUMENTS[name]:
        title, body = part.__name__, part()
        pattern = re.compile(rf"(<!-- {title} -->\n).*?(<!-- /{title} -->)", re.DOTALL)
        text, count = pattern.subn(lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text)
        if count != 1:
            raise SystemExit(f"{name}: <!-- {title} --> stands there {count} times, and once is needed")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="print the stale documents; exit code 1 if there are any")
    args = parser.parse_args()
    stale = [name for name in DOCUMENTS if rewritten(name) != (ROOT / name).read_text()]
    if args.check:
        print("\n".join(stale))
        return int(bool(stale))
    for name in stale:
        (ROOT / name).write_text(rewritten(name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
