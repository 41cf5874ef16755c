"""`python -m fused_attn`: its report, and the detection of a wrong backend."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

import fused_attn
from fused_attn import __main__ as command
from fused_attn import testing
from fused_attn.backends.tiled import attention
from fused_attn.runtime import dispatch
from tests import ROOT

CPU = torch.device("cpu")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three cases are enough to see how the command behaves, and no clock is needed."""
    cases = {name: testing.CASES[name] for name in ("plain", "sink", "head_dim_5")}
    monkeypatch.setattr(testing, "CASES", cases)
    figures = {"fused_attn": {"forward": 1.0}, "torch": {"forward": 2.0}}
    timing = {"shape": (1, 8, 16, 4), "dtype": "float32", "backend": "sdpa", "milliseconds": figures}
    monkeypatch.setattr(command, "timing", lambda device: timing)
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # `triton` refuses, with a reason to report


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["fused_attn", "--device", "cpu", *arguments])
    return command.main(), capsys.readouterr().out


@pytest.mark.usefixtures("short")
def test_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    code, printed = run(monkeypatch, capsys, "--json")
    report = json.loads(printed)
    assert code == 0
    assert report["ok"] is True
    assert report["machine"]["versions"]["torch"] == torch.__version__
    assert list(report["backends"]) == list(fused_attn.BACKENDS)
    assert report["backends"]["hopper"]
    assert "TRITON_INTERPRET" in report["backends"]["triton"][0]
    found = {row["backend"]: (row["passed"], row["refused"], row["failures"]) for row in report["parity"]}
    # head_dim_5 is not a core case; torch's operator has no sink.
    assert found == {"sdpa": (1, 1, []), "tiled": (2, 0, []), "reference": (2, 0, [])}
    assert all(0 < row["share"] <= 1 for row in report["parity"])


@pytest.mark.usefixtures("short")
def test_a_wrong_gradient_fails_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    backward = attention.backward

    def wrong(*args: Any) -> dict[str, torch.Tensor]:
        return {name: x * 1.001 if name == "k" else x for name, x in backward(*args).items()}

    monkeypatch.setattr(attention, "backward", wrong)
    code, printed = run(monkeypatch, capsys)
    assert code == 1
    assert "A BACKEND IS WRONG" in printed
    assert "dk" in printed
    assert "dv:" not in printed
    words = r"sdpa +float32 +1 passed, +1 not supported here, 0 failed; largest error \d+% of the tolerance"
    assert re.search(words, printed)


@pytest.mark.usefixtures("short")
def test_a_crash_fails_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def crash(*args: Any) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(dispatch.TORCH_BACKENDS["reference"], "attention", crash)
    code, printed = run(monkeypatch, capsys, "--json")
    assert code == 1
    failures = {row["backend"]: row["failures"] for row in json.loads(printed)["parity"]}
    assert "ZeroDivisionError" in failures["reference"][0]


def test_timing() -> None:
    figures = command.timing(CPU)
    assert figures["backend"] in fused_attn.BACKENDS
    for name in ("fused_attn", "torch"):
        assert figures["milliseconds"][name]["forward and backward"] > figures["milliseconds"][name]["forward"] > 0


def test_as_a_command() -> None:
    """The real thing, whole, in a process of its own; a backend chosen in the environment is left aside."""
    environment = {**os.environ, "FUSED_ATTN_BACKEND": "reference", "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "fused_attn", "--json", "--device", "cpu"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FUSED_ATTN_BACKEND" in done.stderr
    report = json.loads(done.stdout)
    assert report["timing"]["backend"] == "sdpa"
    core = sum("core" in case.tags for case in testing.CASES.values())
    for row in report["parity"]:
        assert row["passed"] + row["refused"] == core
    assert {row["backend"] for row in report["parity"] if not row["refused"]} == {"tiled", "reference"}
