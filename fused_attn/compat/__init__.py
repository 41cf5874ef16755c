"""Doors for callers who speak another library's words. They translate, and compute nothing.

>>> import fused_attn
>>> with fused_attn.compat.sdpa.scope():
...     pass
"""

from importlib import import_module
from types import ModuleType

_BUILT = ("sdpa", "transformers")
_LATER = ("bert_padding", "flash_attn")


def __getattr__(name: str) -> ModuleType:
    if name in _BUILT:
        return import_module(f".{name}", __name__)
    if name in _LATER:
        raise NotImplementedError(f"{__name__}.{name} is not built yet")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
