"""Plots of the tables that bench.run and bench.ragged write. Nothing is measured here.

    python -m bench.plot                             plots of bench/results/cpu.csv, saved beside it
    python -m bench.plot bench/results/ragged.csv    a decoding step, by number of keys and by cache capacity
    python -m bench.plot FILE... [--out STEM]        several tables as one, saved as STEM_throughput.png and so on

A plot is skipped if the tables hold no data for it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import seaborn
import seaborn.objects as so
from matplotlib.figure import Figure

from bench import labels
from bench.harness import argtypes, table
from bench.harness.clock import DIRECTIONS
from bench.harness.providers import OURS
from bench.harness.samples import ADDITIVE, GRID, MODIFIED

# Blue for fused_attn, warm colours for torch, black for naive, grey for an unknown provider.
STYLES = {
    "fused_attn": ("#1f5fa8", "o"), "hopper": ("#0b2f5e", "D"), "hopper unordered": ("#4a6fa5", "d"),
    "triton": ("#1f5fa8", "o"), "tiled": ("#7fa7d1", "s"), "sdpa": ("#4f86c6", "v"), "reference": ("#b9cde4", "x"),
    "torch": ("#d1742f", "^"), "cudnn": ("#5b8c2a", "^"), "flash": ("#d1742f", "<"), "efficient": ("#c9a227", ">"),
    "math": ("#a58a6f", "+"), "flex": ("#8e4fa8", "P"), "naive": ("#333333", "x"), "sage": ("#c2477f", "*"),
    "cudnn_frontend": ("#2f8c78", "1"), "xformers": ("#7a7a2a", "2"),
}  # fmt: skip
LABELS = {
    **{name: f"fused_attn, {name}" for name in ("hopper", "hopper unordered", "triton", "tiled", "sdpa")},
    "torch": "torch SDPA", "flex": "FlexAttention", "naive": "naive",
}  # fmt: skip
PLACE = ["case", "provider", "direction", "length", "dim"]  # identifies a measurement


def framed(rows: list[table.Row]) -> pd.DataFrame:
    found = pd.DataFrame(rows, columns=table.COLUMNS)
    return found.assign(label=found.provider.map(lambda x: LABELS.get(x, x)))


def with_directions(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of forward and backward if both were timed, else all rows."""
    split = set(DIRECTIONS[:2]) <= set(rows.direction)
    return rows[rows.direction.isin(DIRECTIONS[:2])] if split else rows


def unit(largest: float) -> tuple[float, str]:
    """The factor from TFLOP/s to the unit of an axis, and the unit's name."""
    return (1.0, "TFLOP/s") if largest >= 1.0 else (1000.0, "GFLOP/s")


def caption(rows: pd.DataFrame) -> str:
    """Device, versions and commit."""
    found = []
    for x in rows.drop_duplicates(["device", "threads", "commit"]).to_dict("records"):
        changed = " (modified)" if x["modified"] == "True" else ""
        names = ("torch", "triton", "cudnn", "driver") if pd.notna(x["cuda"]) else ("torch",)
        versions = [f"{name} {x[name]}" for name in names if pd.notna(x[name])]
        found.append(f"{', '.join([table.processors(x), *versions])}, commit {x['commit'][:10]}{changed}")
    return "\n".join(dict.fromkeys(found))


def looks(rows: pd.DataFrame) -> dict[str, Any]:
    """Scales for the colours and markers of providers."""
    styles = {x.label: STYLES.get(x.provider, ("#888888", ".")) for x in rows.itertuples()}
    colours, markers = ({name: style[i] for name, style in styles.items()} for i in (0, 1))
    return {"color": so.Nominal(colours, order=list(styles)), "marker": so.Nominal(markers, order=list(styles))}


def log(ticks: Iterable[float] | None = None, **options: Any) -> so.Continuous:
    scale = so.Continuous(trans="log").tick(**options if ticks is None else {"at": sorted(set(ticks)), "minor": 0})
    return scale.label(like=lambda x, _: f"{x / 1024:g}k" if x >= 1024 and x % 1024 == 0 else f"{x:g}")


def drawn(plot: so.Plot, size: tuple[float, float], note: str, **labels: str) -> Figure:
    figure = plt.figure(figsize=size, layout="constrained")
    theme = seaborn.axes_style("whitegrid") | seaborn.plotting_context("paper") | {"grid.alpha": 0.4}
    plot.label(**{"color": "", "marker": "", "linestyle": "", "fill": ""} | labels).theme(theme).on(figure).plot()
    figure.supxlabel(note, fontsize=7)
    for legend in figure.legends:
        legend.set_bbox_to_anchor((1, 0.5))
    return figure


