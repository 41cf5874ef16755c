"""torch's attention kernel for the CPU: its calls for a problem, their derivatives, and the check of its results.

For NaN, Inf and very large scores the kernel (torch 2.10 to 2.15) returns wrong numbers. `Kernel.sound` detects that
from its log-sum-exp, in O(M).
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import threshold

from ...spec.problem import Mask, Problem, ordered_like
from ...spec.torch_internals import is_view, is_zero_tensor, sdpa_on_cpu, sdpa_on_cpu_backward
from ...spec.transforms import Version, by_operations, transform_of_cotangents, vjp
from ..tiled import attention as tiled
from .pieces import ALL, Piece, may_be_padding, padding_of, pieces_of_lengths, pieces_of_padding, pieces_of_problem

LARGE = 64.0  # largest |log-sum-exp| for the backward: rounding it changes a weight by 2**-18
LARGEST = torch.finfo(torch.float32).max
FEW = 4096  # largest mask, in elements, for which one operator is faster than three


def stored(p: Problem) -> Problem:
    """p with zero tensors (`torch._efficientzerotensor`) among q, k and v copied to memory.

    The dispatcher gives them strides of 0, but the kernel needs a last stride of 1.
    """
    zeros = {
        name: x.clone(memory_format=torch.contiguous_format)
        for name, x in (("q", p.q), ("k", p.k), ("v", p.v))
        if is_zero_tensor(x) or x.stride(3) == 0
    }
    return p.replace(**zeros) if zeros else p


def additive_mask(mask: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A bool mask and a bias as one additive tensor."""
    if mask is None:
        return bias
    if bias is not None:
        return torch.where(mask, bias, -math.inf)
    if mask.numel() <= FEW:
        return torch.where(mask, mask.new_zeros((), dtype=dtype), -math.inf)
    # 0 becomes -inf and any other byte 0. Vectorized, unlike torch.where on bool: 6 times as fast.
    added = mask.view(torch.uint8).to(dtype)
    return threshold(added, 0.5, -math.inf, inplace=True).clamp_max_(0)


class Step(NamedTuple):
    """The kernel call of one piece: indices into (B, H, M or N) and an additive mask for the keys read beyond it."""

    rows: tuple[slice, ...]
    keys: tuple[slice, ...]
    read: tuple[slice, ...]
    length: int  # number of keys
    causal: bool
    hidden: Tensor | None  # additive mask of `Piece.tail`

    @staticmethod
    def of(piece: Piece, dtype: torch.dtype) -> Step:
        rows, keys, read = ((piece.batch, ALL, x) for x in (piece.rows, piece.keys, piece.read))
        hidden = None
        if piece.tail:
            hidden = torch.zeros(1, 1, 1, piece.read.stop - piece.read.start, dtype=dtype)
            hidden[..., -piece.tail :] = -math.inf
        return Step(rows, keys, read, piece.keys.stop - piece.keys.start, piece.causal, hidden)

    def added(self, mask: Tensor | None) -> Tensor | None:
        """The additive mask of this call, given that of the problem."""
        if mask is None:
            return self.hidden
        dims = zip((*self.rows, self.read[2]), mask.shape, strict=True)
        part = mask[tuple(index if size > 1 else ALL for index, size in dims)]
        return part if self.hidden is None else part + self.hidden


