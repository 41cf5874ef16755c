"""The "sdpa" backend: torch's own attention kernels, for problems that they compute exactly and in O(M + N) memory.

CPU: a scaled dot product with a bool mask or an additive bias of any broadcast shape, full or causal (top left). A
problem whose visible scores form several dense rectangles or triangles (`Mask.lengths`, sorted segments, packed
sequences) is one call per `Piece`, on slices; masked scores outside them are not computed. `kernel` makes the calls and
detects inputs for which torch's kernel is wrong; `tiled` recomputes those.

CUDA: `F.scaled_dot_product_attention` without masks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Bound at import: `compat.sdpa` can replace the attribute by a function that calls this backend.
from torch.nn.functional import scaled_dot_product_attention

from ...spec.checks import readable
from ...spec.problem import Problem
from ..tiled import attention as tiled
from .kernel import LARGE, LARGEST, Kernel, stored
from .pieces import pieces_of_problem, run

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not(p: Problem) -> list[str]:
    """Every reason why torch's kernel would be wrong for p, or need memory for the whole score matrix."""
    device = p.q.device.type
    reasons = [f"torch's kernel has no {name}" for name, present in _modifiers(p) if present]
    if device not in ("cpu", "cuda"):
        reasons.append(f"torch's kernel runs on cpu and cuda, not on {device}")
    if p.q.dtype not in DTYPES:
        reasons.append(f"torch's kernel runs in float16, bfloat16 and float32, not in {p.q.dtype}")
    if isinstance(p.scale, float) and not abs(p.scale) <= LARGEST:
        reasons.append(f"torch's kernel needs a scale within float32, got {p.scale}")
    if p.v.shape[3] != p.q.shape[3]:
        reasons.append(f"torch's kernel stores the whole score matrix with Dv = {p.v.shape[3]} and D = {p.q.shape[3]}")
    return [*reasons, *(_why_not_on_cuda(p) if device == "cuda" else _why_not_on_cpu(p))]


def _modifiers(p: Problem) -> list[tuple[str, bool]]:
    return [
        ("tensor scale", not isinstance(p.scale, float)),
        ("softcap", p.softcap is not None),
        ("ALiBi", p.slopes is not None),
        ("sink", p.sink is not None),
        ("counter-based dropout", p.dropout is not None),
        ("log-sum-exp to return", p.return_lse),
        ("additive score", p.w is not None),
        ("row and key terms added to the product", p.key_terms is not None),
        ("sigmoid normalizer", p.sigmoid),
        ("mask of unsorted ids or blocks", p.pattern is not None),
    ]


def _why_not_on_cpu(p: Problem) -> list[str]:
    if p.bias is not None and p.bias.requires_grad and torch.is_grad_enabled():
        return ["torch's kernel has no gradient for a bias"]
    if p.ragged is not None and (p.mask is not None or p.bias is not None):
        return ["torch's kernel takes no mask or bias per packed sequence"]
    if p.empty:
        return ["torch's kernel does not define its result for empty tensors"]
    if any(x.stride(3) != 1 for x in (p.q, p.k, p.v)):
        return ["torch's kernel ignores the last stride of q, k and v, which must be 1"]
    if p.span.lo is None and p.span.hi is None and p.ragged is None:
        shape = run(p.span, (0, p.shape[2]), (0, p.shape[3]))
        supported, causal = shape is not None, shape is not None and shape[1]
    elif not readable(p.q):
        return ["lengths and sequence starts cannot be read while tracing"]
    else:
        pieces = pieces_of_problem(p)
        supported, causal = pieces is not None, any(piece.causal for piece in pieces or ())
    if not supported:
        return ["torch's kernel has only full and top-left causal score matrices"]
    if causal and isinstance(p.scale, float) and not p.scale > 0:
        return [f"torch's kernel needs a positive scale with a causal mask, got {p.scale}"]
    return []


def _why_not_on_cuda(p: Problem) -> list[str]:
    reasons = []
    if p.mask is not None or p.bias is not None:
        reasons.append("masks and biases are not passed to torch's CUDA kernels: its choice of kernel depends on them")
    if p.ragged is not None:
        reasons.append("packed sequences take one call each, which would synchronize with the GPU")
    elif p.empty:
        reasons.append("torch's kernel does not define its result for empty tensors")
    elif (
        p.span.lo is not None
        or p.span.hi is not None
        or run(p.span, (0, p.shape[2]), (0, p.shape[3])) not in ((0, False), (0, True))
    ):
        reasons.append("torch's kernel has only full and top-left causal score matrices")
    if isinstance(p.scale, float) and not p.scale > 0:
        reasons.append(f"torch's kernel needs a positive scale, got {p.scale}")
    if any(x.stride(3) != 1 for x in (p.q, p.k, p.v)):
        reasons.append("torch's kernel stores the whole score matrix if the last stride of q, k or v is not 1")
    requires_grad = any(x.requires_grad for x in (p.q, p.k, p.v))
    if requires_grad and p.deterministic and not torch.are_deterministic_algorithms_enabled():
        reasons.append("torch's CUDA backward is not deterministic, and deterministic is True")
    enabled = torch.backends.cuda
    if not (enabled.flash_sdp_enabled() or enabled.mem_efficient_sdp_enabled() or enabled.cudnn_sdp_enabled()):
        reasons.append("torch.nn.attention.sdpa_kernel has disabled every kernel that does not store the score matrix")
    return reasons


# `forward` and `backward` implement the operator that torch.compile traces. A traced graph cannot change to another
# backend on a bad result, so they call `tiled` themselves. `attention` returns None and leaves that to dispatch.


def forward(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, peak, log_sum) on the CPU, under no_grad. torch's kernel returns only lse: log_sum is 0."""
    p = stored(p)
    kernel = Kernel(p)
    mask = kernel.additive(p)
    out, lse = kernel.forward(p.q, p.k, p.v, mask)
    if not kernel.sound(p.q, p.k, p.v, mask, lse):
        return tiled.forward(p)
    lse = lse.contiguous()
    return p.in_order(out), lse, lse.clone(), torch.zeros_like(lse)


def backward(
    p: Problem, out: Tensor, peak: Tensor, log_sum: Tensor, dout: Tensor, dlse: Tensor | None, needs: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients named in needs, a subset of q, k and v."""
    p = stored(p)
    lse, kernel = peak + log_sum, Kernel(p)
    mask = kernel.additive(p)
    if dlse is not None or not kernel.sound(p.q, p.k, p.v, mask, lse, LARGE):
        out, _, peak, log_sum = tiled.forward(p)
        return tiled.backward(p, out, peak, log_sum, dout, dlse, needs)
    grads = kernel.backward(p.q, p.k, p.v, mask, out, lse, dout)
    return dict(zip("qkv", grads, strict=True))


def attention(p: Problem) -> tuple[Tensor | None, None]:
    """(out, None), or (None, None) if torch's kernel is wrong for these inputs. The public function has no lse."""
    if p.q.device.type == "cpu":
        p = stored(p)
        kernel = Kernel(p)
        return kernel(p.q, p.k, p.v, kernel.additive(p)), None
    shape = run(p.span, (0, p.shape[2]), (0, p.shape[3]))
    causal = shape is not None and shape[1]
    scale: Any = p.scale  # a float: why_not refuses tensors
    out = scaled_dot_product_attention(p.q, p.k, p.v, is_causal=causal, scale=scale, enable_gqa=p.group > 1)
    return p.in_order(out), None
