"""Every mutation applies to exactly one place, and every known fault has a mutation."""

from __future__ import annotations

import ast
import re

import pytest

from tests import ROOT, mutants


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: m.name)
def test_mutated_text_occurs_once(mutant: mutants.Mutant) -> None:
    text = (ROOT / mutant.file).read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file}: {mutant.old!r} stands there {text.count(mutant.old)} times"
    ast.parse(text.replace(mutant.old, mutant.new))
    assert (ROOT / "tests" / mutant.tests[0]).is_file()


def test_every_known_fault_has_a_mutant() -> None:
    file = "backends/test_known_faults.py"
    words = {word for m in mutants.MUTANTS if m.tests[0] == file for word in re.findall(r"\w+", m.tests[1])}
    functions = [x.name for x in ast.parse((ROOT / "tests" / file).read_text()).body if isinstance(x, ast.FunctionDef)]
    tests = [name for name in functions if name.startswith("test_")]
    assert [name for name in tests if not any(word in name for word in words)] == []
