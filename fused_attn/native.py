"""torch's own scaled_dot_product_attention, where it computes exactly what was asked, and in linear memory.

That is a plain scaled dot product, full or causal from the top left, in half or single precision. What it was seen to
do otherwise (torch 2.13, CPU) is refused here: with causal, a scale of zero or below gives NaN; other strides and
Dv != D take a path that stores the whole score matrix; and its kernel turns NaN and Inf into numbers, so `finite` reads
the inputs, and dispatch calls it last of all. A second derivative raises inside torch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Taken now: `compat.sdpa` puts our own function in its place, and that one may come here.
from torch.nn.functional import scaled_dot_product_attention

from .checks import readable
from .spec import Problem

DEVICES = ("cpu", "cuda")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not(p: Problem) -> list[str]:
    """Every reason why torch's op would compute something else, or need memory for the whole score matrix."""
    if p.ragged is not None:
        return _why_not_each(p)
    reasons = [f"torch's op has no {what}" for what, there in _modifiers(p).items() if there]
    device, requires_grad = p.q.device.type, any(x.requires_grad for x in (p.q, p.k, p.v))
    if device not in DEVICES:
        reasons.append(f"it runs on {' and '.join(DEVICES)} here, not on {device}")
    if p.q.dtype not in DTYPES:
        reasons.append(f"it runs in float16, bfloat16 and float32 here, not in {p.q.dtype}")
    if p.empty:
        reasons.append("with no scores to compute it does not say what it returns")
    elif not (_full(p) or _causal(p)):
        reasons.append("it knows only the full score matrix and the causal one from the top left")
    if isinstance(p.scale, float) and not 0 < p.scale < math.inf:
        reasons.append(f"it needs a positive, finite scale, got {p.scale}")
    if p.v.shape[3] != p.q.shape[3]:
        reasons.append(f"with Dv = {p.v.shape[3]} and D = {p.q.shape[3]} it stores the whole score matrix")
    if any(x.stride(3) != 1 for x in (p.q, p.k, p.v)):
        reasons.append("with a last dim that is not contiguous it stores the whole score matrix")
    if device == "cuda" and requires_grad and p.deterministic and not torch.are_deterministic_algorithms_enabled():
        reasons.append("its backward on CUDA may differ from run to run, and deterministic is True")
    if _disabled(device):
        reasons.append("torch.nn.attention.sdpa_kernel has disabled its kernels that need no memory for the scores")
    return reasons


def _disabled(device: str) -> bool:
    """Whether the caller left torch's op nothing but its math path, or nothing at all. Compilers cannot ask."""
    enabled = torch.backends.cuda
    if torch.compiler.is_compiling() or enabled.flash_sdp_enabled():
        return False
    return device == "cpu" or not (enabled.mem_efficient_sdp_enabled() or enabled.cudnn_sdp_enabled())


def _why_not_each(p: Problem) -> list[str]:
    """Of ragged sequences, which are so many calls of torch's op."""
    if not readable(p.q) or p.q.device.type != "cpu":
        return ["it is called for one ragged sequence after another, and where they begin is only read on the CPU"]
    some = [alone for _, alone in p.sequences() if not alone.empty]
    return list(dict.fromkeys(x for alone in some or [p.replace(ragged=None)] for x in why_not(alone)))


def _modifiers(p: Problem) -> dict[str, bool]:
    return {
        "tensor scale": not isinstance(p.scale, float),
        "softcap": p.softcap is not None,
        "gradient to a broadcast bias": p.bias is not None,
        "ALiBi": p.slopes is not None,
        "sink": p.sink is not None,
        "zeros for rows that a mask empties": p.mask is not None,
        "counter-based dropout": p.dropout is not None,
        "log-sum-exp to return": p.return_lse,
        "additive score": p.w is not None,
        "terms of rows and keys beside the product": p.key_terms is not None,
        "sigmoid normalizer": p.sigmoid,
        "mask that is no interval": p.tabled,
    }


def _full(p: Problem) -> bool:
    """Every row sees every key, whatever bounds are written down."""
    span, (m, n) = p.span, p.shape[2:]
    return (
        span.lo is None
        and span.hi is None
        and (span.left is None or span.left <= 1 - m)
        and (span.right is None or span.right >= n - 1)
    )


def _causal(p: Problem) -> bool:
    """Row i sees keys 0 to i."""
    span = p.span
    return (
        span.lo is None and span.hi is None and span.right == 0 and (span.left is None or span.left <= 1 - p.shape[2])
    )


def finite(p: Problem) -> bool:
    """Whether no input, and no score, is NaN or infinite. Reads q, k and v once; on a GPU it would wait for them.

    |q . k| is at most the product of the norms. They overflow a little early, which costs a detour and never an answer.
    """
    with torch.no_grad():
        q, k, v = map(_norm, (p.q, p.k, p.v))
    return q * k * float(p.scale) + v < torch.finfo(torch.float32).max


def _norm(x: Tensor) -> float:
    """Euclidean; infinite where the squares overflow."""
    if x.dtype == torch.float32 and x.is_contiguous():
        flat = x.view(-1)
        return math.sqrt(torch.dot(flat, flat))  # half the time of what follows
    return torch.linalg.vector_norm(x, dtype=torch.float32).item()


def attention(p: Problem) -> tuple[Tensor, None]:
    """out by torch's op, differentiable once by its own backward; it returns no log-sum-exp."""
    if p.ragged is not None:
        return _attention_each(p), None
    scale: Any = p.scale  # a number: why_not refuses tensors
    out = scaled_dot_product_attention(p.q, p.k, p.v, is_causal=not _full(p), scale=scale, enable_gqa=p.group > 1)
    return out if out.stride() == p.q.stride() else p.in_order(out), None


def _attention_each(p: Problem) -> Tensor:
    """Of ragged sequences. They are split, because the derivative of one slice is as large as the whole."""
    shapes = [one.shape for one, _ in p.sequences()]
    rows, keys = ([x[side] for x in shapes] for side in range(2))
    split = zip(p.q.split(rows, 2), p.k.split(keys, 2), p.v.split(keys, 2), strict=True)
    outs = [p.empty_out()[:, :, :0]]
    for (_, alone), (q, k, v) in zip(p.sequences(), split, strict=True):
        own = alone.replace(q=q, k=k, v=v)
        outs.append(torch.zeros_like(own.empty_out()) if own.empty else attention(own)[0])
    return p.in_order(torch.cat(outs, 2))