def throughput(rows: pd.DataFrame) -> Figure | None:
    """TFLOP/s by length, a column for each head dim and mask, a row for each direction, and the rate of a matmul."""
    found = with_directions(rows[(rows.metric == "tflops") & rows.case.isin(GRID)])
    if found.empty:
        return None
    top = rows[(rows.case == "matmul") & rows.threads.isin(found.threads)].value.median()
    factor, name = unit(max(top, found.value.max()))
    panels = found.case.map({"plain": "full"}).fillna(found.case) + found.dim.map(", D {:.0f}".format)
    found = found.assign(panel=panels, **{x: factor * found[x] for x in ("value", "low", "high")})
    size = (3.6 * panels.nunique() + 1.6, 2.7 * found.direction.nunique() + 1)
    note = f"{found.dtype.iloc[0]}, median of {found.samples.iloc[0]:.0f} rounds (shade: 10th to 90th percentile)"
    figure = drawn(
        so.Plot(found, "length", "value", color="label", marker="label", ymin="low", ymax="high")
        .facet("panel", "direction").add(so.Line()).add(so.Band(alpha=0.12), legend=False)
        .scale(x=log(found.length), **looks(found)).limit(y=(0, 1.05 * max(factor * top, found.high.max()))),
        size, f"{note}\ndashed: matmul. {caption(found)}", x="sequence length", y=name,
    )  # fmt: skip
    for axes in figure.axes:
        axes.axhline(factor * top, color="#999999", ls="--", lw=1)
    return figure


def speed(rows: pd.DataFrame) -> Figure | None:
    """Speedup over the naive implementation, by modifier and direction."""
    found = with_directions(rows[(rows.metric == "speedup") & (rows.against == "naive") & rows.case.isin(MODIFIED)])
    if "fused_attn" in set(found.provider):
        found = found[found.provider != "tiled"]
    if found.empty:
        return None
    found = found.assign(case=found.case.map(lambda name: labels.CASES[name].replace("`", "")))
    cases = found.groupby("case").value.max().sort_values(ascending=False).index.tolist()
    x, dodge = found.iloc[0], so.Dodge(by=["color"])
    note = f"{x['dtype']}, B {x.batch:.0f}, length {x.length:.0f}, {x.heads:.0f} heads of {x.dim:.0f}"
    figure = drawn(
        so.Plot(found.assign(text=found.value.map("  {:.1f}".format)), "value", "case", color="label")
        .facet("direction").add(so.Bar(alpha=1, edgewidth=0), dodge, orient="y")
        .add(so.Range(color="k", linewidth=0.8), dodge, orient="y", xmin="low", xmax="high", legend=False)
        .add(so.Text(color="k", halign="left", fontsize=7), dodge, orient="y", text="text", x="high", legend=False)
        .scale(y=so.Nominal(order=cases), color=looks(found)["color"]).limit(x=(0, 1.15 * found.high.max())),
        (4.2 * found.direction.nunique() + 1.6, 0.17 * found.label.nunique() * len(cases) + 1.6),
        f"{note} (whiskers: 10th to 90th percentile of rounds)\n{caption(found)}", x="speedup over naive", y="",
    )  # fmt: skip
    for axes in figure.axes:
        axes.axvline(1, color="black", lw=0.8)
    return figure


def memory(rows: pd.DataFrame) -> Figure | None:
    """Peak memory of one call beyond its inputs, on log axes: a line of slope one is linear."""
    found = rows[(rows.metric == "peak_bytes") & (rows.value > 0)]
    if found.empty:
        return None
    case = found.groupby("case", sort=False).length.nunique().idxmax()
    found = found[found.case == case]
    found = with_directions(found[found.dim == found.dim.iloc[0]])
    x = found.iloc[0]
    strokes = dict(zip(found.direction.unique(), ("-", "--", ":"), strict=False))
    return drawn(
        so.Plot(found.assign(mib=found.value / 2**20), "length", "mib", color="label", marker="label")
        .add(so.Line(), linestyle="direction")
        .scale(x=log(found.length), y=log(), linestyle=strokes, **looks(found)),
        (7.8, 4.6), f"{case}, {x.heads:.0f} heads of {x.dim:.0f}, {x['dtype']}\n{caption(found)}",
        x="sequence length", y="peak memory beyond the inputs, MiB",
    )  # fmt: skip


