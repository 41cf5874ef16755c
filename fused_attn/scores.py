"""How alike a query and a key are, in other words than their dot product.

Each score has one parameter, a tensor that may need a gradient, and two meanings that must agree: `materialize`, its
definition, which the reference uses; and `lower`, what it becomes on the way to every other backend. Bilinear and
cosine scores are a dot product of other vectors, a distance is one with a term for each row and key beside it, and an
additive score is computed as such. What lies outside every row's interval is zeroed first, because it may be NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .checks import as_float
from .spec import Problem, check_parameter, describe, ordered_like
from .tiles import reached

SHORTEST = 1e-6  # norms below it count as it


class Score:
    """What the scores have in common; the one field of each is its parameter."""

    def __post_init__(self) -> None:
        name = fields(self)[0].name  # type: ignore[arg-type]
        x = getattr(self, name)
        if isinstance(x, Tensor) or (type(x) is float and () in self._shapes(1, 1, 1)):
            return
        if () not in self._shapes(1, 1, 1):
            raise TypeError(f"score.{name}: expected a tensor, got {describe(x)}")
        object.__setattr__(self, name, as_float(f"score.{name}", x, "a float or a tensor"))

    @property
    def parameter(self) -> float | Tensor:
        return getattr(self, fields(self)[0].name)  # type: ignore[arg-type]

    def replace(self, parameter: Tensor) -> Score:
        return type(self)(parameter)  # type: ignore[call-arg]

    def default_scale(self, d: int) -> float:
        """Of what has head dim d."""
        return 1.0

    def check(self, q: Tensor, k: Tensor) -> None:
        """Raises what is wrong with the parameter beside heads-first q and k."""
        name, heads = f"score.{fields(self)[0].name}", q.shape[1]  # type: ignore[arg-type]
        if isinstance(self.parameter, Tensor):
            check_parameter(name, self.parameter, q, *self._shapes(heads, q.shape[3], k.shape[3]))

    def materialize(self, q: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, Hq, M, N) by definition, in dtype; q (B, Hq, M, D), k (B, Hq or a divisor of it, N, D)."""
        group = q.shape[1] // k.shape[1] if k.shape[1] else 1
        k = k if group == 1 else k.repeat_interleave(group, 1)
        x = self.parameter
        return self._products(q.to(dtype), k.to(dtype), x.to(dtype) if isinstance(x, Tensor) else x)

    def lower(self, p: Problem) -> Problem:
        """The same problem in words that every backend but the reference takes."""
        q, k = p.q, p.k
        visible = None if p.all_reached else reached(p)
        if visible is not None:
            q, k = torch.where(visible[0], q, 0), torch.where(visible[1], k, 0)
        return self._lower(p.replace(q=q, k=k, score=None))

    def _shapes(self, heads: int, d: int, dk: int) -> tuple[tuple[int, ...], ...]:
        """Those that the parameter may have; () among them allows a float too."""
        raise NotImplementedError

    def _products(self, q: Tensor, k: Tensor, x: Any) -> Tensor:
        raise NotImplementedError

    def _lower(self, p: Problem) -> Problem:
        raise NotImplementedError


def _per_head(x: float | Tensor, dims: int) -> float | Tensor:
    """A float as it is; a tensor () or (Hq,) shaped to multiply (B, Hq, and as many dims more)."""
    return x.reshape(-1, *[1] * dims) if isinstance(x, Tensor) else x


@dataclass(frozen=True, eq=False)
class Bilinear(Score):
    """q . w . k: "general" of Luong et al., "Effective approaches to attention-based neural machine translation", 2015.

    w: (Dq, Dk), or (Hq, Dq, Dk) for a matrix of its own for each query head; float32 or q's dtype. k may have another
    head dim than q. The default scale is Dq ** -0.5.

    >>> import torch, fused_attn
    >>> q, k = torch.randn(2, 8, 10, 32), torch.randn(2, 8, 20, 48)
    >>> w = torch.randn(8, 32, 48, requires_grad=True)
    >>> fused_attn.attention(q, k, k, score=fused_attn.scores.Bilinear(w)).shape
    torch.Size([2, 8, 10, 48])
    """

    w: Tensor

    def default_scale(self, d: int) -> float:
        return d**-0.5

    def _shapes(self, heads: int, d: int, dk: int) -> tuple[tuple[int, ...], ...]:
        return (d, dk), (heads, d, dk)

    def _products(self, q: Tensor, k: Tensor, x: Any) -> Tensor:
        return q @ x @ k.mT

    def _lower(self, p: Problem) -> Problem:
        dtype = torch.promote_types(p.q.dtype, self.w.dtype)
        return p.replace(q=ordered_like(p.q.to(dtype) @ self.w.to(dtype), p.q))


