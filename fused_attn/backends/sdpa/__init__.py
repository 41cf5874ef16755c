"""The "sdpa" backend: torch's own attention kernels, where they compute exactly what was asked in linear memory.

On the CPU that is a scaled dot product with a bool mask or an additive bias of any broadcast shape, full or causal from
the top left. Where what each row sees is not one such matrix but several (`Mask.lengths`, sorted segments, packed
sequences), each is a call of its own on slices (`Piece`), and the other scores are never computed. `torch_kernel` makes
the calls, and finds what the kernel gets wrong, which `tiled` computes again.

On CUDA it is `F.scaled_dot_product_attention` without masks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Taken now: `compat.sdpa` puts our own function in its place, and that one may come here.
from torch.nn.functional import scaled_dot_product_attention

from ...spec.checks import readable
from ...spec.problem import Problem
from ..tiled import attention as tiled
from .kernel import LARGE, LARGEST, Kernel, stored
from .pieces import pieces_of_problem, run

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not(p: Problem) -> list[str]:
    """Every reason why torch's kernel would compute something else, or need memory for the whole score matrix."""
    device = p.q.device.type
    reasons = [f"torch's kernel has no {what}" for what, there in _modifiers(p) if there]
    if device not in ("cpu", "cuda"):
        reasons.append(f"it runs on cpu and cuda here, not on {device}")
    if p.q.dtype not in DTYPES:
        reasons.append(f"it runs in float16, bfloat16 and float32 here, not in {p.q.dtype}")
    if isinstance(p.scale, float) and not abs(p.scale) <= LARGEST:
        reasons.append(f"it needs a scale within float32, got {p.scale}")
    if p.v.shape[3] != p.q.shape[3]:
        reasons.append(f"with Dv = {p.v.shape[3]} and D = {p.q.shape[3]} it stores the whole score matrix")
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
        ("terms of rows and keys beside the product", p.key_terms is not None),
        ("sigmoid normalizer", p.sigmoid),
        ("pattern of unsorted ids or blocks", p.pattern is not None),
    ]


def _why_not_on_cpu(p: Problem) -> list[str]:
    if p.bias is not None and p.bias.requires_grad and torch.is_grad_enabled():
        return ["torch's kernel has no gradient to a bias"]
    if p.ragged is not None and (p.mask is not None or p.bias is not None):
        return ["masks and biases of packed sequences are each sequence's own, which it is not given"]
    if p.empty:
        return ["with no scores to compute it does not say what it returns"]
    if any(x.stride(3) != 1 for x in (p.q, p.k, p.v)):
        return ["torch's kernel reads the last dim of q, k and v as contiguous, whatever its stride"]
    if p.span.lo is None and p.span.hi is None and p.ragged is None:
        shape = run(p.span, (0, p.shape[2]), (0, p.shape[3]))
        known, causal = shape is not None, shape is not None and shape[1]
    elif not readable(p.q):
        return ["lengths and sequence starts cannot be read while tracing"]
    else:
        found = pieces_of_problem(p)
        known, causal = found is not None, any(piece.causal for piece in found or ())
    if not known:
        return ["it knows only full score matrices and causal ones from the top left"]
    if causal and isinstance(p.scale, float) and not p.scale > 0:
        return [f"with a causal mask it needs a positive scale, got {p.scale}"]
    return []


def _why_not_on_cuda(p: Problem) -> list[str]:
    reasons = []
    if p.mask is not None or p.bias is not None:
        reasons.append("its mask is not used on CUDA, where rows that it empties and its strides decide the kernel")
    if p.ragged is not None:
        reasons.append("it is called for one packed sequence after another, which only the CPU can do without waiting")
    elif p.empty:
        reasons.append("with no scores to compute it does not say what it returns")
    elif (
        p.span.lo is not None
        or p.span.hi is not None
        or run(p.span, (0, p.shape[2]), (0, p.shape[3])) not in ((0, False), (0, True))
    ):
        reasons.append("it knows only the full score matrix and the causal one from the top left")
    if isinstance(p.scale, float) and not p.scale > 0:
        reasons.append(f"it needs a positive scale, got {p.scale}")
    if any(x.stride(3) != 1 for x in (p.q, p.k, p.v)):
        reasons.append("with a last dim that is not contiguous it stores the whole score matrix")
    requires_grad = any(x.requires_grad for x in (p.q, p.k, p.v))
    if requires_grad and p.deterministic and not torch.are_deterministic_algorithms_enabled():
        reasons.append("its backward on CUDA may differ from run to run, and deterministic is True")
    enabled = torch.backends.cuda
    if not (enabled.flash_sdp_enabled() or enabled.mem_efficient_sdp_enabled() or enabled.cudnn_sdp_enabled()):
        reasons.append("torch.nn.attention.sdpa_kernel has disabled its kernels that need no memory for the scores")
    return reasons


# The operator, which is what compilers see: its result cannot send anybody elsewhere, so it is mended inside.


def forward(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, peak, log_sum) on the CPU, under no_grad; torch's kernel knows no parts, so its log_sum is 0."""
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
    """The gradients that needs names: of q, k and v."""
    p = stored(p)
    lse, kernel = peak + log_sum, Kernel(p)
    mask = kernel.additive(p)
    if dlse is not None or not kernel.sound(p.q, p.k, p.v, mask, lse, LARGE):
        out, _, peak, log_sum = tiled.forward(p)
        return tiled.backward(p, out, peak, log_sum, dout, dlse, needs)
    grads = kernel.backward(p.q, p.k, p.v, mask, out, lse, dout)
    return dict(zip("qkv", grads, strict=True))


def attention(p: Problem) -> tuple[Tensor | None, None]:
    """out, or None where torch's kernel computes it wrongly; the kernel returns no log-sum-exp."""
    if p.q.device.type == "cpu":
        p = stored(p)
        kernel = Kernel(p)
        return kernel(p.q, p.k, p.v, kernel.additive(p)), None
    shape = run(p.span, (0, p.shape[2]), (0, p.shape[3]))
    causal = shape is not None and shape[1]
    scale: Any = p.scale  # a number: why_not refuses tensors
    out = scaled_dot_product_attention(p.q, p.k, p.v, is_causal=causal, scale=scale, enable_gqa=p.group > 1)
    return p.in_order(out), None