def roofline(rows: pd.DataFrame) -> Figure | None:
    """Throughput by arithmetic intensity, below the rates of a copy and of a matmul on the same machine."""
    rows = rows[rows.threads == rows.threads.min()]  # the rates hold for one number of threads
    tops, copies = (rows[rows.case == name] for name in ("matmul", "copy"))
    # The operations of additive scores are not those of a product.
    found = with_directions(rows[rows.provider.isin(["fused_attn", *OURS, "torch"]) & ~rows.case.isin(ADDITIVE)])
    wide = found.pivot_table("value", [*PLACE, "label"], "metric").reset_index()
    if tops.empty or copies.empty or not {"intensity", "tflops"} <= set(wide):
        return None
    top, rate = tops.value.median(), copies.value.median()  # TFLOP/s, GB/s
    factor, name = unit(top)
    kind = wide.case.map({"plain": "full", "causal": "causal"}).fillna("other")
    shapes = {"marker": {"full": "o", "causal": "^", "other": "s"}, "fill": {x: x == "forward" for x in DIRECTIONS}}
    figure = drawn(
        so.Plot(wide.assign(rate=factor * wide.tflops, kind=kind), "intensity", "rate", color="label")
        .add(so.Dot(pointsize=5), marker="kind", fill="direction")
        .scale(x=log(), y=log(), color=looks(wide)["color"], **shapes),
        (7.6, 4.8), f"{found.dtype.iloc[0]}. Line: a copy at {rate:.0f} GB/s, a matmul at {factor * top:.0f} {name}\n"
        + caption(found), x="arithmetic intensity: operations per byte of operands and results", y=name,
    )  # fmt: skip
    knee = 1000 * top / rate
    roof = [min(knee, wide.intensity.min()) / 2, knee, max(knee, wide.intensity.max()) * 2]
    figure.axes[0].plot(roof, [factor * min(top, rate * x / 1000) for x in roof], color="#999999", lw=1.5)
    return figure


def decoding(rows: pd.DataFrame) -> Figure | None:
    """A decoding step, by the number of keys in a cache of one capacity, and by capacity for one number of keys."""
    found = rows[(rows.metric == "ms") & rows.case.isin(["decode", "decode_paged"])]
    if found.empty:
        return None
    steps = found.to_dict("records")
    most, held = found.length.max(), table.held(steps)
    found = found.assign(room=[table.room(x) for x in steps], cache=found.case.map({"decode": "dense"}).fillna("paged"))
    panels = {
        f"by keys, capacity {most:.0f}": found[found.room == most].assign(size=lambda x: x.length),
        f"by capacity, {held:.0f} keys": found[found.length == held].assign(size=lambda x: x.room),
    }
    x = found.iloc[0]
    note = f"{x.batch:.0f} sequences, {x.heads:.0f} query heads, {x.kv_heads:.0f} KV heads of {x.dim:.0f}, {x['dtype']}"
    colours, markers = {"dense": "#1f5fa8", "paged": "#d1742f"}, {"dense": "o", "paged": "s"}
    return drawn(
        so.Plot(pd.concat(panels, names=["panel", "row"]).reset_index(), "size", "value", color="cache", marker="cache")
        .facet("panel").share(x=False).add(so.Line()).add(so.Band(alpha=0.15), ymin="low", ymax="high", legend=False)
        .scale(color=colours, marker=markers).limit(x=(0, None), y=(0, None)),
        (9.4, 4.0), f"{note} (shade: 10th to 90th percentile)\n{caption(found)}", x="keys", y="ms per step",
    )  # fmt: skip


PICTURES: dict[str, Callable[[pd.DataFrame], Figure | None]] = {
    x.__name__: x for x in (throughput, speed, memory, roofline, decoding)
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", type=argtypes.file, default=[table.RESULTS / "cpu.csv"], metavar="FILE")
    parser.add_argument("--out", type=Path, metavar="STEM", help="default: the first table's path without suffix")
    args = parser.parse_args(argv)
    rows = table.read(*args.tables)
    figures = {name: draw(framed(rows)) for name, draw in PICTURES.items()} if rows else {}
    stem = args.out or args.tables[0].with_suffix("")
    for name, figure in figures.items():
        if figure is not None:
            target = stem.with_name(f"{stem.name}_{name}.png")
            figure.savefig(target, dpi=150, bbox_inches="tight")
            plt.close(figure)
            print(target)
    if not any(figures.values()):
        parser.error(f"FILE: no data for any plot in {', '.join(map(str, args.tables))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
