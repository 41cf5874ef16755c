"""Wrong options of the commands are errors of argparse: one line that names the option, and exit code 2."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch

from tests import ROOT

COUNT, SECONDS = "expected a whole number, at least 1, got", "expected a positive number of seconds, got"
WRONG = (
    ("bench.run", "--directions sideways", "--directions: expected any of forward, "),
    ("bench.run", "--rounds 0", f"--rounds: {COUNT} '0'"),
    ("bench.run", "--rounds 1.5", f"--rounds: {COUNT} '1.5'"),
    ("bench.run", "--lengths 64,-5", f"--lengths: {COUNT} '-5'"),
    ("bench.run", "--dims 0", f"--dims: {COUNT} '0'"),
    ("bench.run", "--threads 0", f"--threads: {COUNT} '0'"),
    ("bench.run", "--seconds nan", f"--seconds: {SECONDS} 'nan'"),
    ("bench.run", "--seconds soon", f"--seconds: {SECONDS} 'soon'"),
    ("bench.run", "--device tpu", "--device: expected cpu or cuda, got 'tpu'"),
    ("bench.run", f"--out {ROOT}", "--out: expected a file in a folder that exists, got "),
    ("bench.run", "--out nowhere/table.csv", "--out: expected a file in a folder that exists, got 'nowhere/table.csv'"),
    ("bench.ragged", f"--out {ROOT}", "--out: expected a file in a folder that exists, got "),
    ("bench.gpu", "parity racing", "PART: expected any of parity, "),
    ("bench.gpu", "--workers 0", f"--workers: {COUNT} '0'"),
    ("bench.gpu", "--seconds 0", f"--seconds: {SECONDS} '0'"),
    ("bench.ragged", "--threads 1 0", f"--threads: {COUNT} '0'"),
    ("bench.static", "--workers 0", f"--workers: {COUNT} '0'"),
    ("bench.static", "--check --only sm_91", "--only: no row contains 'sm_91'"),
    ("bench.tune", "--workers 0", f"--workers: {COUNT} '0'"),
    ("bench.tune", "--only sm_91", "--only: no row contains 'sm_91'"),
    ("bench.plot", "nowhere.csv", "FILE: expected a file, got 'nowhere.csv'"),
    ("bench.plot", f"{ROOT}/CHANGELOG.md", "FILE: no data for any plot in "),
    ("bench.report", "everything", "unrecognized arguments: everything"),
    ("fused_attn.__main__", "--device gpu", "--device: no such device here, 'gpu': "),
    ("fused_attn.__main__", "--device meta", "--device: no such device here, 'meta': "),
)
NO_CUDA = (
    ("bench.run", "--device cuda", "--device: torch finds no CUDA device"),
    ("fused_attn.__main__", "--device cuda", "--device: no such device here, 'cuda': "),
)


@pytest.mark.parametrize(("command", "options", "message"), WRONG + (() if torch.cuda.is_available() else NO_CUDA))
def test_a_wrong_option_is_named(
    command: str, options: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(command)
    monkeypatch.setattr(sys, "argv", [command, *options.split()])
    with pytest.raises(SystemExit) as raised:
        module.main()
    assert raised.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_bench_host_refuses_zero_calls() -> None:
    """In a process of its own, because importing it switches Triton's interpreter off."""
    command = [sys.executable, "-m", "bench.host", "compilations", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"count: {COUNT} '0'" in done.stderr
