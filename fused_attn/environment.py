"""FUSED_ATTN_BACKEND, read when `environment.backend` is: a string, or None where it is unset or empty.

dynamo guards on the attributes of modules, so a compiled function is traced again when the variable has changed. Of
`os.environ` itself it keeps what it read while tracing.
"""

from __future__ import annotations

import os


def __getattr__(name: str) -> str | None:
    if name != "backend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return os.environ.get("FUSED_ATTN_BACKEND") or None
