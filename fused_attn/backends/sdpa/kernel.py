"""torch's own attention kernel for the CPU: how it is called for a problem, its derivatives, and what it gets wrong.

What it does wrong (seen in torch 2.10 to 2.15) is found afterwards in its log-sum-exp, which is as short as the
sequence: see `Kernel.sound`.
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
from .pieces import ALL, Piece, pieces_of_lengths, pieces_of_problem, pieces_of_seen, searched, seen_by_all

LARGE = 64.0  # largest |log-sum-exp| whose rounding, 2**-18, the backward may put into a weight
LARGEST = torch.finfo(torch.float32).max
FEW = 4096  # elements of a mask that one operator converts faster than three


def stored(p: Problem) -> Problem:
    """p with memory for zero tensors (`torch._efficientzerotensor`) among q, k and v.

    torch's dispatcher hands them on with strides of 0, and its kernel reads the last dim as contiguous.
    """
    zeros = {
        name: x.clone(memory_format=torch.contiguous_format)
        for name, x in (("q", p.q), ("k", p.k), ("v", p.v))
        if is_zero_tensor(x) or x.stride(3) == 0
    }
    return p.replace(**zeros) if zeros else p


def additive_mask(mask: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A bool mask and a bias as the one tensor that is added to the scores."""
    if mask is None:
        return bias
    if bias is not None:
        return torch.where(mask, bias, -math.inf)
    if mask.numel() <= FEW:
        return torch.where(mask, mask.new_zeros((), dtype=dtype), -math.inf)
    # In vector instructions, which torch.where on bool is not: 6 times as fast. 0 becomes -inf and any other byte 0.
    added = mask.view(torch.uint8).to(dtype)
    return threshold(added, 0.5, -math.inf, inplace=True).clamp_max_(0)


class Step(NamedTuple):
    """A piece as the kernel is called for it: what to take of the tensors, and which of the keys read to hide."""

    rows: tuple[slice, ...]
    keys: tuple[slice, ...]
    read: tuple[slice, ...]
    length: int  # of keys
    causal: bool
    hidden: Tensor | None  # additive

    @staticmethod
    def of(piece: Piece, dtype: torch.dtype) -> Step:
        rows, keys, read = ((piece.batch, ALL, x) for x in (piece.rows, piece.keys, piece.read))
        hidden = None
        if piece.tail:
            hidden = torch.zeros(1, 1, 1, piece.read.stop - piece.read.start, dtype=dtype)
            hidden[..., -piece.tail :] = -math.inf
        return Step(rows, keys, read, piece.keys.stop - piece.keys.start, piece.causal, hidden)

    def added(self, mask: Tensor | None) -> Tensor | None:
        """Its additive mask, of that of the problem."""
        if mask is None:
            return self.hidden
        places = zip((*self.rows, self.read[2]), mask.shape, strict=True)
        part = mask[tuple(place if size > 1 else ALL for place, size in places)]
        return part if self.hidden is None else part + self.hidden


