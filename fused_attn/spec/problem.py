"""The definition of an attention problem, which every layer below the API takes.

Shapes are heads-first: q (B, Hq, M, D), k (B, Hkv, N, D), v (B, Hkv, N, Dv). Row i counts queries, column j keys,
and query head h reads key-value head h // (Hq // Hkv). The score of (i, j) is, in this order:

    softcap(score(q_i, k_j) * scale)  + bias  - slope * |i + offset - j|,   -inf where the mask forbids it

`materialize()` defines the meaning of masks and dropout in full matrices; the reference is built from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Reexported, so that layers above import the definitions from one module.
from .checks import check_broadcastable, check_parameter, check_window, debug, describe  # noqa: F401
from .dropout import Dropout
from .masks import Mask  # noqa: F401
from .patterns import Pattern
from .ragged import Ragged, Sequence
from .spans import ALIGNMENTS, Shape, Span, diagonal_offset  # noqa: F401

HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32, torch.float64)
NORMALIZERS = ("softmax", "softmax1", "sigmoid")
# The tensors that backends compute gradients of. A score's "parameter" is none of them: lowering replaces it.
DIFFERENTIABLE = ("q", "k", "v", "scale", "softcap", "bias", "slopes", "sink", "w", "row_terms", "key_terms")


class BackendError(ValueError):
    """The chosen backend cannot run this problem; the message lists every reason."""


class TransformError(BackendError, NotImplementedError):
    """The backend does not support a transform of torch (forward AD, torch.func, double backward)."""


@dataclass(frozen=True, eq=False)
class Problem:
    """One validated call. Tensors are heads-first views, neither copied nor expanded.

    scale, softcap: floats, or tensors () or (Hq,) for scale and () for softcap. A row attends to a key if span, pattern
    and mask allow it. mask (bool) and bias are 4-d and broadcastable to (B, Hq, M, N); slopes (Hq,) or (B, Hq); sink
    (Hq,). offset: the diagonal of ALiBi.

    score: one of `fused_attn.scores`, None for the dot product. `lower` replaces it by other q and k; w (D,) or (Hq,
    D), the weights of an additive score; row_terms (B, Hq, M) and key_terms (B, Hq, N), which are added to the scaled
    product. It also replaces the normalizer softmax1 by a sink of zeros.

    ragged: the batch is B packed sequences. q is then (1, Hq, T, D), and every tensor with rows or keys is packed too;
    tensors of pairs have the longest lengths, and shorter sequences use their first rows and columns; the numbers of
    span, and ALiBi, are relative to each sequence's own diagonal.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | Tensor
    softcap: float | Tensor | None = None
    bias: Tensor | None = None
    slopes: Tensor | None = None
    sink: Tensor | None = None
    w: Tensor | None = None
    row_terms: Tensor | None = None
    key_terms: Tensor | None = None
    mask: Tensor | None = None
    # No default: before torch 2.13 dynamo cannot wrap an object that is a default.
    span: Span = field(kw_only=True)
    pattern: Pattern | None = None
    offset: int = 0
    dropout: Dropout | None = None
    return_lse: bool = False
    deterministic: bool = True
    normalizer: str = "softmax"
    score: Any = None
    ragged: Ragged | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, Hq, M, N); for ragged sequences M and N are the longest lengths."""
        if self.ragged is not None:
            return self.ragged.batch, self.q.shape[1], self.ragged.max_q, self.ragged.max_k
        return (*self.q.shape[:3], self.k.shape[2])

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.q.shape[1] // self.k.shape[1] if self.k.shape[1] else 1

    @property
    def empty(self) -> bool:
        """True if there is no score to compute."""
        return 0 in self.shape or (self.ragged is not None and 0 in (self.q.shape[2], self.k.shape[2]))

    @property
    def unbounded(self) -> bool:
        """True if span and pattern mask nothing."""
        return self.span.unbounded and self.pattern is None

    @property
    def all_keys_visible(self) -> bool:
        """True if span and pattern let some row attend to every key; False without queries."""
        return self.unbounded and self.ragged is None and self.q.shape[2] > 0

    @property
    def needs_block_mask(self) -> bool:
        """True if kernels need a block mask: visibility, apart from the mask tensor, is no interval of keys."""
        return self.pattern is not None or self.span.sinks > 0

    def visible(self, rows: Tensor, cols: Tensor) -> Tensor:
        """bool (B or 1, Hq or 1, rows, cols): visibility by span and pattern."""
        grid = self.span.materialize(rows, cols, self.shape[3])
        return grid if self.pattern is None else grid & self.pattern.materialize(rows, cols)

    def visible_keys(self) -> Tensor:
        """bool (B or 1, 1, N): the keys that some row may attend to by interval and ids, and some row by interval and
        blocks in any head. The other keys have no influence, even as NaN."""
        rows, cols = (torch.arange(x, device=self.q.device) for x in self.shape[2:])
        near = self.span.materialize(rows, cols, self.shape[3])
        found = near.any(-2)
        for condition in () if self.pattern is None else self.pattern.conditions:
            found = found & (near & condition.materialize(rows, cols)).any(-2).any(1, keepdim=True)
        return found

    @property
    def sigmoid(self) -> bool:
        """True if each weight depends on its score alone: there is no denominator and no LSE."""
        return self.normalizer == "sigmoid"

    @property
    def parameter(self) -> Any:
        """The score's parameter, before lowering."""
        return None if self.score is None else self.score.parameter

    @property
    def lse_dtype(self) -> torch.dtype:
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def differentiable(self) -> bool:
        """True if autograd is on and a tensor requires grad."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The differentiable tensors, by name."""
        found = {name: getattr(self, name) for name in (*DIFFERENTIABLE, "parameter")}
        return {name: x for name, x in found.items() if isinstance(x, Tensor)}

    def replace(self, **changes: Any) -> Problem:
        return Problem(**{name: getattr(self, name) for name in _FIELDS} | changes)

    def sequences(self) -> Iterator[tuple[Sequence, Problem]]:
        """Each ragged sequence and its dense problem, as views. Reads the starts, which synchronizes the device."""
        if self.ragged is None:
            raise ValueError("ragged: expected a problem of sequences, got None")
        for one in self.ragged.sequences():
            (m, n), b = one.shape, slice(one.number, one.number + 1)
            offset = n - m if self.ragged.bottom_right else 0
            tensors = {
                name: one.part(name, x)
                for name in (*DIFFERENTIABLE, "mask")
                if isinstance(x := getattr(self, name), Tensor)
            }
            lo, hi = (None if x is None else (x if len(x) == 1 else x[b])[:, :m] for x in (self.span.lo, self.span.hi))
            span = replace(self.span.shifted(offset), lo=lo, hi=hi)
            pattern, dropout = self.pattern, self.dropout
            if pattern is not None:
                pattern = pattern.part(b, slice(None)).begin(m, n)
            if dropout is not None:
                dropout = replace(dropout, first=one.number * self.shape[1])
            yield (
                one,
                self.replace(
                    **tensors, span=span, pattern=pattern, dropout=dropout, offset=self.offset + offset, ragged=None
                ),
            )

    def joined(self, found: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Packed (out, lse) from those of each sequence, in order. Differentiable."""
        outs, lses = ([x[i] for x in found] for i in range(2))
        out = torch.cat([self.empty_out()[:, :, :0], *outs], 2)
        if self.sigmoid:
            return self.in_order(out), self.empty_lse()
        return self.in_order(out), torch.cat([self.empty_lse()[:, :, :0], *lses], 2)

    def of_head(self, h: int) -> Problem:
        """The problem of query head h alone, as views; self is lowered."""
        heads, kv_heads = slice(h, h + 1), slice(h // self.group, h // self.group + 1)

        def own(x: Any, dim: int) -> Any:
            """The head's slice of a tensor with heads in dim -dim, or the tensor if all heads share it."""
            if not isinstance(x, Tensor) or x.ndim < dim or x.shape[-dim] == 1:
                return x
            return x.narrow(-dim, h, 1)

        return self.replace(
            q=self.q[:, heads], k=self.k[:, kv_heads], v=self.v[:, kv_heads], scale=own(self.scale, 1),
            bias=own(self.bias, 3), slopes=own(self.slopes, 1), sink=own(self.sink, 1), w=own(self.w, 2),
            row_terms=own(self.row_terms, 2), key_terms=own(self.key_terms, 2), mask=own(self.mask, 3),
            pattern=None if self.pattern is None else self.pattern.part(slice(None), heads),
        )  # fmt: skip

    def lower(self, wide: bool = False) -> Problem:
        """The same problem without a score object and softmax1, which only the reference implements directly.

        wide: q and k that a score has rewritten stay in `lse_dtype`, even if v has half precision.
        """
        p = self if self.score is None else self.score.lower(self, wide)
        if p.normalizer != "softmax1":
            return p
        return p.replace(normalizer="softmax", sink=p.q.new_zeros(p.q.shape[1], dtype=p.lse_dtype))

    def empty_lse(self) -> Tensor:
        """An uninitialized (B, Hq, M); (0,) for a sigmoid, which has no LSE."""
        return self.q.new_empty((0,) if self.sigmoid else self.q.shape[:3], dtype=self.lse_dtype)

    def empty_normaliser(self) -> tuple[Tensor, Tensor, Tensor]:
        """Three of `empty_lse`."""
        shape, dtype = (0,) if self.sigmoid else self.q.shape[:3], self.lse_dtype
        first = self.q.new_empty(shape, dtype=dtype)
        return first, torch.empty_like(first), torch.empty_like(first)

    def empty_out(self) -> Tensor:
        """An uninitialized (B, Hq, M, Dv) in v's dtype and q's memory order."""
        return empty_ordered(self.q, self.v.shape[3], self.v.dtype)

    def in_order(self, out: Tensor) -> Tensor:
        """out (B, Hq, M, Dv) in v's dtype and q's memory order."""
        return ordered_like(out.to(self.v.dtype), self.q)


_FIELDS = tuple(f.name for f in fields(Problem))


def ordered_like(x: Tensor, like: Tensor) -> Tensor:
    """x, 4-d, in like's memory order."""
    order, inverse = memory_order(like)
    return x.permute(order).contiguous().permute(inverse)


def empty_ordered(q: Tensor, dv: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialized (*q.shape[:3], dv) in q's memory order. dtype None is q's.

    Not a permuted view: a view that a Function returns cannot be changed in place.
    """
    b, h, m, _ = q.shape
    slowest, slower, slow, fast = q.stride()
    if slowest >= slower >= slow >= fast > 0:
        return q.new_empty((b, h, m, dv), dtype=dtype)
    shape, strides, step = (b, h, m, dv), [0] * 4, 1
    for d in reversed(memory_order(q)[0]):
        strides[d] = step
        step = step * shape[d]
    return q.new_empty_strided(shape, strides, dtype=dtype)


class Statistics(NamedTuple):
    """The results of `attention_stats`; None for those not requested."""

    key_mass: Tensor | None = None
    entropy: Tensor | None = None
    max_logit: Tensor | None = None
    top_k_indices: Tensor | None = None
    top_k_weights: Tensor | None = None

    @staticmethod
    def of_sequences(
        p: Problem, find: Callable[..., Statistics], key_mass: bool, entropy: bool, max_logit: bool, top_k: int
    ) -> Statistics:
        """The statistics of ragged sequences, by calling `find` for each."""
        found = Statistics.fully_masked(p, key_mass, entropy, max_logit, top_k)._asdict()
        for one, alone in p.sequences():
            own = find(alone, key_mass, entropy, max_logit, min(top_k, one.shape[1]))
            for name, x in own._asdict().items():
                if x is not None:
                    whole = one.part(name, found[name])
                    (whole[..., : x.shape[3]] if x.ndim == 4 else whole).copy_(x)
        return Statistics(**found)

    @staticmethod
    def fully_masked(p: Problem, key_mass: bool, entropy: bool, max_logit: bool, top_k: int) -> Statistics:
        """The statistics of fully masked rows, in new memory."""
        (b, h, m, _), n = p.q.shape, p.k.shape[2]

        def full(asked: Any, value: float, *shape: int, dtype: torch.dtype = p.lse_dtype) -> Tensor | None:
            return p.q.new_full(shape, value, dtype=dtype) if asked else None

        return Statistics(
            full(key_mass, 0, b, h, n),
            full(entropy, 0, b, h, m),
            full(max_logit, -torch.inf, b, h, m),
            full(top_k, -1, b, h, m, top_k, dtype=torch.int64),
            full(top_k, 0, b, h, m, top_k),
        )


def memory_order(q: Tensor) -> tuple[list[int], list[int]]:
    """The dims of a 4-d q by descending stride, the last dim kept last; and the inverse permutation."""
    strides, order = q.stride(), [0, 1, 2, 3]
    for a in (0, 1, 0):  # a stable sort of three dims, by comparisons that dynamo can guard
        if strides[order[a]] < strides[order[a + 1]]:
            order[a], order[a + 1] = order[a + 1], order[a]
    return order, [order.index(d) for d in range(4)]
