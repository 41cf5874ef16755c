"""The host side of the kernels: the only code that names fused_attn.kernels."""

from __future__ import annotations

from typing import Any


def launch(kernel: Any, grid: int, *args: Any, **options: Any) -> Any:
    """Every launch of every kernel. A check that compiles or counts instead of running replaces this one function.

    What has been recorded is replayed only while this function stands here, so a replacement sees every launch.
    """
    from .replay import launch

    return launch(kernel, grid, args, options)


LAUNCH = launch
