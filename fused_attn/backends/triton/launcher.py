"""The one function through which every kernel is launched."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from .settings import INSTALLED

if INSTALLED:
    from . import launch_cache

# Where `recording.record` runs, it launches instead.
RECORDER: ContextVar[Any] = ContextVar("fused_attn_recorder", default=None)


def launch(kernel: Any, grid: int, *args: Any, **options: Any) -> None:
    """Launch a kernel. Code that compiles or counts instead replaces this function.

    A recorded call is replayed only while this function stands here, so a replacement sees every launch.
    """
    recorder = RECORDER.get()
    if recorder is None:
        launch_cache.launch(kernel, grid, args, options)
    else:
        recorder.launch(kernel, grid, args, options)


LAUNCH = launch  # recordings compare with it to see a replacement
