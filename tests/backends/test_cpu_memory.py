"""Peak memory on a CPU, which does not depend on how busy the machine is."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.harness import memory

SCORES = memory.HEADS[memory.CASE] * 4  # bytes of one entry of every head's score matrix

# A backward holds more than its forward, so alone it is asked for at night.
DIRECTIONS = [pytest.param(x, marks=[] if "backward" in x else [pytest.mark.nightly]) for x in memory.DIRECTIONS]

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is counted by Linux")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_tiled_memory_is_linear_in_length(direction: str) -> None:
    """Four times the length is about four times the memory, and far from sixteen: the score matrix is never there."""
    short, long = 2048, 8192
    peaks = {length: memory.peak("tiled", direction, length) for length in (short, long)}
    assert peaks[long] < 6 * peaks[short]
    assert peaks[long] < 0.1 * SCORES * long**2


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_additive_memory(direction: str) -> None:
    """Less than a twentieth of what the eager form holds: at least one number for each query, key and feature."""
    length, eager = 1024, memory.HEADS["additive"] * memory.DIM * 4
    assert memory.peak("tiled", direction, length, "additive") < 0.05 * eager * length**2
    assert memory.peak("naive", direction, 256, "additive") > eager * 256**2


def test_memory_meter_detects_a_score_matrix() -> None:
    assert memory.peak("naive", "forward", 2048) > SCORES * 2048**2
