"""Imports point down: from the public surface to the vocabulary, and to the kernels through backends/triton alone."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from tests import KERNELS, PACKAGE, ROOT

# From the bottom up: a module imports from its own package and from those of lower layers.
LAYERS = (
    ("deprecated",),
    ("spec",),
    ("scores", "tuning"),
    ("backends",),
    ("runtime",),
    ("api",),
    ("compat", "modules", "testing", "viz"),
)
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = (*PACKAGE.rglob("*.py"), *KERNELS.glob("*.py"), *(ROOT / "bench").rglob("*.py"))
MODULES = {module_name(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    package, found = path.relative_to(ROOT).parts[:-1], set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join((*base, *filter(None, [node.module]))).replace("fused_attn.kernels", "kernels")
            names = {f"{origin}.{alias.name}": origin for alias in node.names}
            found |= {name if name in MODULES else origin for name, origin in names.items()}
    return found


@pytest.mark.parametrize(
    "name", sorted(x for x in MODULES if x.startswith("fused_attn.") and x != "fused_attn.__main__")
)
def test_imports_point_down(name: str) -> None:
    package = name.split(".")[1]
    below = {f"fused_attn.{x}" for x, height in HEIGHT.items() if height < HEIGHT[package] or x == package}
    ours = {".".join(x.split(".")[:2]) for x in imports(MODULES[name]) if x.startswith("fused_attn")}
    others = {x.split(".")[0] for x in imports(MODULES[name])} - {"fused_attn"}
    assert ours <= below
    assert not others & {"bench", "examples", "tests"}
    assert "kernels" not in others or name.startswith("fused_attn.backends.triton.")
    assert package != "spec" or others <= {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize("name", sorted(x for x in MODULES if x.startswith("kernels.")))
def test_kernels_import_only_triton(name: str) -> None:
    allowed = {"triton", "kernels", "__future__", "typing", "math"}
    assert {x.split(".")[0] for x in imports(MODULES[name])} <= allowed


@pytest.mark.parametrize("name", sorted(x for x in MODULES if x.startswith("bench.") and x.count(".") == 2))
def test_bench_imports_point_down(name: str) -> None:
    """Commands are on top; below them the GPU evidence imports the harness, and the compiler only itself."""
    package = name.split(".")[1]
    below = {"bench", f"bench.{package}", *(["bench.harness"] if package == "evidence" else [])}
    assert {".".join(x.split(".")[:2]) for x in imports(MODULES[name]) if x.split(".")[0] == "bench"} <= below


def test_no_cycles() -> None:
    below = {name: imports(path) - {name} for name, path in MODULES.items()}
    while below:
        leaves = {name for name, needs in below.items() if not needs & set(below)}
        assert leaves, f"these import each other: {sorted(below)}"
        below = {name: needs for name, needs in below.items() if name not in leaves}
