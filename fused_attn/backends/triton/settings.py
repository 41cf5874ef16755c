"""Settings shared by launches of several kernels: configuration, precision, heads per wave."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from typing import Any

import torch

from ...spec.problem import HALF, Problem
from ...tuning import Config, architecture
from ...tuning import config as tuned
from ...tuning.select import padded

INSTALLED = importlib.util.find_spec("triton") is not None
UNCHANGED = contextlib.nullcontext()
CACHE = 32 * 2**20  # bytes of keys and values that heads in flight together may hold


def interpreted() -> bool:
    """True if kernels run in Triton's interpreter, which triton decides when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@torch.compiler.assume_constant_result
def multiplies_bit_patterns() -> bool:
    """True if Triton's interpreter multiplies bfloat16 as the integers that store it (triton issue 11584)."""
    import numpy as np
    import triton.language as tl
    from triton import knobs
    from triton.runtime import interpreter

    one = interpreter.TensorHandle(np.array([0x3F80], np.uint16), tl.bfloat16)
    product = interpreter.interpreter_builder.create_fmul(one, one)
    return knobs.runtime.interpret and product.data.item() == 0x3F80 * 0x3F80 % 2**16


def device_of(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """x's device as the current one, which launches go to."""
    device = x.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return UNCHANGED
    return torch.cuda.device(device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def precision(p: Problem) -> str:
    """The precision of products of float32 operands; half precision ignores it."""
    if p.q.dtype in HALF or torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


def has_modifiers(p: Problem) -> bool:
    """True if a modifier, tensor mask or dropout needs registers in the loops."""
    absent = p.softcap is p.bias is p.slopes is p.row_terms is p.mask is p.dropout is p.span.lo is p.span.hi is None
    return not absent or p.sigmoid or p.needs_block_mask


def wave(p: Problem, heads: int) -> int:
    """Heads that run side by side, of B * heads: as many as fit their keys and values into the cache together."""
    b, _, _, n = p.shape
    pair = n * (p.q.shape[3] + p.v.shape[3]) * p.q.element_size()
    return max(1, min(b * heads, CACHE // pair * (heads // p.k.shape[1])))


def config(kernel: str, p: Problem, with_modifiers: bool = False) -> Config:
    dv = p.v.shape[3]
    d = dv if kernel.startswith("additive") else p.q.shape[3]
    return tuned(kernel, architecture(p.q.device), p.q.dtype, d, dv, with_modifiers=with_modifiers or has_modifiers(p))


def constants(c: Config, p: Problem) -> dict[str, Any]:
    """The compile-time arguments and options of a kernel with matrix products."""
    return _constants_of(c, p.group, p.q.shape[3], p.v.shape[3], precision(p))


@functools.lru_cache(1024)
def _constants_of(c: Config, group: int, d: int, dv: int, precision: str) -> dict[str, Any]:
    return {
        "GROUP": group,
        "D": d,
        "DV": dv,
        "BLOCK_D": padded(d),
        "BLOCK_DV": padded(dv),
        "BLOCK_M": c.BLOCK_M,
        "BLOCK_N": c.BLOCK_N,
        "PRECISION": precision,
        "num_warps": c.num_warps,
        "num_stages": c.num_stages,
    }