class Kernel:
    """How torch's CPU kernel computes a problem, and every other that differs in the contents of its tensors alone."""

    __slots__ = (
        "causal", "covers", "differentiable", "dtype", "peeked", "rows", "scale", "steps", "template", "unpadded",
        "whole",
    )  # fmt: skip

    def __init__(self, p: Problem, search: bool = True) -> None:
        """search: whether to look for padding in the mask."""
        seen = seen_by_all(p.mask) if search and p.mask is not None and searched(p) else None
        found = None if seen is None else pieces_of_seen(p.span, p.shape, seen)
        self.unpadded = found is not None
        found = pieces_of_problem(p) if found is None else found
        assert found is not None, "asked for what why_not refuses"
        self.scale: Any = p.scale  # a number: why_not refuses tensors
        self.rows, self.dtype = (p.q.shape[0], p.q.shape[2]), p.q.dtype
        self.whole = None if p.ragged is not None else (ALL, slice(0, p.shape[2]), slice(0, p.shape[3]))
        self.template: Any = None
        self.differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (p.q, p.k, p.v))
        if self.differentiable:
            # For second derivatives; without q, k, v and the mask, which would live as long as this does.
            mask = seen[:, None, None].clone() if self.unpadded and seen is not None else None
            starts = p.ragged and replace(p.ragged, q=p.ragged.q.clone(), k=p.ragged.k.clone())
            self.template = p.replace(q=None, k=None, v=None, mask=mask, bias=None, ragged=starts)
        self._take(found)

    def _take(self, found: list[Piece]) -> None:
        covering = [piece[:3] for piece in found] == [self.whole]
        self.steps = None if covering else [Step.of(x, self.dtype) for x in found]  # None: one call does it all
        self.causal = found[0].causal if covering else False
        # Keys that are read and that no row sees.
        self.peeked = [(x.batch, ALL, slice(x.keys.stop, x.read.stop)) for x in found if x.read != x.keys]
        batch, length = self.rows
        self.covers = sum(piece.rows_of(batch) for piece in found) == batch * length  # every row is in a piece

    def of(self, found: list[Piece], **seen: Any) -> Kernel:
        """That of a problem which differs in nothing but its pieces, and the span or mask that they come from."""
        other = copy.copy(self)
        other.unpadded = "mask" in seen
        other.template = self.template and self.template.replace(**seen)
        other._take(found)
        return other

    def additive(self, p: Problem) -> Tensor | None:
        """What is left to add to the scores of p."""
        return additive_mask(None if self.unpadded else p.mask, p.bias, p.q.dtype)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor | None:
        """out in q's memory order, with a derivative where one is wanted; None: torch's kernel gets it wrong."""
        if self.differentiable:
            out, lse = _apply(self, q, k, v, mask)
            right = self.sound(q, k, v, mask, lse, LARGE)
        else:
            out, lse = self.forward(q, k, v, mask)
            right = self.sound(q, k, v, mask, lse)
        if not right:
            return None
        return out if out.stride() == q.stride() else ordered_like(out, q)

    def sound(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lse: Tensor, limit: float | None = None
    ) -> bool:
        """Whether out is right; with a limit, the backward too: no |log-sum-exp| is above it.

        The kernel makes numbers of NaN and Inf scores, and leaves NaN, Inf or 0 in the log-sum-exp of such a row. A 0
        is also that of a row that the mask hides. A weight of 0 does not hide NaN in a value, nor, in the backward,
        in a key behind the diagonal.
        """
        least, most = (x.item() for x in lse.aminmax())  # NaN where one is
        if not max(-least, most) <= (LARGEST if limit is None else limit):
            return False
        if least <= 0 <= most and not (lse.all() or _finite_scores(q, k, mask, self.scale)):
            return False
        if self.peeked:
            for x in (v,) if limit is None else (k, v):
                if not math.isfinite(_norm(torch.cat([x[place] for place in self.peeked], 2))):
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
            # Copied while it is in the cache; joining all of them in the end takes longer.
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
        """dq, dk and dv by operations that can be differentiated again."""

        def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return tiled.attention(self.template.replace(q=q, k=k, v=v, bias=mask))

        return vjp(function, (q, k, v), needs, (dout, None))