class Kernel:
    """The calls of torch's CPU kernel that compute a problem, valid for every problem with the same metadata."""

    __slots__ = (
        "causal", "covers", "differentiable", "dtype", "overread", "rows", "scale", "steps", "template", "unpadded",
        "whole",
    )  # fmt: skip

    def __init__(self, p: Problem, search: bool = True) -> None:
        """search: whether to look for padding in the mask."""
        visible = padding_of(p.mask) if search and p.mask is not None and may_be_padding(p) else None
        pieces = None if visible is None else pieces_of_padding(p.span, p.shape, visible)
        self.unpadded = pieces is not None
        pieces = pieces_of_problem(p) if pieces is None else pieces
        assert pieces is not None, "why_not refuses this problem"
        self.scale: Any = p.scale  # a float: why_not refuses tensors
        self.rows, self.dtype = (p.q.shape[0], p.q.shape[2]), p.q.dtype
        self.whole = None if p.ragged is not None else (ALL, slice(0, p.shape[2]), slice(0, p.shape[3]))
        self.template: Any = None
        self.differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (p.q, p.k, p.v))
        if self.differentiable:
            # For second derivatives. It omits q, k, v and the mask, which would stay in memory with this object.
            mask = visible[:, None, None].clone() if self.unpadded and visible is not None else None
            starts = p.ragged and replace(p.ragged, q=p.ragged.q.clone(), k=p.ragged.k.clone())
            self.template = p.replace(q=None, k=None, v=None, mask=mask, bias=None, ragged=starts)
        self._set_pieces(pieces)

    def _set_pieces(self, pieces: list[Piece]) -> None:
        whole = [piece[:3] for piece in pieces] == [self.whole]
        self.steps = None if whole else [Step.of(x, self.dtype) for x in pieces]  # None: one call on whole tensors
        self.causal = pieces[0].causal if whole else False
        # Keys that are read although no row sees them.
        self.overread = [(x.batch, ALL, slice(x.keys.stop, x.read.stop)) for x in pieces if x.read != x.keys]
        batch, length = self.rows
        self.covers = sum(piece.rows_of(batch) for piece in pieces) == batch * length  # every row is in a piece

    def of(self, pieces: list[Piece], **source: Any) -> Kernel:
        """A copy for a problem with other pieces; source: the span=... or mask=... that they come from."""
        other = copy.copy(self)
        other.unpadded = "mask" in source
        other.template = self.template and self.template.replace(**source)
        other._set_pieces(pieces)
        return other

    def additive(self, p: Problem) -> Tensor | None:
        """The additive mask of p, without padding that the pieces leave out."""
        return additive_mask(None if self.unpadded else p.mask, p.bias, p.q.dtype)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor | None:
        """out in q's memory order, differentiable if an input requires grad; None if torch's kernel is wrong here."""
        if self.differentiable:
            out, lse = _apply(self, q, k, v, mask)
            sound = self.sound(q, k, v, mask, lse, LARGE)
        else:
            out, lse = self.forward(q, k, v, mask)
            sound = self.sound(q, k, v, mask, lse)
        if not sound:
            return None
        return out if out.stride() == q.stride() else ordered_like(out, q)

    def sound(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lse: Tensor, limit: float | None = None
    ) -> bool:
        """True if out is right; with a limit, True if the backward is right too: no |log-sum-exp| exceeds the limit.

        For a row with NaN or Inf scores the kernel returns finite numbers, and NaN, Inf or 0 as its log-sum-exp. A
        fully masked row has 0 too. Keys that are read but hidden must be finite: weight 0 times NaN is NaN, in the
        values and, in the backward, in the keys.
        """
        least, most = (x.item() for x in lse.aminmax())  # NaN if any is
        if not max(-least, most) <= (LARGEST if limit is None else limit):
            return False
        if least <= 0 <= most and not (lse.all() or _finite_scores(q, k, mask, self.scale)):
            return False
        if self.overread:
            for x in (v,) if limit is None else (k, v):
                if not math.isfinite(_norm(torch.cat([x[index] for index in self.overread], 2))):
                    return False
        return True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """out, in q's memory order, and lse (B, Hq, M)."""
        if self.steps is None:
            return _call(q, k, v, mask, self.causal, self.scale)
        if len(self.steps) == 1 and self.covers:
            return self._compute(self.steps[0], q, k, v, mask)
        make = torch.empty_like if self.covers else torch.zeros_like
        out, lse = make(q), q.new_ones(q.shape[:3], dtype=torch.float32)
        for step in self.steps:
            # Copied while in cache; concatenating at the end is slower.
            out[step.rows], lse[step.rows] = self._compute(step, q, k, v, mask)
        return out, lse

    def _compute(self, step: Step, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        rows, read = step.rows, step.read
        return _call(q[rows], k[read], v[read], step.added(mask), step.causal, self.scale)

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv."""
        if self.steps is None:
            return sdpa_on_cpu_backward(dout, q, k, v, out, lse, 0.0, self.causal, attn_mask=mask, scale=self.scale)
        dq = (torch.empty_like if self.covers else torch.zeros_like)(q)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for step in self.steps:
            rows, read = step.rows, step.read
            dq[rows], key_grads, value_grads = sdpa_on_cpu_backward(
                dout[rows], q[rows], k[read], v[read], out[rows], lse[rows], 0.0, step.causal,
                attn_mask=step.added(mask), scale=self.scale,
            )  # fmt: skip
            dk[step.keys], dv[step.keys] = key_grads[:, :, : step.length], value_grads[:, :, : step.length]
        return dq, dk, dv

    def differentiable_backward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dout: Tensor, needs: list[bool]
    ) -> tuple[Tensor | None, ...]:
        """dq, dk and dv by differentiable operations."""

        def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return tiled.attention(self.template.replace(q=q, k=k, v=v, bias=mask))

        return vjp(function, (q, k, v), needs, (dout, None))


class Repeated:
    """A problem's kernel for calls with the same metadata.

    Pieces may depend on values (lengths, padding). The kernel of the last values is kept, since all layers of a model
    use the same ones.
    """

    __slots__ = ("kernel", "last", "lengths", "padding", "shape", "span")

    def __init__(self, p: Problem, lengths: bool) -> None:
        """lengths: the span's `hi` comes from `Mask.lengths`, and calls pass the lengths as `mask`."""
        self.kernel, self.padding, self.lengths = Kernel(p, search=False), may_be_padding(p), lengths
        self.shape, self.span = p.shape, replace(p.span, hi=None)
        self.last: tuple[Any, Kernel] | None = None

    @staticmethod
    def of(p: Problem, lengths: bool) -> Repeated | None:
        """None if the pieces depend on other values than these."""
        fixed = p.ragged is None and p.span.lo is None and (p.span.hi is None or lengths)
        return Repeated(p, lengths) if p.q.device.type == "cpu" and fixed else None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
        """As `Kernel.__call__`; None also for lengths that are invalid or need another backend."""
        if mask is None:
            return self.kernel(q, k, v, bias)
        if self.lengths:
            kernel = self._of_lengths(mask)
            return None if kernel is None else kernel(q, k, v, bias)
        kernel = self._of_padding(mask) if self.padding else None
        if kernel is not None:
            return kernel(q, k, v, bias)
        return self.kernel(q, k, v, additive_mask(mask, bias, q.dtype))

    def _of_lengths(self, kv: Tensor) -> Kernel | None:
        lengths, last = kv.tolist(), self.last
        if last is not None and last[0] == lengths:
            return last[1]
        if not all(0 <= x <= self.shape[3] for x in lengths):
            return None
        pieces = pieces_of_lengths(self.span, self.shape, lengths)
        if pieces is None:
            return None
        span = self.span & Mask.lengths(kv).resolve(self.shape)[0] if self.kernel.differentiable else self.span
        return self._keep(lengths, self.kernel.of(pieces, span=span))

    def _of_padding(self, mask: Tensor) -> Kernel | None:
        visible, last = padding_of(mask), self.last
        if visible is None:
            return None
        if last is not None and torch.equal(last[0], visible):
            return last[1]
        pieces = pieces_of_padding(self.span, self.shape, visible)
        if pieces is None:
            return None
        visible = visible.clone()
        return self._keep(visible, self.kernel.of(pieces, mask=visible[:, None, None]))

    def _keep(self, values: Any, kernel: Kernel) -> Kernel:
        self.last = values, kernel
        return kernel


def _call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    heads, kv_heads = q.shape[1], k.shape[1]
    if q.shape[2] > 1 or heads == kv_heads or causal or not (mask is None or mask.shape[1] == mask.shape[2] == 1):
        return sdpa_on_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    # One query per head: the query heads of a group become rows, so that its keys are read once.
    out, lse = sdpa_on_cpu(q.view(-1, kv_heads, heads // kv_heads, q.shape[3]), k, v, attn_mask=mask, scale=scale)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def _finite_scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> bool:
    """False if a score may be NaN or +Inf: |q . k| is bounded by the product of the norms. A false alarm costs time,
    not correctness."""
    if mask is not None and not mask.amax() < math.inf:
        return False
    return _norm(q) * _norm(k) * abs(scale) < LARGEST


def _norm(x: Tensor) -> float:
    """Euclidean norm; inf if the squares overflow."""
    x = x.detach()
    if x.dtype == torch.float32 and x.is_contiguous():
        flat = x.view(-1)
        return math.sqrt(torch.dot(flat, flat))  # twice as fast as vector_norm
    return torch.linalg.vector_norm(x, dtype=torch.float32).item()


class _Function(torch.autograd.Function):
    """(kernel, q, k, v, additive mask) -> (out, lse). The backward recomputes an out that was changed in place."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Any:
        out, lse = kernel.forward(q, k, v, mask)
        out = out.clone() if is_view(out) else out  # autograd forbids in-place changes of a returned view
        ctx.save_for_backward(q, k, v, mask, out.data, lse)
        ctx.kernel, ctx.version = kernel, Version(out)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * 5
        *inputs, out, lse = ctx.saved_tensors
        if by_operations(dout, None) or (ctx.kernel.steps is not None and transform_of_cotangents(dout)):
            grads = ctx.kernel.differentiable_backward(*inputs, dout, list(ctx.needs_input_grad[1:4]))
        else:
            with torch.autocast("cpu", enabled=False):
                out = ctx.kernel.forward(*inputs)[0] if ctx.version.changed() else out
                grads = ctx.kernel.backward(*inputs, out, lse, dout)
        return None, *grads, None


# `Function.apply` binds default arguments in Python at every call; its base method does not.
_apply = super(torch.autograd.Function, _Function).apply
