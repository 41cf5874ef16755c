"""No test has a tolerance of its own: numbers are held to assert_within_budget, or assert_close compares as it is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests import ROOT

FILES = sorted((ROOT / "tests").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "tests")))
def test_assert_close_has_its_default_tolerance_or_none(path: Path) -> None:
    calls = [x for x in ast.walk(ast.parse(path.read_text())) if isinstance(x, ast.Call)]
    for call in calls:
        name = ast.unparse(call.func).rpartition(".")[2]
        assert name not in ("allclose", "isclose"), ast.unparse(call)
        if name == "assert_close":
            given = {x.arg: ast.unparse(x.value) for x in call.keywords}
            assert given.keys() <= {"rtol", "atol", "equal_nan"}, ast.unparse(call)
            assert {given.get("rtol", "0"), given.get("atol", "0")} == {"0"}, ast.unparse(call)