class Repeated:
    """A problem's kernel for calls that differ in the contents of their tensors alone.

    Where those decide what is computed, as lengths and padding do, the last ones' kernel is kept: all layers of a model
    have the same.
    """

    __slots__ = ("kernel", "last", "lengths", "searched", "shape", "span")

    def __init__(self, p: Problem, lengths: bool) -> None:
        """lengths: the span's `hi` is that of `Mask.lengths`; calls give the lengths in place of a mask."""
        self.kernel, self.searched, self.lengths = Kernel(p, search=False), searched(p), lengths
        self.shape, self.span = p.shape, replace(p.span, hi=None)
        self.last: tuple[Any, Kernel] | None = None

    @staticmethod
    def of(p: Problem, lengths: bool) -> Repeated | None:
        """None where there is none."""
        fixed = p.ragged is None and p.span.lo is None and (p.span.hi is None or lengths)
        return Repeated(p, lengths) if p.q.device.type == "cpu" and fixed else None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
        """As `Kernel.__call__`; None also of lengths that are wrong or take another backend."""
        if mask is None:
            return self.kernel(q, k, v, bias)
        if self.lengths:
            kernel = self._of_lengths(mask)
            return None if kernel is None else kernel(q, k, v, bias)
        kernel = self._of_padding(mask) if self.searched else None
        if kernel is not None:
            return kernel(q, k, v, bias)
        return self.kernel(q, k, v, additive_mask(mask, bias, q.dtype))

    def _of_lengths(self, kv: Tensor) -> Kernel | None:
        lengths, last = kv.tolist(), self.last
        if last is not None and last[0] == lengths:
            return last[1]
        if not all(0 <= x <= self.shape[3] for x in lengths):
            return None
        found = pieces_of_lengths(self.span, self.shape, lengths)
        if found is None:
            return None
        span = self.span & Mask.lengths(kv).resolve(self.shape)[0] if self.kernel.differentiable else self.span
        return self._keep(lengths, self.kernel.of(found, span=span))

    def _of_padding(self, mask: Tensor) -> Kernel | None:
        seen, last = seen_by_all(mask), self.last
        if seen is None:
            return None
        if last is not None and torch.equal(last[0], seen):
            return last[1]
        found = pieces_of_seen(self.span, self.shape, seen)
        if found is None:
            return None
        seen = seen.clone()
        return self._keep(seen, self.kernel.of(found, mask=seen[:, None, None]))

    def _keep(self, of: Any, kernel: Kernel) -> Kernel:
        self.last = of, kernel
        return kernel


def _call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    heads, kv_heads = q.shape[1], k.shape[1]
    if q.shape[2] > 1 or heads == kv_heads or causal or not (mask is None or mask.shape[1] == mask.shape[2] == 1):
        return sdpa_on_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    # One query a head: those of a group become rows that read their keys once.
    out, lse = sdpa_on_cpu(q.view(-1, kv_heads, heads // kv_heads, q.shape[3]), k, v, attn_mask=mask, scale=scale)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def _finite_scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> bool:
    """No score is NaN or +Inf. |q . k| is at most the product of the norms; they overflow a little early, which costs a
    detour and never an answer."""
    if mask is not None and not mask.amax() < math.inf:
        return False
    return _norm(q) * _norm(k) * abs(scale) < LARGEST


def _norm(x: Tensor) -> float:
    """Euclidean; infinite where the squares overflow."""
    x = x.detach()
    if x.dtype == torch.float32 and x.is_contiguous():
        flat = x.view(-1)
        return math.sqrt(torch.dot(flat, flat))  # half the time of what follows
    return torch.linalg.vector_norm(x, dtype=torch.float32).item()


class _Function(torch.autograd.Function):
    """A `Kernel`, q, k, v and the additive mask -> (out, lse). An out that was changed in place is computed again."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Any:
        out, lse = kernel.forward(q, k, v, mask)
        out = out.clone() if is_view(out) else out  # a view could not be changed in place
        ctx.save_for_backward(q, k, v, mask, out.data, lse)
        ctx.kernel, ctx.version = kernel, Version(out)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * 5
        *given, out, lse = ctx.saved_tensors
        if by_operations(dout, None) or (ctx.kernel.steps is not None and transform_of_cotangents(dout)):
            grads = ctx.kernel.differentiable_backward(*given, dout, list(ctx.needs_input_grad[1:4]))
        else:
            with torch.autocast("cpu", enabled=False):
                out = ctx.kernel.forward(*given)[0] if ctx.version.changed() else out
                grads = ctx.kernel.backward(*given, out, lse, dout)
        return None, *grads, None


# `Function.apply` binds default arguments in Python at every call; the method below it does the same work without.
_apply = super(torch.autograd.Function, _Function).apply
