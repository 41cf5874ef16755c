"""Module paths before the layers: importing one gives the module that replaced it, with a DeprecationWarning.

None was documented as public, but older pickles name them: those of `Mask` and of the errors.
"""

import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "absolutes": "testing.absolute_sums",
    "additive": "backends.tiled.additive",
    "autograd": "runtime.autograd",
    "bind": "api.bind",
    "cache": "api.paged_cache",
    "cached": "spec.decoding",
    "calls": "runtime.call_cache",
    "cases": "testing.cases",
    "checks": "spec.checks",
    "conditions": "spec.conditions",
    "decode": "api.decode",
    "decode_ops": "runtime.decode_ops",
    "description": "spec.description",
    "dispatch": "runtime.dispatch",
    "environment": "runtime.environment",
    "keywords": "api.keywords",
    "launch": "backends.triton.launcher",
    "launch.additive": "backends.triton.additive",
    "launch.cache": "backends.triton.launch_cache",
    "launch.decode": "backends.triton.decode",
    "launch.hopper": "backends.triton.hopper",
    "launch.owners": "backends.triton.tile_scheduler",
    "launch.portable": "backends.triton.portable",
    "launch.replay": "backends.triton.recording",
    "launch.statistics": "backends.triton.statistics",
    "launch.views": "backends.triton.views",
    "launch.visits": "backends.triton.block_mask",
    "masks": "spec.masks",
    "native": "backends.sdpa",
    "nested": "api.nested",
    "ops": "runtime.ops",
    "patterns": "spec.patterns",
    "pieces": "backends.sdpa.pieces",
    "ragged": "spec.ragged",
    "recipes": "testing.inputs",
    "reference": "backends.reference",
    "seeing": "api.statistics",
    "spans": "spec.spans",
    "state": "spec.state",
    "statistics": "backends.tiled.statistics",
    "storage": "spec.storage",
    "tiled": "backends.tiled.attention",
    "tiles": "backends.tiled.tiles",
    "torch_kernel": "backends.sdpa.kernel",
    "transforms": "spec.transforms",
    "underived": "runtime.no_derivative",
    "varlen": "api.varlen",
    "witness": "testing.statistics",
    "work": "backends.tiled.workspace",
}


class _Finder(MetaPathFinder, Loader):
    """Old paths as other names of the modules that replaced them. `launch`, a package then, forwards attributes."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, old = name.partition(".")
        if package != __package__ or old not in MOVED:
            return None
        return ModuleSpec(name, self, is_package=old == "launch")

    def exec_module(self, module: ModuleType) -> None:
        new = f"{__package__}.{MOVED[module.__name__.partition('.')[2]]}"
        warnings.warn(f"{module.__name__} is {new} now", DeprecationWarning, stacklevel=2)
        if module.__spec__ and module.__spec__.submodule_search_locations is not None:
            module.__getattr__ = functools.partial(getattr, import_module(new))  # type: ignore[method-assign]
        else:
            sys.modules[module.__name__] = import_module(new)


def names_of(package: str, *modules: str) -> Callable[[str], Any]:
    """`__getattr__` for a package that was one module: the names that are in its modules now."""

    def __getattr__(name: str) -> Any:
        for module in [] if name.startswith("_") else [import_module(f"{package}.{x}") for x in modules]:
            if name in vars(module):
                warnings.warn(f"{package}.{name} is {module.__name__}.{name} now", DeprecationWarning, stacklevel=2)
                return getattr(module, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__


def install() -> None:
    """Make the old paths importable."""
    if not any(isinstance(x, _Finder) for x in sys.meta_path):
        sys.meta_path.append(_Finder())
