"""Attention scores other than the dot product: `attention(q, k, v, score=scores.Cosine(t))`.

    Bilinear   q . w . k                Distance   -|q - k|^2 / (2 h^2)
    Cosine     t q . k / (|q| |k|)      Additive   w . tanh(q + k)

The scale of `attention`, by default 1 except for Bilinear, multiplies the score. Each score has one parameter, a tensor
that may require a gradient; Cosine and Distance take a float too. A parameter of a wrong type, shape or dtype raises
TypeError or ValueError.

Each class implements its score twice. `materialize` is the definition, used by the reference. `lower` rewrites the
problem for the other backends: Bilinear and Cosine as dot products of other q and k, Distance as a dot product plus a
term per row and per key, Additive as weights of its own kernels. Rows that see no key and keys that no row sees are set
to zero first, because padding may hold NaN.

Scores can be pickled, copied, printed, compared and moved (`to`). A tensor is kept by reference and read at each call,
so scores have no hash.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from .spec.checks import as_float
from .spec.description import Description
from .spec.problem import Problem, check_parameter, describe, ordered_like
from .spec.ragged import locate
from .spec.visibility import visibility

SHORTEST = 1e-6  # smallest norm of `Cosine`
LARGE = 64.0  # largest |q . w| of `Bilinear` in float16


class Score(Description):
    """Base class of the scores; the only field of a subclass is its parameter."""

    rewrites: ClassVar[bool] = False  # True if `lower` computes a new q or k

    def __post_init__(self) -> None:
        name = fields(self)[0].name
        x = getattr(self, name)
        if isinstance(x, Tensor) or (type(x) is float and () in self._shapes(1, 1, 1)):
            return
        if () not in self._shapes(1, 1, 1):
            raise TypeError(f"score.{name}: expected a tensor, got {describe(x)}")
        object.__setattr__(self, name, as_float(f"score.{name}", x, "a float or a tensor"))

    @property
    def parameter(self) -> float | Tensor:
        return getattr(self, fields(self)[0].name)

    def replace(self, parameter: Tensor) -> Score:
        return type(self)(parameter)  # type: ignore[call-arg]

    def default_scale(self, d: int) -> float:
        """The default scale for head dim d of q."""
        return 1.0

    def check(self, q: Tensor, k: Tensor) -> None:
        """Raise ValueError or TypeError if the parameter does not match q and k (heads-first)."""
        name, heads = f"score.{fields(self)[0].name}", q.shape[1]
        if isinstance(self.parameter, Tensor):
            check_parameter(name, self.parameter, q, *self._shapes(heads, q.shape[3], k.shape[3]))

    def materialize(self, q: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
        """The scores (B, Hq, M, N) by definition, computed in dtype, for q (B, Hq, M, D) and k (B, Hkv, N, D)."""
        group = q.shape[1] // k.shape[1] if k.shape[1] else 1
        k = k if group == 1 else k.repeat_interleave(group, 1)
        x = self.parameter
        return self._products(q.to(dtype), k.to(dtype), x.to(dtype) if isinstance(x, Tensor) else x)

    def lower(self, p: Problem, wide: bool = False) -> Problem:
        """An equivalent problem without `score`, for every backend except the reference.

        wide: keep rewritten q and k in `Problem.lse_dtype` instead of rounding them to q's dtype.
        """
        q, k = p.q, p.k
        keys = None
        if not p.all_keys_visible:
            rows, keys = visibility(p)
            q, k = torch.where(rows, q, 0), torch.where(keys, k, 0)
        return self._lower(p.replace(q=q, k=k, score=None), p.lse_dtype if wide else p.q.dtype, keys)

    def _shapes(self, heads: int, d: int, dk: int) -> tuple[tuple[int, ...], ...]:
        """The allowed shapes of the parameter; () allows a float too."""
        raise NotImplementedError

    def _products(self, q: Tensor, k: Tensor, x: Any) -> Tensor:
        raise NotImplementedError

    def _lower(self, p: Problem, dtype: torch.dtype, keys: Tensor | None) -> Problem:
        """dtype: of rewritten q and k. keys: bool (B or 1, 1, N, 1), the keys that some row sees, or None for all."""
        raise NotImplementedError


def _per_head(x: float | Tensor, dims: int) -> float | Tensor:
    """A float unchanged; a tensor () or (Hq,) shaped to multiply (B, Hq, ...) with `dims` more dims."""
    return x.reshape(-1, *[1] * dims) if isinstance(x, Tensor) else x


@dataclass(frozen=True, eq=False, repr=False)
class Bilinear(Score):
    """q . w . k: "general" of Luong et al., "Effective approaches to attention-based neural machine translation", 2015.

    w: (Dq, Dk), or (Hq, Dq, Dk) for one matrix per query head; float32 or q's dtype. The head dim of k, Dk, may differ
    from that of q, Dq. The default scale is Dq ** -0.5.

    `tiled` and `reference` keep q . w in float32. The other backends round it to q's dtype; in bfloat16 that changes a
    score by about 2^-9 of its terms, several times the rounding error of the output. In float16, q . w is scaled by a
    power of two per head, so that it does not overflow unless the scores do.

    >>> import torch, fused_attn
    >>> q, k = torch.randn(2, 8, 10, 32), torch.randn(2, 8, 20, 48)
    >>> w = torch.randn(8, 32, 48, requires_grad=True)
    >>> fused_attn.attention(q, k, k, score=fused_attn.scores.Bilinear(w)).shape
    torch.Size([2, 8, 10, 48])
    """

    prefix: ClassVar[str] = "scores.Bilinear"
    rewrites: ClassVar[bool] = True
    w: Tensor

    def default_scale(self, d: int) -> float:
        return d**-0.5

    def _shapes(self, heads: int, d: int, dk: int) -> tuple[tuple[int, ...], ...]:
        return (d, dk), (heads, d, dk)

    def _products(self, q: Tensor, k: Tensor, x: Any) -> Tensor:
        return q @ x @ k.mT

    def _lower(self, p: Problem, dtype: torch.dtype, keys: Tensor | None) -> Problem:
        q, scale = p.q.to(p.lse_dtype) @ self.w.to(p.lse_dtype), p.scale
        if dtype == torch.float16 and not p.empty:
            shrink = _excess(q)
            q, scale = q / shrink[:, None, None], scale * shrink
        return p.replace(q=ordered_like(q.to(dtype), p.q), scale=scale)


def _excess(q: Tensor) -> Tensor:
    """(Hq,): the power of two by which to divide each head's q in float16 so that |q| <= LARGE.

    The gradient of the divided q is larger by the same factor, about (size of the scores) / LARGE, and does not
    overflow either.
    """
    q = q.detach()
    largest = torch.where(q.isfinite(), q.abs(), 0).amax((0, 2, 3))
    return torch.exp2((largest / LARGE).clamp_min(1).log2().ceil())


@dataclass(frozen=True, eq=False, repr=False)
class Cosine(Score):
    """t q . k / (|q| |k|), with t an inverse temperature. Norms are at least 1e-6, so zero vectors score 0.

    t: a float, or a tensor () or (Hq,), float32 or q's dtype, which may be learned. Norms are computed in float32
    without overflow. Henry et al., "Query-key normalization for Transformers", 2020.

    >>> import torch, fused_attn
    >>> q = torch.randn(2, 8, 10, 32)
    >>> t = torch.full((8,), 10.0, requires_grad=True)
    >>> fused_attn.attention(q, q, q, score=fused_attn.scores.Cosine(t)).shape
    torch.Size([2, 8, 10, 32])
    """

    prefix: ClassVar[str] = "scores.Cosine"
    rewrites: ClassVar[bool] = True
    t: float | Tensor

    def _shapes(self, heads: int, d: int, dk: int) -> tuple[tuple[int, ...], ...]:
        return (), (heads,)

    def _products(self, q: Tensor, k: Tensor, x: Any) -> Tensor:
        return _unit(q) @ _unit(k).mT * _per_head(x, 2)

    def _lower(self, p: Problem, dtype: torch.dtype, keys: Tensor | None) -> Problem:
        q, k = (ordered_like(_unit(x.to(p.lse_dtype)).to(dtype), x) for x in (p.q, p.k))
        return p.replace(q=q, k=k, scale=self.t * p.scale)


def _unit(x: Tensor) -> Tensor:
    """x / |x|. Divided by its largest element first, so that no square overflows."""
    largest = x.detach().abs().amax(-1, keepdim=True).clamp_min(SHORTEST)
    norm = torch.linalg.vector_norm(x / largest, dim=-1, keepdim=True) * largest
    return x / norm.clamp_min(SHORTEST)


@dataclass(frozen=True, eq=False, repr=False)
class Distance(Score):
    """-|q - k|^2 / (2 h^2): the log of a Gaussian kernel of bandwidth h.

    h: a float, or a tensor () or (Hq,), float32 or q's dtype, not zero. The term |q|^2 cancels in a softmax, but not in
    the log-sum-exp, with sinks or in other normalizers, so it is included. softcap raises ValueError. Accurate far from
    the origin too: q and k are translated so that the keys are close to it.

    Tsai et al., "Transformer dissection: a unified understanding of Transformer's attention via the lens of kernel",
    2019.

    >>> import torch, fused_attn
    >>> q = torch.randn(2, 8, 10, 32)
    >>> fused_attn.attention(q, q, q, score=fused_attn.scores.Distance(4.0)).shape
    torch.Size([2, 8, 10, 32])
    """

    prefix: ClassVar[str] = "scores.Distance"
    h: float | Tensor

    def _shapes(self, heads: int, d: int, dk: int) -> tuple[tuple[int, ...], ...]:
        return (), (heads,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.h, Tensor) and not (math.isfinite(self.h) and self.h):
            raise ValueError(f"score.h: must be finite and not 0, got {self.h}")

    def _products(self, q: Tensor, k: Tensor, x: Any) -> Tensor:
        return (q[..., :, None, :] - k[..., None, :, :]).square().sum(-1) * (-0.5 / _per_head(x * x, 2))

    def _lower(self, p: Problem, dtype: torch.dtype, keys: Tensor | None) -> Problem:
        p, dtype = _moved_to_origin(p, keys), p.lse_dtype
        h = self.h.to(dtype) if isinstance(self.h, Tensor) else self.h
        factor = p.scale / (h * h)
        rows, keys = (x.to(dtype).square().sum(-1) for x in (p.q, p.k))
        keys = keys if p.group == 1 else keys.repeat_interleave(p.group, 1)
        half = _per_head(factor * -0.5, 1)
        return p.replace(
            scale=factor,
            row_terms=(rows * half).expand(p.q.shape[:3]),
            key_terms=(keys * half).expand(p.k.shape[0], p.q.shape[1], -1),
        )


def _moved_to_origin(p: Problem, keys: Tensor | None) -> Problem:
    """Translate q and k by the midrange of the keys, in each coordinate where all keys lie within half of it.

    There |q|^2 + |k|^2 - 2 q.k would cancel; elsewhere the translation is 0. Subtracting the midrange is exact in every
    dtype (Sterbenz, "Floating-point computation", 1974). It is detached, since q - k does not depend on it. Minimum and
    maximum do not depend on the order of keys, so packed and dense sequences get the same bits.
    """
    if p.empty:
        return p
    k = p.k.detach()
    included = k.isfinite()
    for condition in (keys, None if p.mask is None else _unmasked(p, p.mask)):
        included = included if condition is None else included & condition
    low, high = (_extreme(p, torch.where(included, x, torch.inf)) for x in (k, -k))
    low, high = low, -high
    middle = (low / 2 + high / 2).to(k.dtype)
    near = torch.maximum(high - middle, middle - low) <= middle.abs() / 2
    middle = torch.where(near, middle, 0)
    if p.ragged is None:
        q_middle = k_middle = middle
    else:
        q_middle, k_middle = (
            middle[0, :, locate(starts, x.shape[2])[0]][None] for starts, x in ((p.ragged.q, p.q), (p.ragged.k, k))
        )
    q_middle = q_middle if p.group == 1 else q_middle.repeat_interleave(p.group, 1)
    return p.replace(q=ordered_like(p.q - q_middle, p.q), k=ordered_like(p.k - k_middle, p.k))


def _extreme(p: Problem, k: Tensor) -> Tensor:
    """The smallest value of each coordinate over the keys, (B, Hkv, 1, D); for packed sequences (1, Hkv, B, D)."""
    if p.ragged is None:
        return k.amin(2, keepdim=True)
    by_token = k[0].transpose(0, 1).contiguous()
    least = torch.segment_reduce(by_token, "min", offsets=p.ragged.k.long(), axis=0, initial=torch.inf)
    return least.transpose(0, 1)[None]


def _unmasked(p: Problem, mask: Tensor) -> Tensor:
    """bool (B or 1, 1, N or 1, 1): the keys that a tensor mask allows for some row."""
    if p.ragged is None:
        return mask.any(2).any(1, keepdim=True)[..., None]
    rows = torch.arange(p.shape[2], device=mask.device) < p.ragged.q.diff()[:, None]
    allowed = (mask & rows[:, None, :, None]).any(2).any(1)
    b, j = locate(p.ragged.k, p.k.shape[2])
    return allowed.expand(-1, p.shape[3])[b, j][None, None, :, None]


@dataclass(frozen=True, eq=False, repr=False)
class Additive(Score):
    """w . tanh(q + k): Bahdanau et al., "Neural machine translation by jointly learning to align and translate", 2015.

    w: (D,), or (Hq, D) for one vector per query head; float32 or q's dtype. `fused_attn.modules.AdditiveAttention` adds
    the learned projections of the paper.

    >>> import torch, fused_attn
    >>> q, k, v = torch.randn(2, 1, 7, 32), torch.randn(2, 1, 30, 32), torch.randn(2, 1, 30, 64)
    >>> w = torch.randn(32, requires_grad=True)
    >>> fused_attn.attention(q, k, v, score=fused_attn.scores.Additive(w)).shape
    torch.Size([2, 1, 7, 64])
    """

    prefix: ClassVar[str] = "scores.Additive"
    w: Tensor

    def _shapes(self, heads: int, d: int, dk: int) -> tuple[tuple[int, ...], ...]:
        return (d,), (heads, d)

    def _products(self, q: Tensor, k: Tensor, x: Any) -> Tensor:
        return (torch.tanh(q[..., :, None, :] + k[..., None, :, :]) * x.reshape(-1, 1, 1, x.shape[-1])).sum(-1)

    def _lower(self, p: Problem, dtype: torch.dtype, keys: Tensor | None) -> Problem:
        return p.replace(w=self.w)
