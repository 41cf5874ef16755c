"""Packed (varlen) batches: the padded form of a packed sample, and the peers that take packed sequences."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.providers import Call, Provider
from bench.harness.samples import Sample
from fused_attn.spec.ragged import locate, padded
from fused_attn.testing import Case


def ragged_case(lengths: list[int], heads: int, dim: int, causal: bool = False) -> Case:
    """Self-attention of packed sequences."""
    alignment = "top_left" if causal else None
    return Case("ragged", hq=heads, lengths=tuple((n, n) for n in lengths), d=dim, causal=causal, alignment=alignment)


class Padded:
    """A packed sample with its sequences and cotangents padded to (B, H, longest, D)."""

    def __init__(self, x: Sample) -> None:
        ragged = x.inputs.ragged
        assert ragged is not None
        self.starts, self.longest = ragged.q, ragged.max_q
        self.leaves = [self._padded(t).requires_grad_() for t in x.leaves]
        self.cotangents = [self._padded(t) for t in x.cotangents]
        lengths = ragged.q.diff()
        self.mask = (torch.arange(self.longest, device=lengths.device) < lengths[:, None])[:, None, None]

    def _padded(self, x: Tensor) -> Tensor:
        return padded(x.detach(), self.starts, self.longest)

    def call(self, masked: bool) -> Call:
        """SDPA on the padded batch; without the mask it is faster, but attends to the padding."""
        mask = self.mask if masked else None
        return lambda: F.scaled_dot_product_attention(*self.leaves, attn_mask=mask)

    def packed(self, x: Tensor) -> Tensor:
        """(B, H, longest, D) to the layout of a packed sample, (1, H, T, D)."""
        b, i = locate(self.starts, int(self.starts[-1]))
        return x[b, :, i].transpose(0, 1)[None]


# ------------------------------------------------------------------------------------------------------------- peers


def _bound(find: Callable[[Sample], Callable[..., Any]]) -> Callable[[Sample], Call]:
    """Bind a function of packed q, k, v, two cu_seqlens and two maximum lengths."""

    def bind(x: Sample) -> Call:
        call, qkv, ragged = find(x), x.inputs.qkv, x.inputs.ragged
        assert ragged is not None
        return lambda: call(*qkv, ragged.max_q, ragged.max_k).transpose(0, 1)[None]

    return bind


def _flash(x: Sample) -> Callable[..., Any]:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise NotImplementedError(f"flash-attn is not installed: {error}") from error
    return lambda *given: flash_attn_varlen_func(*given, causal=x.case.causal)


def _varlen(x: Sample) -> Callable[..., Any]:
    if x.problem.q.device.type != "cuda":
        raise NotImplementedError("varlen_attn needs a GPU")
    from torch.nn.attention.varlen import varlen_attn

    words: dict[str, Any] = {"is_causal": True}
    if "is_causal" not in inspect.signature(varlen_attn).parameters:  # newer versions take a window instead
        words = {"window_size": (-1, 0)}
    return lambda *given: varlen_attn(*given, **words if x.case.causal else {})


def _nested(x: Sample) -> Call:
    if x.problem.q.device.type != "cuda":
        raise NotImplementedError("SDPA takes jagged tensors only on a GPU")
    q, k, v, starts, _ = x.inputs.qkv
    longest = x.problem.shape[2]

    def jagged(t: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(t, starts, max_seqlen=longest).transpose(1, 2)

    def call() -> Tensor:
        out = F.scaled_dot_product_attention(*map(jagged, (q, k, v)), is_causal=x.case.causal)
        return out.transpose(1, 2).values().transpose(0, 1)[None]

    return call


PEERS = (Provider("flash_attn", _bound(_flash)), Provider("varlen", _bound(_varlen)), Provider("nested", _nested))
