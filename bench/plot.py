"""Draws tables of bench.run: throughput, speed by modifier, memory, and a roofline. Measures nothing.

    python -m bench.plot                        bench/results/cpu.csv, into pictures beside it
    python -m bench.plot bench/results/ragged.csv    a step of decoding, by keys and by room
    python -m bench.plot FILE... [--out STEM]   some tables as one; pictures are named STEM_throughput.png and so on

A picture whose figures the tables do not hold is not drawn.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from bench.harness import table
from bench.harness.clock import DIRECTIONS
from bench.harness.providers import OURS
from bench.harness.samples import ADDITIVE, GRID, MODIFIED
from bench.harness.table import Row

# Ours in blues, torch's in warm colours, whole matrices in black; an unknown provider is grey.
STYLES = {
    "fused_attn": ("#1f5fa8", "o"), "hopper": ("#0b2f5e", "D"), "hopper unordered": ("#4a6fa5", "d"),
    "triton": ("#1f5fa8", "o"), "tiled": ("#7fa7d1", "s"),
    "sdpa": ("#4f86c6", "v"), "reference": ("#b9cde4", "x"), "torch": ("#d1742f", "^"), "cudnn": ("#5b8c2a", "^"),
    "flash": ("#d1742f", "<"), "efficient": ("#c9a227", ">"), "math": ("#a58a6f", "+"), "flex": ("#8e4fa8", "P"),
    "naive": ("#333333", "x"), "sage": ("#c2477f", "*"), "cudnn_frontend": ("#2f8c78", "1"),
    "xformers": ("#7a7a2a", "2"),
}  # fmt: skip
LABELS = {
    "hopper": "fused_attn, hopper", "hopper unordered": "fused_attn, hopper, unordered",
    "triton": "fused_attn, triton", "tiled": "fused_attn, tiled", "sdpa": "fused_attn, sdpa",
    "torch": "torch's own", "flex": "FlexAttention", "naive": "whole matrices",
}  # fmt: skip


def look(provider: str) -> dict[str, str]:
    colour, marker = STYLES.get(provider, ("#888888", "."))
    return {"color": colour, "marker": marker, "label": LABELS.get(provider, provider)}


def picked(rows: Iterable[Row], **wanted: object) -> list[Row]:
    return [x for x in rows if all(x.get(name) == value for name, value in wanted.items())]


def several(rows: Iterable[Row], column: str) -> list:
    """A column's values, in the order of their first rows."""
    return list(dict.fromkeys(x[column] for x in rows if column in x))


def directions_of(rows: Iterable[Row]) -> list[str]:
    """The directions to draw: forward and backward where both were timed alone, else what there is."""
    found = [x for x in DIRECTIONS if x in several(rows, "direction")]
    return found[:2] if len(found) == 3 else found


def key(label: str, **style: Any) -> Line2D:
    """An entry of a legend that stands for a colour, a marker or a stroke alone."""
    return Line2D([], [], **{"color": "#555555", "ls": "", "ms": 5, "label": label, **style})


def unit(largest: float) -> tuple[float, str]:
    """What TFLOP/s are multiplied by to be read easily, and what they are called then."""
    return (1.0, "TFLOP/s") if largest >= 1.0 else (1000.0, "GFLOP/s")


def caption(rows: list[Row]) -> str:
    """Where the figures are from: device, versions, commit."""
    found = []
    for x in rows:
        changed = " (modified)" if x["modified"] == "True" else ""
        versions = "".join(f", {name} {x[name]}" for name in ("triton", "cudnn", "driver") if name in x and "cuda" in x)
        where = f"{table.processors(x)}, torch {x['torch']}{versions}"
        found.append(f"{where}, commit {x['commit'][:10]}{changed}")
    return "; ".join(dict.fromkeys(found))


