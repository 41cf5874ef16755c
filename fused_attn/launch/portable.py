"""The "triton" backend: allocate, choose a configuration, launch. Nothing here depends on values, only on metadata."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from .. import launch as seam
from ..spec import HALF, Problem
from ..tuning import architecture, config
from ..tuning.select import padded

MAX_HEAD_DIM = 512
CACHE = 32 * 2**20  # bytes of keys and values that heads in flight together may hold


@functools.cache
def _device_code() -> Any:
    """The kernels and the views they take; imported when first asked for, because they import triton."""
    from types import SimpleNamespace

    from ..kernels import forward
    from . import views

    return SimpleNamespace(forward=forward.forward_kernel, views=views)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which triton decides when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not(p: Problem) -> list[str]:
    """Every reason why these kernels cannot run p."""
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed")
    device = p.q.device
    if device.type == "cpu":
        if not interpreted():
            reasons.append("tensors are on the CPU, and TRITON_INTERPRET is not 1")
    elif device.type != "cuda":
        reasons.append(f"no kernels for {device.type} devices")
    elif not torch.version.hip and torch.cuda.get_device_capability(device)[0] < 8:
        reasons.append("needs compute capability 8.0 or newer")
    if p.q.dtype not in (*HALF, torch.float32):
        reasons.append(f"{p.q.dtype} is not supported; float16, bfloat16 and float32 are")
    for name, x in (("q", p.q), ("v", p.v)):
        if x.shape[3] > MAX_HEAD_DIM:
            reasons.append(f"{name}'s head dim {x.shape[3]} is above {MAX_HEAD_DIM}")
    return reasons


def _precision(p: Problem) -> str:
    """How float32 operands are multiplied; half precision does not ask."""
    if p.q.dtype in HALF or torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


def _rich(p: Problem) -> bool:
    return any(x is not None for x in (p.softcap, p.bias, p.slopes, p.mask, p.dropout))


def _wave(p: Problem, heads: int) -> int:
    """How many heads run side by side: as many as have their keys and values in the cache together."""
    _, _, _, n = p.shape
    per_head = n * (p.q.shape[3] + p.v.shape[3]) * p.q.element_size()
    return max(1, min(heads, CACHE // max(per_head, 1) * (p.group if heads == p.q.shape[0] * p.q.shape[1] else 1)))


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """(out, lse), under no_grad."""
    code = _device_code()
    views = code.views
    b, hq, m, n = p.shape
    d, dv = p.q.shape[3], p.v.shape[3]
    out = p.empty_out()
    lse = p.q.new_empty((b, hq, m), dtype=torch.float32)
    c = config("forward", architecture(p.q.device), p.q.dtype, d, dv, rich=_rich(p))
    with torch.cuda.device_of(p.q):
        seam.launch(
            code.forward,
            -(-m // c.BLOCK_M) * b * hq,
            *(views.view(x) for x in (p.q, p.k, p.v, out)),
            lse,
            views.score(p),
            views.span(p.span),
            views.broadcast_view(p.mask, p.shape),
            None if p.sink is None else p.sink.contiguous(),
            views.dropout(p),
            m, n, hq, b * hq, _wave(p, b * hq),
            GROUP=p.group, D=d, DV=dv, BLOCK_D=padded(d), BLOCK_DV=padded(dv),
            BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, OVERLAP=c.overlap, PRECISION=_precision(p),
            num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
    return out, lse
