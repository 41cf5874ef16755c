"""New lengths compile nothing, and the host's time of a call."""

from __future__ import annotations

import pytest
from triton import knobs

from bench import host
from tests.backends.launches.stub import replays


def test_new_lengths_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Triton's own report of what it was replayed to compile, whoever replayed; replays included."""
    replayed = replays(monkeypatch)
    monkeypatch.setattr(knobs.compilation, "listener", None)
    found = host.compilations(12)["kinds"]
    assert {name: x["unseen lengths"] for name, x in found.items()} == dict.fromkeys(host.KINDS, 0)
    assert all(x["warm-up"] >= 1 for x in found.values())
    assert sum(replayed) >= 12 * len(host.KINDS)


# Idle machines measure 2.3 to 2.5, 3.9 to 5.0 and 5.1 to 6.3: how much autograd costs beside an operator depends on the
# processor. On a busy one another run may be better. A call that is bound again measures 17 and more.
LIMITS = {"inference": 3.0, "autograd forward": 5.8, "backward": 7.0}


def test_host_time_of_a_call() -> None:
    """As a ratio to an empty operator with the same outputs, the launch itself dropped."""
    least = dict.fromkeys(LIMITS, float("inf"))
    for _ in range(4):
        ratios = host.overhead(1200)["ratios"]
        least = {name: min(x, ratios[name]) for name, x in least.items()}
        if all(least[name] <= limit for name, limit in LIMITS.items()):
            return
    pytest.fail(f"{least} where {LIMITS} are allowed")