def lengths_axis(axes: Axes, lengths: list[int]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(lengths, [f"{x // 1024}k" if x >= 1024 and x % 1024 == 0 else str(x) for x in lengths])
    axes.minorticks_off()


def throughput(rows: list[Row]) -> Figure | None:
    """TFLOP/s over length, a column for each head dim and mask, a row for each direction, and the matmul above."""
    found = [x for x in picked(rows, metric="tflops") if x["case"] in GRID]
    if not found:
        return None
    directions, columns = directions_of(found), [(d, c) for d in sorted(several(found, "dim")) for c in GRID]
    columns = [(d, c) for d, c in columns if picked(found, dim=d, case=c)]
    top = statistics.median(x["value"] for x in picked(rows, case="matmul"))
    factor, name = unit(max(top, *(x["value"] for x in found)))
    size = (3.6 * len(columns) + 1.2, 2.7 * len(directions) + 1.1)
    figure, grid = plt.subplots(
        len(directions), len(columns), figsize=size, layout="constrained", squeeze=False, sharey=True
    )
    for line, direction in zip(grid, directions, strict=True):
        for axes, (dim, case) in zip(line, columns, strict=True):
            panel = picked(found, direction=direction, dim=dim, case=case)
            for provider in several(panel, "provider"):
                points = sorted(picked(panel, provider=provider), key=lambda x: x["length"])
                middle, low, high = ([factor * x[part] for x in points] for part in ("value", "low", "high"))
                places = [x["length"] for x in points]
                axes.plot(places, middle, lw=1.4, ms=5, **look(provider))
                axes.fill_between(places, low, high, color=look(provider)["color"], alpha=0.12, lw=0)
            axes.axhline(factor * top, color="#999999", ls="--", lw=1, label="matmul")
            mask = "causal" if case == "causal" else "full"
            axes.set_title(f"{direction}, D {dim}, {mask}", fontsize=9)
            lengths_axis(axes, sorted(several(panel, "length")))
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.25)
            axes.tick_params(labelsize=8)
        line[0].set_ylabel(name, fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("sequence length", fontsize=9)
    handles = {label: h for axes in grid.flat for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3 * len(columns), fontsize=8)
    note = f"{several(found, 'dtype')[0]}, median of {found[0]['samples']} rounds (shade: 10th to 90th percentile)"
    figure.supxlabel(f"{note}\n{caption(found)}", fontsize=7)
    return figure


def speed(rows: list[Row]) -> Figure | None:
    """How many times faster than whole matrices, by modifier and direction."""
    found = [x for x in picked(rows, metric="speedup", against="naive") if x["case"] in MODIFIED]
    found = [x for x in found if x["provider"] != "tiled"] if picked(found, provider="fused_attn") else found
    if not found:
        return None
    directions, cases, providers = directions_of(found), several(found, "case"), several(found, "provider")
    cases.sort(key=lambda case: -max(x["value"] for x in found if x["case"] == case))
    size = (4.2 * len(directions) + 1.2, 0.17 * len(providers) * len(cases) + 1.9)
    figure, grid = plt.subplots(1, len(directions), figsize=size, layout="constrained", sharey=True, squeeze=False)
    thick = 0.8 / len(providers)
    for axes, direction in zip(grid[0], directions, strict=True):
        for n, provider in enumerate(providers):
            chosen = {x["case"]: x for x in picked(found, direction=direction, provider=provider)}
            places = [i + thick * (n - (len(providers) - 1) / 2) for i, case in enumerate(cases) if case in chosen]
            bars = [chosen[case] for case in cases if case in chosen]
            if not bars:
                continue
            values = [x["value"] for x in bars]
            spread = [[x["value"] - x["low"] for x in bars], [x["high"] - x["value"] for x in bars]]
            drawn = axes.barh(
                places, values, thick * 0.92, xerr=spread, color=look(provider)["color"], label=look(provider)["label"],
                error_kw={"lw": 0.8},
            )  # fmt: skip
            axes.bar_label(drawn, [f"{x:.1f}" for x in values], fontsize=7, padding=2)
        axes.axvline(1, color="black", lw=0.8)
        axes.set_title(direction, fontsize=10)
        axes.set_xlabel("times the speed of whole matrices", fontsize=9)
        axes.margins(x=0.12)
        axes.grid(axis="x", alpha=0.25)
    grid[0][0].set_yticks(range(len(cases)), cases, fontsize=8)
    grid[0][0].invert_yaxis()
    handles = {label: h for axes in grid.flat for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), fontsize=8)
    x = found[0]
    note = f"{x['dtype']}, B {x['batch']}, length {x['length']}, {x['heads']} heads of {x['dim']}"
    figure.supxlabel(f"{note} (whiskers: 10th to 90th percentile of rounds)\n{caption(found)}", fontsize=7)
    return figure


