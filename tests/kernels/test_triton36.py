"""A subset of the parity tests under triton 3.6.0, which comes with the torch of the reference GPU.

The tests marked triton36 run again, in a process of their own, with the older triton in front of the installed one.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fused_attn import testing
from tests import ROOT

VERSION = "3.6.0"
SCRIPT = f"""
import sys, pytest, triton
assert triton.__version__ == {VERSION!r}, (triton.__version__, triton.__file__)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-m", "triton36", "tests/backends/test_parity.py"]))
"""


@pytest.mark.slow
def test_core_cases() -> None:
    pytest.importorskip("triton")
    if importlib.metadata.version("triton") == VERSION:
        pytest.skip(f"triton is {VERSION} here, and every parity test runs under it")
    folder = Path(os.environ.get("FUSED_ATTN_TRITON36") or ROOT / ".venv" / "triton36")
    if not (folder / "triton").is_dir():
        pytest.skip(f"triton {VERSION} is not in {folder}; set FUSED_ATTN_TRITON36, or let `make test` install it")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(folder), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) >= sum("core" in case.tags for case in testing.CASES.values())
    assert "skipped" not in done.stdout.splitlines()[-1]
