"""Benchmark results as a long CSV table, one figure per row.

A row has the run (case, provider, direction, sizes), one metric (median, 10th and 90th percentile, number of samples),
and the environment (device, versions, commit, whether the tree was modified). A row without a metric gives the reason
in `status` and `reason`.

length counts queries; the number of keys is the case's. share is the largest error of the run's outputs and gradients,
as a share of what the tolerance rule allows (1 is the limit); error is the largest difference of out from float64.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench import ROOT
from fused_attn import tuning

RESULTS = ROOT / "bench" / "results"
WHAT = ("case", "provider", "direction", "length", "batch", "heads", "kv_heads", "dim", "dtype", "options", "config")
FIGURE = ("metric", "value", "low", "high", "samples", "against", "status", "reason", "share", "error")
WHERE = (
    "device", "arch", "threads", "load", "python", "torch", "triton", "cuda", "cudnn", "driver", "commit", "modified",
    "time",
)  # fmt: skip
COLUMNS = (*WHAT, *FIGURE, *WHERE)
NUMBERS = {"length": int, "batch": int, "heads": int, "kv_heads": int, "dim": int, "samples": int, "threads": int}
NUMBERS |= dict.fromkeys(("value", "low", "high", "share", "error", "load"), float)

Row = dict[str, Any]


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """The median, the 10th and the 90th percentile."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return statistics.median(samples), deciles[0], deciles[-1]


def figure(metric: str, samples: list[float], **more: Any) -> Row:
    """The columns of one figure."""
    middle, low, high = quantiles(samples)
    return {"metric": metric, "value": middle, "low": low, "high": high, "samples": len(samples), **more}


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write all rows to a temporary file and rename it, so that the table is never incomplete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    with draft.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        for row in rows:
            table.writerow({name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()})
    draft.replace(path)


def read(*paths: Path) -> list[Row]:
    """Rows of several tables, with numbers converted; empty cells are left out."""
    found = []
    for path in paths:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                found.append({name: NUMBERS.get(name, str)(x) for name, x in row.items() if x != ""})
    return found


# --------------------------------------------------------------------------------------------------------- where


def environment(device: str = "cpu", threads: int | None = None) -> Row:
    """Device, versions, load and commit."""
    commit = said("git", "rev-parse", "HEAD")
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "arch": tuning.architecture(torch.device("cuda")) if device == "cuda" else "cpu",
        "threads": threads or torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton") or version("pytorch-triton"),
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if device == "cuda" else None,
        "driver": said(*query).partition("\n")[0] if device == "cuda" else None,
        "commit": commit or f"sha256:{source()}",
        "modified": bool(said("git", "status", "--porcelain", "--", "fused_attn", "kernels", "bench/*.py")),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load": os.getloadavg()[0],
    }


def source() -> str:
    """A digest of the package and its kernels, for trees without git."""
    digest = hashlib.sha256()
    files = [file for folder in ("fused_attn", "kernels") for file in (ROOT / folder).rglob("*")]
    for file in sorted(x for x in files if x.suffix in (".py", ".json")):
        digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def processors(row: Row) -> str:
    """A row's device, with the number of threads on a CPU."""
    count = row["threads"]
    return f"{row['device']}, {count} thread{'s' * (count > 1)}" if row["arch"] == "cpu" else row["device"]


def options(row: Row) -> dict[str, str]:
    """A row's options by name."""
    return dict(x.split("=") for x in row.get("options", "").split())


def room(row: Row) -> int:
    """Capacity of the cache of a decoding step, in keys."""
    return int(options(row)["room"])


def held(rows: list[Row]) -> int:
    """The number of keys that was measured with the most capacities, among rows of decoding steps."""
    rooms: dict[int, set[int]] = {}
    for row in rows:
        rooms.setdefault(row["length"], set()).add(room(row))
    return max(rooms, key=lambda length: len(rooms[length]))


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if x.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def said(*command: str) -> str:
    """The output of a command, empty if it fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
