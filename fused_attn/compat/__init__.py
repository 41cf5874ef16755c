"""Drop-in replacements for the interfaces of other libraries. They translate calls and compute nothing themselves.

>>> import fused_attn
>>> with fused_attn.compat.sdpa.scope():
...     pass
"""

from importlib import import_module
from types import ModuleType

_BUILT = ("bert_padding", "flash_attn", "sdpa", "transformers")


def __getattr__(name: str) -> ModuleType:
    if name in _BUILT:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
