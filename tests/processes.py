"""Commands run in processes of their own."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path


def run(*command: object, cwd: Path, path: tuple[Path, ...] = ()) -> str:
    """A command's standard output; the test fails with all it said if it fails."""
    dropped = ("PYTHONPATH", "FUSED_ATTN_BACKEND")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout
