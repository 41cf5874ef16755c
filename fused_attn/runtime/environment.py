"""FUSED_ATTN_BACKEND, read when `environment.backend` is: a string, or None where it is unset or empty.

dynamo guards on the attributes of modules, so a compiled function is traced again when the variable has changed. Of
`os.environ` itself it keeps what it read while tracing.
"""

from __future__ import annotations

import os

_NAME = "FUSED_ATTN_BACKEND"
_KEY = getattr(os.environ, "encodekey", str)(_NAME)


def __getattr__(name: str) -> str | None:
    if name != "backend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return read()


def read() -> str | None:
    """As `backend`. os.environ encodes the name and decodes the value at every `get`; its table takes a tenth of it."""
    environ = os.environ
    try:
        if not environ._data.get(_KEY):  # type: ignore[attr-defined]
            return None
    except AttributeError:  # no public part of os
        pass
    return environ.get(_NAME) or None
