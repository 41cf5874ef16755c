"""Recorded launches: their values in the interpreter, and their arguments under each triton version."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_attn import testing
from fused_attn.runtime import call_cache
from fused_attn.testing.cases import Case
from tests import ROOT

pytest.importorskip("triton")

SMALL = {"hq": 4, "hkv": 2, "m": 21, "n": 40, "d": 16, "memory": "dense"}
# With what a replay must carry over: strides, groups, spans, constants, and tensors beside q, k and v.
REPLAYED = (
    Case("causal_softcap", **SMALL, causal=True, alignment="bottom_right", softcap=2.0, scale=0.3, return_lse=True),
    Case("window_bshd", **SMALL, window=(5, 9), alignment="top_left", layout="bshd"),
    Case("bias_alibi_sink", **SMALL, bias="1hmn", alibi="h", alignment="top_left", sink=True),
)  # fmt: skip


@pytest.mark.parametrize("case", REPLAYED, ids=lambda case: case.name)
def test_replays_by_value(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that is recorded, and two that are replayed on other numbers: each within its budget."""
    from tests.backends.launches.stub import replays  # imports triton

    replayed = replays(monkeypatch)
    call_cache._calls.clear()
    for seed in range(5):
        testing.check_parity(case, "triton", torch.float32, seed=seed)
    assert sum(replayed) >= 2


FILES = ("replays", "invalidation", "signatures", "recordings", "host_time")


def _checks(path: Path | None, *options: str) -> None:
    paths = [str(x) for x in (path, ROOT, os.environ.get("PYTHONPATH")) if x]
    dropped = ("PYTEST_", "FUSED_ATTN_BACKEND")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    environment |= {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(paths)}
    files = [f"tests/backends/launches/{name}.py" for name in FILES]
    plugins = [f"-p{name}" for name in ("no:cacheprovider", "no:xdist", "tests.backends.launches.fixtures")]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, *files, *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout.splitlines()[-1], done.stdout


@pytest.mark.slow
def test_launches() -> None:
    _checks(None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    (
        pytest.param(("-k", "replay or triton or descriptors"), id="what triton decides"),
        pytest.param((), id="all", marks=pytest.mark.nightly),
    ),
)
def test_launches_under_the_triton_of_the_reference_gpu(options: tuple[str, ...]) -> None:
    if importlib.metadata.version("triton") == "3.6.0":
        pytest.skip("triton is 3.6.0 here")
    folder = Path(os.environ.get("FUSED_ATTN_TRITON36") or ROOT / ".venv" / "triton36")
    if not (folder / "triton").is_dir():
        pytest.skip(f"triton 3.6.0 is not in {folder}; set FUSED_ATTN_TRITON36, or let `make test` install it")
    _checks(folder, *options)
