"""Draws bench/results/cpu.json: memory by length, and the speed of each modifier. Measures nothing.

python -m bench.plot [FILE]        writes cpu_memory.png and cpu_speed.png beside it
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULT = Path(__file__).resolve().parent / "results" / "cpu.json"
COLOURS = {"tiled": "#1f5fa8", "naive": "#b0413e"}
LABELS = {"tiled": "fused_attn, tiled", "naive": "whole matrices"}
TARGET, WINDOW_TARGET = 1.5, 3.0  # times the speed of whole matrices, for a modifier and for a window


def _caption(environment: dict[str, Any]) -> str:
    return (
        f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']},"
        f" commit {environment['commit'][:10]}"
    )


def memory(result: dict[str, Any]) -> plt.Figure:
    """Peak memory of one call beyond its inputs, both axes logarithmic: a line of slope one is linear."""
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for name in COLOURS:
        for direction, style in (("forward", "o-"), ("backward", "s--")):
            points = [x for x in result["memory"] if (x["name"], x["direction"]) == (name, direction)]
            label = f"{LABELS[name]}, {'forward' if direction == 'forward' else 'forward and backward'}"
            axes.plot(
                [x["length"] for x in points], [x["bytes"] / 2**20 for x in points], style,
                color=COLOURS[name], label=label,
            )  # fmt: skip
    ticks = sorted({x["length"] for x in result["memory"]})
    axes.set(xscale="log", yscale="log", xlabel="sequence length", ylabel="MiB beyond the inputs")
    axes.set_xticks(ticks, [str(x) for x in ticks])
    axes.minorticks_off()
    axes.set_title("Peak memory: causal attention with ALiBi, 2 heads of 64, float32", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.supxlabel(_caption(result["environment"]["memory"]), fontsize=7)
    return figure


def speed(result: dict[str, Any]) -> plt.Figure:
    """How many times faster than whole matrices, by modifier."""
    figure, axes = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    entries = result["modifiers"]
    names = list(dict.fromkeys(x["name"] for x in entries))
    for shift, (direction, colour) in enumerate((("forward", "#1f5fa8"), ("forward+backward", "#7fa7d1"))):
        chosen = {x["name"]: x for x in entries if x["direction"] == direction}
        ratios = [chosen[name]["ratio"] for name in names]
        spread = [
            [max(0.0, chosen[n]["ratio"] - chosen[n]["ratio_quantiles"][0]) for n in names],
            [max(0.0, chosen[n]["ratio_quantiles"][1] - chosen[n]["ratio"]) for n in names],
        ]
        places = [i + 0.4 * shift for i in range(len(names))]
        bars = axes.barh(places, ratios, 0.38, xerr=spread, color=colour, label=direction, error_kw={"lw": 0.8})
        axes.bar_label(bars, [f"{x:.1f}" for x in ratios], fontsize=7, padding=2)
    axes.axvline(1, color="black", lw=0.8)
    for i, name in enumerate(names):
        goal = WINDOW_TARGET if name.startswith("window") else TARGET
        axes.plot([goal, goal], [i - 0.25, i + 0.65], color="#b0413e", lw=1.5, label=None if i else "goal")
    axes.set_yticks([i + 0.2 for i in range(len(names))], names)
    axes.invert_yaxis()
    axes.set_xlabel("times the speed of whole matrices (whiskers: 10th to 90th percentile)", fontsize=9)
    axes.set_title(f"Float32, 8 heads of 64, length {entries[0]['length']}", fontsize=10)
    axes.legend(fontsize=8)
    figure.supxlabel(_caption(result["environment"]["modifiers"]), fontsize=7)
    return figure


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULT
    result = json.loads(path.read_text())
    for part, draw in (("memory", memory), ("modifiers", speed)):
        if part in result:
            target = path.with_name(f"{path.stem}_{draw.__name__}.png")
            draw(result).savefig(target, dpi=150)
            print(target)


if __name__ == "__main__":
    main()
