"""The mutation run stays possible: every text to be broken still stands, once, and every line is broken somewhere."""

from __future__ import annotations

import ast

import pytest

from tests import ROOT, mutants

# The numbered faults of test_known_faults.py that hold without a GPU and without what is not built.
LINES = {*range(1, 11), *range(12, 16), *range(17, 26), 27, 30, *range(32, 37), 38}


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: m.what)
def test_text_stands_once(mutant: mutants.Mutant) -> None:
    text = (ROOT / mutant.file).read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file}: {mutant.old!r} stands there {text.count(mutant.old)} times"
    ast.parse(text.replace(mutant.old, mutant.new))
    assert (ROOT / "tests" / mutant.tests[0]).is_file()


def test_every_line_has_a_mutant() -> None:
    assert {line for mutant in mutants.MUTANTS for line in mutant.lines} >= LINES
