"""What can be held on a CPU that others share: memory, which is counted and not timed; and that the benchmark runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import memory

ROOT = Path(__file__).resolve().parent.parent
SCORES = memory.HEADS * 4  # bytes of one entry of every head's score matrix

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is counted by Linux")


@pytest.mark.parametrize("direction", memory.DIRECTIONS)
def test_tiled_memory_is_linear_in_length(direction: str) -> None:
    """Four times the length is about four times the memory, and far from sixteen: the score matrix is never there."""
    short, long = 2048, 8192
    peaks = {length: memory.peak("tiled", direction, length) for length in (short, long)}
    assert peaks[long] < 6 * peaks[short]
    assert peaks[long] < 0.1 * SCORES * long**2


def test_the_meter_sees_a_score_matrix() -> None:
    assert memory.peak("naive", "forward", 2048) > SCORES * 2048**2


def test_bench_writes_what_plots_are_drawn_from(tmp_path: Path) -> None:
    result = tmp_path / "cpu.json"
    run = [sys.executable, "-m", "bench.cpu", "--quick", "--out", str(result), "plain", "modifiers"]
    subprocess.run(run, cwd=ROOT, check=True, capture_output=True)
    found = json.loads(result.read_text())
    for entry in (*found["plain"], *found["modifiers"]):
        assert entry["ratio"] > 0
        assert len(entry["samples"]["ours"]) == len(entry["samples"]["peer"])
    assert {x["backend"] for x in found["plain"]} == {"sdpa"}
    assert {"commit", "torch", "device"} <= found["environment"]["modifiers"].keys()

    pytest.importorskip("matplotlib")
    subprocess.run([sys.executable, "-m", "bench.plot", str(result)], cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "cpu_speed.png").stat().st_size > 10_000
