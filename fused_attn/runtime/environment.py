"""`environment.backend`: the value of FUSED_ATTN_BACKEND at each access, None where it is unset or empty.

A module attribute, because dynamo guards on these: a compiled function is retraced if the variable changes. A value
read from `os.environ` while tracing would be kept.
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
    """The same as `backend`. `os.environ.get` encodes and decodes; a lookup in its table takes a tenth of the time."""
    environ = os.environ
    try:
        if not environ._data.get(_KEY):  # type: ignore[attr-defined]
            return None
    except AttributeError:  # _data is private
        pass
    return environ.get(_NAME) or None
