"""Fused attention for every device, with every derivative: score, softmax and weighted sum in one pass over the keys.

>>> import torch, fused_attn
>>> q, k, v = (torch.randn(2, 8, 128, 64) for _ in range(3))
>>> out = fused_attn.attention(q, k, v, causal=True)
"""

import sys as _sys
from importlib import import_module as _import_module
from importlib.machinery import ModuleSpec as _ModuleSpec
from importlib.util import module_from_spec as _module_from_spec
from pathlib import Path as _Path
from types import ModuleType as _ModuleType

# An installed package contains the kernels; in a checkout or editable install they are a sibling directory. Only that
# directory becomes importable: with its parent in __path__, setup.py would be a module of this package.
_here = _Path(__file__).resolve().parent
if not (_here / "kernels").is_dir() and (_here.parent / "setup.py").is_file():
    _spec = _ModuleSpec(f"{__name__}.kernels", None, is_package=True)
    _spec.submodule_search_locations = [str(_here.parent / "kernels")]
    kernels = _sys.modules.setdefault(_spec.name, _module_from_spec(_spec))

from . import deprecated as _deprecated  # noqa: E402
from . import scores  # noqa: E402
from .api.attention import attention, explain, merge_states, warmup  # noqa: E402
from .api.decode import attention_decode  # noqa: E402
from .api.paged_cache import CacheFullError, PagedKVCache  # noqa: E402
from .api.sdpa import scaled_dot_product_attention  # noqa: E402
from .api.statistics import attention_map, attention_stats  # noqa: E402
from .api.varlen import attention_varlen  # noqa: E402
from .runtime.dispatch import BACKENDS, Explanation  # noqa: E402
from .spec.problem import BackendError, Mask, TransformError, debug  # noqa: E402

_deprecated.install()
__version__ = "0.1.0"
__all__ = [
    "BACKENDS",
    "BackendError",
    "CacheFullError",
    "Explanation",
    "Mask",
    "PagedKVCache",
    "TransformError",
    "attention",
    "attention_decode",
    "attention_map",
    "attention_stats",
    "attention_varlen",
    "compat",
    "debug",
    "explain",
    "merge_states",
    "modules",
    "scaled_dot_product_attention",
    "scores",
    "testing",
    "viz",
    "warmup",
]


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def __getattr__(name: str) -> _ModuleType:
    if name in ("compat", "modules", "testing", "viz"):
        return _import_module(f".{name}", __name__)
    later = "; it is not implemented yet" if name in ("parallel", "record") else ""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{later}")
