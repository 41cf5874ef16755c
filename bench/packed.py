"""Ragged batches as benchmarks see them: the padded form of a packed sample, the peers that take it packed, and
the evidence that bench.gpu gathers of them."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.providers import DIRECTIONS, Call, Provider, ours
from bench.samples import Sample, heavy_tail, sized
from fused_attn.ragged import padded, places
from fused_attn.testing import Case

FILL = {"heavy": 0.3, "equal": 1.0}  # of the padded batch
GOAL = 0.9  # of the dense kernel's TFLOP/s


def ragged_case(lengths: list[int], heads: int, dim: int, causal: bool = False) -> Case:
    """Self-attention of packed sequences."""
    alignment = "top_left" if causal else None
    return Case("ragged", hq=heads, lengths=tuple((n, n) for n in lengths), d=dim, causal=causal, alignment=alignment)


class Padded:
    """The sequences of a packed sample, each padded to the longest: (B, H, longest, D), and the cotangent likewise."""

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
        """torch's own function; without a mask it is at its fastest, and lets the padding take part."""
        mask = self.mask if masked else None
        return lambda: F.scaled_dot_product_attention(*self.leaves, attn_mask=mask)

    def packed(self, x: Tensor) -> Tensor:
        """(B, H, longest, D) as a packed sample lies, (1, H, T, D)."""
        b, i = places(self.starts, int(self.starts[-1]))
        return x[b, :, i].transpose(0, 1)[None]


# ------------------------------------------------------------------------------------------------------------- peers


def _bound(find: Callable[[Sample], Callable[..., Any]]) -> Callable[[Sample], Call]:
    """Of a function of packed q, k, v, two starts and two longest lengths."""

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
        raise NotImplementedError("torch's varlen_attn needs a GPU")
    from torch.nn.attention.varlen import varlen_attn

    words: dict[str, Any] = {"is_causal": True}
    if "is_causal" not in inspect.signature(varlen_attn).parameters:  # newer ones say it as a window
        words = {"window_size": (-1, 0)}
    return lambda *given: varlen_attn(*given, **words if x.case.causal else {})


def _nested(x: Sample) -> Call:
    if x.problem.q.device.type != "cuda":
        raise NotImplementedError("torch's function takes jagged tensors on a GPU")
    q, k, v, starts, _ = x.inputs.qkv
    longest = x.problem.shape[2]

    def jagged(t: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(t, starts, max_seqlen=longest).transpose(1, 2)

    def call() -> Tensor:
        out = F.scaled_dot_product_attention(*map(jagged, (q, k, v)), is_causal=x.case.causal)
        return out.transpose(1, 2).values().transpose(0, 1)[None]

    return call


PEERS = (Provider("flash_attn", _bound(_flash)), Provider("varlen", _bound(_varlen)), Provider("nested", _nested))


# ---------------------------------------------------------------------------------------------------------- evidence


class RaggedBatches:
    """Packed sequences, of lengths from a heavy tail and of equal ones: TFLOP/s on the tokens that there are, beside
    the dense kernel's on as many scores, and beside peers that take them packed."""

    def __init__(self) -> None:
        self.shares = {"check": 25, "measure": 40}

    def cases(self, s: Any) -> Iterator[tuple[str, bool, dict[str, Any]]]:
        for kind, d, mask in itertools.product(FILL, s.dims[:2], ("full", "causal")):
            args = {"kind": kind, "d": d, "causal": mask == "causal"}
            yield f"{kind}/d{d}/{mask}", kind == "heavy" and d == s.dims[0], args

    def samples(self, s: Any, kind: str, d: int, causal: bool) -> tuple[Sample, Sample]:
        """The packed batch, and a dense one of as many sequences and scores."""
        batch, longest = s.ragged
        lengths = heavy_tail(batch, longest, FILL[kind]) if FILL[kind] < 1 else [longest] * max(1, batch // 8)
        heads, each = max(1, s.width // d), round(math.sqrt(sum(n * n for n in lengths) / len(lengths)))
        cases = (
            ragged_case(lengths, heads, d, causal),
            sized("causal" if causal else "plain", len(lengths), heads, each, d),
        )
        packed, dense = (Sample.draw(case, s.half, s.device, scores=0) for case in cases)
        return packed, dense

    def check(self, s: Any, kind: str, d: int, causal: bool) -> dict[str, Any]:
        from bench.evidence import verify

        packed, dense = self.samples(s, kind, d, causal)
        return {"rows": verify(ours(), packed) | {f"dense {n}": x for n, x in verify(ours(), dense).items()}}

    def measure(self, s: Any, checked: dict[str, Any], kind: str, d: int, causal: bool) -> dict[str, Any]:
        from bench.evidence import compared, throughputs

        packed, dense = self.samples(s, kind, d, causal)
        found = compared([ours(), *PEERS], packed, s, DIRECTIONS, ["triton"])
        for direction, (own, other) in throughputs([packed, dense], s).items():
            found[direction] = {"ms": own[0], "dense_ms": other[0], "of_dense": own[1] / other[1], "goal": GOAL}
        return found
