"""Mutations of a kernel file: each wait, arrival or fence left out, each phase flipped."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

# Calls that stand alone and may be left out, by the last part of their name.
ALONE = {
    "wait", "arrive", "expect", "init", "store_wait", "fence_async_shared", "bulk_wait", "wait_for", "store_release",
}  # fmt: skip
# Calls whose first argument says how much may be outstanding.
OUTSTANDING = {"warpgroup_mma_wait", "store_wait"}
EVERYTHING = 1000


@dataclass(frozen=True)
class Mutation:
    """What to do to the `index`-th node of a file's tree, in the order of ast.walk."""

    file: Path
    index: int
    kind: str
    line: int
    function: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.file.name}:{self.line} {self.function}: {self.text}: {self.kind}"

    def codes(self) -> dict[tuple[str, str, int], CodeType]:
        """The code of the file's functions with the mutation made."""
        tree = ast.parse(self.file.read_text())
        node = list(ast.walk(tree))[self.index]
        _change(node, self.kind)
        ast.fix_missing_locations(tree)
        module = compile(tree, str(self.file), "exec")
        found = {}
        for code in module.co_consts:
            if isinstance(code, CodeType):
                found[code.co_filename, code.co_name, code.co_firstlineno] = code
        return found


def _change(node: ast.AST, kind: str) -> None:
    if kind == "left out":
        assert isinstance(node, ast.Expr)
        node.value = ast.Constant(None)
        return
    assert isinstance(node, ast.Call)
    if kind == "phase flipped":
        node.args[1] = ast.BinOp(node.args[1], ast.BitXor(), ast.Constant(1))
    else:
        more = EVERYTHING if kind == "waits for nothing" else 1
        node.args[0] = ast.BinOp(node.args[0], ast.Add(), ast.Constant(more))


def _called(node: ast.AST) -> str:
    """The name that a call ends in."""
    if not isinstance(node, ast.Call):
        return ""
    f = node.func
    return f.attr if isinstance(f, ast.Attribute) else f.id if isinstance(f, ast.Name) else ""


def _is_device_code(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)


def mutations(file: Path) -> list[Mutation]:
    """All of a file, in the order of its lines."""
    tree = ast.parse(file.read_text())
    index = {id(node): n for n, node in enumerate(ast.walk(tree))}
    found = []
    for function in tree.body:
        if not _is_device_code(function):
            continue
        for node in ast.walk(function):

            def add(kind: str, what: ast.AST = node, name: str = function.name) -> None:
                text = " ".join(ast.unparse(what).split())
                found.append(Mutation(file, index[id(what)], kind, what.lineno, name, text))

            if isinstance(node, ast.Expr) and _called(node.value) in ALONE:
                add("left out")
            name = _called(node)
            if name == "wait" and len(node.args) > 1:
                add("phase flipped")
            if name in OUTSTANDING:
                add("one less waited for")
                if name == "warpgroup_mma_wait":
                    add("waits for nothing")
    return sorted(found, key=lambda m: (m.line, m.index, m.kind))
