"""The Hopper backend: Gluon kernels for sm_90. None is built yet, so it refuses every problem."""

from __future__ import annotations

from ..spec import Problem


def why_not(p: Problem) -> list[str]:
    """Why this backend cannot run p."""
    return ["the Gluon kernels for sm_90 are not built yet"]
