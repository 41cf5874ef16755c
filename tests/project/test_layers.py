"""Which module may import which: layers of the package, device code on its own, no cycles."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests import KERNELS, PACKAGE

# compat, modules, parallel -> api -> dispatch -> autograd -> ops ~> launch -> kernels. A new room needs a line here.
MAY_IMPORT = {
    "checks": set(),
    "keywords": {"checks"},
    "environment": set(),
    "patterns": set(),
    "ragged": set(),
    "spans": {"checks", "ragged"},
    "description": {"checks"},
    "conditions": {"checks", "description", "patterns", "ragged", "spans"},
    "masks": {"checks", "conditions", "patterns", "ragged", "spans"},
    "spec": {"checks", "masks", "patterns", "ragged", "spans"},
    "state": set(),
    "storage": set(),
    "underived": set(),
    "tiles": {"masks", "ragged", "spec"},
    "scores": {"checks", "description", "ragged", "spec", "tiles"},
    "bind": {"checks", "scores", "spec"},
    "reference": {"scores", "spec"},
    "pieces": {"checks", "spec"},
    "torch_kernel": {"autograd", "ops", "pieces", "spec", "transforms"},
    "native": {"autograd", "checks", "ops", "pieces", "spec", "torch_kernel"},
    "additive": set(),
    "work": {"additive", "spec", "tiles"},
    "tiled": {"additive", "ragged", "scores", "spec", "state", "tiles", "work"},
    "tuning": {"spec"},
    "statistics": {"spec", "tiles", "work"},
    "launch": {"cached", "masks", "ragged", "spec", "tuning", "kernels"},
    "ops": {"checks", "spec"},
    "transforms": set(),
    "autograd": {"ops", "spec", "transforms"},
    "dispatch": {"autograd", "checks", "environment", "ops", "native", "tiled", "reference", "spec", "transforms"},
    "calls": {"autograd", "environment", "ops", "spec", "torch_kernel"},
    "varlen": {"bind", "checks", "dispatch", "keywords", "spec"},
    "nested": {"bind", "checks", "spec", "varlen"},
    "api": {"varlen", "checks", "calls", "keywords", "dispatch", "nested", "state", "bind", "spec"},
    "cache": {"cached", "checks", "spec"},
    "cached": {"checks", "spec", "storage"},
    "decode_ops": {"cached", "reference", "state", "tiled"},
    "decode": {"bind", "cached", "checks", "decode_ops", "dispatch", "keywords", "spec", "transforms"},
    "seeing": {"checks", "keywords", "varlen", "api", "bind", "dispatch", "ops", "reference", "spec", "underived"},
    "recipes": {"scores", "spec"},
    "cases": {"bind", "recipes", "spec", "tiles"},
    "absolutes": {"cases", "reference", "scores", "spec"},
    "testing": {"absolutes", "api", "cases", "dispatch", "reference", "spec", "varlen"},
    "witness": {"absolutes", "cases", "reference", "seeing", "spec", "testing"},
    "compat": {"api", "checks", "decode", "environment", "keywords", "ragged", "seeing", "spec", "underived", "varlen"},
    "modules": {"api", "checks", "masks", "scores", "seeing", "spec", "transforms"},
    "viz": {"checks"},
    "__init__": {"api", "cache", "decode", "dispatch", "scores", "seeing", "spec", "varlen"},
    "__main__": {"", "testing"},  # "" is the public surface
}
# ops finds these by name when an operator runs; that is the arrow drawn with a tilde.
LOOKED_UP = {"ops": {"launch", "native", "statistics", "tiled"}, "decode_ops": {"launch"}}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, package: tuple[str, ...]) -> set[str]:
    """The absolute names that a file imports, anywhere in it; package is the one that the file belongs to."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join((*package[: len(package) - node.level + 1], *filter(None, [node.module])))
            base = base if node.level else node.module
            # `from package import module` and `from module import name` look alike; the package's own are modules.
            inner = node.module is None or base == "fused_attn"
            found |= {f"{base}.{alias.name}" for alias in node.names} if inner else {base}
    return found


def package_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_every_room_has_its_place() -> None:
    assert {room(path) for path in package_files()} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", package_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows(path: Path) -> None:
    """Nothing imports upward, and only launch/ names the kernels."""
    here = room(path)
    package = ("fused_attn", *path.relative_to(PACKAGE).parts[:-1])
    rooms = set()
    for name in imports(path, package):
        if name.split(".")[0] == "fused_attn":
            rooms.add(name.partition(".")[2].split(".")[0])
        assert name.split(".")[0] not in ("kernels", "bench", "tests"), f"{here} imports {name}"
    assert rooms <= MAY_IMPORT[here] | {here}
    named = {
        match
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for match in re.findall(r"^fused_attn\.(\w+)", node.value)
        if (PACKAGE / match).exists() or (PACKAGE / f"{match}.py").exists() or match == "kernels"
    }
    if here not in ("__init__", "__main__"):
        assert named <= LOOKED_UP.get(here, set())


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.name)
def test_device_code_stands_alone(path: Path) -> None:
    """kernels/ imports triton, the standard library and itself."""
    allowed = {"triton", "kernels", "__future__", "typing", "math"}
    assert {name.split(".")[0] for name in imports(path, ("kernels",))} <= allowed


def test_device_code_has_no_cycles() -> None:
    below = {
        path.stem: {name.split(".")[1] for name in imports(path, ("kernels",)) if name.startswith("kernels.")}
        for path in KERNELS.glob("*.py")
    }
    while below:
        leaves = {name for name, needs in below.items() if not needs & set(below)}
        assert leaves, f"these import each other: {sorted(below)}"
        below = {name: needs for name, needs in below.items() if name not in leaves}
