"""The public test kit: named cases, the one tolerance rule, and the parity check that tests and benchmarks share.

`CASES` are named problems, `make_inputs` gives a case its tensors, `check_parity` runs one forward and through every
gradient. A project that depends on fused_attn can run them in its own CI:

>>> from fused_attn import testing
>>> print(testing.check_parity("causal", backend="tiled").case.name)
causal
"""

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
