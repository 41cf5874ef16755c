"""Test utilities: named attention problems, the tolerance rule, and parity checks against float64.

`CASES` holds the problems, `make_inputs` creates the tensors of one, and `check_parity` compares the output and every
gradient of a backend with float64. A project that depends on fused_attn can run them in its own CI:

>>> from fused_attn import testing
>>> print(testing.check_parity("causal", backend="tiled").case.name)
causal
"""

from typing import TYPE_CHECKING

from ..deprecated import names_of
from .cases import CASES, Case
from .inputs import Inputs, make_inputs
from .parity import Expected, Parity, check_parity, compare, expect, run_module, run_public, why_not
from .tolerance import Row, assert_within_budget

__all__ = [
    "CASES",
    "Case",
    "Expected",
    "Inputs",
    "Parity",
    "Row",
    "assert_within_budget",
    "check_parity",
    "compare",
    "expect",
    "make_inputs",
    "run_module",
    "run_public",
    "why_not",
]

if not TYPE_CHECKING:
    __getattr__ = names_of(__name__, "parity", "tolerance", "cases")
