"""How alike q and k are: the dot product. Modifiers (modifiers.py) make its value a score."""

import triton
import triton.language as tl

from .numerics import dot


@triton.jit
def products(q, k, PRECISION: tl.constexpr):
    """q [BLOCK_M, BLOCK_D], k [BLOCK_N, BLOCK_D] -> [BLOCK_M, BLOCK_N]; swap them for the transpose."""
    return dot(q, tl.trans(k), None, PRECISION)