@dataclass(frozen=True, eq=False)
class Cosine(Score):
    """t times the cosine of the angle between q and k; norms below 1e-6 count as 1e-6, so zero vectors score 0.

    t: a float, or a tensor () or (Hq,), float32 or q's dtype: an inverse temperature that can be learned. Norms are
    taken in float32, whatever the size of the vectors. Henry et al., "Query-key normalization for Transformers", 2020.

    >>> import torch, fused_attn
    >>> q = torch.randn(2, 8, 10, 32)
    >>> t = torch.full((8,), 10.0, requires_grad=True)
    >>> fused_attn.attention(q, q, q, score=fused_attn.scores.Cosine(t)).shape
    torch.Size([2, 8, 10, 32])
    """

    t: float | Tensor

    def _shapes(self, heads: int, d: int, dk: int) -> tuple[tuple[int, ...], ...]:
        return (), (heads,)

    def _products(self, q: Tensor, k: Tensor, x: Any) -> Tensor:
        return _unit(q) @ _unit(k).mT * _per_head(x, 2)

    def _lower(self, p: Problem) -> Problem:
        q, k = (ordered_like(_unit(x.to(p.lse_dtype)), x) for x in (p.q, p.k))
        return p.replace(q=q, k=k, scale=self.t * p.scale)


def _unit(x: Tensor) -> Tensor:
    """x over its norm. The largest element is taken out first, so that no square overflows."""
    largest = x.detach().abs().amax(-1, keepdim=True).clamp_min(SHORTEST)
    norm = torch.linalg.vector_norm(x / largest, dim=-1, keepdim=True) * largest
    return x / norm.clamp_min(SHORTEST)


@dataclass(frozen=True, eq=False)
class Distance(Score):
    """-|q - k|^2 / (2 h^2): the log of a Gaussian kernel of bandwidth h.

    h: a float, or a tensor () or (Hq,), float32 or q's dtype, not zero. |q|^2 is kept, although a softmax does not see
    it, because the log-sum-exp, sinks and other normalisers do. Not with softcap.
    Tsai et al., "Transformer dissection: a unified understanding of Transformer's attention via the lens of kernel",
    2019.

    >>> import torch, fused_attn
    >>> q = torch.randn(2, 8, 10, 32)
    >>> fused_attn.attention(q, q, q, score=fused_attn.scores.Distance(4.0)).shape
    torch.Size([2, 8, 10, 32])
    """

    h: float | Tensor

    def _shapes(self, heads: int, d: int, dk: int) -> tuple[tuple[int, ...], ...]:
        return (), (heads,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.h, Tensor) and not (math.isfinite(self.h) and self.h):
            raise ValueError(f"score.h: must be finite and not 0, got {self.h}")

    def _products(self, q: Tensor, k: Tensor, x: Any) -> Tensor:
        return (q[..., :, None, :] - k[..., None, :, :]).square().sum(-1) * (-0.5 / _per_head(x * x, 2))

    def _lower(self, p: Problem) -> Problem:
        dtype = p.lse_dtype
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


@dataclass(frozen=True, eq=False)
class Additive(Score):
    """w . tanh(q + k): Bahdanau et al., "Neural machine translation by jointly learning to align and translate", 2015.

    w: (D,), or (Hq, D) for weights of its own for each query head; float32 or q's dtype. The learned projections of the
    paper are the caller's (`fused_attn.modules.AdditiveAttention` has them).

    >>> import torch, fused_attn
    >>> q, k, v = torch.randn(2, 1, 7, 32), torch.randn(2, 1, 30, 32), torch.randn(2, 1, 30, 64)
    >>> w = torch.randn(32, requires_grad=True)
    >>> fused_attn.attention(q, k, v, score=fused_attn.scores.Additive(w)).shape
    torch.Size([2, 1, 7, 64])
    """

    w: Tensor

    def _shapes(self, heads: int, d: int, dk: int) -> tuple[tuple[int, ...], ...]:
        return (d,), (heads, d)

    def _products(self, q: Tensor, k: Tensor, x: Any) -> Tensor:
        return (torch.tanh(q[..., :, None, :] + k[..., None, :, :]) * x.reshape(-1, 1, 1, x.shape[-1])).sum(-1)

    def _lower(self, p: Problem) -> Problem:
        return p.replace(w=self.w)