def memory(rows: list[Row]) -> Figure | None:
    """Peak memory of one call beyond its inputs, both axes logarithmic: a line of slope one is linear."""
    found = [x for x in picked(rows, metric="peak_bytes") if x["value"] > 0]
    cases = several(found, "case")
    if not cases:
        return None
    case = max(cases, key=lambda name: len(several(picked(found, case=name), "length")))
    found = picked(found, case=case, dim=picked(found, case=case)[0]["dim"])
    figure, axes = plt.subplots(figsize=(7.8, 4.6), layout="constrained")
    directions, providers = directions_of(found), several(found, "provider")
    strokes = dict(zip(directions, ("-", "--", ":"), strict=False))
    for provider, direction in itertools.product(providers, directions):
        points = sorted(picked(found, provider=provider, direction=direction), key=lambda x: x["length"])
        style = look(provider) | {"ls": strokes[direction]}
        axes.plot([x["length"] for x in points], [x["value"] / 2**20 for x in points], **style)
    axes.set_yscale("log")
    lengths_axis(axes, sorted(several(found, "length")))
    axes.set(xlabel="sequence length", ylabel="MiB at the peak, beyond the inputs")
    x = found[0]
    axes.set_title(f"Peak memory of one call: {case}, {x['heads']} heads of {x['dim']}, {x['dtype']}", fontsize=10)
    axes.grid(alpha=0.3)
    handles = [key(x, ls=strokes[x]) for x in directions] + [key(**look(x)) for x in providers]
    axes.legend(handles=handles, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.supxlabel(caption(found), fontsize=7)
    return figure


def roofline(rows: list[Row]) -> Figure | None:
    """Throughput by arithmetic intensity, under what a copy and a matmul reach on the same machine."""
    copies, tops = picked(rows, case="copy"), picked(rows, case="matmul")
    points = [x for x in picked(rows, metric="intensity") if x["provider"] in ("fused_attn", *OURS, "torch")]
    points = [x for x in points if x["case"] not in ADDITIVE]  # whose operations are not those of a product
    if not (copies and tops and points):
        return None
    top, rate = (statistics.median(x["value"] for x in y) for y in (tops, copies))  # TFLOP/s, GB/s
    factor, name = unit(top)
    figure, axes = plt.subplots(figsize=(7.6, 4.8), layout="constrained")
    where = ("case", "provider", "direction", "length", "dim")
    fast = [x for x in picked(rows, metric="tflops") if all(name in x for name in where)]
    speeds = {tuple(x[name] for name in where): x["value"] for x in fast}
    xs = [x["value"] for x in points]
    knee = top / rate * 1000
    left, right = min(knee, *xs) / 4, max(knee, *xs) * 2
    roof = [left, knee, right]
    axes.plot(roof, [factor * min(top, rate * x / 1000) for x in roof], color="#999999", lw=1.5)
    for text, place, shift in (
        (f"matmul, {factor * top:.0f} {name}", (knee, factor * top), (4, 5)),
        (f"copy, {rate:.0f} GB/s", (left, factor * rate * left / 1000), (14, 2)),
    ):
        axes.annotate(text, place, xytext=shift, textcoords="offset points", fontsize=8, color="#666666")
    markers = {"full": "o", "causal": "^", "other": "s"}
    directions, providers = directions_of(points), several(points, "provider")
    for x in points:
        place = tuple(x[name] for name in where)
        if place not in speeds or x["direction"] not in directions:
            continue
        colour, kind = look(x["provider"])["color"], {"plain": "full", "causal": "causal"}.get(x["case"], "other")
        axes.scatter(
            x["value"], factor * speeds[place], s=26, marker=markers[kind], edgecolors=colour,
            facecolors=colour if x["direction"] == "forward" else "none",
        )  # fmt: skip
    handles = [key(look(x)["label"], color=look(x)["color"], marker="o") for x in providers]
    handles += [key(x, marker=markers[x]) for x in markers]
    handles += [key(x, marker="o", mfc=None if x == "forward" else "none") for x in directions]
    axes.set(xscale="log", yscale="log", ylabel=name)
    for axis, steps in ((axes.xaxis, (1,)), (axes.yaxis, (1, 2, 5))):
        axis.set_major_locator(LogLocator(subs=steps))
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("arithmetic intensity: operations a byte of operands and results", fontsize=9)
    axes.set_title(f"Roofline, {points[0]['dtype']}", fontsize=10)
    axes.grid(alpha=0.25, which="both")
    axes.legend(handles=handles, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.supxlabel(caption(points), fontsize=7)
    return figure


def decoding(rows: list[Row]) -> Figure | None:
    """A step of decoding: by the keys in a cache of one size, and by the size of a cache with as many keys."""
    found = [x for x in picked(rows, metric="ms") if x["case"].startswith("decode")]
    if not found:
        return None
    most, held = max(several(found, "length")), table.held(found)
    figure, grid = plt.subplots(1, 2, figsize=(9.4, 4.0), layout="constrained", sharey=True)
    panels = (
        (f"keys in a cache with room for {most}", [x for x in found if table.room(x) == most], lambda x: x["length"]),
        (f"room of a cache with {held} keys", [x for x in found if x["length"] == held], table.room),
    )
    colours = {"decode": ("#1f5fa8", "o", "dense"), "decode_paged": ("#d1742f", "s", "in pages")}
    for axes, (title, panel, place) in zip(grid, panels, strict=True):
        for case, (colour, marker, label) in colours.items():
            points = sorted(picked(panel, case=case), key=place)
            places = [place(x) for x in points]
            middle, low, high = ([x[part] for x in points] for part in ("value", "low", "high"))
            axes.plot(places, middle, lw=1.4, ms=5, color=colour, marker=marker, label=label)
            axes.fill_between(places, low, high, color=colour, alpha=0.15, lw=0)
        axes.set_xlabel(title, fontsize=9)
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
    grid[0].set_ylabel("ms a step", fontsize=9)
    grid[0].legend(fontsize=8)
    x = found[0]
    note = f"{x['batch']} sequences, {x['heads']} query heads, {x['kv_heads']} of keys, of {x['dim']}, {x['dtype']}"
    figure.supxlabel(f"{note} (shade: 10th to 90th percentile)\n{caption(found)}", fontsize=7)
    return figure


PICTURES: dict[str, Callable[[list[Row]], Figure | None]] = {
    x.__name__: x for x in (throughput, speed, memory, roofline, decoding)
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", type=Path, default=[table.RESULTS / "cpu.csv"], metavar="FILE")
    parser.add_argument("--out", type=Path, metavar="STEM", help="the first table's name without its ending")
    args = parser.parse_args(argv)
    rows = table.read(*args.tables)
    stem = args.out or args.tables[0].with_suffix("")
    for name, draw in PICTURES.items():
        if (figure := draw(rows)) is not None:
            target = stem.with_name(f"{stem.name}_{name}.png")
            figure.savefig(target, dpi=150)
            plt.close(figure)
            print(target)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
